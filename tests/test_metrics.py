"""What a node counts, how it is kept, and that table, code and documentation say the same."""

import re
from pathlib import Path
from statistics import stdev

import pytest
from one_node import OneNode

from serfd.effects import Address, Connect
from serfd.metrics import (
    BOUNDS,
    METRICS,
    NAME_LENGTH_MAX,
    NAMES_MAX,
    RAW_MAX,
    STRANGERS_NAMES_MAX,
    Metrics,
    factor,
    line_name,
    report,
)
from serfd.serf.coordinates import ORIGIN
from serfd.serf.coordinates import encode as encode_coordinate
from serfd.serf.queries import QueryParams
from serfd.wire.serf_messages import (
    IS_ACK,
    JoinIntent,
    QueryMessage,
    QueryResponse,
    UserEventMessage,
    decode,
    encode,
)
from serfd.wire.swim_messages import Ack, Dead, Ping, Suspect, User, encode_push_pull

ROOT = Path(__file__).parents[1]
NOW = "2026-11-23 20:10:00 +0000 UTC"


# Keeping


def test_a_counter_grows_and_a_gauge_is_what_it_was_last():
    metrics = Metrics()
    metrics.count("plugins.x.done")
    metrics.count("plugins.x.done", 4)
    metrics.gauge("plugins.x.waiting", 3)
    metrics.gauge("plugins.x.waiting", 2)
    assert metrics.counters == {"plugins.x.done": 5}
    assert metrics.gauges == {"plugins.x.waiting": 2}


def test_a_sample_is_summed_up():
    metrics, values = Metrics(), [0.25, 0.1, 0.4, 0.1]
    for value in values:
        metrics.sample("plugins.x.took", value)
    series = metrics.samples["plugins.x.took"]
    assert (series.count, series.min, series.max, series.last) == (4, 0.1, 0.4, 0.1)
    assert series.sum == pytest.approx(sum(values))
    assert series.squares == pytest.approx(sum(value * value for value in values))
    assert series.deviation == pytest.approx(stdev(values))


@pytest.mark.parametrize("values", [[0.1], [0.1] * 7, [1e9] * 3])
def test_values_that_are_all_the_same_do_not_deviate(values):
    metrics = Metrics()
    for value in values:
        metrics.sample("plugins.x.took", value)
    assert metrics.samples["plugins.x.took"].deviation == pytest.approx(0, abs=1e-8)


def test_a_buckets_bound_belongs_to_it_and_the_last_has_none():
    metrics = Metrics()
    for value in (-1, 0, 1, 1.5, 2, 2.001, 1e9):
        metrics.sample("plugins.x.size", value, unit="bytes", bounds=(1, 2))
    series = metrics.samples["plugins.x.size"]
    assert (series.unit, series.bounds, series.buckets) == ("bytes", (1, 2), [3, 2, 2])


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("memberlist.probeNode", "seconds"),
        ("serf.msgs.sent", "bytes"),
        ("serf.queue.Event", ""),
        ("serf.coordinate.adjustment-ms", "milliseconds"),
        ("runtime.gc_pause_ns", "nanoseconds"),
        ("plugins.x.took", "seconds"),
    ],
)
def test_a_histogram_suits_its_unit(name, unit):
    metrics = Metrics()
    metrics.sample(name, 1)
    assert metrics.samples[name].unit == unit
    assert metrics.samples[name].bounds == BOUNDS[unit]


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_bounds_are_ascending(bounds):
    assert list(bounds) == sorted(set(bounds))


# Limits


@pytest.mark.parametrize("kind", ["count", "gauge", "sample"])
def test_too_many_names_are_refused_and_counted_but_serfds_own_never(kind):
    metrics = Metrics()
    for number in range(NAMES_MAX + 3):
        getattr(metrics, kind)(f"plugins.x.{number}", 1)
    getattr(metrics, kind)("plugins.x.0", 1)
    getattr(metrics, kind)("memberlist.udp.sent", 1)
    kept = metrics.counters | metrics.gauges | metrics.samples
    assert metrics.counters.pop("agent.metrics.refused") == 3
    assert "memberlist.udp.sent" in kept
    assert len([name for name in kept if name.startswith("plugins.")]) == NAMES_MAX


