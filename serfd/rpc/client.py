"""A blocking client of Serf's RPC, without Twisted.

Its import is a good part of the time a `serfctl` takes, hence no typing, no dataclasses, and
`_socket` below.
"""

from __future__ import annotations

# `socket` wraps this module and imports selectors and enum for it: 4.6 of 18 ms that a `serfctl`
# would take. Sockets as the kernel knows them are enough here.
import _socket
import os

from msgpack import Packer, Unpacker, UnpackException

from serfd.errors import SerfdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from serfd.rpc.client_tls import SecureSocket

REPLY_SIZE_MAX = 64 << 20
"""Bytes of one message from the agent; 100,000 members take some 16 MB."""

LIST_LENGTH_MAX = 1 << 20
"""Entries of one list or map from the agent."""

RECORDS_EARLY_MAX = 512
"""Records kept while another request waits for its reply; more are dropped, as Go's client does."""

_RECEIVE_SIZE = 1 << 16

# Every other command is answered by a header alone (rpc.md 4).
_ANSWERED_BY_BODY = frozenset(
    (
        "get-coordinate", "install-key", "join", "list-keys", "members", "members-filtered",
        "plugins", "remove-key", "stats", "use-key",
    )
)  # fmt: skip

# Errors that come without the command's body: it was not even looked at (rpc.md 3).
_REFUSALS = frozenset(("Authentication required", "Handshake required", "Unsupported command"))

_UNIX = "unix:"
_SOCKET_PATH_MAX = 107

_TOKEN_ADVICE = "The agent's rpc_auth is asked for: give it with -rpc-auth or SERF_RPC_AUTH."
_ADVICE = {
    "Authentication required": _TOKEN_ADVICE,
    "Unsupported command": "The agent does not know it: it is not serfd, or another version.",
}
_NOTHING = object()


class RpcError(SerfdError):
    """The agent refused, or answered with nonsense. The text is the agent's own, if it gave one."""

    def __init__(self, reason: str, body: dict[str, Any] | None = None) -> None:
        self.reason = reason
        self.advice = _ADVICE.get(reason, "")
        """What to do about it; may be empty."""
        self.body = body or {}
        """What the agent had to say all the same; of key commands and `join`."""
        super().__init__(reason)


class ConnectionClosed(RpcError):
    """The agent closed the connection before it answered."""

    def __init__(self) -> None:
        super().__init__("client closed")


class CannotConnect(SerfdError):
    """There is no agent that would talk to us. The text's last line says what to do."""

    def __init__(self, reason: str, advice: str) -> None:
        self.reason = reason
        """As Go's client words it: `dial tcp 127.0.0.1:7373: connect: connection refused`."""
        self.advice = advice
        super().__init__(f"{reason}\n{advice}")


class Tls:
    """Paths of PEM files for a connection over TLS."""

    __slots__ = ("authority", "certificate", "key")

    def __init__(self, authority: str, certificate: str = "", key: str = "") -> None:
        self.authority = authority
        """The certificate of the authority that must have signed the agent's."""
        self.certificate = certificate
        """Ours, for an agent that asks for one; may be empty."""
        self.key = key or certificate
        """Its key; left out if it stands in the certificate's file."""


