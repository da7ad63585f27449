"""The daemon's clock: monotonic, whatever happens to the wall's."""

import time

from serfd.net.reactor import MonotonicReactor


def test_it_counts_monotonic_seconds(reactor):
    before = time.monotonic()
    now = reactor.seconds()
    assert before <= now <= time.monotonic()


def test_a_step_of_the_wall_clock_fires_nothing(reactor, monkeypatch):
    fired = []
    call = reactor.callLater(3600, fired.append, 1)
    monkeypatch.setattr(time, "time", lambda: 2e9 + 1e6)
    reactor.iterate(0)
    assert fired == []
    assert 3590 < call.getTime() - time.monotonic() <= 3600


def test_it_is_twisteds_own_reactor_but_for_the_clock():
    assert MonotonicReactor.seconds is time.monotonic
    assert [name for name in vars(MonotonicReactor) if not name.startswith("__")] == ["seconds"]
