"""mDNS: its packets against those of a real agent, and nodes that find each other.

The nodes have real sockets, in a network of their own.
"""

import logging
import select
import socket
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_network import HOST, INTERFACE, add_interface, ip, own_network
from twisted.logger import globalLogPublisher
from twisted.names import dns

from serfd.effects import Address
from serfd.errors import ConfigError
from serfd.net import mdns
from serfd.net.mdns import Mdns, Service, decode, entries, question

__all__ = ["own_network"]

# What a real agent says (agent.md 8): its question, and the answer of node n1, port 17001, host vm.
QUESTION = bytes.fromhex(
    "330900000001000000000000095f736572665f636c75045f746370056c6f63616c00000c0001"
)
ANSWER = bytes.fromhex(
    "000084000000000400000000095f736572665f636c75045f746370056c6f63616c00000c00010000007800050"
    "26e31c00cc02c0021000100000078000a000a0001426902766d00c043000100010000007800047f000001c02c"
    "0010000100000078001312536572662027636c752720636c7573746572"
)
SERVICE = "_serf_clu._tcp.local"
INSTANCE = f"n1.{SERVICE}"
N1 = Service("clu", node="n1", host="vm", addr=bytes((127, 0, 0, 1)), port=17001)
POINTER = ("PTR", SERVICE, INSTANCE)
PLACE = ("SRV", INSTANCE, "10 1 17001 vm")
HERE = ("A", "vm", "127.0.0.1")
TEXT = ("TXT", INSTANCE, "Serf 'clu' cluster")


def asked(name: str, kind: int, cls: int = dns.IN) -> dns.Message:
    message = dns.Message(id=7)
    message.addQuery(name.encode(), kind, cls)
    return decode(message.toStr())


def shown(record: dns.RRHeader) -> tuple[str, str, str]:
    """Kind, name and content; all else is the same in every record."""
    assert (record.cls, record.ttl) == (dns.IN, 120)
    content: Any = record.payload
    match record.type:
        case dns.PTR:
            text = content.name.name.decode()
        case dns.SRV:
            target = content.target.name.decode()
            text = f"{content.priority} {content.weight} {content.port} {target}"
        case dns.A:
            text = socket.inet_ntoa(content.address)
        case dns.AAAA:
            text = socket.inet_ntop(socket.AF_INET6, content.address)
        case _:
            [data] = content.data
            text = data.decode()
    return dns.QUERY_TYPES[record.type], record.name.name.decode(), text


def records(packet: bytes) -> list[tuple[str, str, str]]:
    """Of an answer, which is all that the packet is."""
    if not packet:
        return []
    message = dns.Message()
    message.fromStr(packet)
    assert packet[:4] == bytes.fromhex("00008400")
    assert not message.queries + message.authority + message.additional
    return [shown(record) for record in message.answers]


# Packets


def test_the_question_is_a_real_agents() -> None:
    assert question("clu", 0x3309) == QUESTION


def test_the_answer_says_what_a_real_agents_says() -> None:
    answer = N1.answer(decode(QUESTION))
    assert records(answer) == records(ANSWER) == [POINTER, PLACE, HERE, TEXT]


