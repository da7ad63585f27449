"""Serf's layer of one node: intents, leaving, tags, events to pass on, reaping, reconnecting."""

from collections import Counter

import pytest
from one_node import VSN, OneNode, address

from serfd.config import Seconds
from serfd.effects import Emit
from serfd.errors import CommandError
from serfd.serf.events import UserEvent
from serfd.serf.node import Joined, Stage
from serfd.wire.serf_messages import (
    JoinIntent,
    LeaveIntent,
    PushPullState,
    QueryMessage,
    UserEventMessage,
    decode,
    encode,
    encode_tags,
)
from serfd.wire.stream import UserState
from serfd.wire.swim_messages import Alive, Dead, Ping, User, encode_push_pull


def say(one: OneNode, *messages: object, source: str = "n2") -> None:
    one.hear(*[User(encode(message)) for message in messages], source=source)  # type: ignore[arg-type]


def told(one: OneNode, kind: type) -> list[object]:
    """The different Serf messages of a kind that it sent since last asked."""
    found = [decode(m.payload) for _, m in one.take(User)]
    return list(dict.fromkeys(m for m in found if isinstance(m, kind)))


# Intents.


def test_news_is_passed_on_as_received_and_only_once() -> None:
    one = OneNode("n2", "n3")
    payload = encode(JoinIntent(4, "n2"))
    one.hear(User(payload))
    one.run_until(0.5)
    one.run_until(0.9)
    assert {m.payload for _, m in one.take(User)} == {payload}
    one.hear(User(payload))
    one.run_until(1.5)
    assert one.take(User) == []


def test_intents_queries_and_events_have_the_first_choice_by_turns() -> None:
    one = OneNode("n2")
    one.run_until(5.0, answering=["n2"])
    # Of each there is more than a packet holds.
    for number in range(1, 101):
        say(one, JoinIntent(number, f"stranger-{number:03}" + "x" * 400))
        say(one, UserEventMessage(number, "e", b"%03d" % number + bytes(420), coalesce=False))
        query = QueryMessage(
            number, number, bytes((10, 0, 0, 2)), 7946, "n2", (), 0, 0, 10**9, "q", bytes(350)
        )
        say(one, query)
    one.sent.clear()
    firsts = []
    for _ in range(30):
        before = len(one.sent)
        one.hear(Ping(1, "n1"))
        firsts += [decode(m.payload) for _, m in one.sent[before:] if isinstance(m, User)][:1]
    counts = Counter(type(message) for message in firsts)
    assert min(counts[kind] for kind in (JoinIntent, UserEventMessage, QueryMessage)) >= 9


def test_a_member_that_says_it_leaves_and_is_gone_has_left() -> None:
    one = OneNode("n2")
    one.events()
    say(one, LeaveIntent(2, "n2", prune=False))
    assert one.statuses()["n2"] == "leaving"
    one.hear(Dead(1, "n2", "n2"))
    assert one.statuses()["n2"] == "left"
    assert one.events() == [("member-leave", ["n2"])]


def test_a_member_that_is_gone_without_a_word_has_failed_and_a_late_word_mends_it() -> None:
    one = OneNode("n2")
    one.events()
    one.hear(Dead(1, "n2", "n3"))
    assert one.statuses()["n2"] == "failed"
    say(one, LeaveIntent(2, "n2", prune=False))
    assert one.statuses()["n2"] == "left"
    assert one.events() == [("member-failed", ["n2"]), ("member-leave", ["n2"])]


def test_an_old_word_that_this_node_leaves_is_refuted() -> None:
    one = OneNode("n2")
    say(one, LeaveIntent(9, "n1", prune=False))
    assert one.statuses()["n1"] == "alive"
    one.run_until(0.1)
    assert told(one, JoinIntent) == [JoinIntent(10, "n1")]


def test_a_time_that_would_wrap_a_clock_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    one = OneNode("n2")
    raw = encode(JoinIntent(2**64 - 2, "n2"))
    one.hear(User(raw.replace(b"\xff" * 7 + b"\xfe", b"\xff" * 8)))
    assert one.node.stats()["member_time"] == "1"
    assert "10.0.0.2:7946" in caplog.text


# Joining.


def answer(*events: tuple[int, list[tuple[str, bytes]]], left: tuple[str, ...] = ()) -> bytes:
    state = PushPullState(5, {"n2": 3, **dict.fromkeys(left, 3)}, list(left), 7, list(events), 2)
    n2 = OneNode.alive("n2")
    from serfd.wire.swim_messages import NodeState

    states = [NodeState(n2.node, n2.addr, n2.port, n2.meta, 1, 0, n2.vsn)]
    return encode_push_pull(states, encode(state), join=True)


