"""Scripts are told the same of events and queries by serfd as by Serf, and answer the same."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import AgentProcess, Agents, Records, everyone_sees, until

pytestmark = pytest.mark.interop

NOTE = """\
#!/bin/sh
# Everything a script is given, one line for each run.
printf '%s %s\\n' "$(env | grep '^SERF_' | sort | base64 -w0)" "$(base64 -w0)" >> "$1"
"""
SCRIPTS = (
    ("cat", "cat"),
    ("told", "env | grep ^SERF_ | grep -v SELF_NAME | sort"),
    ("no-line-end", "printf load"),
    ("lines", "echo 1; echo; echo 2"),
    ("both-outputs", "echo out; echo err >&2; echo out"),
    ("only-errors", "echo err >&2"),
    ("bytes", r"printf '\377\000\001\n'"),
    ("long", "head -c 900 /dev/zero | tr '\\0' x"),
    ("too-long", "head -c 5000 /dev/zero | tr '\\0' x"),
    ("very-long", "head -c 9000 /dev/zero | tr '\\0' x"),
    ("nothing", "true"),
    ("fails", "echo load; exit 3"),
    ("is-killed", "echo load; kill -9 $$"),
    ("no-program", "/no/such/program"),
    ("twice", "echo first"),
    ("twice", "sleep 0.3; echo second"),
    ("a:b", "echo colon"),
)
"""Queries with what their scripts do."""
PAYLOADS = (b"", b"v 1.2", b"line\n", b"two\n\n", b"\xff\0")


PLUGIN = """\
from serfd.hooks import hookimpl

class Plugin:
    def __init__(self, agent):
        self.agent = agent
        self.heard = []

    @hookimpl
    async def user_event(self, event):
        self.heard.append(event.name)
        if len(self.heard) == 2:
            await self.agent.user_event("heard both", b"x", coalesce=False)

    @hookimpl
    def query(self, query):
        match query.name:
            case "heard": return ",".join(sorted(self.heard))
            case "echo": return query.source.encode() + b" \\xff" + query.payload
            case "long": return "x" * 1025
"""


class Told(NamedTuple):
    """One run of the script: its variables, its input."""

    env: Mapping[str, str]
    stdin: bytes


def told(path: Path) -> list[Told]:
    found: list[Told] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        variables, stdin = map(base64.b64decode, line.split(" "))
        env = dict(v.partition("=")[::2] for v in variables.decode().splitlines())
        found.append(Told(env, stdin))
    return found


@pytest.fixture
def pair(agents: Agents, tmp_path: Path) -> dict[str, AgentProcess]:
    """A real agent and ours, in one cluster, with the same scripts."""
    script = tmp_path / "note"
    script.write_text(NOTE)
    script.chmod(0o755)
    handlers = [f"-event-handler=query:{name}={does}" for name, does in SCRIPTS]
    both: dict[str, AgentProcess] = {}
    for kind in ("serf", "serfd"):
        note = f"-event-handler=user,query:note={script} {tmp_path / kind}.told"
        both[kind] = agents.start(kind, kind, *handlers, note, "-tag=role=watch")
    both["serfd"].join(both["serf"])
    everyone_sees(both.values(), dict.fromkeys(both, "alive"))
    return both


def raw(payload: str | bytes | None) -> bytes:
    """As it was sent."""
    return (
        payload.encode("utf-8", "surrogateescape") if isinstance(payload, str) else payload or b""
    )


def ask(asker: AgentProcess, *queries: tuple[str, bytes]) -> list[dict[str, bytes]]:
    """Each node's answer to each query, all asked at once: real agents wait for the whole time."""
    with asker.client() as client:
        answers: dict[int, dict[str, bytes]] = {}
        for name, payload in queries:
            query = {"Name": name, "Payload": payload, "Timeout": 4_000_000_000}
            answers[client.start("query", query)] = {}
        running = set(answers)
        for seq, record in client.records():
            if record["Type"] == "response":
                answers[seq][record["From"]] = raw(record["Payload"])
            elif record["Type"] == "done":
                running.remove(seq)
                if not running:
                    break
    return list(answers.values())


