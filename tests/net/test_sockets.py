"""Sockets bound before anything is started on them."""

import grp
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from serfd.errors import ConfigError
from serfd.net.sockets import (
    bind_gossip,
    bind_rpc,
    bind_unix,
    find_group,
    peer_address,
    resolve_address,
)

HOST = "127.0.0.1"


def ports(*bound: socket.socket) -> list[int]:
    """Their ports; they are closed."""
    found = [each.getsockname()[1] for each in bound]
    for each in bound:
        each.close()
    return found


def test_gossip_gets_one_port_for_both_kinds():
    tcp, udp = bind_gossip(HOST, 0)
    assert (tcp.type, udp.type) == (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    assert not tcp.getblocking()
    assert not udp.getblocking()
    with socket.create_connection(tcp.getsockname(), timeout=10):
        pass  # it listens
    # As much as a burst needs, or as much as the system gives.
    assert udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= 128 * 1024
    one, same = ports(tcp, udp)
    assert one == same != 0


def test_a_port_that_is_given_is_taken(port):
    assert ports(*bind_gossip(HOST, port)) == [port, port]


@pytest.mark.parametrize(
    ("bound", "reached"),
    [("::1", ["::1"]), ("::", [HOST, "::1"]), ("0.0.0.0", [HOST, "::1"]), (HOST, [HOST])],
)
def test_ipv6_works_and_either_wildcard_takes_both(bound, reached):
    if not socket.has_dualstack_ipv6():
        pytest.skip("this system has no IPv6")
    tcp, udp = bind_gossip(bound, 0)
    with bind_rpc(bound, 0) as rpc:
        for host in reached:
            for listening in (tcp, rpc):
                address = host, listening.getsockname()[1]
                with socket.create_connection(address, timeout=10) as caller:
                    accepted, peer = listening.accept()
                    accepted.close()
                    assert peer_address(*peer[:2]) == caller.getsockname()[:2]
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as caller:
                caller.connect((host, udp.getsockname()[1]))
                caller.send(b"hello")
                data, source = udp.recvfrom(10)
                assert data == b"hello"
                assert peer_address(*source[:2]) == caller.getsockname()[:2]
    ports(tcp, udp)


@pytest.mark.parametrize(
    ("kind", "name"), [(socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")], ids=["TCP", "UDP"]
)
def test_a_gossip_port_that_is_taken_is_named_and_nothing_stays_open(port, kind, name):
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind((HOST, port))
        with pytest.raises(ConfigError) as failed:
            bind_gossip(HOST, port)
    assert str(failed.value) == (
        f"cannot listen on {HOST}:{port} ({name}, bind): Address already in use; "
        "another agent may run there"
    )
    ports(*bind_gossip(HOST, port))


def test_an_rpc_port_that_is_taken_is_named():
    with bind_rpc(HOST, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} \(TCP, rpc_addr\): Address alr"):
            bind_rpc(HOST, port)


@pytest.mark.parametrize("host", ["198.51.100.7", "2001:db8::1"])
def test_an_address_that_is_not_of_this_host_is_named(host):
    shown = f"[{host}]" if ":" in host else host
    with pytest.raises(ConfigError) as failed:
        bind_gossip(host, 7946)
    assert str(failed.value).startswith(f"cannot listen on {shown}:7946 (TCP, bind): ")


def test_a_port_can_be_taken_again_at_once_after_connections(port):
    address = (HOST, port)
    tcp, udp = bind_gossip(*address)
    with socket.create_connection(address, timeout=10):
        tcp.setblocking(True)
        accepted, _ = tcp.accept()
        accepted.close()  # this end closes first and stays in TIME_WAIT
    ports(tcp, udp)
    assert ports(*bind_gossip(*address)) == [port, port]


@pytest.mark.parametrize(
    ("shown", "address"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("fd00::7", "fd00::7"),
        ("::ffff:0:7", "::ffff:0:7"),
    ],
)
def test_an_ipv4_peer_is_shown_as_one_by_whatever_socket_it_came(shown, address):
    assert peer_address(shown, 7) == (address, 7)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.9", ("127.0.0.9", 7946)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
        (":7000", ("0.0.0.0", 7000)),
    ],
)
def test_addresses_stay_as_they_are_and_no_host_is_all(text, found):
    assert resolve_address("bind", text, default_port=7946) == found


def test_the_name_of_a_host_is_looked_up():
    host, _ = resolve_address("bind", "localhost", default_port=7946)
    assert host in ("127.0.0.1", "::1")


@pytest.mark.parametrize("name", ["http-alt", "HTTP-Alt"])
def test_the_name_of_a_service_is_looked_up(name):
    try:
        port = socket.getservbyname("http-alt", "tcp")
    except OSError:
        pytest.skip("this system knows no services: apt-get install netbase")
    assert resolve_address("bind", f"[::1]:{name}", default_port=7946) == ("::1", port)


@pytest.mark.parametrize(
    ("host", "why"), [("nobody.invalid", ""), ("a" * 64, "it can be nobody's name")]
)
def test_a_host_that_nobody_knows_is_named_with_its_setting(host, why):
    with pytest.raises(ConfigError, match=rf"^advertise: cannot resolve '{host}': {why}"):
        resolve_address("advertise", host, default_port=7946)


@pytest.mark.parametrize("port", ["nobodys-port", "-5", "+5", "²", "\udcff"])
def test_a_service_that_nobody_knows_is_named_with_its_setting(port):
    with pytest.raises(ConfigError) as failed:
        resolve_address("rpc_addr", f"127.0.0.1:{port}", default_port=7373)
    assert str(failed.value) == (
        f"rpc_addr: {port!r} is not a port, 0 to 65535, and no service that this machine knows; "
        "`getent services` lists those"
    )


# Unix sockets.


@pytest.fixture
def folder():
    """A directory that other users reach too."""
    made = Path(tempfile.mkdtemp(prefix="serfd-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@contextmanager
def as_nobody():
    """In this block without root's rights, if the tests have them."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def bind(path, *, mode=0o600, group=""):
    return bind_unix(str(path), mode=mode, group=group)


def refused(path, **how):
    """Why it cannot be bound."""
    with pytest.raises(ConfigError) as failed:
        bind(path, **how)
    return str(failed.value).replace(str(path), "PATH").replace(str(path.parent), "FOLDER")


def other_group():
    """A group that this process can give away a file to, if possible not its first one."""
    mine = os.getgroups() if os.geteuid() else [g.gr_gid for g in grp.getgrall()]
    return grp.getgrgid(next((g for g in mine if g != os.getegid()), os.getegid()))


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
@pytest.mark.parametrize("umask", [0, 0o077])
def test_a_unix_socket_has_its_mode_whatever_the_umask(folder, mode, umask):
    before = os.umask(umask)
    try:
        with bind(folder / "rpc.sock", mode=mode) as bound:
            assert not bound.getblocking()
            assert stat.S_IMODE((folder / "rpc.sock").stat().st_mode) == mode
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(bound.getsockname())  # it listens
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_its_group_is_set_by_name(folder):
    group = other_group()
    with bind(folder / "rpc.sock", mode=0o660, group=group.gr_name):
        assert (folder / "rpc.sock").stat().st_gid == group.gr_gid


def test_until_its_group_is_right_nobody_can_connect_and_its_mode_is_no_wider(folder):
    # Asked in the moment before the change of group, which Python tells of.
    code = """if True:
        import os, socket, stat, sys
        from serfd.net.sockets import bind_unix
        path, group = sys.argv[1:]

        def look(event, args):
            if event == "os.chown":
                with socket.socket(socket.AF_UNIX) as client:
                    mode = stat.S_IMODE(os.stat(path).st_mode)
                    print(oct(mode), os.strerror(client.connect_ex(path)))

        os.umask(0)
        sys.addaudithook(look)
        bind_unix(path, mode=0o640, group=group)
    """
    argv = [sys.executable, "-c", code, folder / "rpc.sock", other_group().gr_name]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == "0o640 Connection refused\n"


def test_the_socket_of_a_daemon_that_is_dead_is_replaced(folder):
    bind(folder / "rpc.sock").close()
    old = (folder / "rpc.sock").stat().st_ino, (folder / "rpc.sock").stat().st_ctime_ns
    with bind(folder / "rpc.sock") as bound, socket.socket(socket.AF_UNIX) as client:
        client.connect(bound.getsockname())
        new = (folder / "rpc.sock").stat().st_ino, (folder / "rpc.sock").stat().st_ctime_ns
    assert new != old


TAKEN = "cannot listen on unix:PATH (rpc_addr): Address already in use; another agent may run there"


def test_the_socket_of_a_living_one_is_not(folder):
    with bind(folder / "rpc.sock"):
        assert refused(folder / "rpc.sock") == TAKEN


def test_nor_that_of_one_that_does_not_keep_up_with_accepting(folder):
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(folder / "rpc.sock"))
        busy.listen(0)
        waiting.connect(busy.getsockname())
        assert refused(folder / "rpc.sock") == TAKEN


def make_file(path):
    path.write_text("precious")


def make_link(path):
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("make", [make_file, make_link, Path.mkdir])
def test_what_is_no_socket_is_left_alone(folder, make):
    make(folder / "rpc.sock")
    before = (folder / "rpc.sock").lstat()
    assert refused(folder / "rpc.sock") == (
        "cannot listen on unix:PATH (rpc_addr): there is a file that is no socket; remove it, or "
        "choose another path"
    )
    assert (folder / "rpc.sock").lstat() == before


def test_a_socket_of_another_kind_that_lives_is_left_alone(folder):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(folder / "rpc.sock"))
        assert refused(folder / "rpc.sock") == (
            "cannot listen on unix:PATH (rpc_addr): there is a socket already: "
            "Protocol wrong type for socket"
        )


def test_a_directory_that_is_not_there_is_named(folder):
    assert refused(folder / "none" / "rpc.sock") == (
        "cannot listen on unix:PATH (rpc_addr): No such file or directory; "
        "make the directory FOLDER first"
    )


def test_a_directory_that_may_not_be_written_to_is_named(folder):
    folder.chmod(0o555)
    with as_nobody():
        assert refused(folder / "rpc.sock") == (
            "cannot listen on unix:PATH (rpc_addr): Permission denied; "
            "serfd must be allowed to make files in FOLDER"
        )


def test_a_dead_socket_in_somebody_elses_directory_is_told(folder):
    bind(folder / "rpc.sock", mode=0o666).close()
    folder.chmod(0o555)
    with as_nobody():
        assert refused(folder / "rpc.sock") == (
            "cannot listen on unix:PATH (rpc_addr): the socket of an ended process cannot be "
            "removed: Permission denied"
        )
    folder.chmod(0o755)


@pytest.mark.parametrize("name", ["no-such-group", "nul\0"])
def test_a_group_that_nobody_knows_is_named_and_nothing_is_made(folder, name):
    assert refused(folder / "rpc.sock", group=name) == (
        f"rpc_socket_group: there is no group {name!r} on this machine; `getent group` lists "
        "those there are"
    )
    assert list(folder.iterdir()) == []


def test_a_group_that_may_not_be_given_is_told_and_nothing_stays(folder):
    folder.chmod(0o777)
    mine = {os.getegid(), *os.getgroups()}
    foreign = next(group.gr_name for group in grp.getgrall() if group.gr_gid not in mine)
    with as_nobody():
        said = refused(folder / "rpc.sock", group=foreign)
    assert said == (
        f"rpc_socket_group {foreign!r}: Operation not permitted; the user that serfd runs as must "
        "be in that group"
    )
    assert list(folder.iterdir()) == []


def test_no_group_is_no_change():
    assert find_group("") == -1
