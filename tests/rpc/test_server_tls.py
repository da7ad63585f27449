"""RPC within TLS: whom it serves, what it bounds, and what it says of wrong files.

The client is Python's own ssl, without a socket: bytes are carried by hand, and time is a number.
"""

import ssl
from datetime import timedelta

import msgpack
import pytest
from certificates import Authority
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import ITCPTransport
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from zope.interface import implementer

from serfd.config import RpcTlsConfig
from serfd.errors import ConfigError
from serfd.rpc.server import (
    CLIENTS_MAX,
    CLOSE_TIME_MAX,
    HANDSHAKE_TIME_MAX,
    QUEUED_RECORDS_MAX,
)
from serfd.rpc.server_tls import ServerTls
from serfd.serf.events import UserEvent

OK = {"Error": "", "Seq": 1}
BUFFERED_MAX = 200_000
"""Bytes; Twisted's own buffers for a connection within TLS."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def settings(authority):
    certificate, key = authority.sign("server", "127.0.0.1")
    return RpcTlsConfig(certificate=str(certificate), private_key=str(key))


@pytest.fixture
def factory(serve, settings):
    """The one daemon's server."""
    return ServerTls(settings).around(serve())


@pytest.fixture
def trusting(authority):
    """What a client needs that trusts the authority."""
    return ssl.create_default_context(cafile=authority.file)


@implementer(ITCPTransport)
class Transport(StringTransport):
    options = ()

    def setTcpNoDelay(self, enabled):
        self.options += ("no delay",) * enabled

    def setTcpKeepAlive(self, enabled):
        self.options += ("keep alive",) * enabled


class TlsClient:
    """A client's end."""

    def __init__(self, factory, context, *, host="127.0.0.1"):
        # Lenient as Twisted's own: it may be resumed when it is about to close.
        self.transport = Transport(lenient=True)
        self.protocol = factory.buildProtocol(IPv4Address("TCP", "127.0.0.1", 47080))
        self._clock = factory.wrappedFactory.clock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        self.data = b""
        """All that was received and not yet looked at."""
        self.hears_goodbye = False
        self.protocol.makeConnection(self.transport)

    def carry(self):
        """Everything there is, both ways; raises what TLS has to complain of."""
        while True:
            self._clock.advance(0)
            self._in.write(self.transport.value())
            self.transport.clear()
            try:
                self._read()
            finally:
                sent = self._out.read()
                if sent and not self.transport.disconnecting:
                    self.protocol.dataReceived(sent)
            if not sent and not self.transport.value():
                return

    def _read(self):
        try:
            if self.tls.version() is None:
                self.tls.do_handshake()
            while said := self.tls.read(65536):
                self.data += said
            self.hears_goodbye = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.hears_goodbye = True

    def shake_hands(self):
        self.carry()
        assert self.ask("handshake", {"Version": 1}, seq=0) == [{"Error": "", "Seq": 0}]
        return self

    def ask(self, command, body=None, *, seq=1):
        parts = [{"Command": command, "Seq": seq}, *([] if body is None else [body])]
        self.tls.write(b"".join(map(msgpack.packb, parts)))
        self.carry()
        return self.received()

    def received(self):
        """The objects that came since the last look."""
        unpacker = msgpack.Unpacker()
        unpacker.feed(self.data)
        self.data = b""
        return list(unpacker)

    def hang_up(self):
        self.protocol.connectionLost(Failure(ConnectionDone()))


# Whom it serves.


def test_it_serves_within_tls_1_3(factory, trusting):
    client = TlsClient(factory, trusting).shake_hands()
    assert client.tls.version() == "TLSv1.3"
    assert client.transport.options == ("no delay", "keep alive")
    header, body = client.ask("members")
    assert header == OK
    assert [member["Name"] for member in body["Members"]] == ["n1", "n2"]


