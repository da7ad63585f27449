"""Conversations recorded from real Serf agents, held with ours."""

import json
import logging
import time
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import msgpack
import pytest
from stand_in import Client, StandInAgent, member, query

from serfd.logs import LogRing
from serfd.plain import plain
from serfd.rpc.commands import COMMANDS
from serfd.rpc.messages import PackedMembers, event_body, query_body, query_rest
from serfd.rpc.server import LAST_WORD_DELAY
from serfd.serf.coordinates import Coordinate
from serfd.serf.events import Member, MemberEvent, MemberEventKind, Status, UserEvent
from serfd.serf.keys import KeyResult

VECTORS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "golden" / "rpc").glob("*.json"))
}

OTHERWISE = {
    "go-auth-missing": "a body before auth is dropped, and not answered like a header of its own",
    "py-auth-body-desync": "the same",
}
"""Those that are not replayed, and why; they have tests of their own."""

LATER = {"go-reachability", "go-rtt-unknown", "py-pipelined"}
"""Recorded when the members were no longer as their setup says."""

UNORDERED = {"py-stream-overlap"}
"""The order of what comes to both streams is arbitrary."""

LATE = {"py-respond": 5}
"""Before a request with this Seq, the deadline of the queries passes."""


def test_every_command_of_the_vectors_is_served():
    named = {
        commanded(frame)
        for vector in VECTORS.values()
        for frame in vector["frames"]
        if frame["from"] == "client" and frame["kind"] == "header"
    }
    # `bogus` is in no table, and its vector shows what then happens.
    assert named - {"bogus"} == set(COMMANDS) - {"plugins"}  # Serf has none


class Exchange(NamedTuple):
    """What one side says before the other goes on."""

    sender: str
    said: list[dict]

    @property
    def data(self):
        return b"".join(bytes.fromhex(f.get("hex", "")) for f in self.said)

    @property
    def closes(self):
        return self.said[-1]["kind"] == "close"

    @property
    def backlog(self):
        """The log lines that come at once after the reply to a monitor's request."""
        records = [f for f in self.said if f["kind"] == "body"]
        return [f for f in takewhile(lambda f: "Log" in f["decoded"], records)]


@pytest.mark.parametrize("feeding", ["at once", "byte by byte"])
@pytest.mark.parametrize("name", sorted(VECTORS.keys() - OTHERWISE.keys()))
def test_a_conversation_goes_as_with_a_real_agent(name, feeding, serve, clock):
    vector = VECTORS[name]
    exchanges = [
        Exchange(sender, list(said))
        for sender, said in groupby(without_defects(vector["frames"]), key=lambda f: f["from"])
    ]
    agent = agent_of(vector["setup"])
    prepare(agent, vector["frames"], is_later=name in LATER)
    ring = LogRing()
    monitors = [e for before, e in pairwise(exchanges) if asks_for(before, "monitor")]
    for line in next((e.backlog for e in reversed(monitors) if e.backlog), ()):
        ring.handle(record_of(line["decoded"]["Log"]))
    auth = "sekret" if "rpc_auth=sekret" in vector["setup"] else ""
    factory = serve(auth=auth, agent=agent, logs=ring)
    agent.shut_down = lambda: [c.hang_up() for c in tuple(factory.connections)]
    client = Client(factory)
    gone, seen = False, 0
    for exchange in exchanges:
        if exchange.sender == "client":
            if any(
                f.get("decoded") == {"Command": "respond", "Seq": LATE.get(name)}
                for f in exchange.said
            ):
                clock.advance(60)
            data = exchange.data
            for piece in [data] if feeding == "at once" else [bytes([b]) for b in data]:
                client.send(piece)
                clock.advance(0)
            if exchange.closes and not gone:
                client.hang_up()
                gone = True
        else:
            told = {}
            for header, frame in pairwise(exchange.said):
                if frame["kind"] != "body" or (exchange in monitors and frame in exchange.backlog):
                    continue
                # What two streams tell of has happened once.
                if "Event" in frame["decoded"]:
                    stream = told.setdefault(frame["hex"], header["hex"])
                    if stream != header["hex"]:
                        continue
                make_happen(frame["decoded"], agent, ring)
                clock.advance(LAST_WORD_DELAY if frame["decoded"].get("Type") == "done" else 0)
            answered = client.transport.value()[seen:]
            seen += len(answered)
            expected = [f for f in exchange.said if f["kind"] != "close"]
            ours, theirs = normal(answered, expected), normal(exchange.data, expected)
            assert sorted(ours) == sorted(theirs) if name in UNORDERED else ours == theirs
            assert gone or client.hung_up_on is exchange.closes
    assert client.transport.value()[seen:] == b""


