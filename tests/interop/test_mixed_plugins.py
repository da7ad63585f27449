"""All bundled plugins at once, in a cluster of serfd and real agents, driven by real `serf`."""

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from processes import LOCAL, AgentProcess, free_port, run, until, until_is

pytestmark = pytest.mark.interop

KINDS = {"d1": "serfd", "s1": "serf", "d2": "serfd", "s2": "serf"}

ANSWER = '''
"""Say on a query who is alive here; note each user event."""

from serfd.hooks import Status, Struct, hookimpl


class Plugin:
    class Settings(Struct):
        file: str

    def __init__(self, agent, settings):
        self._agent, self._file = agent, settings.file

    @hookimpl
    def query(self, query):
        if query.name == "alive":
            return " ".join(m.name for m in self._agent.members(status=Status.ALIVE))

    @hookimpl
    def user_event(self, event):
        with open(self._file, "a") as file:
            file.write(f"{event.name} {event.payload.decode()}\\n")
'''


class Posts(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    got: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Where a webhook posts to, and what has come."""
    got: list[dict[str, Any]] = []
    handler = type("Kept", (Posts,), {"got": got})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", got
        server.shutdown()
        thread.join()


def config(folder: Path, name: str, url: str, port: int) -> dict[str, Any]:
    template = folder / "list.j2"
    template.write_text("{% for m in members %}{{ m.name }} {% endfor %}\n")
    return {
        "plugin_dirs": [str(folder)],
        "state_dir": str(folder / "state" / name),
        "event_handlers": [f"user:deploy=cat >> {folder}/{name}.script"],
        "plugins": {
            "answer": {"file": str(folder / f"{name}.events"), "durable": True},
            "list": {
                "plugin": "template", "template": str(template),
                "target": str(folder / f"{name}.list"), "wait": "50ms",
            },
            "hosts": {"target": str(folder / f"{name}.hosts"), "wait": "50ms"},
            "prometheus_sd": {"target": str(folder / f"{name}.json"), "port": 9, "wait": "50ms"},
            "metrics": {"listen": f"127.0.0.1:{port}"},
            "webhook": {"url": url, "events": ["member-failed", "user"]},
        },
    }  # fmt: skip


def content(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def test_plugins_follow_a_mixed_cluster(agents, tmp_path, receiver) -> None:
    url, posted = receiver
    (tmp_path / "answer.py").write_text(ANSWER)
    four: dict[str, AgentProcess] = {}
    ports = {name: free_port() for name in KINDS}
    for name, kind in KINDS.items():
        own = config(tmp_path, name, url, ports[name]) if kind == "serfd" else None
        four[name] = agents.start(kind, name, LOCAL, config=own)
        if len(four) > 1:
            four[name].join(four["d1"])

    ours = [name for name, kind in KINDS.items() if kind == "serfd"]
    for name in ours:
        until_is(f"{name}'s list", lambda n=name: content(tmp_path / f"{n}.list"), "d1 d2 s1 s2 ")
        until("all are in the hosts file", lambda n=name: all(
            f" {member}\n" in content(tmp_path / f"{n}.hosts") for member in KINDS
        ))  # fmt: skip
        until("all are targets", lambda n=name: len(
            json.loads(content(tmp_path / f"{n}.json") or "[]")
        ) == 4)  # fmt: skip
        assert 'serfd_members{status="alive"} 4' in scraped(ports[name])

    rpc = f"-rpc-addr={four['s1'].rpc_addr}"
    assert run("serf", "event", rpc, "-coalesce=false", "deploy", "v7").returncode == 0
    for name in ours:
        until_is(
            f"{name}'s plugin", lambda n=name: content(tmp_path / f"{n}.events"), "deploy v7\n"
        )
        until_is(f"{name}'s script", lambda n=name: content(tmp_path / f"{n}.script"), "v7\n")
    until("both have posted it", lambda: len(posted) == 2)
    asked = run("serf", "query", rpc, "-format=json", "-timeout=3s", "alive")
    answers = json.loads(asked.stdout)["Responses"]
    assert {name: sorted(who.split()) for name, who in answers.items()} == {
        name: sorted(KINDS) for name in ours
    }

    four["s2"].kill()
    for name in ours:
        until_is(f"{name}'s list", lambda n=name: content(tmp_path / f"{n}.list"), "d1 d2 s1 ")
        assert "s2" not in (tmp_path / f"{name}.hosts").read_text()
        until("one has failed", lambda n=name: 'status="failed"} 1' in scraped(ports[n]))
    until("both have posted it", lambda: len(posted) == 4)
    assert {post["members"][0]["name"] for post in posted[2:]} == {"s2"}
    four["s2"].restart()
    four["s2"].join(four["s1"])
    for name in ours:
        until_is(f"{name}'s list", lambda n=name: content(tmp_path / f"{n}.list"), "d1 d2 s1 s2 ")
