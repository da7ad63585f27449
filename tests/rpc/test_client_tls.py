"""The RPC client within TLS: whom it trusts, what it shows, and what it says if that fails."""

import os
import re
import socket
import ssl
import struct
import threading
from datetime import timedelta

import pytest
from certificates import Authority
from recorded_agent import HELLO, RecordedAgent, reply

from serfd.rpc.client import CannotConnect, Client, ConnectionClosed, RpcError, Tls
from serfd.rpc.client_tls import SecureSocket

MEMBERS = HELLO + reply(2, "", {"Members": []})


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def tls(authority):
    """The client trusts the authority."""
    return Tls(str(authority.file))


def serving(files, *, clients=None, version=None):
    """A server's side; with `clients` an authority whose certificates it asks for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    if version is not None:
        context.maximum_version = version
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients.file)
    return context


@pytest.fixture
def good(authority):
    """The side of a server that the client trusts."""
    return serving(authority.sign("server", "127.0.0.1", "localhost"))


def refusal(address, tls):
    """Reason and advice."""
    with pytest.raises(CannotConnect) as caught, Client(address, tls=tls, timeout=10) as client:
        client.members()
    return caught.value.reason.replace(address, "ADDRESS"), caught.value.advice


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_agent_is_asked_within_tls(good, tls, host):
    with RecordedAgent(MEMBERS, tls=good) as agent:
        address = agent.address.replace("127.0.0.1", host)
        with Client(address, tls=tls) as client:
            assert client.members() == []
    assert b"handshake" in agent.received


def test_more_than_fits_into_one_record_comes_whole(good, tls):
    many = [{"Name": f"n{number}"} for number in range(20_000)]
    with (
        RecordedAgent(HELLO + reply(2, "", {"Members": many}), tls=good) as agent,
        Client(agent.address, tls=tls) as client,
    ):
        assert client.members() == many


def test_a_slow_answer_is_waited_for_and_told_once(good, tls):
    told = []

    def waiting():
        told.append("waiting")
        agent.released.set()

    with RecordedAgent(HELLO + reply(2), tls=good) as agent:
        agent.released.clear()
        with Client(agent.address, tls=tls, waiting=waiting, patience=0.01) as client:
            client.leave()
    assert told == ["waiting"]


def test_an_agent_that_hangs_up_has_closed(good, tls):
    with (
        RecordedAgent(MEMBERS, tls=good, hangs_up=True) as agent,
        Client(agent.address, tls=tls) as client,
    ):
        client.members()
        with pytest.raises(ConnectionClosed):
            client.members()


def test_a_write_that_does_not_get_through_in_time_is_given_up(good, tls):
    with RecordedAgent(b"", tls=good, after=1) as agent:
        agent.released.clear()  # it reads no more after the first bytes
        client = Client(agent.address, tls=tls, timeout=10)
        client._timeout = 0.05
        with client, pytest.raises(RpcError, match=r"write tcp .*: i/o timeout"):
            client.call("event", {"Payload": bytes(50_000_000)})
        agent.released.set()


# What the agent shows.


@pytest.mark.parametrize(
    ("sign", "reason", "advice"),
    [
        (
            lambda own, _: own.sign("old", "127.0.0.1", valid=timedelta(hours=-1)),
            "certificate has expired",
            "The agent needs a new certificate, or a clock is wrong",
        ),
        (
            lambda own, _: own.sign("other", "127.0.0.2", "elsewhere.example"),
            "IP address mismatch, certificate is not valid for '127.0.0.1'.",
            "-rpc-addr must have a name or an IP address that the agent's certificate is for.",
        ),
        (
            lambda own, _: own.sign("nameless"),
            "IP address mismatch, certificate is not valid for '127.0.0.1'.",
            "-rpc-addr must have a name or an IP address that the agent's certificate is for.",
        ),
        (
            lambda _, foreign: foreign.sign("foreign", "127.0.0.1"),
            "unable to get local issuer certificate",
            "-rpc-tls-ca or SERFD_RPC_TLS_CA must name the certificate of the authority that",
        ),
        (
            lambda own, _: own.sign("alice", "127.0.0.1", client=True),
            "certificate purpose",
            "The agent needs a certificate for servers.",
        ),
    ],
    ids=["expired", "for another address", "for none", "of another authority", "a client's"],
)
def test_an_agent_with_a_certificate_that_is_not_good_is_not_talked_to(
    authority, tls, tmp_path, sign, reason, advice
):
    shown = serving(sign(authority, Authority(tmp_path, "stranger")))
    with RecordedAgent(MEMBERS, tls=shown) as agent:
        said, advised = refusal(agent.address, tls)
    prefix = "tls ADDRESS: the agent's certificate is not accepted: "
    assert said.startswith(prefix)
    assert reason in said
    assert advised.startswith(advice)
    assert agent.received == b""


# What the client shows.


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("joined", [False, True], ids=["two files", "one file"])
def test_a_certificate_is_shown_to_an_agent_that_asks_for_one(
    authority, tls, tmp_path, version, joined
):
    asking = serving(authority.sign("server", "127.0.0.1"), clients=authority, version=version)
    certificate, key = authority.sign("alice", client=True)
    tls = Tls(tls.authority, str(certificate), str(key))
    if joined:
        both = tmp_path / "both.pem"
        both.write_bytes(certificate.read_bytes() + key.read_bytes())
        tls = Tls(tls.authority, str(both))
    with RecordedAgent(MEMBERS, tls=asking) as agent, Client(agent.address, tls=tls) as client:
        assert client.members() == []


@pytest.mark.parametrize("version", VERSIONS)
def test_without_one_the_advice_is_to_give_it(authority, tls, version):
    asking = serving(authority.sign("server", "127.0.0.1"), clients=authority, version=version)
    with RecordedAgent(MEMBERS, tls=asking) as agent:
        reason, advice = refusal(agent.address, tls)
    assert re.fullmatch(
        r"tls ADDRESS: the agent refuses: (certificate required|handshake failure)", reason
    )
    assert advice == (
        "The agent wants a certificate of yours: give it with -rpc-tls-cert and -rpc-tls-key, or "
        "SERFD_RPC_TLS_CERT and SERFD_RPC_TLS_KEY."
    )


def test_a_refusal_is_told_also_when_nothing_can_be_sent_any_more(authority, tls):
    asking = serving(authority.sign("server", "127.0.0.1"), clients=authority)
    with RecordedAgent(MEMBERS, tls=asking) as agent:
        host, _, port = agent.address.partition(":")
        connection = socket.create_connection((host, int(port)), timeout=10)
        secure = SecureSocket(connection, agent.address, host, tls)

    def send_until_it_fails():
        while True:
            secure.sendall(b"x")

    # It is refused by now, and the agent is gone: the first write is answered by a reset.
    with pytest.raises(CannotConnect, match="the agent refuses: certificate required"):
        send_until_it_fails()
    secure.close()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "sign",
    [
        lambda own, _: own.sign("old", client=True, valid=timedelta(hours=-1)),
        lambda _, foreign: foreign.sign("foreign", client=True),
    ],
    ids=["expired", "of another authority"],
)
def test_one_that_the_agent_does_not_like_is_told(authority, tls, tmp_path, sign, version):
    asking = serving(authority.sign("server", "127.0.0.1"), clients=authority, version=version)
    certificate, key = map(str, sign(authority, Authority(tmp_path, "stranger")))
    with RecordedAgent(MEMBERS, tls=asking) as agent:
        reason, advice = refusal(agent.address, Tls(tls.authority, certificate, key))
    assert reason.startswith("tls ADDRESS: the agent refuses: ")
    assert (
        advice == "Your certificate must be signed by the agent's client_authority, and be valid."
    )


def test_any_other_refusal_is_told_with_where_to_look(authority, tls):
    asking = serving(authority.sign("server", "127.0.0.1"), version=ssl.TLSVersion.TLSv1_2)
    asking.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")  # its key is of another kind
    files = map(str, authority.sign("alice", client=True))
    with RecordedAgent(MEMBERS, tls=asking) as agent:
        assert refusal(agent.address, Tls(tls.authority, *files)) == (
            "tls ADDRESS: the agent refuses: handshake failure", "The agent's log says more.",
        )  # fmt: skip


# What is no TLS.

IS_IT_TLS = (
    "Does the agent have a certificate in its [rpc_tls]? If not, ask it without -rpc-tls-ca and "
    "SERFD_RPC_TLS_CA."
)


@pytest.mark.parametrize(
    ("said", "linger", "reason"),
    [
        (HELLO, (0, 0), "the agent does not speak TLS"),
        (b"", (0, 0), "the agent closed instead of shaking hands"),
        (b"", (1, 0), "the agent closed instead of shaking hands"),
    ],
    ids=["answers", "closes", "resets"],
)
def test_an_agent_without_tls_is_guessed(tls, said, linger, reason):
    def answer():
        connection, _ = listening.accept()
        connection.recv(65536)
        connection.sendall(said)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", *linger))
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=answer)
        answering.start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert refusal(address, tls) == (f"tls ADDRESS: {reason}", IS_IT_TLS)
        answering.join()


def test_one_that_never_answers_is_given_up(tls):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(CannotConnect) as caught:
            Client(address, tls=tls, timeout=0.05)
    assert caught.value.reason == f"tls {address}: i/o timeout"
    assert caught.value.advice == IS_IT_TLS


def test_an_agent_with_tls_that_is_asked_without_is_guessed(good):
    with RecordedAgent(MEMBERS, tls=good) as agent:
        _, advice = refusal(agent.address, None)
    assert advice == (
        "Is ADDRESS the RPC address of a Serf agent? "
        "If it speaks TLS: -rpc-tls-ca FILE or SERFD_RPC_TLS_CA."
    ).replace("ADDRESS", agent.address)


def test_a_unix_socket_does_without(tmp_path, tls):
    with (
        RecordedAgent(MEMBERS, path=str(tmp_path / "rpc.sock")) as agent,
        Client(agent.address, tls=tls) as client,
    ):
        assert client.members() == []


# Wrong files.


@pytest.mark.parametrize(
    ("changed", "file", "why"),
    [
        ("ca", "none", "No such file or directory"),
        ("ca", "folder", "Is a directory"),
        ("ca", "empty", "it holds no PEM certificate"),
        ("ca", "alice.key", "it holds no PEM certificate"),
        ("cert", "none", "No such file or directory"),
        ("cert", "empty", "it holds no PEM certificate, or alice.key no PEM key without a"),
        ("key", "none", "No such file or directory"),
        ("key", "empty", "it holds no PEM certificate, or empty no PEM key without a passphrase"),
        ("key", "sealed.key", "it holds no PEM certificate, or sealed.key no PEM key without a"),
        ("key", "other.key", "the key in other.key is another certificate's"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_option(
    authority, tmp_path, monkeypatch, changed, file, why
):
    authority.sign("alice", client=True)
    authority.sign("other", client=True)
    authority.sign("sealed", client=True, passphrase=b"sesame")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    files = {"ca": "authority.crt", "cert": "alice.crt", "key": "alice.key", changed: file}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        descriptors = len(os.listdir("/proc/self/fd"))
        reason, advice = refusal(address, Tls(*files.values()))
        assert len(os.listdir("/proc/self/fd")) == descriptors
    option = re.match(r"-rpc-tls-(ca|cert|key) (\S+): ", reason)
    assert option is not None
    assert files[option[1]] == option[2]
    assert reason[option.end() :].startswith(why)
    assert advice == f"Expected a PEM file; SERFD_RPC_TLS_{option[1].upper()} may name it too."