def test_a_name_that_is_too_long_is_refused():
    metrics = Metrics()
    metrics.gauge("x" * NAME_LENGTH_MAX, 1)
    metrics.gauge("x" * (NAME_LENGTH_MAX + 1), 1)
    assert list(metrics.gauges) == ["x" * NAME_LENGTH_MAX]
    assert metrics.counters == {"agent.metrics.refused": 1}


def test_of_strangers_names_that_are_too_many_only_the_total_counts():
    metrics = Metrics()
    for number in range(STRANGERS_NAMES_MAX + 5):
        metrics.count_one_of("serf.events", str(number))
    metrics.count_one_of("serf.events", "0")
    metrics.count("plugins.x.done")
    assert metrics.counters["serf.events"] == STRANGERS_NAMES_MAX + 6
    assert metrics.counters["serf.events.0"] == 2
    assert f"serf.events.{STRANGERS_NAMES_MAX}" not in metrics.counters
    assert metrics.counters["agent.metrics.refused"] == 5
    assert metrics.counters["plugins.x.done"] == 1


def test_single_values_are_kept_only_for_who_wants_them_and_not_without_end():
    metrics = Metrics()
    metrics.sample("serf.msgs.sent", 1)
    metrics.keep_raw()
    metrics.sample("serf.msgs.sent", 2)
    metrics.sample("plugins.x.took", 0.5)
    assert metrics.take_raw() == [("serf.msgs.sent", 2), ("plugins.x.took", 0.5)]
    for number in range(RAW_MAX + 7):
        metrics.sample("serf.msgs.sent", number)
    assert metrics.take_raw() == [("serf.msgs.sent", number) for number in range(RAW_MAX)]
    assert metrics.take_raw() == []
    assert metrics.counters == {"agent.metrics.dropped": 7}
    assert metrics.samples["serf.msgs.sent"].count == RAW_MAX + 9


# Lines


@pytest.mark.parametrize(
    ("name", "host", "shown"),
    [
        ("serf.events.deploy", "", "serf-agent.serf.events.deploy"),
        ("serf.events.de:p loy", "", "serf-agent.serf.events.de_p_loy"),
        ("serf.events.a|b\nc\0d\x7f\x85\udcff", "", "serf-agent.serf.events.a_b_c_d___"),
        ("serf.events.é", "", "serf-agent.serf.events.é"),
        ("runtime.alloc_bytes", "vm", "serf-agent.vm.runtime.alloc_bytes"),
        ("runtime.alloc_bytes", "v m", "serf-agent.v_m.runtime.alloc_bytes"),
    ],
)
def test_a_name_is_sent_as_a_real_agent_sends_it_and_breaks_no_line(name, host, shown):
    assert line_name(name, host) == shown


def test_durations_are_told_in_milliseconds_and_nothing_else_is_changed():
    assert [factor(unit) for unit in BOUNDS] == [1, 1, 1, 1, 1000]


def test_the_report_has_a_real_agents_lines():
    metrics = Metrics()
    metrics.gauge("runtime.sys_bytes", 12958736)
    metrics.count("serf.member.join")
    metrics.count_one_of("serf.events", "de:ploy")
    metrics.count("memberlist.udp.sent", 42)
    metrics.sample("serf.msgs.received", 41)
    for value in (0.0003, 0.0005):
        metrics.sample("memberlist.probeNode", value)
    assert list(report(metrics, NOW)) == [
        f"[{NOW}][G] 'serf-agent.runtime.sys_bytes': 12958736.000",
        f"[{NOW}][C] 'serf-agent.memberlist.udp.sent': Sum: 42.000",
        f"[{NOW}][C] 'serf-agent.serf.events': Count: 1 Sum: 1.000",
        f"[{NOW}][C] 'serf-agent.serf.events.de_ploy': Count: 1 Sum: 1.000",
        f"[{NOW}][C] 'serf-agent.serf.member.join': Count: 1 Sum: 1.000",
        f"[{NOW}][S] 'serf-agent.memberlist.probeNode': Count: 2 Min: 0.300 Mean: 0.400"
        " Max: 0.500 Stddev: 0.141 Sum: 0.800",
        f"[{NOW}][S] 'serf-agent.serf.msgs.received': Count: 1 Sum: 41.000",
    ]


