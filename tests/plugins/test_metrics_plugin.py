"""The plugin `metrics` in a simulated cluster: what it serves, and to whom it does not."""

import gc
import json
import re
import sys
from pathlib import Path

import pytest
from followed_files import Node, agent_of, bundled
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError, ConnectionDone
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure

import serfd
from serfd.config import Config
from serfd.errors import ConfigError
from serfd.hooks import hookimpl
from serfd.hooks.loader import load
from serfd.metrics import BOUNDS, METRICS, NAMES_MAX

metrics = bundled("metrics")
PAGE = (Path(__file__).parents[2] / "docs/plugins/metrics.md").read_text()


class Metrics(metrics.Plugin):
    """A simulated node has no ports."""

    @hookimpl
    def start(self):
        pass

    @hookimpl
    def stop(self):
        self.server.hang_up()


@pytest.fixture
def cluster(serf_cluster):
    return serf_cluster(3)


@pytest.fixture
def plugin(cluster):
    return cluster.load(Metrics)


class Client:
    """One connection."""

    def __init__(self, server) -> None:
        self.transport = StringTransport()
        self.connection = server.buildProtocol(None)
        assert self.connection is not None
        self.connection.makeConnection(self.transport)

    def send(self, data: bytes) -> None:
        self.connection.dataReceived(data)

    def answer(self) -> tuple[int, dict[str, str], str]:
        """Status, headers and body of what came since the last look."""
        head, _, body = self.transport.value().decode().partition("\r\n\r\n")
        self.transport.clear()
        status, *lines = head.split("\r\n")
        return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body

    def lose(self) -> None:
        self.connection.connectionLost(Failure(ConnectionDone()))


def ask(plugin, path: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
    client = Client(plugin.server)
    client.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return client.answer()


def ready(plugin) -> tuple[int, dict[str, object]]:
    status, headers, body = ask(plugin, "/ready")
    assert headers["Content-Type"] == "application/json"
    return status, json.loads(body)


def families(plugin):
    """What is served, by name as Prometheus has it."""
    status, headers, body = ask(plugin, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(body):
        found[family.name + "_total" * (family.type == "counter")] = family
    return found


def values(plugin, name: str) -> dict[tuple[str, ...], float]:
    """Of one family, by labels."""
    labels = metrics.FAMILIES[name].labels
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for sample in families(plugin)[name].samples
    }


# /health and /ready


def test_health_says_who_serves(plugin):
    status, headers, body = ask(plugin, "/health")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == {"status": "ok", "name": "n1", "version": serfd.__version__}


def test_a_node_is_ready_as_long_as_it_sees_another(cluster, plugin):
    assert ready(plugin) == (200, {"ready": True, "members_alive": 3})
    cluster.fail("n2")
    assert ready(plugin) == (200, {"ready": True, "members_alive": 2})
    with cluster.partition("n1"):
        status, told = ready(plugin)
        assert (status, told["ready"], told["members_alive"]) == (503, False, 1)
        assert "isolated" in told["reason"]
        assert values(plugin, "serfd_isolated") == {(): 1}
        assert values(plugin, "serfd_ready") == {(): 0}
    assert ready(plugin) == (200, {"ready": True, "members_alive": 2})
    assert values(plugin, "serfd_isolated") == {(): 0}
    assert values(plugin, "serfd_ready") == {(): 1}


def test_the_first_node_of_a_cluster_is_ready_alone(serf_cluster):
    plugin = serf_cluster(1).load(Metrics)
    assert ready(plugin) == (200, {"ready": True, "members_alive": 1})


def test_a_node_may_have_to_see_more_members(cluster):
    plugin = cluster.load(Metrics, members_min=3)
    assert ready(plugin)[0] == 200
    cluster.leave("n3")
    reason = "2 members are alive, at least 3 expected"
    assert ready(plugin) == (503, {"ready": False, "reason": reason, "members_alive": 2})


def test_a_node_that_leaves_is_not_ready(cluster, plugin):
    agent = plugin._agent
    left = agent.leave()
    _, told = ready(plugin)
    assert told["reason"] == "this node is leaving"
    cluster.run(10)
    assert left.called
    _, told = ready(plugin)
    assert told["reason"] == "this node is left"


# /metrics


def test_members_are_counted_by_status(cluster, plugin):
    version = values(plugin, "serfd_members_version")
    assert values(plugin, "serfd_members") == {
        ("alive",): 3, ("leaving",): 0, ("left",): 0, ("failed",): 0,
    }  # fmt: skip
    cluster.fail("n2")
    cluster.leave("n3")
    assert values(plugin, "serfd_members") == {
        ("alive",): 1, ("leaving",): 0, ("left",): 1, ("failed",): 1,
    }  # fmt: skip
    assert values(plugin, "serfd_members_version") != version


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("serf.member.join", "serfd_member_join_total"),
        ("serf.events", "serfd_events_total"),
        ("serf.events.NAME", "serfd_events_by_name_total"),
        ("serf.queue.Intent", "serfd_queue_intent"),
        ("serf.snapshot.appendLine", "serfd_snapshot_append_line_seconds"),
        ("serf.coordinate.adjustment-ms", "serfd_coordinate_adjustment_seconds"),
        ("serf.coordinate.zero-rtt", "serfd_coordinate_zero_rtt_total"),
        ("memberlist.udp.sent", "serfd_memberlist_udp_sent_bytes_total"),
        ("memberlist.pushPullNode", "serfd_memberlist_push_pull_node_seconds"),
        ("plugin.calls.PLUGIN", "serfd_plugin_calls_total"),
        ("plugin.waiting.PLUGIN", "serfd_plugin_waiting"),
        ("runtime.alloc_bytes", "serfd_runtime_alloc_bytes"),
        ("runtime.total_gc_pause_ns", "serfd_runtime_total_gc_pause_seconds"),
    ],
)
def test_names_are_in_prometheus_spelling(name, served):
    assert metrics._OF_METRICS[name].name == served


