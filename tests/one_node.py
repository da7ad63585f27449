"""One node in a test's hand: what goes in, and what it sends, decoded."""

from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec

from serfd.config import PROFILES, Config
from serfd.effects import Address, Close, Connect, Emit, Finish, SendPacket, Write
from serfd.serf.node import Node
from serfd.wire.envelope import Envelope
from serfd.wire.packet import PacketCodec
from serfd.wire.sealing import Keyring
from serfd.wire.stream import StreamReader, seal_stream
from serfd.wire.swim_messages import Ack, Alive, Message, Ping, encode

VSN = bytes((1, 5, 2, 2, 5, 5))
PLAIN = Envelope(compress=False)


def address(name: str) -> Address:
    """`n7` is 10.0.0.7:7946."""
    return Address(f"10.0.0.{int(name[1:])}", 7946)


class OneNode:
    """A `Node` named n1 on its own clock."""

    def __init__(self, *others: str, profile: str = "lan", **settings: Any) -> None:
        gossip = msgspec.structs.replace(PROFILES[profile], **settings.pop("gossip", {}))
        settings.setdefault("disable_coordinates", True)
        keyring = Keyring(settings.pop("keys", ()))
        remembered = settings.pop("remembered", None)
        config = Config(gossip=gossip, enable_compression=False, **settings)
        self.now = 0.0
        label = config.cluster_label.encode()
        envelope = Envelope(compress=False, keyring=keyring, label=label)
        self.codec = PacketCodec(envelope)
        self.sent: list[tuple[str, Message]] = []
        self.effects: list[Any] = []
        self.node = Node(
            config, name="n1", addr=bytes((10, 0, 0, 1)), port=7946, keyring=keyring,
            now=0.0, rng=Random(7), nonce=lambda: bytes(12),
            remembered=remembered,
        )  # fmt: skip
        for name in others:
            self.hear(self.alive(name), source=name)

    @staticmethod
    def alive(name: str, incarnation: int = 1, meta: bytes = b"\xff\x80", **fields: Any) -> Alive:
        host = bytes((10, 0, 0, int(name[1:])))
        return Alive(incarnation, name, host, 7946, meta, VSN)._replace(**fields)

    def hear(self, *messages: Message, source: str = "n2") -> None:
        """One packet with these messages."""
        data = self.codec.seal([encode(m) for m in messages], crc=False, nonce=lambda: bytes(12))
        self.hear_bytes(data, source)

    def hear_bytes(self, data: bytes, source: str = "n2") -> None:
        self.node.packet_received(self.now, data, address(source))
        self.collect()

    def collect(self) -> None:
        for effect in self.node.take_effects():
            self.effects.append(effect)
            if isinstance(effect, SendPacket):
                messages, faults = self.codec.open(effect.data)
                assert not faults
                assert len(effect.data) <= 1405
                self.sent += [(f"n{effect.to.host.rpartition('.')[2]}", m) for m in messages]

    def run_until(self, now: float, *, answering: Sequence[str] = ()) -> None:
        """Let time pass; those `answering` ack every ping at once."""
        while (due := self.node.next_wakeup()) is not None and due <= now:
            self.now = max(self.now, due)
            self.node.wake(self.now)
            before = len(self.sent)
            self.collect()
            for to, message in self.sent[before:]:
                if isinstance(message, Ping) and to in answering:
                    self.hear(Ack(message.seq), source=to)
        self.now = now

    def take(self, kind: type) -> list[tuple[str, Any]]:
        """What was sent of this kind since last asked: to whom, and what. All else is dropped."""
        found = [(to, m) for to, m in self.sent if isinstance(m, kind)]
        self.sent.clear()
        return found

    def take_effects(self, kind: type) -> list[Any]:
        found = [effect for effect in self.effects if isinstance(effect, kind)]
        self.effects.clear()
        return found

    def events(self) -> list[tuple[str, list[str]]]:
        """The member events since last asked."""
        return [(e.event.name, [m.name for m in e.event.members]) for e in self.take_effects(Emit)]

    def results(self) -> list[Any]:
        return [e.result for e in self.take_effects(Finish)]

    def statuses(self) -> dict[str, str]:
        return {m.name: m.status.text for m in self.node.members()}

    # Streams.

    def accept(
        self, body: bytes, *, source: str = "n2", pieces: int = 65536, envelope: Envelope = PLAIN
    ) -> list[Any]:
        """A peer connects and sends this request in its envelope; what it reads back."""
        stream = self.node.stream_opened(self.now, address(source))
        data = seal_stream(body, envelope, calling=True, nonce=lambda: bytes(12))
        for i in range(0, len(data), pieces):
            self.node.stream_received(self.now, stream, data[i : i + pieces])
        return self.answer_on(stream, envelope)

    def answer_on(self, stream: int, envelope: Envelope = PLAIN) -> list[Any]:
        reader = StreamReader(envelope, accepting=False)
        self.effects.clear()
        self.collect()
        for effect in self.effects:
            if isinstance(effect, Write) and effect.stream == stream:
                reader.feed(effect.data)
        items = reader.read()
        while reader.pending:
            items += reader.read()
        return items

    def connects(self) -> list[tuple[int, str]]:
        """The streams it opened since last asked: number and to whom."""
        self.collect()
        opened = [(e.stream, f"n{e.to.host.rpartition('.')[2]}") for e in self.effects
                  if isinstance(e, Connect)]  # fmt: skip
        self.effects.clear()
        return opened

    def reply(self, stream: int, body: bytes, *, envelope: Envelope = PLAIN) -> None:
        data = seal_stream(body, envelope, calling=False, nonce=lambda: bytes(12))
        self.node.stream_received(self.now, stream, data)
        self.collect()

    def closed(self) -> list[int]:
        self.collect()
        return [effect.stream for effect in self.effects if isinstance(effect, Close)]
