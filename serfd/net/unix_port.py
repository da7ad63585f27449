"""The port on a unix socket, and the end of its file."""

import os
import socket
import stat
from contextlib import suppress
from typing import Any

from twisted.internet import tcp, unix
from twisted.internet.interfaces import IProtocolFactory
from twisted.python.failure import Failure

from serfd.net.sockets import BACKLOG


class UnixPort(unix.Port):
    """Listens on a socket that `bind_unix` bound, and removes its file at the end.

    Twisted's own port would open the file to everybody, remove it at the end even if it is another
    socket's by then, and fail if there is none.
    """

    def __init__(self, bound: socket.socket, factory: IProtocolFactory, reactor: Any) -> None:
        """`bound` is not to be used any more."""
        path = bound.getsockname()
        self._path = path
        self._file = os.lstat(path)
        mode = stat.S_IMODE(self._file.st_mode)
        super().__init__(path, factory, backlog=BACKLOG, mode=mode, reactor=reactor)
        self._preexistingSocket = bound

    def connectionLost(self, reason: Failure) -> None:
        """It is closed."""
        with suppress(OSError):  # gone, or in a directory that is
            if os.path.samestat(os.lstat(self._path), self._file):
                os.unlink(self._path)
        tcp.Port.connectionLost(self, reason)