def test_no_two_families_have_one_name():
    made = len(metrics._OWN) + len(METRICS)
    assert len(metrics.FAMILIES) == made
    # Not even when Prometheus's suffixes are gone.
    assert len({name.removesuffix("_total") for name in metrics.FAMILIES}) == made


def fill(cluster) -> None:
    """Let there be a value of every figure."""
    for name, metric in METRICS.items():
        own = name.replace("NAME", "deploy").replace("PLUGIN", "metrics")
        if metric.kind == "counter":
            cluster.metrics.count(own)
        elif metric.kind == "gauge":
            cluster.metrics.gauge(own, 1)
        else:
            cluster.metrics.sample(own, 1)
    own = cluster.plugin()._agent.metrics
    own.count("posted", 3)
    own.gauge("posted", 4)
    for unit in BOUNDS:
        own.sample(f"took {unit}", 0.5, unit=unit)


def test_the_documentation_has_every_figure_with_type_labels_and_sentence(cluster, plugin):
    fill(cluster)
    documented = [
        metrics.Family(name, kind, tuple(re.findall(r"`(\w+)`", labels)), text)
        for name, kind, labels, text in re.findall(
            r"^\| `(serfd_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", PAGE, re.MULTILINE
        )
    ]
    served = families(plugin)
    assert set(re.findall(r"`(process_\w+)`", PAGE)) >= served.keys() - metrics.FAMILIES.keys()
    shown = []
    for name, family in served.items():
        labels = {label for each in family.samples for label in each.labels} - {"le"}
        if name in metrics.FAMILIES:
            order = metrics.FAMILIES[name].labels
            assert labels == set(order)
            shown.append(metrics.Family(name, family.type, order, family.documentation))
    assert shown == documented
    assert len(documented) > 70


def test_all_counters_are_there_from_the_beginning(plugin):
    served = families(plugin)
    for name, (_, kind, labels, _) in metrics.FAMILIES.items():
        if kind == "counter" and "name" not in labels:
            assert name in served, name
    assert values(plugin, "serfd_plugin_errors_total") == {("metrics",): 0}


