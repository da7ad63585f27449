"""What packets and streams are wrapped in alike: label, sealing, compression (gossip.md 3)."""

from dataclasses import dataclass, field

from serfd.errors import WireError
from serfd.wire import lzw
from serfd.wire.gomsgpack import pack, raw, u8, unpack
from serfd.wire.sealing import SEALING_OVERHEAD, Keyring
from serfd.wire.swim_messages import COMPRESS, HAS_LABEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """How this node wraps what it sends, and what it expects."""

    label: bytes = b""
    """At most 255 bytes; peers with another label are not heard. Serf itself sets none."""
    keyring: Keyring = field(default_factory=Keyring)
    """May get and lose keys while in use. Encryption is on while it has any."""
    compress: bool = True
    """Whether to pack what is sent. What is received is unpacked in any case."""
    verify_incoming: bool = True
    """False takes plain messages too although there are keys."""
    verify_outgoing: bool = True
    """False sends plain although there are keys."""

    def __post_init__(self) -> None:
        """Check what the header's length byte can say."""
        assert len(self.label) <= 255

    @property
    def label_header(self) -> bytes:
        """What goes before packets and requests: nothing if there is no label (gossip.md 3.5)."""
        return bytes((HAS_LABEL, len(self.label))) + self.label if self.label else b""

    @property
    def seals(self) -> bool:
        """Whether what is sent gets sealed now."""
        return self.verify_outgoing and len(self.keyring) > 0

    @property
    def overhead(self) -> int:
        """Bytes to keep free in every packet for label and sealing (gossip.md 8.1, 8.3)."""
        label = 2 + len(self.label) if self.label else 0
        return label + (SEALING_OVERHEAD if self.seals else 0)


def compressed(message: bytes) -> bytes:
    """`message` as a compress message, which can be longer (gossip.md 3.2)."""
    return b"\x09" + pack({"Algo": 0, "Buf": lzw.compress(message)})


def decompressed(message: bytes, *, limit: int) -> bytes:
    """The message in a compress message, at most `limit` bytes of it. Raises WireError."""
    assert message[0] == COMPRESS
    fields = unpack(message[1:], "compress")
    check_algorithm(u8(fields, "compress", b"Algo"))
    return lzw.decompress(raw(fields, "compress", b"Buf"), limit=limit)


def check_algorithm(number: int) -> None:
    """Raise WireError for anything but LZW, the only compression there is."""
    if number != 0:
        raise WireError(f"compress: unknown algorithm {number}")
