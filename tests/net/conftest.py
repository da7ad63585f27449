"""Reactors of a test's own, turned by hand: time is a number, or passes as it does."""

import random
import socket
from collections.abc import Callable, Iterator

import pytest
from twisted.internet.epollreactor import EPollReactor

from serfd.net.reactor import MonotonicReactor

LIMIT = 60.0
"""Seconds that something real may take."""


@pytest.fixture
def port() -> int:
    """A port of loopback that nobody has, nor gets unless he asks for it."""
    choice = random.SystemRandom()
    while True:
        port = choice.randrange(10_000, 32_000)
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            try:
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class HandTurned(EPollReactor):
    """Twisted's reactor with real sockets, whose clock the test sets."""

    now = 1000.0

    def seconds(self) -> float:
        return self.now

    def turn(self) -> None:
        """Run what is due, then read the sockets; as a running reactor does, once."""
        self.iterate(0)


@pytest.fixture
def hand_turned() -> Iterator[HandTurned]:
    reactor = HandTurned()
    yield reactor
    _end(reactor)


@pytest.fixture
def reactor() -> Iterator[MonotonicReactor]:
    """The daemon's reactor, but not the process's."""
    reactor = MonotonicReactor()
    yield reactor
    _end(reactor)


@pytest.fixture
def run_until(reactor: MonotonicReactor) -> Callable[[Callable[[], object]], None]:
    """Turns the reactor until something is true."""

    def run_until(condition: Callable[[], object]) -> None:
        deadline = reactor.seconds() + LIMIT
        while not condition():
            assert reactor.seconds() < deadline, "it takes too long"
            reactor.iterate(0.01)

    return run_until


def _end(reactor: EPollReactor) -> None:
    for call in reactor.getDelayedCalls():
        call.cancel()
    reactor.removeAll()
    reactor.waker.connectionLost(None)
    reactor._poller.close()