def test_a_join_counts_who_answers_tells_who_does_not_and_says_so_to_all() -> None:
    one = OneNode()
    one.node.join(0.0, [address("n2"), address("n3")])
    streams = {to: stream for stream, to in one.connects()}
    one.reply(streams["n2"], answer())
    assert one.results() == []
    why = "dial tcp 10.0.0.3:7946: connect: connection refused"
    one.node.stream_closed(0.0, streams["n3"], why)
    one.collect()
    assert one.results() == [Joined(1, (f"Failed to join 10.0.0.3: {why}",))]
    assert one.node.stats()["member_time"] == "6"
    one.run_until(0.3)
    assert told(one, JoinIntent) == [JoinIntent(5, "n1")]


def test_a_join_that_nobody_answers_times_out() -> None:
    one = OneNode()
    one.node.join(0.0, [address("n2")])
    one.run_until(11.0)
    assert one.results() == [Joined(0, ("Failed to join 10.0.0.2: i/o timeout",))]
    one.run_until(12.0)
    assert told(one, JoinIntent) == []


@pytest.mark.parametrize("replay", [True, False])
def test_recent_events_come_with_a_join_only_if_wanted(*, replay: bool) -> None:
    one = OneNode()
    one.node.join(0.0, [address("n2")], replay=replay)
    ((stream, _),) = one.connects()
    one.reply(stream, answer((4, [("deploy", b"v1")])))
    events = [e.event for e in one.effects if isinstance(e, Emit)]
    heard = [e for e in events if isinstance(e, UserEvent)]
    assert heard == ([UserEvent(4, "deploy", b"v1", coalesce=False)] if replay else [])
    # Nor do they come later, by an exchange that is no join.
    assert one.node.stats()["event_time"] == "7"


def test_a_state_exchange_tells_that_who_failed_has_left() -> None:
    one = OneNode("n3", "n4")
    one.hear(Dead(1, "n3", "n4"))
    one.accept(answer(left=("n3",)))
    assert one.statuses()["n3"] == "left"


def test_a_state_exchange_makes_nobody_leave_who_is_there() -> None:
    one = OneNode("n3")
    one.accept(answer(left=("n3", "n8")))  # the peer has not heard yet that n3 came back
    assert one.statuses()["n3"] == "alive"
    one.hear(OneNode.alive("n8"))  # nor do newcomers inherit it
    assert one.statuses()["n8"] == "alive"


def test_who_says_farewell_has_left_although_its_intent_was_missed() -> None:
    one = OneNode("n2")
    one.events()
    one.hear(Dead(1, "n2", "n2"))
    assert one.statuses()["n2"] == "left"
    assert one.events() == [("member-leave", ["n2"])]


def test_a_node_that_leaves_joins_nobody() -> None:
    one = OneNode("n2")
    one.node.leave(0.0)
    one.node.join(0.0, [address("n2")])
    one.collect()
    (error,) = one.results()
    assert isinstance(error, CommandError)
    assert "Leave" in str(error)


def test_its_own_state_names_every_member_and_the_events_it_knows() -> None:
    one = OneNode("n2")
    say(one, UserEventMessage(3, "deploy", b"v1", coalesce=True), JoinIntent(6, "n2"))
    items = one.accept(answer(), source="n2")
    (user,) = [item for item in items if isinstance(item, UserState)]
    state = decode(user.payload)
    assert isinstance(state, PushPullState)
    assert state.status_ltimes == {"n1": 0, "n2": 6}
    assert state.events == [(3, [("deploy", b"v1")])]
    assert (state.ltime, state.event_ltime) == (7, 4)


# Leaving.


def test_a_leave_says_so_first_then_goes_and_is_done_within_a_second() -> None:
    one = OneNode(*[f"n{i}" for i in range(2, 12)])
    one.run_until(0.9)
    one.take(User)
    start = one.now
    one.node.leave(one.now)
    one.collect()
    assert one.statuses()["n1"] == "leaving"
    one.run_until(start + 0.19)
    assert told(one, LeaveIntent) == [LeaveIntent(1, "n1", prune=False)]
    one.run_until(start + 0.3)
    assert {m.accuser for _, m in one.take(Dead)} == {"n1"}
    assert one.node.stage is Stage.LEAVING
    one.run_until(start + 1.0)
    assert one.results() == [None]
    assert one.node.stage is Stage.LEFT
    assert one.statuses()["n1"] == "left"


def test_a_lone_node_leaves_at_once() -> None:
    one = OneNode()
    one.node.leave(0.0)
    one.run_until(0.01)
    assert one.results() == [None]


