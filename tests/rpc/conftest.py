"""What the RPC's tests start from."""

import logging

import pytest
from stand_in import Client, StandInAgent, member
from twisted.internet.task import Clock

from serfd.logs import LogRing
from serfd.rpc.server import RpcFactory


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def agent():
    return StandInAgent(
        [member("n1", port=17001, role="web", dc="east"), member("n2", port=17002, role="db")]
    )


@pytest.fixture
def logs():
    """A ring on serfd's logger, which lets everything through meanwhile."""
    ring, logger = LogRing(), logging.getLogger("serfd")
    level = logger.level
    logger.addHandler(ring)
    logger.setLevel(5)
    yield ring
    logger.removeHandler(ring)
    logger.setLevel(level)


@pytest.fixture
def lines(logs):
    """Every log line of the test, without its time."""
    heard = []
    detach = logs.attach(0, lambda line: heard.append(line[20:]))
    yield heard
    detach()


@pytest.fixture
def serve(agent, logs, clock):
    """Makes the factory; several in a test are several daemons."""
    running = []

    def serve(*, auth="", agent=agent, logs=logs, clock=clock):
        factory = RpcFactory(agent, logs, auth=auth, clock=clock)
        factory.startFactory()
        running.append(factory)
        return factory

    yield serve
    for factory in running:
        factory.stopFactory()


@pytest.fixture
def connect(serve):
    """Connects a client that has shaken hands to the one daemon of the test."""
    factory = serve()
    return lambda: Client(factory).shake_hands()
