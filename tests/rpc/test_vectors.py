"""Conversations recorded from real Serf agents, held with ours."""

import json
import logging
import time
from itertools import groupby
from pathlib import Path

import msgpack
import pytest
from stand_in import Client, StandInAgent, member

from serfd.logs import LogRing
from serfd.rpc.commands import COMMANDS
from serfd.rpc.messages import event_body, members_body, pack
from serfd.serf.events import Member, MemberEvent, MemberEventKind, Status, UserEvent

VECTORS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "golden" / "rpc").glob("*.json"))
}

NOT_SERVED_YET = {
    "event": (
        "go-event go-event-nopayload go-event-too-big py-body-array py-body-wrong-field-type "
        "py-body-wrong-type py-event-lenient py-monitor py-pipelined py-auth-body-desync "
        "py-stream-events py-stream-named py-stream-overlap"
    ),
    "query": (
        "go-query go-query-default-timeout go-query-filtered go-query-reserved go-query-too-big "
        "go-reachability py-query-nil-response py-query-respond py-query-variants"
    ),
    "respond": "py-respond py-respond-too-big",
    "install-key": (
        "go-keys-install go-keys-install-badbase64 go-keys-install-badlen go-keys-install-plain "
        "py-keys-plain"
    ),
    "use-key": "go-keys-use go-keys-use-unknown",
    "remove-key": "go-keys-remove go-keys-remove-primary",
    "list-keys": "go-keys-list go-keys-list2 go-keys-list-plain",
    "get-coordinate": "go-rtt go-rtt-unknown py-stats-coordinate",
}
"""The vectors not replayed, under the first of their commands that serfd does not serve."""

OTHERWISE = {
    "go-auth-missing": "a body before auth is dropped, and not answered like a header of its own",
    "go-monitor": "a query, asked by somebody else, comes over the stream",
}
"""Those that use served commands only, and why they are still not replayed."""


def commands_of(vector):
    frames = [f for f in vector["frames"] if f["from"] == "client" and f["kind"] == "header"]
    return [f["decoded"]["Command"] for f in frames]


def test_every_vector_of_served_commands_is_replayed():
    named = {command: set(names.split()) for command, names in NOT_SERVED_YET.items()}
    found = {}
    for name, vector in VECTORS.items():
        # `bogus` is in no table, and its vector shows what then happens.
        missing = [c for c in commands_of(vector) if c not in COMMANDS and c != "bogus"]
        if missing:
            found.setdefault(missing[0], set()).add(name)
    assert found == named
    assert not {*OTHERWISE} & set.union(*found.values())


REPLAYED = sorted(
    set(VECTORS) - {n for s in NOT_SERVED_YET.values() for n in s.split()} - {*OTHERWISE}
)


@pytest.mark.parametrize("feeding", ["at once", "byte by byte"])
@pytest.mark.parametrize("name", REPLAYED)
def test_a_conversation_goes_as_with_a_real_agent(name, feeding, serve, clock):
    vector = VECTORS[name]
    agent = agent_of(vector["setup"])
    factory = serve(auth="sekret" if "rpc_auth=sekret" in vector["setup"] else "", agent=agent)
    agent.shut_down = lambda: [c.hang_up() for c in tuple(factory.connections)]
    client = Client(factory)
    gone, seen = False, 0
    for sender, frames in groupby(vector["frames"], key=lambda f: f["from"]):
        frames = list(frames)
        closes = frames[-1]["kind"] == "close"
        data = b"".join(bytes.fromhex(f.get("hex", "")) for f in frames)
        if sender == "client":
            for piece in [data] if feeding == "at once" else [bytes([b]) for b in data]:
                client.send(piece)
            if closes and not gone:
                client.hang_up()
                gone = True
        else:
            answered = client.transport.value()[seen:]
            seen += len(answered)
            expected = [f for f in frames if f["kind"] != "close"]
            assert normal(answered, expected) == normal(data, expected)
            assert gone or client.hung_up_on is closes
    assert client.transport.value()[seen:] == b""


def test_the_monitors_conversation_goes_as_with_a_real_agent_until_its_event(serve):
    frames = VECTORS["py-monitor"]["frames"]
    frames = frames[
        : next(i for i, f in enumerate(frames) if f["decoded"].get("Command") == "event")
    ]
    debug = next(i for i, f in enumerate(frames) if f["decoded"].get("LogLevel") == "Debug")
    ring = LogRing()
    for frame in frames[debug:]:
        if "Log" in frame["decoded"]:
            ring.handle(record_of(frame["decoded"]["Log"]))
    client = Client(serve(logs=ring))
    client.send(b"".join(bytes.fromhex(f["hex"]) for f in frames if f["from"] == "client"))
    said = b"".join(bytes.fromhex(f["hex"]) for f in frames if f["from"] == "server")
    assert client.transport.value() == said