def test_it_serves_clients_of_tls_1_2_with_forward_secrecy(factory, trusting):
    trusting.maximum_version = ssl.TLSVersion.TLSv1_2
    trusting.set_ciphers("ALL:@SECLEVEL=0")
    client = TlsClient(factory, trusting).shake_hands()
    name, version, _ = client.tls.cipher()
    assert version == "TLSv1.2"
    assert name.startswith("ECDHE-")
    assert "GCM" in name or "CHACHA20" in name


def refused(factory, context, lines):
    """What the client is told, and the log."""
    client = TlsClient(factory, context)
    with pytest.raises(ssl.SSLError) as failed:
        client.shake_hands()
    assert client.data == b""
    assert client.transport.disconnecting
    client.hang_up()
    prefix = "[WARN] agent.ipc: TLS with client 127.0.0.1:47080 failed: [('SSL routines', '', '"
    assert lines[-1].startswith(prefix)
    return failed.value.reason, lines[-1].removeprefix(prefix).removesuffix("')]")


def test_older_tls_is_refused(factory, trusting, lines):
    with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
        trusting.minimum_version = trusting.maximum_version = ssl.TLSVersion.TLSv1_1
    trusting.set_ciphers("ALL:@SECLEVEL=0")
    told, logged = refused(factory, trusting, lines)
    assert told == "TLSV1_ALERT_PROTOCOL_VERSION"
    assert logged == "unsupported protocol"


def test_ciphers_without_forward_secrecy_are_refused(factory, trusting, lines):
    trusting.maximum_version = ssl.TLSVersion.TLSv1_2
    trusting.set_ciphers("kRSA:ECDHE+AES+SHA1:@SECLEVEL=0")
    _, logged = refused(factory, trusting, lines)
    assert logged == "no shared cipher"


def test_a_client_without_tls_is_hung_up_on(factory, trusting, lines):
    client = TlsClient(factory, trusting)
    client.protocol.dataReceived(msgpack.packb({"Command": "handshake", "Seq": 1}))
    assert client.transport.disconnecting
    client.hang_up()
    assert "TLS with client 127.0.0.1:47080 failed: " in lines[-1]


# Clients' certificates.


@pytest.fixture
def picky(serve, settings, authority):
    """A server that wants to see a certificate."""
    asking = RpcTlsConfig(
        certificate=settings.certificate,
        private_key=settings.private_key,
        client_authority=str(authority.file),
    )
    return ServerTls(asking).around(serve())


def test_a_client_with_a_certificate_of_the_authority_is_served(picky, authority, trusting):
    trusting.load_cert_chain(*authority.sign("alice", client=True))
    assert TlsClient(picky, trusting).shake_hands().ask("members")[0] == OK


def test_a_client_without_certificate_is_not(picky, trusting, lines):
    assert refused(picky, trusting, lines) == (
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "peer did not return a certificate",
    )


@pytest.mark.parametrize(
    "sign",
    [
        lambda own, _: own.sign("expired", client=True, valid=timedelta(hours=-1)),
        lambda own, _: own.sign("not-for-clients"),
        lambda _, foreign: foreign.sign("foreign", client=True),
    ],
    ids=["expired", "not for clients", "of another authority"],
)
def test_nor_one_with_a_certificate_that_is_not_good(
    picky, trusting, authority, tmp_path, sign, lines
):
    trusting.load_cert_chain(*sign(authority, Authority(tmp_path, "stranger")))
    _, logged = refused(picky, trusting, lines)
    assert logged == "certificate verify failed"


# What is bounded.


def test_a_client_that_never_finishes_its_tls_handshake_is_cut(factory, trusting, clock, lines):
    silent, half = TlsClient(factory, trusting), TlsClient(factory, trusting)
    with pytest.raises(ssl.SSLWantReadError):
        half.tls.do_handshake()
    half.protocol.dataReceived(half._out.read()[:100])
    polite = TlsClient(factory, trusting).shake_hands()
    clock.advance(HANDSHAKE_TIME_MAX - 1)
    assert not silent.transport.disconnected
    assert not half.transport.disconnected
    clock.advance(1)
    assert silent.transport.disconnected
    assert half.transport.disconnected
    assert not polite.transport.disconnecting
    assert lines[-1] == "[WARN] agent.ipc: Closing client: 127.0.0.1:47080: no handshake in 30 s"


