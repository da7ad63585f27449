"""What next, how often, how much fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serfd.effects import Address
from serfd.gossip.broadcasts import BroadcastQueue, Target, retransmit_limit


def queue(*messages: bytes, size_max: int = 100) -> BroadcastQueue:
    made = BroadcastQueue(size_max=size_max, message_max=1000)
    for message in messages:
        made.add(message)
    return made


def take(q: BroadcastQueue, limit: int = 1000, *, overhead: int = 2, transmits_max: int = 4,
         count: int = 100) -> list[bytes]:  # fmt: skip
    return q.take(limit, overhead=overhead, transmits_max=transmits_max, count=count)


@pytest.mark.parametrize(
    ("members", "times"),
    [(1, 4), (2, 4), (3, 8), (9, 8), (10, 12), (99, 12), (100, 16), (5000, 20)],
)
def test_the_number_of_transmits_grows_with_the_cluster(members: int, times: int) -> None:
    assert retransmit_limit(4, members) == times
    assert retransmit_limit(2, members) == times  # the least there is
    assert retransmit_limit(6, members) == times * 6 // 4


def test_the_longest_goes_first_then_the_newest() -> None:
    assert take(queue(b"a", b"ccc", b"bb", b"dd")) == [b"ccc", b"dd", b"bb", b"a"]


def test_what_was_sent_least_goes_first() -> None:
    q = queue(b"long-and-old")
    take(q)
    q.add(b"new")
    assert q.has_news(1)
    assert take(q, 5) == [b"new"]
    assert not q.has_news(1)
    assert q.has_news(2)


def test_a_packet_is_filled_with_what_fits_overhead_included() -> None:
    q = queue(b"x" * 50, b"y" * 40, b"z" * 10)
    assert take(q, 64, overhead=2) == [b"x" * 50, b"z" * 10]
    assert take(q, 41, overhead=2) == [b"z" * 10]  # 40 bytes and 2 do not fit into 41


def test_no_more_messages_than_asked_for() -> None:
    assert len(take(queue(*[b"%d" % i for i in range(10)]), count=3)) == 3


def test_a_message_is_gone_after_its_last_transmit_and_its_ticket_comes_back() -> None:
    q = BroadcastQueue(size_max=10, message_max=100)
    q.add(b"m", ticket="t")
    for _ in range(3):
        assert take(q, transmits_max=4) == [b"m"]
        assert q.finished == []
    assert take(q, transmits_max=4) == [b"m"]
    assert (q.finished, len(q), take(q)) == ([("t", True)], 0, [])


def test_in_a_small_cluster_nobody_gets_a_message_again_while_another_has_not_got_it() -> None:
    q = queue(b"long-and-first", b"short")
    a, b = (Target(Address(f"127.0.0.{n}", 1), others=2) for n in (1, 2))

    def told(target: Target, limit: int = 1000) -> list[bytes]:
        return q.take(limit, overhead=2, transmits_max=4, count=100, target=target)

    assert told(a) == [b"long-and-first", b"short"]
    assert told(a) == []
    assert told(b, 8) == [b"short"]
    # All have the short one: it begins anew. The other waits for whom it has not reached.
    assert told(a) == [b"short"]
    assert told(b) == [b"long-and-first", b"short"]
    assert len(q) == 1


def test_the_limit_is_that_of_the_moment_of_sending() -> None:
    q = queue(b"m")
    for _ in range(3):
        take(q, transmits_max=4)
    take(q, transmits_max=8)  # the cluster has grown: the last transmit is not the last
    assert len(q) == 1


def test_news_of_the_same_name_replaces_the_older_and_finishes_it() -> None:
    q = BroadcastQueue(size_max=10, message_max=100)
    q.add(b"old", name="n1", ticket="t")
    q.add(b"new", name="n1")
    q.add(b"other", name="n2")
    assert q.finished == [("t", True)]
    assert sorted(take(q)) == [b"new", b"other"]


def test_a_full_queue_drops_the_most_sent_then_the_shortest_then_the_oldest() -> None:
    q = queue(b"sent-often", size_max=3)
    take(q)
    for message in (b"aa", b"b", b"c"):
        q.add(message)
    assert (len(q), q.dropped) == (3, 1)
    q.add(b"dd")
    assert sorted(take(q)) == [b"aa", b"c", b"dd"]


def test_who_loses_his_place_in_the_queue_hears_whether_anybody_was_told() -> None:
    q = BroadcastQueue(size_max=1, message_max=100)
    q.add(b"a", ticket="never sent")
    q.add(b"longer")
    take(q)
    q.add(b"the longest", ticket="sent once")
    take(q)
    take(q)
    q.add(b"newer")
    assert q.finished == [("never sent", False), ("sent once", True)]


def test_a_message_that_fits_no_packet_is_refused_and_its_ticket_comes_back() -> None:
    q = BroadcastQueue(size_max=10, message_max=5)
    q.add(b"123456", ticket="t")
    assert (len(q), q.dropped, q.finished, q.has_news(9)) == (0, 1, [("t", False)], False)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_every_message_is_sent_exactly_as_often_as_it_should(
    messages: list[bytes], times: int
) -> None:
    q = queue(*messages)
    sent: list[bytes] = []
    for _ in range(1000):
        packet = take(q, 60, transmits_max=times)
        assert sum(map(len, packet)) + 2 * len(packet) <= 60
        if not packet:
            break
        sent += packet
    assert sorted(sent) == sorted(messages * times)
