"""TLS for the RPC client: a connection that behaves as a plain socket, and what can go wrong.

Imported only when TLS is asked for: ssl takes as long as all else that a `serfctl` imports.
"""

from __future__ import annotations

import socket
import ssl

from serfd.rpc.client import CannotConnect

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from serfd.rpc.client import Tls

_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_PURPOSE = 26
_OTHER_HOST, _OTHER_ADDRESS = 62, 64
"""OpenSSL's numbers of what can be wrong with a certificate: X509_V_ERR_..."""

_NO_CERTIFICATE = ("certificate required", "handshake failure")
"""Alerts of agents that miss a certificate of ours, in TLS 1.3 and 1.2."""

_IS_IT_TLS = (
    "Does the agent have a certificate in its [rpc_tls]? If not, ask it without -rpc-tls-ca and "
    "SERFD_RPC_TLS_CA."
)


class SecureSocket:
    """A connection within TLS; its methods are a socket's.

    An agent may refuse our certificate as late as at the first answer: CannotConnect comes there.
    """

    def __init__(self, connection: _socket.socket, address: str, host: str, tls: Tls) -> None:
        """Shake hands.

        Args:
            connection: it is taken over, with its timeout, and closed if this fails.
            address: for the texts.
            host: the name or IP address that the agent's certificate must be for.
            tls: our files.

        Raises:
            CannotConnect: a file is wrong, or one side does not accept the other.
        """
        self._address = address
        self._has_certificate = bool(tls.certificate)
        timeout = connection.gettimeout()
        plain = socket.socket(fileno=connection.detach())
        try:
            plain.settimeout(timeout)
            self._socket = _context(tls).wrap_socket(plain, server_hostname=host)
        except OSError as error:
            raise self._explained(error) from None
        finally:
            # Its descriptor is the other's, if there is one.
            plain.close()

    def settimeout(self, seconds: float | None) -> None:
        """Limit of each later call."""
        self._socket.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        """Send. Raises OSError, CannotConnect."""
        try:
            self._socket.sendall(data)
        except TimeoutError:
            raise
        except OSError:
            self.recv(1)  # it may have said why
            raise

    def recv(self, size: int) -> bytes:
        """What has come, at least a byte; empty at the end. Raises OSError, CannotConnect."""
        try:
            return self._socket.recv(size)
        except ssl.SSLError as error:
            if _alert(error):
                raise self._explained(error) from None
            raise

    def close(self) -> None:
        """Close."""
        self._socket.close()

    def _explained(self, error: OSError) -> CannotConnect:
        if isinstance(error, ssl.SSLCertVerificationError):
            return CannotConnect(
                f"tls {self._address}: the agent's certificate is not accepted: "
                f"{error.verify_message}",
                _advice_on(error.verify_code),
            )
        if alert := _alert(error):
            advice = "The agent's log says more."
            if self._has_certificate and ("certificate" in alert or alert == "unknown ca"):
                advice = (
                    "Your certificate must be signed by the agent's client_authority, and be valid."
                )
            elif alert in _NO_CERTIFICATE and not self._has_certificate:
                advice = (
                    "The agent wants a certificate of yours: give it with -rpc-tls-cert and "
                    "-rpc-tls-key, or SERFD_RPC_TLS_CERT and SERFD_RPC_TLS_KEY."
                )
            return CannotConnect(f"tls {self._address}: the agent refuses: {alert}", advice)
        what = "the agent does not speak TLS"
        if isinstance(error, TimeoutError):
            what = "i/o timeout"
        elif isinstance(error, (ssl.SSLEOFError, ConnectionError)):
            what = "the agent closed instead of shaking hands"
        return CannotConnect(f"tls {self._address}: {what}", _IS_IT_TLS)


def _advice_on(code: int) -> str:
    if code in (_NOT_YET_VALID, _EXPIRED):
        return (
            "The agent needs a new certificate, or a clock is wrong, this machine's or the agent's."
        )
    if code in (_OTHER_HOST, _OTHER_ADDRESS):
        return "-rpc-addr must have a name or an IP address that the agent's certificate is for."
    if code == _OTHER_PURPOSE:
        return "The agent needs a certificate for servers."
    return (
        "-rpc-tls-ca or SERFD_RPC_TLS_CA must name the certificate of the authority that signed "
        "the agent's."
    )


def _alert(error: OSError) -> str:
    """Why the agent ends it, `certificate required`; empty if it did not say."""
    reason = error.reason if isinstance(error, ssl.SSLError) else ""
    return (reason or "").partition("_ALERT_")[2].replace("_", " ").lower()


def _context(tls: Tls) -> ssl.SSLContext:
    """Raises CannotConnect."""
    _try_reading("ca", tls.authority)
    try:
        # It checks certificates and names, and takes TLS 1.2 and later.
        context = ssl.create_default_context(cafile=tls.authority)
    except ssl.SSLError:
        raise _wrong_file("ca", tls.authority, "it holds no PEM certificate") from None
    if tls.certificate:
        _try_reading("cert", tls.certificate)
        _try_reading("key", tls.key)
        try:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(tls.certificate, tls.key, password="")
        except ssl.SSLError as error:
            why = f"it holds no PEM certificate, or {tls.key} no PEM key without a passphrase"
            if error.reason == "KEY_VALUES_MISMATCH":
                why = f"the key in {tls.key} is another certificate's"
            raise _wrong_file("cert", tls.certificate, why) from None
    return context


def _try_reading(option: str, path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise _wrong_file(option, path, str(error.strerror)) from None


def _wrong_file(option: str, path: str, why: str) -> CannotConnect:
    return CannotConnect(
        f"-rpc-tls-{option} {path}: {why}",
        f"Expected a PEM file; SERFD_RPC_TLS_{option.upper()} may name it too.",
    )
