"""Binds the sockets for gossip and RPC, before anything is started on them."""

import errno
import grp
import os
import socket
import stat

from serfd.config import split_service
from serfd.effects import Address
from serfd.errors import ConfigError

RECEIVE_BUFFER = 2 << 20
"""Bytes asked for; the system's default holds about 90 gossip packets."""
BACKLOG = 512
ANYWHERE = "0.0.0.0"
"""All addresses of this host, IPv6 ones too where the system has them, as real agents have it."""
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


def bind_unix(path: str, *, mode: int, group: str) -> socket.socket:
    """A unix socket for RPC clients, in the place of one that nobody listens on any more.

    Args:
        path: of its file.
        mode: the file's, from its first moment on.
        group: the file's, by name; empty: this process's.

    Raises:
        ConfigError: it says what to do.
    """
    group_id = find_group(group)
    folder = os.path.dirname(path)
    _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.settimeout(0)
    umask = os.umask(~mode & 0o777)
    try:
        bound.bind(path)
    except OSError as error:
        bound.close()
        hint = {
            errno.ENOENT: f"; make the directory {folder} first",
            errno.EACCES: f"; serfd must be allowed to make files in {folder}",
        }.get(error.errno or 0, "")
        raise _cannot_listen(path, os.strerror(error.errno or 0) + hint) from None
    finally:
        os.umask(umask)
    try:
        # Nobody can connect before it listens.
        os.chown(path, -1, group_id, follow_symlinks=False)
    except OSError as error:
        bound.close()
        os.unlink(path)
        raise ConfigError(
            f"rpc_socket_group {group!r}: {os.strerror(error.errno or 0)}; the user that serfd "
            "runs as must be in that group"
        ) from None
    bound.listen(BACKLOG)
    return bound


def find_group(name: str) -> int:
    """The number of rpc_socket_group; -1, which changes nothing, if it is empty.

    Raises ConfigError.
    """
    try:
        return grp.getgrnam(name).gr_gid if name else -1
    except (KeyError, ValueError):
        raise ConfigError(
            f"rpc_socket_group: there is no group {name!r} on this machine; `getent group` lists "
            "those there are"
        ) from None


def resolve_address(key: str, text: str, *, default_port: int) -> tuple[str, int]:
    """The IP address and the port that a setting means, whose hosts and ports may be names.

    No host is 0.0.0.0. Raises ConfigError.
    """
    host, port = split_service(text, key=key)
    return _resolve_host(key, host or ANYWHERE), _resolve_port(key, port or str(default_port))


def peer_address(host: str, port: int) -> Address:
    """Where a peer is, by what a socket says: one of both families shows IPv4 in IPv6's form."""
    return Address(host.removeprefix("::ffff:") if "." in host else host, port)


def _resolve_host(key: str, host: str) -> str:
    """The first address of a host name; addresses stay."""
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except OSError as error:
        why = error.strerror
    except UnicodeError:
        why = "it can be nobody's name"
    raise ConfigError(f"{key}: cannot resolve {host!r}: {why}")


def _resolve_port(key: str, port: str) -> int:
    """The number of a service, as getent(1) has it; numbers stay."""
    if port.isascii() and port.isdigit():
        return int(port)
    try:
        return socket.getservbyname(port.lower(), "tcp")
    except (OSError, UnicodeError):
        raise ConfigError(
            f"{key}: {port!r} is not a port, 0 to 65535, and no service that this machine knows; "
            "`getent services` lists those"
        ) from None


def _bind(key: str, host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    is_dual = host == "::" or (host == ANYWHERE and socket.has_dualstack_ipv6())
    family = socket.AF_INET6 if is_dual or ":" in host else socket.AF_INET
    bound = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_dual:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.settimeout(0)
        bound.bind(("::" if is_dual else host, port))
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


def _remove_stale(path: str) -> None:
    """Remove a socket whose process has ended."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # binding tells why
    if not stat.S_ISSOCK(mode):
        raise _cannot_listen(
            path, "there is a file that is no socket; remove it, or choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(0)
        try:
            asking.connect(path)
        except ConnectionRefusedError:
            pass  # what is left of one that has ended
        except BlockingIOError:
            raise _taken(path) from None
        except OSError as error:
            raise _cannot_listen(
                path, f"there is a socket already: {os.strerror(error.errno or 0)}"
            ) from None
        else:
            raise _taken(path)
    try:
        os.unlink(path)
    except OSError as error:
        raise _cannot_listen(
            path, f"the socket of an ended process cannot be removed: {error.strerror}"
        ) from None


def _taken(path: str) -> ConfigError:
    return _cannot_listen(path, f"{os.strerror(errno.EADDRINUSE)}; another agent may run there")


def _cannot_listen(path: str, why: str) -> ConfigError:
    return ConfigError(f"cannot listen on unix:{path} (rpc_addr): {why}")
