"""Go's LZW, both ways: least significant bit first, 8 bit literals, codes of 9 to 12 bits.

Real agents pack every stream and most gossip with it (gossip.md 3.2). No library writes this form,
so it is done here, in the few steps per code that Python can do fast: codes are cut out of a large
integer in batches, and the table holds whole strings.
"""

from serfd.errors import WireError

_CLEAR = 256
_END = 257
_WIDTH_MIN = 9
_WIDTH_MAX = 12
_TABLE_MAX = 1 << _WIDTH_MAX

_BATCH = 64
"""Codes unpacked between two looks at the limit: some 250 kB can be unpacked beyond it."""

_BLOCK = 512
"""Packed bytes turned into one integer: shifting longer ones costs more than the loop around."""

_FIRST = slice(1)

_START = [bytes((literal,)) for literal in range(256)] + [b"", b""]
"""The table after a clear. The empty strings stand at the two codes that are not data."""

_WRITER_MAX = 4095
"""The writer throws its table away when it has given out the code below this one."""

_RUNS = ((9, 0, 255), (10, 255, 767), (11, 767, 1791), (12, 1791, 3839))
"""Width of the codes between two clears, by position; the clear or end after them counts too."""


def compress(data: bytes) -> bytes:
    """Pack `data` into the very bytes Go's writer makes (gossip.md 3.2)."""
    packed = bytearray()
    bits = count = 0
    for codes in _matches(data):
        for width, start, stop in _RUNS:
            run = codes[start:stop]
            for block in range(0, len(run), _BATCH):
                for code in run[block : block + _BATCH]:
                    bits |= code << count
                    count += width
                whole = count >> 3
                packed += (bits & (1 << 8 * whole) - 1).to_bytes(whole, "little")
                bits >>= 8 * whole
                count &= 7
    if count:
        packed.append(bits)
    return bytes(packed)


def _matches(data: bytes) -> list[list[int]]:
    """The codes for `data`, a list for each life of the table, which a clear or the end closes."""
    codes: list[int] = []
    lives = [[_CLEAR], codes]
    table: dict[int, int] = {}
    newest = _END
    code = -1
    for byte in data:
        if code < 0:
            code = byte
            continue
        # A string is known by the code of all but its last byte, and that byte.
        string = code << 8 | byte
        longer = table.get(string)
        if longer is not None:
            code = longer
            continue
        codes.append(code)
        code = byte
        newest += 1
        if newest < _WRITER_MAX:
            table[string] = newest
            continue
        codes.append(_CLEAR)
        codes = []
        lives.append(codes)
        table = {}
        newest = _END
    if code >= 0:
        codes.append(code)
        # The last code counts like any other: it can widen the end code, or clear before it.
        if newest + 1 == _WRITER_MAX:
            codes.append(_CLEAR)
            codes = []
            lives.append(codes)
    codes.append(_END)
    return lives


def decompress(data: bytes, *, limit: int) -> bytes:
    """Unpack `data`, which holds the end code; bytes after that are ignored.

    Raises WireError if it unpacks to more than `limit` bytes, has an impossible code or no end.
    """
    decompressor = Decompressor(limit)
    unpacked = decompressor.feed(data)
    if not decompressor.finished:
        raise WireError("packed bytes stop without an end code")
    return unpacked


class Decompressor:
    """Unpacks bytes that arrive in pieces of any size, at most `limit` bytes altogether."""

    __slots__ = ("_bits", "_count", "_last", "_limit", "_room", "_table", "_width", "finished")

    def __init__(self, limit: int) -> None:
        self.finished = False
        """Whether the end code was read; what is fed after it is ignored."""
        self._limit = limit
        self._room = limit
        self._bits = 0
        self._count = 0
        self._clear()

    def feed(self, data: bytes) -> bytes:
        """Give what can be unpacked now; a code of which bits are missing waits for them.

        Raises WireError over the limit or for an impossible code; it is of no use after that.
        """
        unpacked = []
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            self._bits |= int.from_bytes(block, "little") << self._count
            self._count += 8 * len(block)
            while not self.finished and (codes := self._next_codes()):
                unpacked.append(self._strings(codes))
        return b"".join(unpacked)

    def _clear(self) -> None:
        self._table = _START.copy()
        self._width = _WIDTH_MIN
        self._last = b""

    def _next_codes(self) -> list[int]:
        """Some whole codes of the width in force; none if too few bits are there."""
        width = self._width
        many = min(self._count // width, _BATCH)
        if not self._last:
            many = min(many, 1)
        elif len(self._table) < _TABLE_MAX:
            # From the second code after a clear on, each adds an entry, and the entry that no code
            # of this width can name is the first of the next width.
            many = min(many, (1 << width) - len(self._table))
        chunk = self._bits & (1 << many * width) - 1
        mask = (1 << width) - 1
        return [chunk >> shift & mask for shift in range(0, many * width, width)]

    def _strings(self, codes: list[int]) -> bytes:
        """What `codes` stand for, up to the first that is a clear or the end."""
        table = self._table
        last = self._last
        strings = []
        for code in codes:
            try:
                string = table[code]
            except IndexError:
                # The only code that may be used before its entry is complete.
                if code != len(table) or not last:
                    raise WireError(f"packed bytes have the impossible code {code}") from None
                string = last + last[_FIRST]
            if not string:
                break
            strings.append(string)
            if last and len(table) < _TABLE_MAX:
                table.append(last + string[_FIRST])
            last = string
        self._last = last
        self._take(len(strings))
        if len(strings) < len(codes):
            self._take(1)
            if codes[len(strings)] == _END:
                self.finished = True
            else:
                self._clear()
        elif len(table) == 1 << self._width and self._width < _WIDTH_MAX:
            self._width += 1
        unpacked = b"".join(strings)
        self._room -= len(unpacked)
        if self._room < 0:
            raise WireError(f"packed bytes unpack to more than {self._limit} bytes")
        return unpacked

    def _take(self, codes: int) -> None:
        bits = codes * self._width
        self._bits >>= bits
        self._count -= bits