@pytest.mark.parametrize(
    ("name", "kind", "answer"),
    [
        (SERVICE, dns.PTR, [POINTER, PLACE, HERE, TEXT]),
        (SERVICE, dns.ALL_RECORDS, [POINTER, PLACE, HERE, TEXT]),
        (SERVICE.upper(), dns.PTR, [POINTER, PLACE, HERE, TEXT]),
        (SERVICE, dns.A, []),
        (INSTANCE, dns.SRV, [PLACE, HERE]),
        (INSTANCE, dns.TXT, [TEXT]),
        (INSTANCE, dns.ALL_RECORDS, [PLACE, HERE, TEXT]),
        (INSTANCE, dns.PTR, []),
        ("vm", dns.A, [HERE]),
        ("vm", dns.ALL_RECORDS, [HERE]),
        ("vm", dns.AAAA, []),
        ("_services._dns-sd._udp.local", dns.PTR,
         [("PTR", "_services._dns-sd._udp.local", SERVICE)]),
        ("_serf_other._tcp.local", dns.PTR, []),
        (f"n2.{SERVICE}", dns.SRV, []),
        ("x", dns.A, []),
    ],
)  # fmt: skip
def test_each_question_has_its_answer(name: str, kind: int, answer: list[Any]) -> None:
    assert records(N1.answer(asked(name, kind))) == answer
    # Who asks for an answer to himself alone gets the same, who asks of another network nothing.
    assert records(N1.answer(asked(name, kind, 0x8000 | dns.IN))) == answer
    assert records(N1.answer(asked(name, kind, dns.CH))) == []


def test_several_questions_in_one_packet_get_each_record_once() -> None:
    message = dns.Message()
    for name, kind in ((INSTANCE, dns.TXT), (SERVICE, dns.PTR), ("vm", dns.A), (SERVICE, dns.PTR)):
        message.addQuery(name.encode(), kind)
    assert records(N1.answer(message)) == [TEXT, POINTER, PLACE, HERE]


def test_a_node_with_an_ipv6_address_says_so() -> None:
    addr = socket.inet_pton(socket.AF_INET6, "fd00::7")
    answer = Service("clu", node="n1", host="vm", addr=addr, port=1).answer(decode(QUESTION))
    assert ("AAAA", "vm", "fd00::7") in records(answer)
    assert entries(decode(answer), "clu") == [Address("fd00::7", 1)]


@pytest.mark.parametrize(
    "name",
    [
        "n1",
        "a.example.org",
        "ü",
        "x" * 63,
        "x" * 64,
        "x" * 128,
        "a..b",
        ".",
        "",
        "\udcff",
        "ü" * 60,
    ],
)
def test_whatever_a_node_and_its_host_are_called_others_read_where_it_is(name: str) -> None:
    for cluster in ("clu", "x" * 57):
        service = Service(cluster, node=name, host=name, addr=bytes((10, 0, 0, 1)), port=7946)
        answer = service.answer(decode(question(cluster, 1)))
        assert entries(decode(answer), cluster) == [Address("10.0.0.1", 7946)]
        for record in decode(answer).answers:
            assert len(record.name.name) < 255
            assert all(0 < len(label) < 64 for label in record.name.name.split(b"."))


def test_a_node_is_where_a_real_agents_answer_says() -> None:
    assert entries(decode(ANSWER), "clu") == [Address("127.0.0.1", 17001)]
    assert entries(decode(ANSWER), "CLU") == [Address("127.0.0.1", 17001)]
    assert entries(decode(ANSWER), "lu") == []


def answer_of(*parts: tuple[str, Any], ttl: int = 120, additional: int = 0) -> bytes:
    """An answer with these records: name and content; the last of them are additional ones."""
    message = dns.Message(answer=1, auth=True, maxSize=0)
    rows = [dns.RRHeader(n.encode(), p.TYPE, dns.IN, ttl, p) for n, p in parts]
    message.answers = rows[: len(rows) - additional]
    message.additional = rows[len(rows) - additional :]
    return message.toStr()


def node_records(number: int, host: str = "10.0.0.{}") -> list[tuple[str, Any]]:
    """The records of one node: `n7` is at 10.0.0.7:7946."""
    name, target = f"n{number}.{SERVICE}", f"h{number}"
    return [
        (name, dns.Record_SRV(10, 1, 7946, target.encode())),
        (target, dns.Record_A(host.format(number))),
        (name, dns.Record_TXT(b"Serf")),
    ]


