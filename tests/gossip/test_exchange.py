"""A join of several addresses, and a state taken in by slices."""

from one_node import VSN, address

from serfd.gossip.exchange import JOINS_AT_ONCE, Asking, Exchange, JoinRun, Merge
from serfd.wire.envelope import Envelope
from serfd.wire.stream import StreamReader
from serfd.wire.swim_messages import NodeState, PushPullHead


def test_a_join_asks_a_few_at_a_time_until_all_were_asked() -> None:
    addresses = [address(f"n{i}") for i in range(2, 22)]
    run = JoinRun(addresses, ticket="t")
    asked = run.next_addresses()
    assert asked == addresses[:JOINS_AT_ONCE]
    assert run.next_addresses() == []
    while asked:
        assert not run.is_over
        first = asked.pop(0)
        if first.host.endswith("3"):
            run.failed(f"no answer from {first}")
        else:
            run.answered()
        asked += run.next_addresses()
    assert run.is_over
    assert (run.contacted, run.failures) == (
        18,
        ("no answer from 10.0.0.3:7946", "no answer from 10.0.0.13:7946"),
    )


def test_a_join_of_nobody_is_over_at_once() -> None:
    run = JoinRun([], ticket=None)
    assert run.next_addresses() == []
    assert run.is_over


def test_a_state_is_taken_in_order_and_freed_as_it_is_taken() -> None:
    reader = StreamReader(Envelope(), accepting=False)
    exchange = Exchange(1, address("n2"), reader, Asking(None), 0.0)
    exchange.head = PushPullHead(5, 0, join=True)
    exchange.states = [NodeState(f"n{i}", b"\x0a\0\0\1", 1, b"", 1, 0, VSN) for i in range(5)]
    merge = Merge(exchange, b"user", news=True, present=1)
    taken = []
    while not merge.is_over:
        some = merge.take(2)
        assert 0 < len(some) <= 2
        taken += [state.name for state in some]
    assert taken == ["n0", "n1", "n2", "n3", "n4"]
    assert (merge.with_join, merge.user_state, merge.join) == (True, b"user", None)


def test_a_join_that_has_tried_the_primary_only_has_no_other_key() -> None:
    assert Asking(None).other_key is None
    assert Asking(None, (b"primary",)).other_key is None
    assert Asking(None, (b"primary", b"second", b"third")).other_key == b"third"