# What a node counts


class Counted:
    """What is new in a node's metrics since the last look."""

    def __init__(self, one: OneNode) -> None:
        self._metrics = one.node.metrics
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        samples = {name: series.count for name, series in self._metrics.samples.items()}
        return self._metrics.counters | samples

    def new(self) -> dict[str, float]:
        now, before = self._now(), self._before
        self._before = now
        return {
            name: value - before.get(name, 0)
            for name, value in now.items()
            if value != before.get(name, 0) and ".udp." not in name
        }


def test_members_that_come_change_fail_and_come_back_are_counted():
    one = OneNode()
    counted = Counted(one)
    one.hear(one.alive("n2"))
    assert counted.new() == {"serf.member.join": 1, "memberlist.msg.alive": 1}
    one.hear(one.alive("n2", 2, b"\xff\x81\xa1a\xa1b"))
    assert counted.new() == {"serf.member.update": 1, "memberlist.msg.alive": 1}
    one.hear(one.alive("n2", 2, b"\xff\x81\xa1a\xa1b"), source="n3")
    assert counted.new() == {}
    one.hear(Suspect(2, "n2", "n3"))
    assert counted.new() == {"memberlist.msg.suspect": 1}
    one.hear(Dead(2, "n2", "n3"))
    assert counted.new() == {"serf.member.failed": 1, "memberlist.msg.dead": 1}
    one.now = 59.0
    one.hear(one.alive("n2", 3))
    assert counted.new() == {
        "serf.member.join": 1, "serf.member.flap": 1, "memberlist.msg.alive": 1,
    }  # fmt: skip
    one.hear(Dead(3, "n2", "n3"))
    one.now = 59.0 + 60.0
    counted.new()
    one.hear(one.alive("n2", 4))
    assert counted.new() == {"serf.member.join": 1, "memberlist.msg.alive": 1}
    one.hear(Dead(4, "n2", "n2"))
    assert counted.new() == {"serf.member.left": 1, "memberlist.msg.dead": 1}


def test_the_node_itself_is_a_member_that_joins_changes_and_leaves():
    one = OneNode()
    assert one.node.metrics.counters == {"memberlist.msg.alive": 1, "serf.member.join": 1}
    counted = Counted(one)
    one.node.update_tags(one.now, {"a": "b"})
    assert counted.new() == {"serf.member.update": 1, "memberlist.msg.alive": 1}
    one.node.leave(one.now)
    one.run_until(5.0)
    assert counted.new() == {"serf.member.left": 1, "memberlist.msg.dead": 1}


def test_bytes_of_packets_are_counted_whatever_is_in_them():
    one = OneNode("n2")
    counters = one.node.metrics.counters
    before = counters["memberlist.udp.received"]
    one.hear_bytes(b"\xff" * 100)
    assert counters["memberlist.udp.received"] == before + 100
    sent = counters.get("memberlist.udp.sent", 0)
    one.sent.clear()
    one.node.packet_received(one.now, bytes(one.codec.seal(
        [b"\0" + b"\x82\xa5SeqNo\x01\xa4Node\xa2n1"], crc=False, nonce=lambda: bytes(12)
    )), Address("10.0.0.2", 7946))  # fmt: skip
    packets = [effect.data for effect in one.node.take_effects() if hasattr(effect, "data")]
    assert counters["memberlist.udp.sent"] == sent + sum(map(len, packets)) > sent


def test_probes_and_state_exchanges_are_timed():
    one = OneNode("n2")
    one.run_until(1.0)
    [(_, ping)] = [(to, m) for to, m in one.sent if isinstance(m, Ping)]
    one.now += 0.125
    one.hear(Ack(ping.seq))
    series = one.node.metrics.samples["memberlist.probeNode"]
    assert (series.count, series.last) == (1, 0.125)
    one.node.join(one.now, [Address("10.0.0.3", 7946)])
    one.collect()
    [stream] = [effect.stream for effect in one.effects if isinstance(effect, Connect)]
    counted = Counted(one)
    one.node.stream_closed(one.now + 0.5, stream, "connection refused")
    assert counted.new()["memberlist.pushPullNode"] == 1
    assert one.node.metrics.samples["memberlist.pushPullNode"].last == 0.5
    assert one.node.metrics.counters["memberlist.tcp.connect"] == 1
    assert one.node.metrics.counters["memberlist.tcp.sent"] > 100


