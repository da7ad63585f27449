"""TLS for the RPC's port: certificate, key and authority of the configuration.

Imported only when a certificate is configured: it needs pyOpenSSL, which is an extra and takes
16 MB of memory.
"""

from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL
from twisted.internet.interfaces import IAddress, IOpenSSLServerConnectionCreator
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from zope.interface import implementer

from serfd.config import RpcTlsConfig
from serfd.errors import ConfigError
from serfd.rpc.server import RpcFactory

CIPHERS: Final = b"ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2: those with forward secrecy and authentication. Of TLS 1.3 all are good."""


@implementer(IOpenSSLServerConnectionCreator)
class ServerTls:
    """What each connection is encrypted with."""

    def __init__(self, settings: RpcTlsConfig) -> None:
        """Raises ConfigError, which names the setting and the file."""
        self._context = _context(settings)

    def serverConnectionForTLS(self, protocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """For a client that has just connected."""
        return SSL.Connection(self._context)

    def around(self, clients: RpcFactory) -> "TlsFactory":
        """The same server, with each connection within TLS."""
        return TlsFactory(self, isClient=False, wrappedFactory=clients, clock=clients.clock)

    def take_over(self, other: "ServerTls") -> None:
        """From now on encrypt as `other`; connections that are open stay as they are."""
        self._context = other._context


class TlsFactory(TLSMemoryBIOFactory):
    """Builds a connection for each client, within TLS."""

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """A client connects. None, which closes the connection, if there are too many."""
        # Twisted's own would wrap the None.
        connection = self.wrappedFactory.buildProtocol(addr)
        return None if connection is None else self.protocol(self, connection)


def _context(settings: RpcTlsConfig) -> SSL.Context:
    certificate, *between = _certificates("certificate", settings.certificate)
    key = _key(settings.private_key)
    if key.public_key() != certificate.public_key():
        raise _wrong(
            "private_key", settings.private_key, f"it does not belong to {settings.certificate}"
        )
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(CIPHERS)
    # A client's renegotiations would cost us more than it; resumed sessions save nothing here.
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION | SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    try:
        context.use_certificate(certificate)
        context.use_privatekey(key)
        for each in between:
            context.add_extra_chain_cert(each)
    except (SSL.Error, TypeError) as error:
        raise _wrong("certificate", settings.certificate, f"OpenSSL refuses it: {error}") from None
    if settings.client_authority:
        for authority in _certificates("client_authority", settings.client_authority):
            context.add_client_ca(authority)
        context.load_verify_locations(settings.client_authority)
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    return context


def _certificates(setting: str, path: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(setting, path))
    except ValueError:
        raise _wrong(setting, path, "it holds no PEM certificate") from None


def _key(path: str) -> Any:
    pem = _read("private_key", path)
    try:
        return load_pem_private_key(pem, password=None)
    except TypeError:
        raise _wrong("private_key", path, "a key with a passphrase cannot be used") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _wrong("private_key", path, "it holds no PEM private key") from None


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _wrong(setting, path, str(error.strerror)) from None


def _wrong(setting: str, path: str, why: str) -> ConfigError:
    return ConfigError(f"rpc_tls.{setting} {path}: {why}")
