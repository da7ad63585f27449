"""Binds the sockets for gossip, before anything is started on them."""

import errno
import os
import socket

from serfd.errors import ConfigError

RECEIVE_BUFFER = 2 << 20
"""Bytes asked for; the system's default holds about 90 gossip packets."""
BACKLOG = 512
_TRIES = 10


def bind_gossip(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A TCP and a UDP socket on the same port; port 0: one that is free for both.

    Raises ConfigError naming the address, if it cannot be had.
    """
    tries = 1 if port else _TRIES
    while True:
        tries -= 1
        tcp = _bind("bind", host, port, socket.SOCK_STREAM)
        try:
            udp = _bind("bind", host, tcp.getsockname()[1], socket.SOCK_DGRAM)
        except ConfigError:
            tcp.close()
            if not tries:
                raise
            continue
        size = RECEIVE_BUFFER
        while udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < size and size > 65536:
            udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
            size //= 2
        return tcp, udp


def bind_rpc(host: str, port: int) -> socket.socket:
    """A TCP socket for RPC clients. Raises ConfigError."""
    return _bind("rpc_addr", host, port, socket.SOCK_STREAM)


def resolve_host(key: str, host: str) -> str:
    """The first address of a host name, as text; addresses stay. Raises ConfigError."""
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError as error:
        raise ConfigError(f"{key}: cannot resolve {host!r}: {error.strerror}") from None


def _bind(key: str, host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.settimeout(0)
        bound.bind((host, port))
        if kind == socket.SOCK_STREAM:
            bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        what = "TCP" if kind == socket.SOCK_STREAM else "UDP"
        hint = "; another agent may run there" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(
            f"cannot listen on {shown} ({what}, {key}): {os.strerror(error.errno or 0)}{hint}"
        ) from None
    return bound
