"""HAProxy and nginx behind serfd's plugin `template`: backends, the programs, and traffic."""

import asyncio
import http.client
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from processes import LIMIT, free_port, until
from programs import require

EXAMPLES = Path(__file__).parents[2] / "conf/templates"
CLIENTS = 3


class Backends:
    """Small HTTP servers in one thread; each answers with its port."""

    def __init__(self, count: int) -> None:
        self.ports: list[int] = []
        self._loop = asyncio.new_event_loop()
        self._servers: dict[int, asyncio.Server] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        for _ in range(count):
            self.ports.append(self._call(self._open()))

    def fail(self, ports: Sequence[int]) -> None:
        """Nobody listens there any more."""
        for port in ports:
            self._call(self._close(port))

    def end(self) -> None:
        self.fail(list(self._servers))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT)

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT)

    async def _open(self) -> int:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            port = writer.get_extra_info("sockname")[1]
            try:
                while (await reader.readuntil(b"\r\n\r\n")).startswith((b"GET", b"OPTIONS")):
                    body = str(port).encode()
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
                    writer.write(head.encode() + body)
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()  # the client has gone

        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
        port: int = server.sockets[0].getsockname()[1]
        self._servers[port] = server
        return port

    async def _close(self, port: int) -> None:
        self._servers.pop(port).close()


class Answer(NamedTuple):
    """What one request got."""

    began: float
    status: int
    """0: none at all."""
    members: str
    """How many the configuration had that it went through."""
    text: str


class Traffic:
    """Some clients that ask again and again, each time over a new connection."""

    def __init__(self, port: int) -> None:
        self.answers: list[Answer] = []
        self._port = port
        self._goes_on = True
        self._clients = [threading.Thread(target=self._ask, daemon=True) for _ in range(CLIENTS)]
        for client in self._clients:
            client.start()

    def end(self) -> None:
        self._goes_on = False
        for client in self._clients:
            client.join(LIMIT)

    def since(self, count: int) -> list[Answer]:
        """Those that came in after the first `count`."""
        return self.answers[count:]

    def all_go_through(self, members: int) -> None:
        """Wait until a hundred in a row went through a configuration with so many members."""

        def settled() -> bool:
            last = self.answers[-100:]
            return len(last) == 100 and {each.members for each in last} == {str(members)}

        until(f"requests go through a configuration with {members} members", settled)

    def more(self, count: int) -> list[Answer]:
        """The next so many answers; those under way now are not among them."""
        now, begin = time.monotonic(), len(self.answers)

        def fresh() -> list[Answer]:
            return [each for each in self.since(begin) if each.began > now]

        until(f"{count} more answers", lambda: len(fresh()) >= count)
        return fresh()

    def _ask(self) -> None:
        while self._goes_on:
            began = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
            try:
                connection.request("GET", "/", headers={"Connection": "close"})
                response = connection.getresponse()
                members = response.getheader("X-Members", "")
                text = response.read().decode()
                self.answers.append(Answer(began, response.status, members, text))
            except (OSError, http.client.HTTPException) as error:
                self.answers.append(Answer(began, 0, "", repr(error)))
            finally:
                connection.close()


@dataclass
class Balancer:
    """One of the programs, with what its example configuration is changed to for a test."""

    name: str
    folder: Path
    port: int
    example: str
    changed: Mapping[str, str]
    argv: Sequence[str]
    check: Sequence[str]
    reload: str

    @property
    def target(self) -> Path:
        return self.folder / f"{self.name}.conf"

    @property
    def reloads(self) -> int:
        """How often it was reloaded without an error."""
        path = self.folder / f"{self.name}.reloads"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def settings(self) -> dict[str, object]:
        """Those of the plugin; writes the template."""
        text = (EXAMPLES / self.example).read_text()
        for old, new in self.changed.items():
            assert text.count(old) == 1, f"{self.example}: {old!r}"
            text = text.replace(old, new)
        template = self.folder / f"{self.name}.j2"
        template.write_text(text)
        return {
            "plugin": "template",
            "template": str(template),
            "target": str(self.target),
            "check": self.check,
            "reload": f"{self.reload} && echo done >> {self.folder}/{self.name}.reloads",
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start it on the file that is there; end it with all it has started."""
        with (self.folder / f"{self.name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield
        finally:
            print((self.folder / f"{self.name}.log").read_text()[-3000:])
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(LIMIT)


def haproxy(folder: Path) -> Balancer:
    program, port = require("haproxy"), free_port()
    pid, target = folder / "haproxy.pid", folder / "haproxy.conf"
    return Balancer(
        "haproxy",
        folder,
        port,
        "haproxy.cfg.j2",
        {
            "    log /dev/log local0\n": "",
            "/run/haproxy/admin.sock": f"{folder}/admin.sock",
            "bind :80": f"bind 127.0.0.1:{port}\n"
            "    http-response set-header X-Members {{ members | length }}",
        },
        [program, "-W", "-f", str(target), "-p", str(pid)],
        [program, "-c", "-f", "{}"],
        f"kill -USR2 $(cat {pid})",
    )


def nginx(folder: Path) -> Balancer:
    program, port = require("nginx"), free_port()
    target = folder / "nginx.conf"
    return Balancer(
        "nginx",
        folder,
        port,
        "nginx.conf.j2",
        {
            "/run/nginx.pid": f"{folder}/nginx.pid",
            "/var/log/nginx/error.log": f"{folder}/nginx.error.log",
            "access_log /var/log/nginx/access.log": "access_log off",
            "listen 80;": f"listen 127.0.0.1:{port};\n"
            "        add_header X-Members {{ members | length }} always;",
        },
        [program, "-c", str(target), "-g", "daemon off;"],
        [program, "-t", "-q", "-c", "{}"],
        f"{program} -c {target} -s reload",
    )