def without_defects(frames):
    """Real agents end some queries with answers of nobody: a defect (rpc.md 8)."""
    kept = []
    for frame in frames:
        said = frame.get("decoded")
        if isinstance(said, dict) and said.get("From") == "" and said["Type"] != "done":
            kept.pop()  # its header
        else:
            kept.append(frame)
    return kept


def asks_for(exchange, command):
    return any(f["kind"] == "header" and commanded(f) == command for f in exchange.said)


def commanded(frame):
    """The command of a header: a map, or a list in the order of its fields."""
    said = frame["decoded"]
    return said.get("Command") if isinstance(said, dict) else said[0]


def prepare(agent, frames, *, is_later):
    """Let the agent know what it is to say of keys and coordinates, and of members as they were."""
    for asked, reply, answer in zip(frames, frames[1:], frames[2:], strict=False):
        said = answer.get("decoded")
        if not isinstance(said, dict) or answer["from"] == "client":
            continue
        if "NumNodes" in said:
            result = KeyResult(
                said["Messages"], said["Keys"] or {}, said["NumNodes"], said["NumErr"],
                said["NumResp"], reply["decoded"]["Error"],
            )  # fmt: skip
            agent.key_results.append(result)
        if is_later and "agent" in said:
            agent.tags = said["tags"]
        if is_later and "Members" in said:
            agent.everybody = list(map(member_of, said["Members"]))
        if said.get("Ok"):
            place = said["Coord"]
            agent.coordinates[asked["decoded"]["Node"]] = Coordinate(
                tuple(place["Vec"]), place["Error"], place["Adjustment"], place["Height"]
            )


def make_happen(said, agent, ring):
    """What a record tells of; nothing if it is a reply's body."""
    if "Log" in said:
        ring.handle(record_of(said["Log"]))
    elif said.get("Event"):
        agent.publish(event_of(said))
    elif said.get("Type") == "done":
        agent.asked.pop(0).end()
    elif "Type" in said:
        agent.asked[0].answer(said["From"], octets_of(said), is_ack=said["Type"] == "ack")


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_command_with_a_body_before_auth_is_answered_once(name, serve):
    frames = VECTORS[name]["frames"]
    first = next(i for i, f in enumerate(frames) if "Error" in f["decoded"] and i > 2)
    client = Client(serve(auth="sekret"))
    client.send(b"".join(bytes.fromhex(f["hex"]) for f in frames[:first] if f["from"] == "client"))
    assert client.received() == [
        {"Error": "", "Seq": frames[0]["decoded"]["Seq"]},
        {"Error": "Authentication required", "Seq": frames[3]["decoded"]["Seq"]},
    ]
    assert client.ask("auth", {"AuthKey": "sekret"}, seq=3) == [{"Error": "", "Seq": 3}]


BODIES = [
    pytest.param(frame, id=f"{name}-{i}")
    for name, vector in VECTORS.items()
    for i, frame in enumerate(vector["frames"])
    if frame["from"] == "server" and frame["kind"] == "body"
    and ("Members" in frame["decoded"] or "Event" in frame["decoded"])
]  # fmt: skip


@pytest.mark.parametrize("frame", BODIES)
def test_members_and_events_are_written_byte_for_byte_as_a_real_agent_does(frame):
    said = frame["decoded"]
    if "Event" not in said:
        ours = PackedMembers([*map(member_of, said["Members"])]).body
    elif said["Event"] == "query":
        ours = query_body(said["ID"], query_rest(event_of(said)))
    else:
        ours = event_body(event_of(said))
    assert ours.hex() == frame["hex"]


def event_of(said):
    """What a record of a stream tells of."""
    match said["Event"]:
        case "user":
            return UserEvent(said["LTime"], said["Name"], octets_of(said), said["Coalesce"])
        case "query":
            return query(said["Name"], octets_of(said), ltime=said["LTime"])
        case kind:
            everybody = tuple(map(member_of, said["Members"]))
            return MemberEvent(MemberEventKind(kind), everybody)


def octets_of(said):
    return bytes.fromhex(said["Payload"]["$bin"]) if said["Payload"] else b""


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
    if "Log" in result:  # of several lines in a real agent, of one in ours
        return plain(result["Log"])
    if "agent" in result:  # stats: maps throughout
        result = {section: dict(values) for section, values in pairs}
        for pointer in pointers:
            _, section, name = pointer.split("/")
            result[section][name] = "varies"
        return result
    if "Members" in result and "Event" not in result:
        assert list(pointers) == ["/Members (order)", "/Members/*/Addr", "/Members/*/Port"] or (
            not result["Members"]
        )
        everybody = [
            [(k, dict(v) if k == "Tags" else type(v) if k in ("Addr", "Port") else v) for k, v in m]
            for m in result["Members"]
        ]
        return sorted(everybody, key=lambda m: dict(m)["Name"])
    # Anything else that varies from run to run was made to happen as it did then.
    return [(k, sorted(v) if k in ("Keys", "Messages") and v else v) for k, v in pairs]