def test_a_counter_is_what_was_counted_and_a_gauge_what_was_set(cluster, plugin):
    fill(cluster)
    assert values(plugin, "serfd_plugin_counted_total") == {("metrics", "posted"): 3}
    assert values(plugin, "serfd_plugin_value") == {("metrics", "posted"): 4}
    cluster.user_event("deploy", source="n2", times=2)
    assert values(plugin, "serfd_events_by_name_total") == {("deploy",): 3}
    cluster.metrics.gauge("runtime.total_gc_pause_ns", 5e8)
    assert values(plugin, "serfd_runtime_total_gc_pause_seconds") == {(): 0.5}


@pytest.mark.parametrize(
    ("unit", "served", "scale"),
    [
        ("", "serfd_plugin_sampled", 1),
        ("bytes", "serfd_plugin_sampled_bytes", 1),
        ("seconds", "serfd_plugin_sampled_seconds", 1),
        ("milliseconds", "serfd_plugin_sampled_seconds", 1e-3),
        ("nanoseconds", "serfd_plugin_sampled_seconds", 1e-9),
    ],
)
def test_a_sample_is_a_histogram_in_prometheus_units(plugin, unit, served, scale):
    bounds = BOUNDS[unit]
    for value in (bounds[2], bounds[2], bounds[4], 10 * bounds[-1]):
        plugin._agent.metrics.sample("x", value, unit=unit)
    samples = families(plugin)[served].samples
    buckets = {s.labels["le"]: s.value for s in samples if s.name.endswith("_bucket")}
    assert [float(bound) for bound in buckets] == [
        *(pytest.approx(scale * bound, rel=1e-12) for bound in bounds), float("inf"),
    ]  # fmt: skip
    assert list(buckets.values()) == [0, 0, 2, 2, *([3] * (len(bounds) - 4)), 4]
    assert all(len(bound) < 8 for bound in buckets)
    sums = {s.name.removeprefix(served): s.value for s in samples}
    assert sums["_count"] == 4
    total = 2 * bounds[2] + bounds[4] + 10 * bounds[-1]
    assert sums["_sum"] == pytest.approx(scale * total)


def test_names_that_strangers_chose_break_nothing(cluster, plugin):
    names = ['a"b', "a\\b", "a\nb", 'x"} 1\nserfd_ready 0', "é", "", "a.b", "{", "\udcff", "\udcfe"]
    for name in names:
        cluster.metrics.count_one_of("serf.events", name)
    # What reads the same is one.
    expected = {(name,): 1 for name in names[:-2]} | {("�",): 2}
    assert values(plugin, "serfd_events_by_name_total") == expected


def test_as_many_names_as_there_may_be_are_served(cluster, plugin):
    for number in range(NAMES_MAX):
        plugin._agent.metrics.count(str(number))
    assert len(values(plugin, "serfd_plugin_counted_total")) > 0.9 * NAMES_MAX


class Failing:
    """Does not get on its feet."""

    def __init__(self, agent):
        pass

    @hookimpl
    def start(self):
        raise OSError("no such luck")


def test_the_state_of_each_plugin_is_told(cluster, plugin):
    with cluster.errors_allowed():
        cluster.load(Failing)
    assert values(plugin, "serfd_plugin_state") == {
        ("metrics", "running"): 1, ("failing", "failing"): 1,
    }  # fmt: skip
    errors = values(plugin, "serfd_plugin_errors_total")
    assert errors[("metrics",)] == 0
    assert errors[("failing",)] >= 1
    cluster.unload("failing")
    assert values(plugin, "serfd_plugin_state") == {("metrics", "running"): 1}


class Slow:
    def __init__(self, agent):
        pass

    @hookimpl
    def user_event(self, event):
        pass