def test_scripts_are_told_the_same(pair, tmp_path):
    with pair["serf"].client() as client:
        for payload in PAYLOADS:
            client.call("event", {"Name": "deploy 1", "Payload": payload, "Coalesce": False})
    ask(pair["serf"], *(("note", payload) for payload in PAYLOADS))
    files = {name: tmp_path / f"{name}.told" for name in pair}
    for name, path in files.items():
        until(f"all is told under {name}", lambda path=path: len(told(path)) == 2 * len(PAYLOADS))
    heard = {
        name: sorted((sorted(run.env.items()), run.stdin) for run in told(path))
        for name, path in files.items()
    }
    # They differ in their own names only.
    ours = [([(k, v.replace("serfd", "serf")) for k, v in env], i) for env, i in heard["serfd"]]
    assert ours == heard["serf"]
    assert {i for _, i in ours} == {b"", b"v 1.2\n", b"line\n", b"two\n\n", b"\xff\0\n"}
    assert {name for env, _ in ours for name, _ in env} == {
        "SERF_EVENT", "SERF_SELF_NAME", "SERF_SELF_ROLE", "SERF_TAG_ROLE",
        "SERF_USER_EVENT", "SERF_USER_LTIME", "SERF_QUERY_NAME", "SERF_QUERY_LTIME",
    }  # fmt: skip
    for name, agent in pair.items():
        for line in ("user-event: deploy 1", "query: note", "member-join"):
            assert f"[INFO] agent: Received event: {line}\n" in agent.log(), name


@pytest.mark.parametrize("asker", ["serf", "serfd"])
def test_what_scripts_write_becomes_the_same_answer(pair, asker):
    names = list(dict(SCRIPTS))
    answers = ask(pair[asker], *((name, b"load") for name in names))
    of_serf, of_serfd = (
        {name: answer.get(node) for name, answer in zip(names, answers, strict=True)}
        for node in ("serf", "serfd")
    )
    assert of_serfd == of_serf
    ltime = 1 + names.index("told")
    assert of_serf == {
        "cat": b"load\n",
        "told": b"SERF_EVENT=query\nSERF_QUERY_LTIME=%d\nSERF_QUERY_NAME=told\n"
                b"SERF_SELF_ROLE=watch\nSERF_TAG_ROLE=watch\n" % ltime,
        "no-line-end": b"load",
        "lines": b"1\n\n2\n",
        "both-outputs": b"out\nerr\nout\n",
        "only-errors": b"err\n",
        "bytes": b"\xff\0\1\n",
        "long": b"x" * 900,
        "too-long": None,
        "very-long": None,
        "nothing": None,
        "fails": None,
        "is-killed": None,
        "no-program": None,
        "twice": b"first\n",
        "a:b": b"colon\n",
    }  # fmt: skip
    refused = "Failed to respond to query 'query: {}': failed to respond to key query: response {}"
    for agent in pair.values():
        for name, why in (
            ("too-long", "exceeds limit of 1024 bytes"),
            ("very-long", "exceeds limit of 1024 bytes"),
            ("twice", "already sent"),
        ):
            line = refused.format(name, why)
            until(f"{agent.name} says: {line}", lambda agent=agent, line=line: line in agent.log())
        assert "Error invoking script 'echo load; exit 3': exit status 3" in agent.log()
        assert "Error invoking script 'echo load; kill -9 $$': signal: killed" in agent.log()
        assert "Error invoking script '/no/such/program': exit status 127" in agent.log()


def test_a_plugin_hears_events_of_a_real_agent_and_answers_its_queries(agents, tmp_path):
    (tmp_path / "answers.py").write_text(PLUGIN)
    config = {"plugin_dirs": [str(tmp_path)], "plugins": {"answers": {}}}
    ours = agents.start("serfd", "ours", config=config)
    real = agents.start("serf", "real")
    real.join(ours)
    everyone_sees([real, ours], {"real": "alive", "ours": "alive"})
    heard = Records(real, "user")
    with real.client() as client:
        for name in ("one", "two\n2026 [ERR] forged"):
            client.call("event", {"Name": name, "Payload": b"", "Coalesce": False})
    heard.wait("the plugin's own event", lambda record: record["Name"] == "heard both")
    assert ask(real, ("heard", b""), ("echo", b"\0"), ("long", b""), ("other", b"")) == [
        {"ours": b"heard both,one,two\n2026 [ERR] forged"}, {"ours": b"real \xff\0"}, {}, {},
    ]  # fmt: skip
    log = ours.log()
    assert (
        "[WARN] hooks.host: plugin answers: Failed to respond to query 'query: long': failed to "
        "respond to key query: response exceeds limit of 1024 bytes\n"
    ) in log
    assert "[INFO] agent: Received event: user-event: one\n" in log
    assert "[INFO] agent: Received event: user-event: 'two\\n2026 [ERR] forged'\n" in log
    assert "[INFO] agent: Received event: query: other\n" in log