def test_streams_of_peers_are_counted():
    one = OneNode()
    counted = Counted(one)
    one.node.stream_opened(one.now, Address("10.0.0.2", 1234))
    assert counted.new() == {"memberlist.tcp.accept": 1}


def test_bad_health_is_a_gauge_and_what_it_costs_is_counted():
    one = OneNode("n2", "n3", "n4", "n5")
    one.run_until(30.0)  # nobody answers
    metrics = one.node.metrics
    assert metrics.gauges["memberlist.health.score"] > 0
    assert metrics.counters["memberlist.degraded.probe"] > 0
    assert metrics.counters["memberlist.degraded.timeout"] > 0


def test_a_suspect_that_others_accuse_too_is_no_degraded_timeout():
    one = OneNode("n2", "n3", "n4", "n5")
    for accuser in ("n3", "n4", "n5"):
        one.hear(Suspect(1, "n2", accuser))
    one.run_until(60.0, answering=["n3", "n4", "n5"])
    assert one.node.metrics.counters["serf.member.failed"] == 1
    assert "memberlist.degraded.timeout" not in one.node.metrics.counters


def test_user_events_are_counted_once_by_name_and_with_their_bytes():
    one = OneNode("n2")
    counted = Counted(one)
    one.node.user_event(one.now, "deploy", b"")
    heard = User(encode(UserEventMessage(9, "heard", b"x", coalesce=False)))
    one.hear(heard)
    one.hear(heard)
    assert counted.new() == {
        "serf.events": 2, "serf.events.deploy": 1, "serf.events.heard": 1,
        "serf.msgs.received": 2,
    }  # fmt: skip
    one.run_until(0.01)
    assert counted.new()["serf.msgs.sent"] >= 2


def test_queries_and_their_answers_are_counted_and_second_answers_apart():
    one = OneNode("n2")
    counted = Counted(one)
    one.node.query(one.now, "load", b"", QueryParams(want_ack=True, wait_all=True))
    one.run_until(0.01)
    told = [decode(message.payload) for _, message in one.sent if isinstance(message, User)]
    asked = next(message for message in told if isinstance(message, QueryMessage))
    for flags in (IS_ACK, IS_ACK, 0, 0, 0):
        one.hear(User(encode(QueryResponse(asked.ltime, asked.id, "n2", flags, b""))))
    one.hear(User(encode(QueryMessage(
        7, 4711, bytes((10, 0, 0, 2)), 7946, "n2", (), 0, 0, 10**9, "_serf_ping", b""
    ))))  # fmt: skip
    new = counted.new()
    assert {name: count for name, count in new.items() if "quer" in name} == {
        "serf.queries": 2, "serf.queries.load": 1, "serf.queries._serf_ping": 1,
        "serf.query_acks": 1, "serf.query_duplicate_acks": 1,
        "serf.query_responses": 1, "serf.query_duplicate_responses": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("height", "rtt", "name"),
    [
        (1e-5, 0.01, "serf.coordinate.adjustment-ms"),
        (1e-5, 0.0, "serf.coordinate.zero-rtt"),
        (-1.0, 0.01, "serf.coordinate.rejected"),
    ],
)
def test_what_round_trips_teach_is_counted(height, rtt, name):
    one = OneNode("n2", disable_coordinates=False)
    one.run_until(1.0)
    [(_, ping)] = [(to, m) for to, m in one.sent if isinstance(m, Ping)]
    one.now += rtt
    counted = Counted(one)
    one.hear(Ack(ping.seq, encode_coordinate(ORIGIN._replace(height=height))))
    assert counted.new()[name] == 1


def test_queues_are_measured_now_and_then():
    one = OneNode("n2")
    one.run_until(31.0, answering=["n2"])
    samples = one.node.metrics.samples
    for name in ("serf.queue.Intent", "serf.queue.Event", "serf.queue.Query"):
        assert (samples[name].count, samples[name].max) == (2, 0)
    assert samples["memberlist.queue.broadcasts"].count == 2