def test_what_waits_for_a_plugin_is_told(cluster, plugin):
    cluster.load(Slow)
    with cluster.hold():
        cluster.user_event("deploy", source="n2", times=3)
        assert values(plugin, "serfd_plugin_waiting") == {("metrics",): 0, ("slow",): 3}
    assert values(plugin, "serfd_plugin_waiting") == {("metrics",): 0, ("slow",): 0}


# HTTP


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/", 404, "there are only /metrics, /health, /ready\n"),
        ("GET", "/metrics/", 404, "there are only /metrics, /health, /ready\n"),
        ("GET", "/../metrics", 404, "there are only /metrics, /health, /ready\n"),
        ("POST", "/metrics", 405, "only GET and HEAD\n"),
        ("DELETE", "/", 405, "only GET and HEAD\n"),
        ("get", "/metrics", 405, "only GET and HEAD\n"),
    ],
)
def test_all_else_is_refused_in_plain_text(plugin, method, path, status, text):
    found, headers, body = ask(plugin, path, method)
    assert (found, body) == (status, text)
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers.get("Allow") == ("GET, HEAD" if status == 405 else None)


def test_head_has_the_headers_alone(plugin):
    got, asked = ask(plugin, "/health"), ask(plugin, "/health", "HEAD")
    assert (asked[0], asked[1], asked[2]) == (200, got[1], "")
    assert int(got[1]["Content-Length"]) == len(got[2])


def test_a_question_mark_and_what_follows_does_not_matter(plugin):
    assert ask(plugin, "/ready?verbose=1&name[]=x")[0] == 200


def test_a_connection_serves_many_requests(plugin):
    client = Client(plugin.server)
    for path in (b"/health", b"/ready", b"/none", b"/metrics"):
        client.send(b"GET " + path + b" HTTP/1.1\r\n\r\n")
        status, headers, body = client.answer()
        assert (status, len(body.encode())) == (
            404 if path == b"/none" else 200, int(headers["Content-Length"]),
        )  # fmt: skip
        assert not client.transport.disconnecting


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"GET /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 413),
        (b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 413),
        (b"nonsense\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nnonsense\r\n\r\n", 400),
        (b"GET /" + b"x" * metrics.HEAD_MAX + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n" + b"X: 1234567\r\n" * (metrics.HEAD_MAX // 10), 400),
    ],
)
def test_what_is_no_simple_request_is_refused_and_the_client_cut_off(plugin, request_text, status):
    client = Client(plugin.server)
    client.send(request_text)
    assert client.answer()[0] == status
    assert client.transport.disconnecting


def test_a_request_that_comes_in_drops_is_not_waited_for(cluster, plugin):
    client, other = Client(plugin.server), Client(plugin.server)
    for _ in range(int(metrics.REQUEST_TIME_MAX / 10)):
        client.send(b"G")
        cluster.run(10)
    other.send(b"GET /health HTTP/1.1\r\n\r\n")
    assert not client.transport.disconnected
    cluster.run(10)
    assert client.transport.disconnected
    # Who has had an answer may stay and ask again, as long.
    assert not other.transport.disconnected
    cluster.run(metrics.REQUEST_TIME_MAX)
    assert other.transport.disconnected


def test_clients_that_are_too_many_are_turned_away_and_told_of_once(cluster, plugin):
    clients = [Client(plugin.server) for _ in range(metrics.CONNECTIONS_MAX)]
    for _ in range(3):
        assert plugin.server.buildProtocol(None) is None
    assert cluster.metrics.counters["plugins.metrics.refused"] == 3
    assert cluster.log.count("more are turned away") == 1
    clients[0].lose()
    assert ask(plugin, "/health")[0] == 200


def server_of(cluster, page):
    return metrics.Server({b"/x": page}, cluster.plugin()._agent)


def test_what_goes_wrong_is_logged_and_the_client_hears_that_it_did(cluster, plugin):
    async def page():
        raise ValueError("no such luck")

    client = Client(server_of(cluster, page))
    for _ in range(2):
        client.send(b"GET /x HTTP/1.1\r\n\r\n")
        assert client.answer()[::2] == (500, "see serfd's log\n")
    assert cluster.log.count("ValueError: no such luck") == 2