@pytest.mark.parametrize(
    ("packet", "found"),
    [
        (answer_of(*node_records(1), *node_records(2)), ["10.0.0.1:7946", "10.0.0.2:7946"]),
        (answer_of(*node_records(1), additional=2), ["10.0.0.1:7946"]),
        (answer_of(*reversed(node_records(1))), ["10.0.0.1:7946"]),
        (answer_of(*node_records(1)[:2]), []),  # no text
        (answer_of(*node_records(1)[1:]), []),  # no port
        (answer_of(*node_records(1)[::2], node_records(2)[1]), []),  # no address of its own
        (answer_of(*node_records(1), ttl=0), []),  # it says goodbye
        (answer_of((INSTANCE, dns.Record_SRV(0, 0, 0, b"h1")), *node_records(1)[1:]), []),
        (answer_of(*node_records(1), ("h1", dns.Record_A("10.0.0.9"))),
         ["10.0.0.1:7946", "10.0.0.9:7946"]),
        (answer_of(*node_records(1), *node_records(1)), ["10.0.0.1:7946"]),
        (answer_of(*(part for n in range(21) for part in node_records(n))),
         [f"10.0.0.{n}:7946" for n in range(mdns.ENTRIES_MAX)]),
        (answer_of((INSTANCE, dns.Record_TXT(b"x" * 200))), []),
    ],
)  # fmt: skip
def test_an_entry_is_used_when_all_of_it_is_told(packet: bytes, found: list[str]) -> None:
    assert [str(address) for address in entries(decode(packet), "clu")] == found


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        (b"", "0 bytes are too short"),
        (QUESTION[:11], "11 bytes are too short"),
        (bytes(1501), "more than 1500 bytes"),
        (bytes(4) + struct.pack("!4H", 30, 30, 5, 0), "65 questions and records, at most 64"),
        (bytes(4) + struct.pack("!4H", 1, 0, 0, 0) + b"\xc0\x0c\0\0\0\0", "loop"),
    ],
)
def test_what_is_no_packet_is_told(packet: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode(packet)


def test_records_that_nobody_looks_at_make_twisted_log_nothing() -> None:
    texts = [("x", dns.Record_TXT(b"12345678")), ("y", dns.Record_TXT(b"something"))]
    packet = bytearray(answer_of(*texts))
    packet[packet.index(b"12345678") - 1] = 12  # the text is longer than its record
    events: list[Any] = []
    globalLogPublisher.addObserver(events.append)
    decode(bytes(packet))
    globalLogPublisher.removeObserver(events.append)
    assert events == []


@given(
    start=st.sampled_from([QUESTION, ANSWER]),
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=5),
    end=st.integers(0, 200),
    rest=st.binary(max_size=40),
)
def test_whatever_comes_in_is_read_or_refused(start, changes, end, rest) -> None:
    packet = bytearray(start[:end] + rest)
    for place, value in changes:
        if place < len(packet):
            packet[place] = value
    try:
        message = decode(bytes(packet))
    except ValueError:
        return
    assert all(":" in str(address) for address in entries(message, "clu"))
    records(N1.answer(message))


# Nodes


class Node:
    """One that listens and asks, and what it has found."""

    def __init__(self, reactor: Any, number: int, **settings: Any) -> None:
        self.address = Address(f"10.0.0.{number}", 7946)
        self.batches: list[list[str]] = []
        self.known: set[Address] = {self.address}
        settings.setdefault("families", [socket.AF_INET])
        settings.setdefault("interface", "")
        service = Service(
            "clu", node=f"n{number}", host="vm", addr=bytes((10, 0, 0, number)), port=7946
        )
        self.mdns = Mdns(
            reactor, service, known=lambda: self.known, found=self._found, rng=Random(number),
            **settings,
        )  # fmt: skip

    def _found(self, addresses: list[Address]) -> None:
        self.batches.append([str(address) for address in addresses])