def test_how_many_members_are_in_each_state_is_measured_now_and_then():
    one = OneNode("n2", "n3", "n4")
    one.hear(Dead(1, "n2", "n2"))
    one.hear(Dead(1, "n3", "n1"))
    one.run_until(15.0, answering=["n4"])
    gauges = one.node.metrics.gauges
    assert {
        state: gauges[f"memberlist.node.instances.{state}"]
        for state in ("alive", "suspect", "dead", "left")
    } == {"alive": 2, "suspect": 0, "dead": 1, "left": 1}
    one.run_until(30.0)  # n4 is silent
    assert gauges["memberlist.node.instances.alive"] == 1


def test_sizes_of_state_exchanges_are_measured():
    one = OneNode("n2")
    state = encode_push_pull([], b"", join=False)
    one.accept(state)
    metrics = one.node.metrics
    small = metrics.gauges["memberlist.size.local"]
    series = metrics.samples["memberlist.size.remote"]
    assert (series.count, series.last) == (1, len(state))
    one.hear(*(one.alive(f"n{number}") for number in range(3, 20)))
    one.accept(state)
    assert metrics.gauges["memberlist.size.local"] > small + 17 * 50


def test_what_queues_drop_is_counted_and_told_now_and_then(caplog):
    one = OneNode("n2", "n3", gossip={"packet_size_max": 1000})
    for number in range(3):
        one.hear(User(encode(UserEventMessage(number + 1, "long", bytes(1200), coalesce=False))))
    assert one.node.stats()["dropped_broadcasts"] == "3"
    one.run_until(61.0, answering=["n2", "n3"])
    told = [r.message for r in caplog.records if "dropped" in r.message]
    assert told == [
        "Event queue dropped 3 messages: too many waited, or they were too long for a packet"
    ]
    assert one.node.metrics.counters["serf.queue.dropped"] == 3


@pytest.mark.parametrize(("waiting", "told"), [(127, []), (128, ["Intent queue depth: 128"])])
def test_a_queue_that_grows_long_is_told_every_time_it_is_looked_at(waiting, told, caplog):
    one = OneNode("n2")
    one.run_until(14.99, answering=["n2"])
    caplog.clear()
    for number in range(waiting):
        one.hear(User(encode(JoinIntent(number + 1, f"stranger-{number}" + "x" * 1200))))
    one.run_until(15.0)
    assert one.node.stats()["intent_queue"] == str(waiting)
    assert [r.message for r in caplog.records if "depth" in r.message] == told


# The texts


def sources() -> str:
    """All code but the table itself."""
    code = "\n".join(path.read_text() for path in sorted((ROOT / "serfd").rglob("*.py")))
    before, table, after = code.partition("\nMETRICS: ")
    assert table
    return before + after.partition("\n}")[2]


def test_every_name_in_the_table_is_made_somewhere():
    code = sources()
    for name in METRICS:
        family = re.sub(r"\.(NAME|PLUGIN)$", "", name)
        # Names are also put together: serf.query_{kind}.
        made = re.sub(r"(acks|responses)$", "{kind}", family)
        assert f'"{family}"' in code or f'"{made}"' in code or f'"{family}.{{' in code, name


def test_every_name_that_the_code_makes_is_in_the_table():
    made = re.findall(r'metrics\.(?:count|gauge|sample)\(\s*f?"([a-z]+\.[^"]+)"', sources())
    assert len(made) > 30
    for name in made:
        names = [name.format(kind=kind) for kind in ("acks", "responses")] if "kind" in name else [
            re.sub(r"\{.*", "PLUGIN", name)
        ]  # fmt: skip
        assert set(names) <= METRICS.keys()


def test_what_is_measured_has_the_kind_that_the_table_says():
    one = OneNode("n2", "n3", disable_coordinates=False)
    one.run_until(60.0, answering=["n2"])
    metrics = one.node.metrics
    for kind, held in (
        ("counter", metrics.counters), ("gauge", metrics.gauges), ("sample", metrics.samples)
    ):  # fmt: skip
        assert held
        assert {METRICS[name].kind for name in held} == {kind}


def test_the_documentation_has_the_table():
    page = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    assert rows == [
        (name, metric.kind, metric.unit or "–", metric.text) for name, metric in METRICS.items()
    ]