class Client:
    """One connection to an agent, serfd's or Serf's. Requests are answered one by one, in order."""

    def __init__(
        self,
        address: str,
        auth: str = "",
        timeout: float = 10.0,
        *,
        tls: Tls | None = None,
        waiting: Callable[[], None] | None = None,
        patience: float = 1.0,
    ) -> None:
        """Connect. Handshake and token travel with the first command, in one write.

        Args:
            address: `host:port`, `[v6]:port` or `unix:path`.
            auth: the agent's rpc_auth; empty if it has none.
            timeout: limit in seconds for connecting and for each write. Reading has none: a leave
                takes as long as it takes.
            tls: speak TLS, and with whom; a unix socket does without.
            waiting: called once for every request whose reply has not come after `patience`
                seconds.

        Raises:
            CannotConnect: the address is wrong, or nobody listens there, or TLS failed.
        """
        self._address = address
        self._timeout = timeout
        self._waiting = waiting
        self._patience = patience
        self._notice: Callable[[], None] | None = None
        self._pack = Packer(use_bin_type=True, unicode_errors="surrogateescape").pack
        self._unpacker = Unpacker(
            raw=False,
            unicode_errors="surrogateescape",
            max_buffer_size=REPLY_SIZE_MAX,
            max_array_len=LIST_LENGTH_MAX,
            max_map_len=LIST_LENGTH_MAX,
        )
        self._seq = 0
        self._unsent = b""
        self._greetings: list[int] = []
        self._streams: set[int] = set()
        self._early: list[tuple[int, dict[str, Any]]] = []
        self._socket: _socket.socket | SecureSocket = _connect(address, timeout)
        if tls is not None and not address.startswith(_UNIX):
            from serfd.rpc.client_tls import SecureSocket

            self._socket = SecureSocket(self._socket, address, _split(address)[0], tls)
        self._greetings.append(self._queue("handshake", {"Version": 1}))
        if auth:
            self._greetings.append(self._queue("auth", {"AuthKey": auth}))

    def __enter__(self) -> Client:
        """Closed at the end of the `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the connection; the agent ends its streams."""
        self._socket.close()

    # Any command.

    def call(self, command: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask, wait for the answer, and return its body (rpc.md 4); `{}` if it has none.

        Bytes may come as text, from a peer that speaks the older msgpack.

        Raises:
            RpcError: the agent's error text.
            ConnectionClosed: the agent closed instead of answering: it stops, or it could not read
                the request, or a pattern of `members-filtered` is no regex.
            CannotConnect: at the first command: the token is wrong, or this is not an agent's RPC.
        """
        return self._ask(command, body)[1]

    def start(self, command: str, body: Mapping[str, Any]) -> int:
        """Open a stream by `stream`, `monitor` or `query`; returns the Seq of its records.

        Raises: as `call`.
        """
        seq = self._ask(command, body)[0]
        self._streams.add(seq)
        return seq

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Seq and body of every record of all open streams, as they come.

        Raises:
            ConnectionClosed: the agent is gone. There is no other end.
        """
        while True:
            while self._early:
                yield self._early.pop(0)
            seq, _ = self._read_header()
            if seq in self._streams:
                yield seq, self._read_map()

    def stream(self, command: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Open the connection's only stream; returns the bodies of its records.

        Raises: as `start` and `records`.
        """
        seq = self.start(command, body)
        return (record for found, record in self.records() if found == seq)

    def stop(self, seq: int) -> None:
        """End a stream or monitor. Raises: as `call`."""
        self.call("stop", {"Stop": seq})
        self._streams.discard(seq)

    # Commands by name. Each raises as `call`.

    def join(self, addresses: Sequence[str], *, replay: bool = False) -> int:
        """Join a cluster; returns the number of addresses that answered."""
        count = self.call("join", {"Existing": list(addresses), "Replay": replay}).get("Num")
        return count if isinstance(count, int) else 0

    def members(self) -> list[dict[str, Any]]:
        """All members, unordered, as maps with the fields of rpc.md 5."""
        return _list(self.call("members"), "Members")

    def members_filtered(
        self, *, tags: Mapping[str, str] | None = None, status: str = "", name: str = ""
    ) -> list[dict[str, Any]]:
        """The members that match all these patterns (rpc.md 5); an empty one matches all."""
        body = {"Name": name, "Status": status, "Tags": dict(tags or {})}
        return _list(self.call("members-filtered", body), "Members")

    def leave(self) -> None:
        """Let the agent leave its cluster and stop."""
        self.call("leave")

    def force_leave(self, name: str, *, prune: bool = False) -> None:
        """Declare a failed member as left; with `prune` forget it altogether."""
        self.call("force-leave", {"Node": name, "Prune": prune})

    def tags(self, tags: Mapping[str, str], *, delete: Sequence[str] = ()) -> None:
        """Delete tags of the agent, then set others."""
        self.call("tags", {"DeleteTags": list(delete), "Tags": dict(tags)})

    def plugins(self) -> list[dict[str, Any]]:
        """The agent's plugins, in its order; a real Serf agent does not know this command."""
        return _list(self.call("plugins"), "Plugins")

    def stats(self) -> dict[str, dict[str, str]]:
        """What the agent tells about itself: sections of names and values (rpc.md 5)."""
        stats = self.call("stats")
        for section, values in stats.items():
            if not isinstance(values, dict):
                raise RpcError(f"section {section} of stats is no map but {type(values).__name__}")
        return stats

    def event(self, name: str, payload: bytes | None = None, *, coalesce: bool = True) -> None:
        """Tell the whole cluster something."""
        self.call("event", {"Coalesce": coalesce, "Name": name, "Payload": payload})

    def query(
        self,
        name: str,
        payload: bytes | None = None,
        *,
        nodes: Sequence[str] | None = None,
        tags: Mapping[str, str] | None = None,
        want_ack: bool = False,
        relay_factor: int = 0,
        timeout: float = 0.0,
        wait_all: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Ask the whole cluster something; asked when this returns, which gives the answers.

        They are maps of `Type`, `ack` or `response`, `From` and `Payload` (rpc.md 8). They end when
        the query does: serfd ends it when all have answered, Serf always waits for the timeout, and
        so does serfd with `wait_all`. Other streams of the connection are not heard meanwhile.

        Args:
            name: of the query.
            payload: up to about 1,000 bytes.
            nodes: only these answer.
            tags: only whose tags match these regular expressions.
            want_ack: let them all say that they have heard it.
            relay_factor: so many others pass each answer on, 0 to 255.
            timeout: seconds; 0 is the agent's own, which depends on the size of the cluster.
            wait_all: as above.
        """
        body = {
            "FilterNodes": None if nodes is None else list(nodes),
            "FilterTags": None if tags is None else dict(tags),
            "Name": name,
            "Payload": payload,
            "RelayFactor": relay_factor,
            "RequestAck": want_ack,
            "Timeout": round(timeout * 1e9),
        }
        if wait_all:
            body["WaitAll"] = True
        return self._answers(self.start("query", body))

    def respond(self, number: int, payload: bytes | None = None) -> None:
        """Answer a query that a stream of this connection told of, by its record's `ID`."""
        self.call("respond", {"ID": number, "Payload": payload})

    def install_key(self, key: str) -> dict[str, Any]:
        """Give all members one more key, in base64; returns what they said (rpc.md 4).

        If some refused, RpcError has that in its `body`. So it is with the other key commands.
        """
        return self.call("install-key", {"Key": key})

    def use_key(self, key: str) -> dict[str, Any]:
        """Let all members encrypt with this key, which they must have."""
        return self.call("use-key", {"Key": key})

    def remove_key(self, key: str) -> dict[str, Any]:
        """Take a key, which must not be in use, from all members."""
        return self.call("remove-key", {"Key": key})

    def list_keys(self) -> dict[str, Any]:
        """All keys in base64, and how many members have each."""
        return self.call("list-keys")

    def coordinate(self, name: str) -> dict[str, Any] | None:
        """Where a member is in the network: `Vec`, `Height`, `Adjustment`, `Error` (rpc.md 4).

        None if that is not known.
        """
        found = self.call("get-coordinate", {"Node": name})
        return found.get("Coord") if found.get("Ok") else None

    def monitor(self, level: str) -> Iterator[str]:
        """The agent's log from `level` up: the last 512 lines, then as it grows."""
        records = self.stream("monitor", {"LogLevel": level})
        return (str(record.get("Log", "")) for record in records)

    # Steps.

    def _ask(self, command: str, body: Mapping[str, Any] | None) -> tuple[int, dict[str, Any]]:
        seq = self._queue(command, body)
        self._notice = self._waiting
        self._send()
        self._greet()
        error = self._reply_to(seq)
        answer = {}
        if command in _ANSWERED_BY_BODY and error not in _REFUSALS:
            answer = self._read_map()
        self._notice = None
        if error:
            raise RpcError(error, answer)
        return seq, answer

    def _answers(self, query: int) -> Iterator[dict[str, Any]]:
        self._notice = self._waiting
        try:
            for seq, record in self.records():
                if seq != query:
                    continue
                if record.get("Type") == "done":
                    return
                # Real agents end some queries with answers of nobody.
                if record.get("From"):
                    yield record
        finally:
            self._notice = None
            self._streams.discard(query)

    def _queue(self, command: str, body: Mapping[str, Any] | None) -> int:
        self._seq += 1
        self._unsent += self._pack({"Command": command, "Seq": self._seq})
        if body is not None:
            self._unsent += self._pack(body)
        return self._seq

    def _send(self) -> None:
        data, self._unsent = self._unsent, b""
        self._socket.settimeout(self._timeout)
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise RpcError(f"write {_network(self._address)}: i/o timeout") from None
        except OSError:
            raise ConnectionClosed from None

    def _greet(self) -> None:
        """Take the answers to handshake and token, which stand before the first command's."""
        while self._greetings:
            advice = f"Is {self._address} the RPC address of a Serf agent?"
            if isinstance(self._socket, _socket.socket) and not self._address.startswith(_UNIX):
                advice += " If it speaks TLS: -rpc-tls-ca FILE or SERFD_RPC_TLS_CA."
            try:
                error = self._reply_to(self._greetings[0])
            except RpcError as failure:
                raise CannotConnect(failure.reason, advice) from None
            if error:
                wrong_token = error == "Invalid authentication token"
                raise CannotConnect(error, _TOKEN_ADVICE if wrong_token else advice)
            del self._greetings[0]

    def _reply_to(self, seq: int) -> str:
        """The error text of the reply to request `seq`."""
        while True:
            found, error = self._read_header()
            if found == seq:
                return error
            if found in self._streams:
                record = self._read_map()
                if len(self._early) < RECORDS_EARLY_MAX:
                    self._early.append((found, record))
            # Anything else is a real agent's second answer to a request it refused (rpc.md 2).

    def _read_header(self) -> tuple[int, str]:
        header = self._read_map()
        seq = header.get("Seq")
        return seq if isinstance(seq, int) else 0, str(header.get("Error") or "")

    def _read_map(self) -> dict[str, Any]:
        try:
            while (found := next(self._unpacker, _NOTHING)) is _NOTHING:
                self._unpacker.feed(self._receive())
        except (ValueError, UnpackException) as error:
            raise RpcError(f"{self._address} does not speak Serf's RPC: {error}") from None
        if not isinstance(found, dict):
            raise RpcError(
                f"{self._address} does not speak Serf's RPC: "
                f"expected a map, found {type(found).__name__}"
            )
        return found

    def _receive(self) -> bytes:
        if self._notice is not None:
            self._socket.settimeout(self._patience)
            try:
                return self._receive_now()
            except TimeoutError:
                notice, self._notice = self._notice, None
                notice()
        self._socket.settimeout(None)
        return self._receive_now()

    def _receive_now(self) -> bytes:
        try:
            data = self._socket.recv(_RECEIVE_SIZE)
        except OSError as error:
            # Patience that is at its end has no number.
            if error.errno is None:
                raise
            raise ConnectionClosed from None
        if not data:
            raise ConnectionClosed
        return data


def address_text(member: Mapping[str, Any]) -> str:
    """`10.0.0.7:7946`, `[fd00::7]:7946`: where a member map of rpc.md 5 gossips."""
    addr = member.get("Addr") or b""
    if isinstance(addr, str):
        addr = addr.encode("utf-8", "surrogateescape")
    port = member.get("Port") or 0
    # Agents bound to 0.0.0.0 gossip their IPv4 address in its IPv6 form.
    if len(addr) == 16 and addr.startswith(b"\0\0\0\0\0\0\0\0\0\0\xff\xff"):
        addr = addr[12:]
    if len(addr) == 4:
        return f"{_socket.inet_ntoa(addr)}:{port}"
    if len(addr) == 16:
        return f"[{_socket.inet_ntop(_socket.AF_INET6, addr)}]:{port}"
    return f"?{addr.hex()}:{port}"


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """The round trip to expect between two coordinates as `coordinate` gives them, in seconds.

    The same as `serfd.serf.coordinates.distance`, which a command line tool that is to start
    quickly cannot import. Raises ValueError or OverflowError for coordinates that are nonsense.
    """
    total = 0.0
    for x, y in zip(a["Vec"], b["Vec"], strict=True):
        total += (x - y) * (x - y)
    raw: float = total**0.5 + a["Height"] + b["Height"]
    adjusted = raw + a["Adjustment"] + b["Adjustment"]
    return int((adjusted if adjusted > 0 else raw) * 1_000_000_000) / 1_000_000_000


def _list(body: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    found = body.get(field)
    if found is None:
        return []
    if not isinstance(found, list):
        raise RpcError(f"{field} in the agent's answer is no list but {type(found).__name__}")
    return found


def _connect(address: str, timeout: float) -> _socket.socket:
    """A connected socket. Raises CannotConnect with Go's words."""
    if address.startswith(_UNIX):
        return _connect_unix(address.removeprefix(_UNIX), timeout)
    host, port = _split(address)
    try:
        # Bytes, because a text would be sent through the idna codec: 4 ms for its import.
        found = _socket.getaddrinfo(
            host.encode() if host.isascii() else host, port, 0, _socket.SOCK_STREAM
        )
    except (OSError, UnicodeError) as error:
        if isinstance(error, _socket.gaierror) and error.errno == _socket.EAI_SERVICE:
            raise _bad_address(f"address tcp/{port}: unknown port") from None
        raise _bad_address(f"lookup {host}: no such host") from None
    failure = _bad_address(f"lookup {host}: no such host")
    for family, kind, protocol, _, where in found:
        try:
            return _open(_socket.socket(family, kind, protocol), where, timeout)
        except OSError as error:
            failure = _refused(where, error)
    raise failure


def _open(
    connection: _socket.socket, where: tuple[Any, ...] | str, timeout: float
) -> _socket.socket:
    try:
        connection.settimeout(timeout)
        connection.connect(where)
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_unix(path: str, timeout: float) -> _socket.socket:
    size = len(os.fsencode(path))
    if not 0 < size <= _SOCKET_PATH_MAX:
        raise CannotConnect(
            f"dial unix {path}: a path of {size} bytes",
            f"Expected -rpc-addr unix:PATH, with a path of at most {_SOCKET_PATH_MAX} bytes.",
        )
    try:
        return _open(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM), path, timeout)
    except PermissionError as error:
        advice = (
            "The agent's rpc_socket_mode and rpc_socket_group say who may connect: become a member "
            f"of the group that `ls -l {path}` shows, or its user."
        )
        reason = _reason(error)
    except OSError as error:
        advice = "Is serfd running there? Its rpc_addr says where the socket is."
        reason = _reason(error)
    raise CannotConnect(f"dial unix {path}: {reason}", advice)


def _refused(where: tuple[Any, ...], error: OSError) -> CannotConnect:
    place = f"[{where[0]}]:{where[1]}" if len(where) == 4 else f"{where[0]}:{where[1]}"
    return CannotConnect(
        f"dial tcp {place}: {_reason(error)}",
        "Is serfd running there? If it is elsewhere, say where: -rpc-addr HOST:PORT or unix:PATH, "
        "or SERF_RPC_ADDR.",
    )


def _reason(error: OSError) -> str:
    return f"connect: {os.strerror(error.errno).lower()}" if error.errno else "i/o timeout"


def _network(address: str) -> str:
    """An address as Go writes it: `tcp 127.0.0.1:7373`, `unix /run/serfd/rpc.sock`."""
    return address.replace(":", " ", 1) if address.startswith(_UNIX) else f"tcp {address}"


def _split(address: str) -> tuple[str, str]:
    """`host:port`, `[v6]:port`, `:port` → host and port. Raises CannotConnect."""
    if not address:
        raise _bad_address("missing address")
    host, colon, port = address.rpartition(":")
    if not colon or not port or port[-1] == "]":
        raise _bad_address(f"address {address}: missing port in address")
    if host[:1] == "[" and host[-1:] == "]":
        host = host[1:-1]
    elif ":" in host:
        raise _bad_address(f"address {address}: too many colons in address")
    if port.isdigit() and not (port.isascii() and len(port) <= 5 and int(port) <= 65535):
        raise _bad_address(f"address {port}: invalid port")
    # As in Go, no host is this host.
    return host or "localhost", port


def _bad_address(reason: str) -> CannotConnect:
    return CannotConnect(
        f"dial tcp: {reason}",
        "Expected -rpc-addr HOST:PORT, [IPV6]:PORT or unix:PATH, as 127.0.0.1:7373.",
    )