class Air:
    """The network, the nodes in it, and a stranger who speaks with them by hand."""

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.nodes: list[Node] = []
        self.polling: list[Node] = []
        self.voice = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.voice.bind((HOST, 0))
        self.voice.settimeout(60)
        self.ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.ear.bind(("224.0.0.251", 5353))
        self.ear.setsockopt(
            socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
            socket.inet_aton("224.0.0.251") + socket.inet_aton(HOST),
        )  # fmt: skip
        self.ear.setsockopt(socket.IPPROTO_IP, mdns._IP_MULTICAST_ALL, 0)
        self.ear.settimeout(60)

    def node(self, number: int, **settings: Any) -> Node:
        """One that listens."""
        made = Node(self.reactor, number, **settings)
        self.nodes.append(made)
        made.mdns.listen()
        return made

    def until(self, condition: Callable[[], object]) -> None:
        """Turn the reactor until so; time does not pass."""
        for _ in range(6000):
            if condition():
                return
            self.reactor.iterate(0.01)
        raise AssertionError("it does not become so")

    def pass_(self, seconds: float) -> None:
        self.reactor.now += seconds
        self.reactor.turn()

    def asked(self, node: Node) -> Any:
        """Let it ask, for the first time or again, and hear it; gives where from."""
        if node in self.polling:
            self.pass_(mdns.POLL_INTERVAL)
        else:
            self.polling.append(node)
            node.mdns.poll()
        packet, source = self.ear.recvfrom(2000)
        assert packet[2:] == QUESTION[2:]
        return source

    def tell(self, node: Node, to: Any, *packets: bytes) -> None:
        """Send it packets, and see that it has read them."""
        before = node.mdns.ignored
        for packet in (*packets, b"_serf\x09_serf_clu"):  # the last is none, and counted as such
            self.voice.sendto(packet, to)
        self.until(lambda: node.mdns.ignored > before)

    def end(self) -> None:
        for node in self.nodes:
            node.mdns.stop()
        assert not [r for r in self.reactor.getReaders() if r is not self.reactor.waker]
        assert not self.reactor.getDelayedCalls()
        self.voice.close()
        self.ear.close()


@pytest.fixture
def air(own_network, hand_turned) -> Iterator[Air]:
    made = Air(hand_turned)
    yield made
    made.end()


def _waiting(ear: socket.socket) -> bool:
    """Whether somebody has said something to it."""
    return bool(select.select([ear], [], [], 0)[0])


GROUP = ("224.0.0.251", 5353)


@pytest.mark.parametrize("interface", ["", INTERFACE])
@pytest.mark.parametrize(
    "families",
    [[socket.AF_INET], [socket.AF_INET6], [socket.AF_INET, socket.AF_INET6]],
    ids=["IPv4", "IPv6", "both"],
)
def test_two_nodes_find_each_other(air, families, interface):
    one, two = (air.node(n, families=families, interface=interface) for n in (1, 2))
    for asks, other in ((one, two), (two, one)):
        asks.mdns.poll()

        def found(asks: Node = asks) -> bool:
            air.pass_(mdns.BATCH_WAIT)
            return bool(asks.batches)

        air.until(found)
        # It does not hear of itself: that is known.
        assert asks.batches == [[str(other.address)]]


def test_nodes_on_another_interface_than_the_systems_choice_find_each_other_there(air):
    one, two = (air.node(n, interface="lo") for n in (1, 2))
    one.mdns.poll()

    def found() -> bool:
        air.pass_(mdns.BATCH_WAIT)
        return bool(one.batches)

    air.until(found)
    assert one.batches == [[str(two.address)]]
    # What is said elsewhere they do not hear, although somebody here does.
    air.voice.sendto(QUESTION, GROUP)
    assert air.ear.recv(2000) == QUESTION
    loopback = socket.inet_aton("127.0.0.1")
    air.voice.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
    air.tell(one, GROUP)
    assert not _waiting(air.voice)


