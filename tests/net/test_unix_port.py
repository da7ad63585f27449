"""A port on a unix socket: who may connect stays as it was bound, and its file goes with it."""

import os
import socket
import stat

import pytest
from twisted.internet.defer import maybeDeferred
from twisted.internet.protocol import Factory, Protocol

from serfd.net.sockets import bind_unix
from serfd.net.unix_port import UnixPort


class Echo(Protocol):
    def dataReceived(self, data):
        self.transport.write(data)


class EchoFactory(Factory):
    protocol = Echo
    noisy = False
    stopped = False

    def stopFactory(self):
        self.stopped = True


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rpc.sock"


@pytest.fixture
def factory():
    return EchoFactory()


@pytest.fixture
def port(reactor, path, factory):
    found = UnixPort(bind_unix(str(path), mode=0o640, group=""), factory, reactor)
    found.startListening()
    return found


@pytest.fixture
def close(port, factory, run_until):
    """Closes the port, and fails if that did."""

    def close():
        results = []
        maybeDeferred(port.stopListening).addBoth(results.append)
        run_until(lambda: results)
        assert results == [None]
        assert factory.stopped

    return close


def test_it_serves_and_goes_with_its_file(port, path, run_until, close):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.setblocking(False)
        client.sendall(b"hello")
        heard = []

        def hears():
            try:
                heard.append(client.recv(100))
            except BlockingIOError:
                return False
            return True

        run_until(hears)
    assert heard == [b"hello"]
    close()
    assert not path.exists()


def test_its_file_keeps_the_mode_it_was_bound_with(port, path, close):
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    close()


def test_it_can_be_closed_when_its_file_is_gone(port, path, close):
    path.unlink()
    close()


def test_it_leaves_another_socket_that_has_taken_its_name(port, path, close):
    os.rename(path, path.with_suffix(".old"))
    with bind_unix(str(path), mode=0o600, group=""):
        close()
        assert path.is_socket()
