"""A reactor on monotonic time."""

import time

from twisted.internet.epollreactor import EPollReactor
from twisted.internet.main import installReactor


class MonotonicReactor(EPollReactor):
    """Twisted's reactor counts wall-clock time: a clock step of an hour would fire every timer."""

    seconds = staticmethod(time.monotonic)


def install() -> MonotonicReactor:
    """Make this the process's reactor. Before anything imports `twisted.internet.reactor`."""
    reactor = MonotonicReactor()
    installReactor(reactor)
    return reactor
