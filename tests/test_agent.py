"""What RPC and plugins may ask of the node, without sockets."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IResolutionReceiver
from twisted.internet.task import Clock

from serfd.agent import Agent
from serfd.config import Config
from serfd.errors import CommandError, JoinFailed
from serfd.net.tags_file import load_tags
from serfd.serf.events import Event, MemberEvent, Status
from serfd.serf.node import Node
from serfd.wire.sealing import Keyring


class Resolver:
    """Knows one name."""

    def resolveHostName(self, receiver: IResolutionReceiver, name: str) -> None:
        from twisted.internet.address import IPv4Address

        receiver.resolutionBegan(None)
        if name != "nowhere":
            receiver.addressResolved(IPv4Address("TCP", "10.0.0.2", 0))
        receiver.resolutionComplete()


class Reactor(Clock):
    """Virtual time; connections are refused."""

    nameResolver = Resolver()

    def connectTCP(self, host: str, port: int, factory: Any, timeout: float) -> Any:
        from twisted.internet.error import ConnectionRefusedError
        from twisted.python.failure import Failure

        self.callLater(0, factory.clientConnectionFailed, None,
                       Failure(ConnectionRefusedError(111)))  # fmt: skip


class Udp:
    def write(self, data: bytes, to: tuple[str, int]) -> None:
        """Nobody hears it."""


def agent(**settings: Any) -> tuple[Agent, Reactor]:
    config = Config(**settings)
    reactor = Reactor()
    node = Node(
        config, name="n1", addr=b"\x0a\0\0\1", port=7946, keyring=Keyring(), now=0.0,
        rng=Random(1), nonce=lambda: bytes(12),
    )  # fmt: skip
    made = Agent(config, node, reactor, port=7946, shut_down=lambda: None)
    made.driver.start(Udp(), is_ipv6=False)  # type: ignore[arg-type]
    return made, reactor


def outcome(deferred: "Deferred[Any]") -> Any:
    found: list[Any] = []
    deferred.addBoth(found.append)
    assert found, "it is not done"
    return getattr(found[0], "value", found[0])


def test_a_join_that_nobody_answers_says_why_in_a_real_agents_words() -> None:
    made, reactor = agent()
    joined = made.join(["10.0.0.2:1", "nowhere", "/x", "a:b"])
    reactor.advance(0.1)
    error = outcome(joined)
    assert isinstance(error, JoinFailed)
    assert str(error) == (
        "4 errors occurred:\n"
        "\t* Failed to resolve nowhere: lookup nowhere: no such host\n"
        "\t* Failed to resolve /x: empty node name provided\n"
        "\t* Failed to resolve a:b: address 'a:b': 'b' is not a port, expected 0 to 65535\n"
        "\t* Failed to join 10.0.0.2: dial tcp 10.0.0.2:1: connect: connection refused\n\n"
    )


def test_joining_nobody_gives_zero() -> None:
    made, _ = agent()
    assert outcome(made.join([])) == 0


def test_every_listener_hears_every_event_until_it_ends_listening() -> None:
    made, reactor = agent()
    heard: dict[str, list[Event]] = {"a": [], "b": []}
    end = made.subscribe(heard["a"].append)
    made.subscribe(heard["b"].append)
    made.update_tags({"x": "1"}).addErrback(lambda _: None)
    end()
    end()  # twice is no error
    made.update_tags({"x": "2"}).addErrback(lambda _: None)
    reactor.advance(1)
    assert [len(events) for events in heard.values()] == [1, 2]
    assert all(isinstance(event, MemberEvent) for event in heard["b"])
    assert dict(made.tags) == {"x": "2"}


def test_members_are_found_by_name_and_counted_by_status() -> None:
    made, reactor = agent()
    (me,) = made.members()
    assert made.member("n1") == me
    assert made.member("n2") is None
    assert made.status_counts() == {Status.ALIVE: 1}
    assert made.status_counts()[Status.FAILED] == 0
    made.leave().addErrback(lambda _: None)
    assert made.status_counts() == {Status.LEAVING: 1}
    reactor.advance(10)


def test_commands_that_cannot_be_done_fail() -> None:
    made, _ = agent()
    error = outcome(made.update_tags({"x": "y" * 600}))
    assert isinstance(error, CommandError)
    assert "512" in str(error)


def test_tags_are_in_their_file_before_anybody_hears_of_them(tmp_path: Path) -> None:
    file = tmp_path / "tags.json"
    made, reactor = agent(tags_file=str(file))
    in_the_file: list[dict[str, str]] = []
    made.subscribe(lambda event: in_the_file.append(load_tags(str(file))))
    for tags, delete in ({"a": "1", "b": "2"}, []), ({"c": "3"}, ["a"]):
        updated = made.update_tags(tags, delete=delete)
        reactor.advance(1)
        assert outcome(updated) is None
    assert in_the_file == [{"a": "1", "b": "2"}, {"b": "2", "c": "3"}]
    assert dict(made.tags) == {"b": "2", "c": "3"}


def test_tags_that_are_too_long_or_cannot_be_kept_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tags.json"
    made, reactor = agent(tags_file=str(file))
    updated = made.update_tags({"a": "1"})
    reactor.advance(1)
    assert outcome(updated) is None
    assert str(outcome(made.update_tags({"a": "x" * 600}))) == (
        "Encoded length of tags exceeds limit of 512 bytes"
    )
    assert load_tags(str(file)) == {"a": "1"}
    (tmp_path / "tags.json.new").mkdir()
    assert str(outcome(made.update_tags({"a": "2"}))) == (
        f"cannot write the tags file {file}: Is a directory"
    )
    assert dict(made.tags) == {"a": "1"}
    assert load_tags(str(file)) == {"a": "1"}


def test_it_can_be_asked_beforehand_whether_tags_get_too_long() -> None:
    made, _ = agent(tags={"a": "x" * 400})
    made.check_tags({"b": "y" * 400}, delete=["a"])
    with pytest.raises(CommandError, match="Encoded length of tags exceeds limit of 512 bytes"):
        made.check_tags({"b": "y" * 400})
    assert dict(made.tags) == {"a": "x" * 400}


def test_a_leave_ends_and_a_stopped_agent_refuses_commands() -> None:
    made, reactor = agent()
    left = made.leave()
    reactor.advance(0.1)
    assert outcome(left) is None
    assert [member.status.text for member in made.members()] == ["left"]
    made.driver.stop()
    assert isinstance(outcome(made.leave()), CommandError)


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("query:load=uptime", {"query:load": "uptime"}),
        ("member-join,member-leave=x.sh", {"member-join:": "x.sh", "member-leave:": "x.sh"}),
        ("all.sh", {"*:": "all.sh"}),
        ("=all.sh", {"*:": "all.sh"}),
        ("user:deploy=a=b", {"user:deploy": "a=b"}),
    ],
)
def test_stats_show_event_handlers_as_serf_does(spec: str, shown: dict[str, str]) -> None:
    made, _ = agent(event_handlers=[spec])
    assert made.stats()["event_handlers"] == shown


def test_stats_have_serfs_sections_and_only_texts() -> None:
    made, _ = agent(tags={"role": "web"})
    stats = made.stats()
    assert list(stats) == ["agent", "runtime", "serf", "tags", "event_handlers"]
    assert stats["agent"] == {"name": "n1"}
    assert stats["tags"] == {"role": "web"}
    assert all(isinstance(v, str) for section in stats.values() for v in section.values())
    assert {"members", "failed", "left", "health_score", "member_time", "encrypted"} <= set(
        stats["serf"]
    )