def test_a_command_with_a_body_before_auth_is_answered_once(serve):
    frames = VECTORS["go-auth-missing"]["frames"]
    client = Client(serve(auth="sekret"))
    client.send(b"".join(bytes.fromhex(f.get("hex", "")) for f in frames if f["from"] == "client"))
    assert client.received() == [
        {"Error": "", "Seq": 1},
        {"Error": "Authentication required", "Seq": 2},
    ]
    assert client.ask("auth", {"AuthKey": "sekret"}, seq=3) == [{"Error": "", "Seq": 3}]


BODIES = [
    pytest.param(frame, id=f"{name}-{i}")
    for name, vector in VECTORS.items()
    for i, frame in enumerate(vector["frames"])
    if frame["from"] == "server" and frame["kind"] == "body"
    and ("Members" in frame["decoded"] or frame["decoded"].get("Event") == "user")
]  # fmt: skip


@pytest.mark.parametrize("frame", BODIES)
def test_members_and_events_are_written_byte_for_byte_as_a_real_agent_does(frame):
    said = frame["decoded"]
    match said.get("Event"):
        case None:
            ours = pack(members_body(map(member_of, said["Members"])))
        case "user":
            payload = bytes.fromhex(said["Payload"]["$bin"]) if said["Payload"] else b""
            ours = event_body(UserEvent(said["LTime"], said["Name"], payload, said["Coalesce"]))
        case kind:
            everybody = tuple(map(member_of, said["Members"]))
            ours = event_body(MemberEvent(MemberEventKind(kind), everybody))
    assert ours.hex() == frame["hex"]


def agent_of(setup):
    """An agent as the one in a vector's setup."""
    first = member("n1", port=17001, role="web", dc="east")
    second, third = member("n2", port=17002, role="db"), member("n3", port=17003)
    if setup.startswith("one agent"):
        return StandInAgent([member("n9", port=17009)])
    agent = StandInAgent([first, second, third] if setup.startswith("three") else [first, second])
    if "handler query:load=echo hi-from-n1" in setup:
        agent.event_handlers = {"query:load": "echo hi-from-n1"}
    return agent


def member_of(said):
    numbers = (
        "ProtocolMin",
        "ProtocolMax",
        "ProtocolCur",
        "DelegateMin",
        "DelegateMax",
        "DelegateCur",
    )
    return Member(
        said["Name"],
        bytes.fromhex(said["Addr"]["$bin"]),
        said["Port"],
        said["Tags"],
        Status[said["Status"].upper()],
        bytes(said[n] for n in numbers),
    )


def record_of(line):
    """The log record whose line is `2026/11/23 03:21:39 [INFO] agent: text`."""
    stamp, level, component, text = (
        line[:19],
        line[21:].split("]")[0],
        *line.split("] ", 1)[1].split(": ", 1),
    )
    number = {"DEBUG": 10, "INFO": 20, "WARN": 30, "ERR": 40}[level]
    record = logging.LogRecord(f"serfd.{component}", number, "", 0, text, (), None)
    record.created = time.mktime(time.strptime(stamp, "%Y/%m/%d %H:%M:%S"))
    return record


def normal(data, frames):
    """What `data` says: in pairs, as the order of a struct's fields counts, less what varies."""
    unpacker = msgpack.Unpacker(object_pairs_hook=list)
    unpacker.feed(data)
    objects = list(unpacker)
    assert len(objects) == len(frames)
    return [without(o, f.get("variable", ())) for o, f in zip(objects, frames, strict=True)]


def without(pairs, pointers):
    result = dict(pairs)
    if "agent" in result:  # stats: maps throughout
        result = {section: dict(values) for section, values in pairs}
        for pointer in pointers:
            _, section, name = pointer.split("/")
            result[section][name] = "varies"
        return result
    if "Members" in result:
        assert list(pointers) == ["/Members (order)", "/Members/*/Addr", "/Members/*/Port"] or (
            not result["Members"]
        )
        everybody = [
            [(k, dict(v) if k == "Tags" else type(v) if k in ("Addr", "Port") else v) for k, v in m]
            for m in result["Members"]
        ]
        return sorted(everybody, key=lambda m: dict(m)["Name"])
    assert not pointers
    return pairs