def test_an_answer_comes_from_the_port_of_mdns_to_the_one_who_asks(air):
    node = air.node(1)
    air.voice.sendto(QUESTION, GROUP)
    air.until(lambda: _waiting(air.voice))
    packet, source = air.voice.recvfrom(2000)
    assert source == (HOST, 5353)
    assert entries(decode(packet), "clu") == [node.address]


def test_it_asks_at_once_and_every_minute_each_time_from_another_port(air):
    node = air.node(1)
    sources = {air.asked(node)}
    air.pass_(mdns.POLL_INTERVAL - 1)
    assert not _waiting(air.ear)
    air.pass_(1)
    sources.add(air.ear.recvfrom(2000)[1])
    sources.add(air.asked(node))
    assert len(sources) == 3


def test_what_comes_in_soon_after_each_other_is_handed_on_together(air):
    node = air.node(9)
    to = air.asked(node)
    air.tell(node, to, answer_of(*node_records(1)))
    air.pass_(0.08)
    air.tell(node, to, answer_of(*node_records(2), *node_records(1)))
    air.pass_(0.08)
    assert node.batches == []
    air.pass_(0.03)
    assert node.batches == [["10.0.0.1:7946", "10.0.0.2:7946"]]


def test_an_address_is_handed_on_once_until_the_next_question_and_a_known_one_never(air):
    node = air.node(9)
    both = answer_of(*node_records(1), *node_records(2))
    node.known.add(Address("10.0.0.2", 7946))
    to = air.asked(node)
    for _ in range(2):
        air.tell(node, to, both)
        air.pass_(0.2)
    assert node.batches == [["10.0.0.1:7946"]]
    # It could not be joined: it is not known yet.
    air.tell(node, air.asked(node), both)
    air.pass_(0.2)
    assert node.batches == [["10.0.0.1:7946"]] * 2
    node.known.add(Address("10.0.0.1", 7946))
    air.tell(node, air.asked(node), both)
    air.pass_(0.2)
    assert node.batches == [["10.0.0.1:7946"]] * 2


def test_answers_to_the_group_are_read_too(air):
    node = air.node(9)
    air.tell(node, GROUP, answer_of(*node_records(1)))
    air.pass_(0.2)
    assert node.batches == [["10.0.0.1:7946"]]


def test_only_so_many_addresses_are_handed_on_until_the_next_question(air):
    node = air.node(9)
    packets = []
    for start in range(0, 50, 10):
        parts = [node_records(number, "10.0.1.{}") for number in range(start, start + 10)]
        packets.append(answer_of(*(record for part in parts for record in part)))
    air.tell(node, air.asked(node), *packets)
    air.pass_(0.2)
    assert [len(batch) for batch in node.batches] == [mdns.FOUND_MAX]
    node.known |= {Address(f"10.0.1.{n}", 7946) for n in range(mdns.FOUND_MAX)}
    air.tell(node, air.asked(node), *packets)
    air.pass_(0.2)
    assert [len(batch) for batch in node.batches] == [mdns.FOUND_MAX, 50 - mdns.FOUND_MAX]


def answers(air: Air, node: Node, questions: int) -> int:
    """How many answers so many questions get."""
    air.tell(node, GROUP, *[QUESTION] * questions)
    count = 0
    while _waiting(air.voice):
        air.voice.recv(2000)
        count += 1
    return count


def test_only_so_many_questions_are_answered_in_a_second(air):
    node = air.node(1)
    most = mdns.ANSWERS_PER_SECOND_MAX
    assert answers(air, node, most + 10) == most
    air.pass_(1)
    assert answers(air, node, most - 1) == most - 1


def test_only_so_many_packets_are_read_in_a_second(air):
    node = air.node(9)
    air.tell(node, GROUP, *[answer_of(*node_records(1)[:2])] * mdns.PACKETS_PER_SECOND_MAX)
    assert node.mdns.ignored == 1  # the one that ends them
    air.tell(node, GROUP, answer_of(*node_records(2)))
    air.pass_(0.2)
    assert node.batches == []
    air.pass_(1)
    air.tell(node, GROUP, answer_of(*node_records(3)))
    air.pass_(0.2)
    assert node.batches == [["10.0.0.3:7946"]]