def test_one_that_shakes_hands_in_tls_only_is_cut_too(factory, trusting, clock):
    client = TlsClient(factory, trusting)
    client.carry()
    clock.advance(HANDSHAKE_TIME_MAX)
    client.carry()
    assert client.hears_goodbye


def test_there_is_a_limit_of_clients(factory, trusting, lines):
    clients = [TlsClient(factory, trusting) for _ in range(CLIENTS_MAX)]
    assert factory.buildProtocol(IPv4Address("TCP", "10.0.0.1", 5)) is None
    refused = "Refused client: 10.0.0.1:5: 256 are connected, no more may"
    assert lines[-1] == f"[WARN] agent.ipc: {refused}"
    clients[0].hang_up()
    assert TlsClient(factory, trusting).shake_hands()


def test_a_client_that_does_not_read_gets_what_is_kept_for_it_and_no_more(
    factory, trusting, agent, clock, lines
):
    client = TlsClient(factory, trusting).shake_hands()
    assert client.ask("stream", {"Type": "user"}) == [OK]
    full = client.transport.producer
    full.pauseProducing()
    total = QUEUED_RECORDS_MAX + 5
    for number in range(total):
        agent.publish(UserEvent(number, "deploy", b"x" * 500, coalesce=False))
        clock.advance(0)
    assert client.transport.value() == b""
    assert factory.wrappedFactory.records_dropped == 5
    assert any("Dropping events to client: 127.0.0.1:47080" in line for line in lines)
    full.resumeProducing()
    client.carry()
    told = [record["LTime"] for record in client.received() if "LTime" in record]
    assert told == list(range(QUEUED_RECORDS_MAX))


def test_the_transport_is_asked_to_stop_before_much_is_written(factory, trusting, agent, clock):
    client = TlsClient(factory, trusting).shake_hands()
    client.ask("stream", {"Type": "user"})
    # A transport that says it is full as Twisted's does, from 64 kB on.
    write = client.transport.write

    def writes(data):
        write(data)
        if len(client.transport.value()) > 65536:
            client.transport.producer.pauseProducing()

    client.transport.write = writes
    for number in range(1000):
        agent.publish(UserEvent(number, "deploy", b"x" * 500, coalesce=False))
        if number % 100 == 0:
            clock.advance(0)
    clock.advance(0)
    client.transport.write = write
    assert 65536 < len(client.transport.value()) < BUFFERED_MAX


def test_requests_are_not_taken_in_while_one_is_served(factory, trusting, agent):
    agent.slow = True
    client = TlsClient(factory, trusting).shake_hands()
    client.ask("force-leave", {"Node": "n2"})
    client.ask("members")
    assert client.transport.producerState == "paused"
    agent.slow.callback(None)
    client.carry()
    assert client.transport.producerState == "producing"
    assert [record["Error"] for record in client.received() if "Error" in record] == ["", ""]


# Its end.


def test_the_last_words_come_before_the_end(factory, trusting):
    client = TlsClient(factory, trusting).shake_hands()
    assert client.ask("bogus") == [{"Error": "Unsupported command", "Seq": 1}]
    assert client.hears_goodbye


def test_who_says_goodbye_too_is_closed_at_once(factory, trusting, agent):
    agent.slow = True
    client = TlsClient(factory, trusting).shake_hands()
    client.ask("force-leave", {"Node": "n2"})
    client.ask("members")
    assert client.transport.producerState == "paused"
    client.protocol.wrappedProtocol.hang_up()
    assert client.transport.producerState == "producing"  # or it would not be heard
    client.carry()
    assert client.hears_goodbye
    assert not client.transport.disconnecting
    client.tls.unwrap()
    client.carry()
    assert client.transport.disconnecting