def test_who_goes_away_before_the_answer_leaves_no_trace(cluster, plugin):
    made = Deferred()

    async def page():
        return await made

    client = Client(server_of(cluster, page))
    client.send(b"GET /x HTTP/1.1\r\n\r\n")
    client.lose()
    unhandled = []
    globalLogPublisher.addObserver(unhandled.append)
    try:
        made.callback(metrics.Answer(200, metrics.TEXT, b"late"))
        # A Deferred tells of a failure that nobody took when it is gone.
        gc.collect()
    finally:
        globalLogPublisher.removeObserver(unhandled.append)
    assert unhandled == []
    assert client.transport.value() == b""


def test_at_the_end_all_are_cut_off(cluster, plugin):
    client = Client(plugin.server)
    cluster.stop()
    assert client.transport.disconnected


# The port


class Ports(MemoryReactorClock):
    """Keeps what is listened to; a port may be taken."""

    taken = False

    def listenTCP(self, port, factory, backlog=50, interface=""):
        if self.taken:
            raise CannotListenError(interface, port, OSError(98, "Address already in use"))
        return super().listenTCP(port, factory, backlog, interface)


@pytest.mark.parametrize(
    ("listen", "host", "port"),
    [
        ("127.0.0.1:9546", "127.0.0.1", 9546),
        ("0.0.0.0:1", "0.0.0.0", 1),
        ("[::]:9546", "::", 9546),
        ("[fe80::1%lo]:65535", "fe80::1%lo", 65535),
        ("127.0.0.1:0", "127.0.0.1", 0),
    ],
)
def test_it_listens_where_it_is_told(listen, host, port):
    node = Node()
    node.reactor = Ports()
    plugin = metrics.Plugin(agent_of(node, "metrics"), metrics.Plugin.Settings(listen=listen))
    plugin.start()
    assert [(each[0], each[3]) for each in node.reactor.tcpServers] == [(port, host)]


def test_a_port_in_use_is_an_error_that_names_it():
    node = Node()
    node.reactor = Ports()
    node.reactor.taken = True
    plugin = metrics.Plugin(agent_of(node, "figures"), metrics.Plugin.Settings())
    with pytest.raises(ConfigError) as caught:
        plugin.start()
    assert str(caught.value) == (
        "[plugins.figures] cannot listen on 127.0.0.1:9546: Address already in use"
    )
    node.reactor.taken = False
    plugin.start()
    assert len(node.reactor.tcpServers) == 1


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"listen": "9546"}, "listen is '9546', expected an IP address with a port like"),
        ({"listen": ":9546"}, "listen is ':9546'"),
        ({"listen": "localhost:9546"}, "listen is 'localhost:9546'"),
        ({"listen": "127.0.0.1"}, "listen is '127.0.0.1'"),
        ({"listen": "127.0.0.1:65536"}, "listen is '127.0.0.1:65536'"),
        ({"listen": "::1:9546"}, "listen is '::1:9546'"),
        ({"listen": "[127.0.0.1]:9546"}, "listen is '[127.0.0.1]:9546'"),
        ({"members_min": 0}, "key 'members_min' in [plugins.metrics]"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(table, told):
    with pytest.raises(ConfigError) as caught:
        load(Config(plugins={"metrics": table}), Node())
    assert told in str(caught.value)


def test_without_prometheus_client_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'serfd\[metrics\]'"):
        load(Config(plugins={"metrics": {}}), Node())


# The documentation


def test_the_limits_in_the_docs_are_the_real_ones():
    assert f"Up to {metrics.CONNECTIONS_MAX} clients" in PAGE
    assert f"as a whole {metrics.REQUEST_TIME_MAX} s after" in PAGE
    assert f"in {metrics.HEAD_MAX // 1024} KB" in PAGE
    assert f"{NAMES_MAX:,} at most" in PAGE
    assert metrics.Plugin.Settings().listen in PAGE