def test_a_second_leave_is_refused_while_the_first_is_under_way() -> None:
    one = OneNode("n2")
    one.node.leave(0.0)
    one.node.leave(0.0)
    one.collect()
    (error,) = one.results()
    assert str(error) == "Leave already in progress"
    one.run_until(2.0)
    one.node.leave(2.0)
    one.collect()
    assert one.results() == [None, None]


def test_a_node_that_leaves_still_answers_and_cannot_be_talked_back() -> None:
    one = OneNode("n2")
    one.node.leave(0.0)
    one.run_until(0.5)
    one.hear(Alive(99, "n1", bytes((10, 0, 0, 1)), 7946, b"x", bytes((1, 5, 2, 2, 5, 5))))
    one.run_until(2.0)
    assert one.statuses()["n1"] == "left"


# Force-leave, prune, reap, reconnect.


def failed(**settings: object) -> OneNode:
    one = OneNode("n2", "n3", **settings)
    one.hear(Dead(1, "n2", "n3"))
    assert one.statuses()["n2"] == "failed"
    one.events()
    return one


def test_a_failed_member_is_declared_left() -> None:
    one = failed()
    one.node.force_leave(0.0, "n2")
    assert one.statuses()["n2"] == "left"
    one.run_until(1.0)
    assert one.events() == [("member-leave", ["n2"])]
    assert told(one, LeaveIntent) == [LeaveIntent(1, "n2", prune=False)]


def test_the_caller_of_a_force_leave_hears_when_it_was_told() -> None:
    one = failed()
    one.node.force_leave(0.0, "n2")
    one.collect()
    assert one.results() == []
    one.run_until(2.0)
    assert one.results() == [None]


def test_a_pruned_member_is_forgotten() -> None:
    one = failed()
    one.node.force_leave(0.0, "n2", prune=True)
    one.run_until(0.1)
    assert "n2" not in one.statuses()
    assert one.events() == [("member-leave", ["n2"]), ("member-reap", ["n2"])]


def test_a_living_member_that_is_pruned_may_refute_and_stays() -> None:
    one = OneNode("n2", "n3")
    one.node.force_leave(0.0, "n2", prune=True)
    assert one.statuses()["n2"] == "leaving"
    say(one, JoinIntent(5, "n2"))
    one.run_until(20.0, answering=["n2", "n3"])
    assert one.statuses()["n2"] == "alive"


def test_a_living_member_that_is_pruned_and_keeps_silent_is_forgotten_in_time() -> None:
    one = OneNode("n2", "n3")
    one.node.force_leave(0.0, "n2", prune=True)
    one.run_until(5.0, answering=["n2", "n3"])
    assert "n2" in one.statuses()
    one.run_until(6.0, answering=["n2", "n3"])
    assert "n2" not in one.statuses()


def test_who_is_pruned_has_time_to_refute_however_short_a_broadcast_timeout_is_set() -> None:
    one = OneNode("n2", "n3", broadcast_timeout=Seconds(-60.0))
    one.node.force_leave(0.0, "n2", prune=True)
    one.run_until(1.4, answering=["n2", "n3"])
    assert "n2" in one.statuses()
    one.run_until(2.0, answering=["n2", "n3"])
    assert "n2" not in one.statuses()


def test_who_failed_long_ago_is_forgotten() -> None:
    one = failed(reconnect_timeout=Seconds(40.0))
    one.run_until(39.0, answering=["n3"])
    assert "n2" in one.statuses()
    one.run_until(61.0, answering=["n3"])
    assert "n2" not in one.statuses()
    assert ("member-reap", ["n2"]) in one.events()


def test_a_failed_member_is_tried_again() -> None:
    one = failed(reconnect_interval=Seconds(10.0))
    one.connects()
    one.run_until(10.5, answering=["n3"])
    assert "n2" in {to for _, to in one.connects()}
    assert one.results() == []  # nobody asked for it


# Tags.


def test_new_tags_are_told_at_the_next_incarnation_and_the_caller_hears_when() -> None:
    one = OneNode("n2", tags={"role": "web", "dc": "east"})
    one.events()
    one.node.update_tags(0.0, {"role": "db"}, delete=["dc", "none"])
    one.collect()
    assert dict(one.node.tags) == {"role": "db"}
    assert one.events() == [("member-update", ["n1"])]
    one.run_until(1.0)
    assert one.results() == [None]
    words = [m for _, m in one.take(Alive) if m.node == "n1"]
    assert (words[-1].incarnation, words[-1].meta) == (2, encode_tags({"role": "db"}, protocol=5))


def test_tags_that_are_too_long_change_nothing() -> None:
    one = OneNode("n2", tags={"role": "web"})
    one.node.update_tags(0.0, {"x": "y" * 600})
    one.collect()
    (error,) = one.results()
    assert str(error) == "Encoded length of tags exceeds limit of 512 bytes"
    assert dict(one.node.tags) == {"role": "web"}
    with pytest.raises(CommandError, match="exceeds limit of 512 bytes"):
        OneNode(tags={"x": "y" * 600})