def test_who_does_not_is_cut_off(factory, trusting, clock):
    client = TlsClient(factory, trusting).shake_hands()
    client.protocol.wrappedProtocol.hang_up()
    clock.advance(CLOSE_TIME_MAX - 1)
    assert not client.transport.disconnected
    clock.advance(1)
    assert client.transport.disconnected


def test_no_timer_is_left_of_clients_that_went_away(factory, trusting, clock):
    clients = [TlsClient(factory, trusting), TlsClient(factory, trusting).shake_hands()]
    for client in clients:
        client.hang_up()
    assert clock.getDelayedCalls() == []
    assert factory.wrappedFactory.connections == {}
    assert factory.protocols == {}


# Its files.


def test_new_files_are_for_connections_from_now_on(serve, settings, tmp_path, trusting):
    tls = ServerTls(settings)
    factory = tls.around(serve())
    old = TlsClient(factory, trusting).shake_hands()
    other = Authority(tmp_path)
    certificate, key = map(str, other.sign("server", "127.0.0.1"))
    tls.take_over(ServerTls(RpcTlsConfig(certificate=certificate, private_key=key)))
    assert old.ask("members")[0] == OK
    with pytest.raises(ssl.SSLCertVerificationError):
        TlsClient(factory, trusting).carry()
    TlsClient(factory, ssl.create_default_context(cafile=other.file)).shake_hands()


def test_those_between_it_and_its_authority_are_shown(serve, tmp_path, authority, trusting):
    between = authority.delegate("between")
    certificate, key = between.sign("leaf", "127.0.0.1")
    both = tmp_path / "both.crt"
    both.write_bytes(certificate.read_bytes() + between.file.read_bytes())
    tls = ServerTls(RpcTlsConfig(certificate=str(both), private_key=str(key)))
    TlsClient(tls.around(serve()), trusting).shake_hands()


def wrong(**changes):
    with pytest.raises(ConfigError) as failed:
        ServerTls(RpcTlsConfig(**changes))
    return str(failed.value)


@pytest.mark.parametrize(
    ("setting", "file", "why"),
    [
        ("certificate", "none", "No such file or directory"),
        ("certificate", "folder", "Is a directory"),
        ("certificate", "empty", "it holds no PEM certificate"),
        ("certificate", "server.key", "it holds no PEM certificate"),
        ("certificate", "torn.crt", "it holds no PEM certificate"),
        ("private_key", "none", "No such file or directory"),
        ("private_key", "empty", "it holds no PEM private key"),
        ("private_key", "server.crt", "it holds no PEM private key"),
        ("private_key", "sealed.key", "a key with a passphrase cannot be used"),
        ("private_key", "alice.key", "it does not belong to FOLDER/server.crt"),
        ("client_authority", "none", "No such file or directory"),
        ("client_authority", "empty", "it holds no PEM certificate"),
        ("client_authority", "server.key", "it holds no PEM certificate"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_setting(tmp_path, setting, file, why):
    authority = Authority(tmp_path)
    authority.sign("server", "127.0.0.1")
    authority.sign("alice")
    authority.sign("sealed", passphrase=b"sesame")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "torn.crt").write_bytes((tmp_path / "server.crt").read_bytes()[:200])
    right = {"certificate": "server.crt", "private_key": "server.key"}
    given = {key: str(tmp_path / name) for key, name in {**right, setting: file}.items()}
    said = wrong(**given).replace(str(tmp_path), "FOLDER")
    assert said == f"rpc_tls.{setting} FOLDER/{file}: {why}"


def test_a_key_that_is_too_weak_is_refused_at_the_start(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = map(str, authority.sign("weak", "127.0.0.1", rsa_bits=1024))
    said = wrong(certificate=certificate, private_key=key)
    assert said.startswith(f"rpc_tls.certificate {certificate}: OpenSSL refuses it: ")
    assert "ee key too small" in said
