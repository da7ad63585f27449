"""Every command of the RPC clients that are published on PyPI, against a real serfd."""

import base64
from functools import partial
from types import SimpleNamespace

import anyio
import asyncserf
import asyncserf.connection
import msgpack
import pytest
import serfclient
from asyncserf.codec import UTF8Codec
from processes import all_see, free_port, until, until_is

from serfd.rpc.client import Client

pytestmark = [
    pytest.mark.daemon,
    # Both clients are old, and asyncserf asks anyio in words that are out of use.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

OLD, NEW = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))


def place(agent):
    host, _, port = agent.rpc_addr.rpartition(":")
    return {"host": host, "port": int(port)}


def guarded(agents):
    """An agent that wants to be shown a key."""
    agent = agents.prepare("serfd", "agent", config={"rpc_auth": "sekret"})
    agent.launch(f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")

    def answers():
        with Client(agent.rpc_addr, "sekret") as client:
            return client.stats()

    until("agent answers", answers)
    return agent


# serfclient.


@pytest.fixture
def plain(agents):
    """Makes clients of serfclient; they are closed at the end."""
    made = []

    def connect(agent, **more):
        made.append(serfclient.SerfClient(**place(agent), timeout=30, **more))
        return made[-1]

    yield connect
    for client in made:
        client.close()


OK = {"Error": "", "Seq": 1}


def test_serfclient_lists_and_filters_members(agents, plain):
    agent = agents.start("serfd", "agent", "-tag=role=web")
    client = plain(agent)
    answer = client.members()
    assert answer.head == OK
    (member,) = answer.body["Members"]
    assert (member["Name"], member["Status"], member["Tags"]) == ("agent", "alive", {"role": "web"})
    assert (member["Addr"], member["Port"]) == (b"\x7f\0\0\1", agent.port)
    for wanted, found in (
        ({"name": "a.*"}, ["agent"]),
        ({"status": "alive", "tags": {"role": "w.b"}}, ["agent"]),
        ({"status": "failed"}, []),
    ):
        assert [m["Name"] for m in client.members(**wanted).body["Members"]] == found


def test_serfclient_joins_and_forces_out(agents, plain):
    agent, friend = agents.start("serfd", "agent"), agents.start("serfd", "friend")
    client = plain(agent)
    assert client.join(friend.bind).body == {"Num": 1}
    all_see([agent, friend], agent="alive", friend="alive")
    friend.kill()
    all_see([agent], friend="failed")
    assert client.force_leave("friend").head["Error"] == ""
    all_see([agent], friend="left")
    failed = client.join([f"127.0.0.1:{free_port()}"])
    assert failed.head["Error"].startswith("1 error occurred:\n\t* Failed to join 127.0.0.1")
    assert failed.body == {"Num": 0}


def test_serfclient_sends_events_and_hears_them(agents, plain):
    agent = agents.start("serfd", "agent")
    stream = plain(agent).stream(["user", "member-join"])
    assert stream.head == OK
    client = plain(agent)
    assert client.event("deploy", "v1", coalesce=False).head == OK
    client.event("nothing", coalesce=False)
    first, second = next(stream.body), next(stream.body)
    assert (first.head, second.head) == (OK, OK)
    named = {"Event": "user", "Name": "deploy", "Payload": b"v1", "Coalesce": False}
    assert {**first.body, "LTime": 0} == {**named, "LTime": 0}
    assert (second.body["Name"], second.body["Payload"]) == ("nothing", None)


def test_serfclient_shows_the_key_and_reads_stats(agents, plain):
    agent = guarded(agents)
    stats = plain(agent, rpc_auth="sekret").stats().body
    assert stats["agent"] == {"name": "agent"}
    assert stats["serf"]["members"] == "1"
    wrong = plain(agent, rpc_auth="wrong")
    refused = wrong.connection.call("stats", expect_body=False)
    assert refused.head["Error"] == "Authentication required"


# asyncserf.


@pytest.fixture
def asynchronously(monkeypatch):
    """Run a coroutine function with a client of asyncserf."""
    # It was written for msgpack 0.6, and counts on its defaults.
    old = SimpleNamespace(
        packb=partial(msgpack.packb, use_bin_type=False),
        Unpacker=partial(msgpack.Unpacker, raw=True),
    )
    monkeypatch.setattr(asyncserf.connection, "msgpack", old)

    def run(agent, use, **more):
        async def main():
            with anyio.fail_after(60):
                async with asyncserf.serf_client(**place(agent), **more) as client:
                    await use(client)

        anyio.run(main)

    return run


def names(answer):
    return [member[b"Name"].decode() for member in answer.body[b"Members"]]


def test_asyncserf_lists_and_filters_members_and_reads_stats(agents, asynchronously):
    agent = agents.start("serfd", "agent", "-tag=role=web")

    async def use(client):
        assert names(await client.members()) == ["agent"]
        assert names(await client.members(name="a.*", status="alive")) == ["agent"]
        assert names(await client.members(tags={"role": "db"})) == []
        stats = (await client.stats()).body
        assert stats[b"agent"] == {b"name": b"agent"}
        (member,) = (await client.members()).body[b"Members"]
        assert member[b"Addr"] == b"127.0.0.1"

    asynchronously(agent, use)


def test_asyncserf_joins_forces_out_and_leaves(agents, asynchronously):
    agent, friend = agents.start("serfd", "agent"), agents.start("serfd", "friend")

    async def joins(client):
        assert (await client.join(friend.bind, replay=True)).body == {b"Num": 1}
        nobody = f"127.0.0.1:{free_port()}"
        with pytest.raises(asyncserf.SerfError, match="1 error occurred"):
            await client.join([nobody])

    async def forces_out(client):
        await client.force_leave("friend")

    async def leaves(client):
        await client.leave()

    asynchronously(agent, joins)
    friend.kill()
    all_see([agent], friend="failed")
    asynchronously(agent, forces_out)
    all_see([agent], friend="left")
    asynchronously(agent, leaves)
    assert agent.exit_code() == 0


def test_asyncserf_sends_events_and_hears_them(agents, asynchronously):
    agent = agents.start("serfd", "agent")

    async def use(client):
        async with client.stream(["user:deploy", "user:nothing"]) as stream:
            await client.event("other", "x", coalesce=False)
            await client.event("deploy", "schön", coalesce=False)
            await client.event("nothing", coalesce=False)
            heard = stream.__aiter__()
            event = await heard.__anext__()
            assert (event.event, event.name, event.payload) == ("user", "deploy", "schön")
            event = await heard.__anext__()
            assert (event.name, event.payload, event.coalesce) == ("nothing", None, False)

    asynchronously(agent, use, codec=UTF8Codec())


def test_asyncserf_asks_and_answers(agents, asynchronously):
    agent = agents.start("serfd", "agent")
    answers = []

    async def answer_one(stream):
        async for asked in stream:
            await asked.respond(f"{asked.name} {asked.payload}")
            with pytest.raises(asyncserf.SerfError, match="response already sent"):
                await asked.respond("again")
            return

    async def use(client):
        async with client.stream("query") as stream, anyio.create_task_group() as tasks:
            tasks.start_soon(answer_one, stream)
            async with client.query("load", "now", request_ack=True, timeout=20) as query:
                answers.extend([(a.type, a.payload) async for a in query])
        async with client.query("load", nodes=["nobody"], tags={"a": "b"}, timeout=0.2) as query:
            assert [a async for a in query] == []

    asynchronously(agent, use, codec=UTF8Codec())
    assert sorted(answers, key=str) == [("ack", None), ("response", "load now")]


def test_asyncserf_monitors(agents, asynchronously):
    agent = agents.start("serfd", "agent")

    async def use(client):
        async with client.monitor("info") as stream:
            async for line in stream:
                if "Serf agent starting" in line.log:
                    return

    asynchronously(agent, use)


def test_asyncserf_changes_keys(agents, asynchronously):
    agent = agents.start("serfd", "agent", f"-encrypt={OLD}")

    async def keys(client):
        return (await client.list_keys()).body[b"Keys"]

    async def use(client):
        assert await keys(client) == {OLD.encode(): 1}
        assert (await client.install_key(NEW)).body[b"NumResp"] == 1
        assert await keys(client) == {OLD.encode(): 1, NEW.encode(): 1}
        await client.use_key(NEW)
        await client.remove_key(OLD)
        assert await keys(client) == {NEW.encode(): 1}

    asynchronously(agent, use)


def test_asyncserf_cannot_read_the_end_of_a_tags_command_but_it_is_done(agents, asynchronously):
    agent = agents.start("serfd", "agent", "-tag=role=web", "-tag=dc=east")

    async def use(client):
        # It waits for a body, which no agent sends: a fault of the client's.
        with anyio.move_on_after(1):
            await client.tags(role="db", dc=None)

    asynchronously(agent, use)
    until_is("tags", lambda: dict(agent.members()["agent"].tags), {"role": "db"})


def test_asyncserf_misspells_get_coordinate_and_is_hung_up_on(agents, asynchronously):
    agent = agents.start("serfd", "agent")

    async def use(client):
        with pytest.raises(asyncserf.SerfError, match="Unsupported command"):
            await client.get_coordinate("agent")

    asynchronously(agent, use)
    assert "command ' get-coordinate' not recognized" in agent.log()
    assert agent.is_running


def test_asyncserf_shows_the_key(agents, asynchronously):
    agent = guarded(agents)

    async def use(client):
        assert names(await client.members()) == ["agent"]

    asynchronously(agent, use, rpc_auth="sekret")