def test_a_members_new_tags_are_seen() -> None:
    one = OneNode("n2")
    one.events()
    one.hear(OneNode.alive("n2", 2, encode_tags({"a": "b"}, protocol=5)))
    assert one.events() == [("member-update", ["n2"])]
    member = one.node.member("n2")
    assert member is not None
    assert dict(member.tags) == {"a": "b"}


def test_the_version_of_the_members_grows_with_tags_and_versions_of_a_member() -> None:
    one = OneNode("n2")
    seen = [one.node.members_version]
    one.hear(OneNode.alive("n2", 2))
    assert one.node.members_version == seen[-1]
    one.hear(OneNode.alive("n2", 3, encode_tags({"a": "b"}, protocol=5)))
    seen.append(one.node.members_version)
    one.hear(OneNode.alive("n2", 4, encode_tags({"a": "b"}, protocol=5), vsn=VSN[:5] + b"\4"))
    seen.append(one.node.members_version)
    one.node.update_tags(0.0, {"x": "y"})
    seen.append(one.node.members_version)
    assert sorted(set(seen)) == seen


# User events and queries of others.


def test_an_event_is_heard_once_and_passed_on_as_it_came() -> None:
    one = OneNode("n2", "n3")
    event = UserEventMessage(3, "deploy", b"v1", coalesce=False)
    say(one, event, event)
    heard = [e.event for e in one.effects if isinstance(e, Emit)]
    assert heard[-1] == UserEvent(3, "deploy", b"v1", coalesce=False)
    assert sum(isinstance(e, UserEvent) for e in heard) == 1
    one.run_until(0.5)
    assert told(one, UserEventMessage) == [event]


@pytest.mark.parametrize(("flags", "passed_on"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_query_is_passed_on_once_unless_it_says_not_to(flags: int, *, passed_on: bool) -> None:
    one = OneNode("n2", "n3")
    query = QueryMessage(
        3, 77, bytes((10, 0, 0, 2)), 7946, "n2", (), flags, 0, 1_000_000_000, "load", b""
    )
    say(one, query, query)
    one.run_until(0.5)
    assert told(one, QueryMessage) == ([query] if passed_on else [])
    assert one.node.stats()["query_time"] == "4"


# What is not understood.


@pytest.mark.parametrize(
    "payload", [b"\x02\x80", b"\x63\x80", b"\x01\xc1", b"\x01", b"\x00\x91\xc0"]
)
def test_messages_that_are_none_are_dropped(payload: bytes) -> None:
    one = OneNode("n2")
    before = one.node.members()
    one.hear(User(payload))
    one.run_until(0.5)
    assert one.node.members() == before
    assert one.take(User) == []


def test_a_broken_state_of_serf_does_not_spoil_the_members_that_came_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from serfd.wire.swim_messages import NodeState

    one = OneNode()
    n2 = OneNode.alive("n2")
    states = [NodeState(n2.node, n2.addr, n2.port, n2.meta, 1, 0, n2.vsn)]
    one.accept(encode_push_pull(states, b"\x02\xc1", join=False))
    assert one.statuses()["n2"] == "alive"
    assert "remote state" in caplog.text


def test_a_conflict_about_the_own_name_is_told_but_not_every_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = OneNode("n2")
    stranger = OneNode.alive("n9")._replace(node="n1")
    for _ in range(5):
        one.hear(stranger)
    told_of = [r for r in caplog.records if "10.0.0.9:7946" in r.getMessage()]
    assert len(told_of) == 1
    assert told_of[0].levelname == "ERROR"


def test_a_prune_right_after_a_state_exchange_is_not_taken_for_old() -> None:
    one = failed()
    say(one, LeaveIntent(3, "n2", prune=False))
    one.accept(answer(left=("n2",)), source="n3")  # tells of the same leave, a little later
    say(one, LeaveIntent(4, "n2", prune=True))
    assert "n2" not in one.statuses()


@pytest.mark.parametrize("off", [True, False])
def test_stats_tell_of_coordinates_only_if_there_are_any(*, off: bool) -> None:
    stats = OneNode(disable_coordinates=off).node.stats()
    assert stats.get("coordinate_resets") == (None if off else "0")


def test_a_broadcast_timeout_that_is_too_short_is_raised() -> None:
    one = failed(broadcast_timeout=Seconds(0.001))
    one.node.force_leave(0.0, "n2")
    one.run_until(0.9)
    assert all(not isinstance(result, CommandError) for result in one.results())