def test_what_is_said_to_others_is_not_even_counted(air, caplog):
    node = air.node(1)
    other = dns.Message(id=1)
    other.addQuery(b"_ipp._tcp.local", dns.PTR)
    with caplog.at_level(logging.DEBUG):
        air.tell(node, GROUP, *[other.toStr(), bytes(60)] * (mdns.PACKETS_PER_SECOND_MAX // 2 + 5))
    assert node.mdns.ignored == 1
    [told] = caplog.messages
    assert told.startswith(f"a packet from {HOST} is ignored: ")
    assert told.endswith("; 1 so far")


def test_what_is_ignored_is_told_once_a_second(air, caplog):
    node = air.node(1)
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            air.tell(node, GROUP)
        assert len(caplog.messages) == 1
        air.pass_(1)
        air.tell(node, GROUP)
    assert [text.rpartition("; ")[2] for text in caplog.messages] == ["1 so far", "4 so far"]


@pytest.mark.parametrize(("place", "value"), [(2, 0x08), (3, 0x05)], ids=["opcode", "rcode"])
def test_what_is_no_plain_question_is_not_answered(air, place, value):
    node = air.node(1)
    packet = bytearray(QUESTION)
    packet[place] = value
    air.tell(node, GROUP, bytes(packet))
    assert not _waiting(air.voice)


def test_no_question_is_answered_that_comes_to_where_answers_are_awaited(air):
    node = air.node(1)
    air.tell(node, air.asked(node), QUESTION)
    assert not _waiting(air.voice)


def test_a_port_that_somebody_does_not_share_is_named(air):
    air.ear.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as selfish:
        selfish.bind(("", 5353))
        with pytest.raises(ConfigError) as failed:
            air.node(1)
    assert str(failed.value) == (
        "cannot listen on 224.0.0.251 port 5353 (UDP, discover): another program has it and does "
        "not share it"
    )


def test_without_a_network_it_waits_for_one_and_says_so_once(air, caplog):
    ip(f"link del {INTERFACE}")
    node = air.node(1, families=[socket.AF_INET, socket.AF_INET6])
    node.mdns.poll()
    air.pass_(mdns.POLL_INTERVAL)
    [told] = caplog.messages
    assert told.startswith("Failed to poll for new hosts: 224.0.0.251: No such device; ff02::fb: ")
    add_interface()
    air.pass_(mdns.POLL_INTERVAL)
    assert answers(air, node, 1) == 1
    assert len(caplog.messages) == 1


def test_an_interface_may_be_taken_away_and_come_back(air):
    node = air.node(1, interface=INTERFACE, families=[socket.AF_INET, socket.AF_INET6])
    node.mdns.poll()
    assert answers(air, node, 1) == 1
    ip(f"link del {INTERFACE}")
    air.pass_(mdns.POLL_INTERVAL)
    add_interface()
    air.pass_(mdns.POLL_INTERVAL)
    assert answers(air, node, 1) == 1
    other = air.node(2, interface=INTERFACE, families=[socket.AF_INET6])
    other.mdns.poll()

    def found() -> bool:
        air.pass_(mdns.BATCH_WAIT)
        return bool(other.batches)

    air.until(found)
    assert other.batches == [[str(node.address)]]


def test_without_ipv6_it_uses_ipv4(air, caplog):
    ip(f"-6 addr flush dev {INTERFACE}")
    ip("-6 addr flush dev lo")
    one, two = (air.node(n, families=[socket.AF_INET, socket.AF_INET6]) for n in (1, 2))
    one.mdns.poll()

    def found() -> bool:
        air.pass_(mdns.BATCH_WAIT)
        return bool(one.batches)

    air.until(found)
    assert one.batches == [[str(two.address)]]
    assert caplog.messages == []
