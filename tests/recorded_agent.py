"""An agent that says what it is told to, for tests of RPC clients: a thread and one socket."""

import json
import socket
import ssl
import threading
from pathlib import Path

import msgpack

GOLDEN = Path(__file__).parent / "golden" / "rpc"


def frames(name: str, sender: str) -> bytes:
    """What `client` or `server` sent in a recorded conversation."""
    vector = json.loads((GOLDEN / f"{name}.json").read_text())
    return b"".join(
        bytes.fromhex(frame["hex"]) for frame in vector["frames"] if frame["from"] == sender
        and "hex" in frame
    )  # fmt: skip


def reply(seq: int, error: str = "", *bodies: object) -> bytes:
    """A header, and what follows it."""
    packer = msgpack.Packer(use_bin_type=True, unicode_errors="surrogateescape")
    return b"".join(map(packer.pack, ({"Error": error, "Seq": seq}, *bodies)))


HELLO = reply(1)


class RecordedAgent:
    """Takes one connection: reads `after` bytes, says `answers`, then listens until it is closed.

    With `hangs_up` it closes its side when it has said all. `released`, when cleared, holds the
    answers back. `when` is a word, and what to say once it was heard after all that; saying nothing
    is hanging up. It listens on loopback, or on a unix socket at `path`, and speaks TLS with `tls`.
    """

    def __init__(
        self,
        answers: bytes,
        *,
        after: int = 1,
        hangs_up: bool = False,
        when: tuple[bytes, bytes] | None = None,
        path: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.received = b""
        self.released = threading.Event()
        self.released.set()
        self._answers, self._after = answers, after
        self._hangs_up, self._when = hangs_up, when
        self._tls = tls
        if path:
            self._listening = socket.create_server(path, family=socket.AF_UNIX)
            self.address = f"unix:{path}"
        else:
            self._listening = socket.create_server(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._listening.settimeout(10)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "RecordedAgent":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the client has hung up, so that `received` is all it ever said."""
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        connection, _ = self._listening.accept()
        connection.settimeout(10)
        if self._tls is not None:
            try:
                connection = self._tls.wrap_socket(connection, server_side=True)
            except OSError:
                return  # the client did not like it, or was not liked; it is closed
        with connection:
            while len(self.received) < self._after:
                self.received += connection.recv(65536)
            self.released.wait(10)
            connection.sendall(self._answers)
            if self._hangs_up:
                connection.shutdown(socket.SHUT_WR)
            while said := connection.recv(65536):
                self.received += said
                if self._when is not None and self._when[0] in self.received:
                    answer, self._when = self._when[1], None
                    if answer:
                        connection.sendall(answer)
                    else:
                        connection.shutdown(socket.SHUT_WR)
