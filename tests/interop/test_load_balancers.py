"""HAProxy and nginx follow a cluster of real serfd processes, with traffic all the time."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from load_balancers import Backends, Balancer, Traffic, haproxy, nginx
from processes import AgentProcess, Agents, until, until_is

pytestmark = pytest.mark.interop("haproxy", "nginx")

BACKENDS = 50
EARLY = 2
FAILING = 10
STARTED_AT_ONCE = 6

GOSSIP = {"probe_interval": "300ms", "probe_timeout": "150ms"}
# Failures at one moment are noticed one after the other, over a second or two.
WAITS = {"wait": "3s", "wait_max": "20s"}


def start_webs(agents: Agents, ports: Sequence[int], first: AgentProcess) -> list[AgentProcess]:
    def start(port: int) -> AgentProcess:
        web = agents.prepare(
            "serfd", f"web{port}", "-tag=role=web", f"-tag=port={port}", f"-join={first.bind}",
            config={"gossip": GOSSIP},
        )  # fmt: skip
        agents.launch(web)
        return web

    with ThreadPoolExecutor(STARTED_AT_ONCE) as pool:
        return list(pool.map(start, ports))


def test_balancers_follow_fifty_backends_ten_of_which_fail_at_once(agents, tmp_path):
    balancers = [haproxy(tmp_path), nginx(tmp_path)]
    backends = Backends(BACKENDS)
    plugins = {
        each.name: {**each.settings(), **WAITS, "tags": {"role": "web"}} for each in balancers
    }
    with ExitStack() as stack:
        stack.callback(backends.end)
        first = agents.start("serfd", "first", config={"gossip": GOSSIP, "plugins": plugins})
        webs = start_webs(agents, backends.ports[:EARLY], first)
        for balancer in balancers:
            until_is(f"backends in {balancer.target}", lambda b=balancer: servers(b), EARLY)
            # Until now there was nobody to reload. It is tried again until there is.
            assert balancer.reloads == 0
            stack.enter_context(balancer.running())
        for balancer in balancers:
            until(f"{balancer.name} is reloaded", lambda b=balancer: b.reloads)
        traffic = {each.name: Traffic(each.port) for each in balancers}
        for each in traffic.values():
            stack.callback(each.end)
            each.all_go_through(EARLY)

        # The others come: no request is lost, not even while it reloads.
        begin = {name: len(each.answers) for name, each in traffic.items()}
        webs += start_webs(agents, backends.ports[EARLY:], first)
        for each in traffic.values():
            each.all_go_through(BACKENDS)
        lost = {name: failed(each.since(begin[name])) for name, each in traffic.items()}
        assert lost == {"haproxy": [], "nginx": []}

        # Ten fail in one moment, agents and backends.
        before = {each.name: each.reloads for each in balancers}
        for web in webs[:FAILING]:
            web.process.kill()
        backends.fail(backends.ports[:FAILING])
        for each in traffic.values():
            each.all_go_through(BACKENDS - FAILING)
        after = {name: each.more(500) for name, each in traffic.items()}
        for balancer in balancers:
            answers = after[balancer.name]
            assert failed(answers) == []
            # Many take part, and none of those that failed.
            took_part = {int(answer.text) for answer in answers}
            assert took_part <= set(backends.ports[FAILING:])
            assert len(took_part) > BACKENDS / 2
            assert 1 <= balancer.reloads - before[balancer.name] <= 2
            assert servers(balancer) == BACKENDS - FAILING


def servers(balancer: Balancer) -> int:
    if not balancer.target.exists():
        return 0
    lines = balancer.target.read_text().splitlines()
    return sum(line.strip().startswith("server ") and "127.0.0.1:" in line for line in lines)


def failed(answers) -> list[object]:
    return [answer for answer in answers if answer.status != 200]
