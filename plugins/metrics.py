"""Tells Prometheus what serfd counts and measures, and answers health checks, over HTTP.

    [plugins.metrics]
    listen = "127.0.0.1:9546"

`/metrics` has every figure of the daemon and of its plugins. `/health` says that the process
serves, `/ready` whether this node is a member as it should be. Nothing else is there, nothing can
be changed, and nobody is asked who he is.
"""

import json
import platform
import re
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from ipaddress import ip_address
from itertools import accumulate
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.internet.protocol import ServerFactory, connectionDone
from twisted.python.failure import Failure
from twisted.web import http

from serfd.hooks import METRICS, Agent, ConfigError, Meta, Status, Struct, hookimpl

try:
    from prometheus_client import ProcessCollector
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(f"{error}; pip install 'serfd[metrics]'") from error

CONNECTIONS_MAX = 32
"""More clients at once are turned away."""
REQUEST_TIME_MAX = 65
"""Seconds a client has for a whole request, from its connection or the answer before on. More than
a minute, Prometheus's own interval: so its connection stays."""
HEAD_MAX = 8192
"""Bytes of a request line with all headers. A request has no body."""

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
_PLAIN_TEXT, PROMETHEUS = choose_encoder("")

_LISTEN = re.compile(r"(?:\[([^]]*)\]|([^:\[\]]*)):([0-9]{1,5})")

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]
Labels: TypeAlias = tuple[str, ...]


class Plugin:
    """The server while it runs, and what it answers."""

    class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """The table [plugins.metrics]."""

        listen: str = "127.0.0.1:9546"
        """Address and port to serve at; `[::]:9546` for all addresses."""

        members_min: Annotated[int, Meta(ge=1)] = 1
        """`/ready` says no as long as fewer members are alive, this one included."""

        def __post_init__(self) -> None:
            """Check what has a form of its own."""
            address(self.listen)

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self._agent = agent
        self._settings = settings
        self.server = Server(
            {b"/metrics": self.metrics, b"/health": self.health, b"/ready": self.ready}, agent
        )
        self._port: Any = None

    @hookimpl
    def start(self) -> None:
        """Listen. Raises ConfigError if the address is not to be had."""
        host, port = address(self._settings.listen)
        try:
            self._port = self._agent.reactor.listenTCP(port, self.server, interface=host)
        except CannotListenError as error:
            why = getattr(error.socketError, "strerror", None) or error.socketError
            raise ConfigError(
                f"[plugins.{self._agent.plugin}] cannot listen on {self._settings.listen}: {why}"
            ) from None
        self._agent.logger.info("serving at %s, port %d", host, self._port.getHost().port)

    @hookimpl
    async def stop(self) -> None:
        """Close the port, and hang up."""
        await self._port.stopListening()
        self.server.hang_up()

    # What it answers.

    async def metrics(self) -> "Answer":
        """Everything, in Prometheus's text form. It is looked up here and written in a thread."""
        text = await self._agent.in_thread(_PLAIN_TEXT, self.figures())
        return Answer(http.OK, PROMETHEUS, text)

    async def health(self) -> "Answer":
        """That the process serves; who it is."""
        agent = self._agent
        return _as_json(http.OK, status="ok", name=readable(agent.name), version=agent.version)

    async def ready(self) -> "Answer":
        """Whether this node is a member as it should be; if not, why."""
        reason = self.reason()
        alive = self._agent.status_counts()[Status.ALIVE]
        if reason:
            return _as_json(
                http.SERVICE_UNAVAILABLE, ready=False, reason=reason, members_alive=alive
            )
        return _as_json(http.OK, ready=True, members_alive=alive)

    def reason(self) -> str:
        """Why this node is not ready; empty if it is."""
        me = self._agent.me.status
        if me is not Status.ALIVE:
            return f"this node is {me.text}"
        if self._agent.stats()["serf"]["isolated"] == "true":
            return "isolated: there were other members, none of them is alive"
        alive, least = self._agent.status_counts()[Status.ALIVE], self._settings.members_min
        return f"{alive} members are alive, at least {least} expected" if alive < least else ""

    def figures(self) -> "Figures":
        """Everything as it is now."""
        return Figures(self._agent, is_ready=not self.reason())


def address(listen: str) -> tuple[str, int]:
    """`127.0.0.1:9546`, `[::]:9546` → host and port. Raises ValueError."""
    found = _LISTEN.fullmatch(listen)
    try:
        if found is None or int(found[3]) > 65535:
            raise ValueError
        host = found[1] or found[2]
        if ip_address(host).version != (6 if found[1] else 4):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"listen is {listen!r}, expected an IP address with a port like 127.0.0.1:9546 or "
            "[::1]:9546"
        ) from None
    return host, int(found[3])


def readable(text: str) -> str:
    """The text with � for bytes that are no UTF-8, which Prometheus refuses."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# What is served


class Family(NamedTuple):
    """All that is served under one name."""

    name: str
    kind: Kind
    labels: Labels
    text: str


def _suffix(unit: str) -> str:
    """What names end in; Prometheus has all durations in seconds."""
    return "_seconds" if unit.endswith("seconds") else f"_{unit}" if unit else ""


def _family(name: str) -> Family:
    """What a name of `METRICS` is for Prometheus: `memberlist.udp.sent`, in its own words."""
    kind, unit, text = METRICS[name]
    stem = name.removeprefix("serf.").removesuffix(".PLUGIN").replace(".NAME", "_by_name")
    stem = stem.removesuffix("-ms").removesuffix("_ns")
    stem = re.sub("(?<=[a-z])(?=[A-Z])", "_", stem).lower()
    suffix = _suffix(unit)
    total = "_total" if kind == "counter" else ""
    labels = ("name",) if name.endswith(".NAME") else ("plugin",) if ".PLUGIN" in name else ()
    return Family(
        f"serfd_{re.sub('[^a-z0-9]', '_', stem).removesuffix(suffix)}{suffix}{total}",
        "histogram" if kind == "sample" else kind,
        labels,
        text,
    )


_OF_METRICS: Mapping[str, Family] = {name: _family(name) for name in METRICS}
_PARENTS: Mapping[str, Family] = {
    name.removesuffix("NAME"): family
    for name, family in _OF_METRICS.items()
    if name.endswith(".NAME")
}
"""Families of names that have another name at their end: `serf.events.`"""

_OWN = (
    Family("serfd_build_info", "gauge", ("version", "python"), "Always 1; what runs."),
    Family("serfd_members", "gauge", ("status",), "Members known, in each status."),
    Family("serfd_members_version", "gauge", (), "Another number whenever a member changes."),
    Family("serfd_ready", "gauge", (), "1 if /ready says yes."),
    Family("serfd_isolated", "gauge", (), "1 if there were other members and none is alive."),
    Family("serfd_encrypted", "gauge", (), "1 if gossip is encrypted."),
    Family("serfd_queue_depth", "gauge", ("queue",), "Messages that wait to be gossiped."),
    Family("serfd_lamport_time", "gauge", ("clock",), "How far Serf's logical clocks are."),
    Family("serfd_dropped_input_total", "counter", (), "Packets and streams that were refused."),
    Family("serfd_internal_errors_total", "counter", (), "Mistakes of serfd's own."),
    Family("serfd_send_errors_total", "counter", (), "Packets that could not be sent."),
    Family("serfd_coordinate_resets_total", "counter", (), "Coordinates that had to start anew."),
    Family("serfd_plugin_state", "gauge", ("plugin", "state"), "1 for the state a plugin is in."),
    Family("serfd_plugin_timeouts_total", "counter", ("plugin",), "Hooks that took too long."),
    Family("serfd_plugin_merged_total", "counter", ("plugin",), "Changes told with others."),
    Family("serfd_plugin_busy_seconds_total", "counter", ("plugin",), "Time it held the daemon."),
    Family("serfd_plugin_counted_total", "counter", ("plugin", "name"), "A plugin's own counters."),
    Family("serfd_plugin_value", "gauge", ("plugin", "name"), "A plugin's own gauges."),
    *(
        Family(f"serfd_plugin_sampled{unit}", "histogram", ("plugin", "name"), text)
        for unit, text in (
            ("_seconds", "A plugin's own samples of durations."),
            ("_bytes", "A plugin's own samples of sizes."),
            ("", "A plugin's own samples of plain numbers."),
        )
    ),
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (*_OWN, *_OF_METRICS.values())}
"""By name, in the order in which they are served."""

_STATS: Mapping[str, tuple[str, Labels]] = {
    "isolated": ("serfd_isolated", ()),
    "encrypted": ("serfd_encrypted", ()),
    "intent_queue": ("serfd_queue_depth", ("intent",)),
    "event_queue": ("serfd_queue_depth", ("event",)),
    "query_queue": ("serfd_queue_depth", ("query",)),
    "gossip_queue": ("serfd_queue_depth", ("gossip",)),
    "member_time": ("serfd_lamport_time", ("member",)),
    "event_time": ("serfd_lamport_time", ("event",)),
    "query_time": ("serfd_lamport_time", ("query",)),
    "dropped_input": ("serfd_dropped_input_total", ()),
    "internal_errors": ("serfd_internal_errors_total", ()),
    "send_errors": ("serfd_send_errors_total", ()),
    "coordinate_resets": ("serfd_coordinate_resets_total", ()),
}
"""Of the agent's stats, what is served, and as what."""

_SCALES = {"milliseconds": 1e-3, "nanoseconds": 1e-9}
"""What Prometheus's unit is of these; of others it is the same."""
_PLUGINS = "plugins."


class Histogram(NamedTuple):
    """Values summed up, as they were at one moment; in the unit of their metric."""

    bounds: Sequence[float]
    buckets: Sequence[int]
    """How many values are in each bucket alone; one more than there are bounds."""
    sum: float
    unit: str

    def cumulated(self) -> list[tuple[str, float]]:
        """Each bucket's upper bound for Prometheus, and how many values are not above it."""
        scale = _SCALES.get(self.unit, 1.0)
        bounds = [str(float(f"{scale * bound:.12g}")) for bound in self.bounds]
        return list(zip((*bounds, "+Inf"), accumulate(self.buckets), strict=True))


class Figures(Collector):
    """All figures at one moment. A thread may read them, while the daemon goes on counting."""

    def __init__(self, agent: Agent, *, is_ready: bool) -> None:
        metrics = agent.metrics.all()
        self._counters = dict(metrics.counters)
        self._gauges = dict(metrics.gauges)
        self._samples = {
            name: Histogram(each.bounds, tuple(each.buckets), each.sum, each.unit)
            for name, each in metrics.samples.items()
        }
        self._stats = agent.stats()["serf"]
        self._plugins = agent.plugins()
        self._status_counts = agent.status_counts()
        self._members_version = agent.members_version
        self._is_ready = is_ready
        self._version = agent.version

    def collect(self) -> Iterator[Metric]:
        """Each family with its values, for prometheus_client."""
        found = Found()
        self._find_own(found)
        self._find_metrics(found)
        self._find_plugins_own(found)
        yield from found.families()
        yield from ProcessCollector(registry=None).collect()

    def _find_own(self, found: "Found") -> None:
        put = found.put
        put("serfd_build_info", (self._version, platform.python_version()), 1)
        for status in (Status.ALIVE, Status.LEAVING, Status.LEFT, Status.FAILED):
            put("serfd_members", (status.text,), self._status_counts[status])
        put("serfd_members_version", (), self._members_version)
        put("serfd_ready", (), self._is_ready)
        for key, (name, labels) in _STATS.items():
            if (text := self._stats.get(key)) is not None:
                put(name, labels, text == "true" if text in ("true", "false") else float(text))
        for plugin in self._plugins:
            put("serfd_plugin_state", (plugin.name, plugin.state), 1)
            put("serfd_plugin_timeouts_total", (plugin.name,), plugin.timeouts)
            put("serfd_plugin_merged_total", (plugin.name,), plugin.merged)
            put("serfd_plugin_busy_seconds_total", (plugin.name,), plugin.seconds)

    def _find_metrics(self, found: "Found") -> None:
        numbers = {**self._counters, **self._gauges}
        for name, family in _OF_METRICS.items():
            if name in self._samples:
                found.put_histogram(family.name, (), self._samples[name])
            elif name in numbers:
                scale = _SCALES.get(METRICS[name].unit, 1.0)
                found.put(family.name, (), scale * numbers[name])
            elif name.endswith(".PLUGIN"):
                for plugin in self._plugins:
                    value = numbers.get(name.removesuffix("PLUGIN") + plugin.name, 0)
                    found.put(family.name, (plugin.name,), value)
            elif family.kind == "counter" and not family.labels:
                # From the start there is a 0 to grow from, or Prometheus misses the first one.
                found.put(family.name, (), 0)
        for name, value in self._counters.items():
            for parent, family in _PARENTS.items():
                if name.startswith(parent):
                    found.put(family.name, (name.removeprefix(parent),), value)

    def _find_plugins_own(self, found: "Found") -> None:
        for name, value in self._counters.items():
            if name.startswith(_PLUGINS):
                found.put("serfd_plugin_counted_total", _plugins_own(name), value)
        for name, value in self._gauges.items():
            if name.startswith(_PLUGINS):
                found.put("serfd_plugin_value", _plugins_own(name), value)
        for name, histogram in self._samples.items():
            if name.startswith(_PLUGINS):
                family = f"serfd_plugin_sampled{_suffix(histogram.unit)}"
                found.put_histogram(family, _plugins_own(name), histogram)


def _plugins_own(name: str) -> Labels:
    """`plugins.webhook.posted` → `webhook` and `posted`."""
    plugin, _, own = name.removeprefix(_PLUGINS).partition(".")
    return plugin, own


class Found:
    """Values by family and labels."""

    def __init__(self) -> None:
        self._numbers: defaultdict[str, dict[Labels, float]] = defaultdict(dict)
        self._histograms: defaultdict[str, dict[Labels, Histogram]] = defaultdict(dict)

    def put(self, family: str, labels: Labels, value: float) -> None:
        """This is one of it. Names that read the same are one."""
        key, values = tuple(map(readable, labels)), self._numbers[family]
        values[key] = values.get(key, 0) + value

    def put_histogram(self, family: str, labels: Labels, value: Histogram) -> None:
        """This is one of it."""
        self._histograms[family][tuple(map(readable, labels))] = value

    def families(self) -> Iterator[Metric]:
        """Those of which there is a value, as prometheus_client has them."""
        for name, kind, labels, text in FAMILIES.values():
            if name in self._histograms:
                histograms = HistogramMetricFamily(name, text, labels=labels)
                for key, value in self._histograms[name].items():
                    scale = _SCALES.get(value.unit, 1.0)
                    histograms.add_metric(key, value.cumulated(), value.sum * scale)
                yield histograms
            elif name in self._numbers:
                make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
                numbers = make(name, text, labels=labels)
                for key, number in self._numbers[name].items():
                    numbers.add_metric(key, number)
                yield numbers


# HTTP


class Answer(NamedTuple):
    """What a client gets."""

    code: int
    kind: str
    """Its Content-Type."""
    body: bytes
    headers: Mapping[str, str] = {}


def _as_json(code: int, **fields: object) -> Answer:
    return Answer(code, JSON, json.dumps(fields).encode() + b"\n")


Page: TypeAlias = Callable[[], Coroutine[Any, Any, Answer]]


class Server(ServerFactory):
    """A connection for each client, up to a limit, and pages by path."""

    noisy = False

    def __init__(self, pages: Mapping[bytes, Page], agent: Agent) -> None:
        self._pages = pages
        self._agent = agent
        self._is_full = False
        self.connections: set[Connection] = set()

    @property
    def clock(self) -> IReactorTime:
        """What times are measured with."""
        clock: IReactorTime = self._agent.reactor
        return clock

    def buildProtocol(self, addr: IAddress | None) -> "Connection | None":
        """A client connects. None, which closes the connection, if there are too many."""
        if len(self.connections) >= CONNECTIONS_MAX:
            self._agent.metrics.count("refused")
            if not self._is_full:
                self._is_full = True
                self._agent.logger.warning(
                    "%d clients are connected, more are turned away", CONNECTIONS_MAX
                )
            return None
        self._is_full = False
        return Connection(self)

    def hang_up(self) -> None:
        """Cut off all who are connected."""
        for connection in tuple(self.connections):
            connection.transport.abortConnection()

    def answer(self, request: "Request") -> None:
        """Answer it, now or soon."""
        if request.method not in (b"GET", b"HEAD"):
            allowed = {"Allow": "GET, HEAD"}
            request.answer(Answer(http.NOT_ALLOWED, TEXT, b"only GET and HEAD\n", allowed))
        elif (page := self._pages.get(request.path)) is None:
            there = b", ".join(self._pages)
            request.answer(Answer(http.NOT_FOUND, TEXT, b"there are only " + there + b"\n"))
        else:
            made = Deferred.fromCoroutine(page())
            _ = made.addCallbacks(request.answer, partial(self._failed, request))

    def _failed(self, request: "Request", failure: Failure) -> None:
        path = request.path.decode("latin-1")
        self._agent.logger.error("Answering %s failed", path, extra={"details": failure})
        request.answer(Answer(http.INTERNAL_SERVER_ERROR, TEXT, b"see serfd's log\n"))


class Request(http.Request):
    """One question."""

    channel: "Connection"
    is_gone = False
    """Whether nobody waits for the answer any more."""

    def process(self) -> None:
        """It is here as a whole."""
        self.channel.server.answer(self)

    def connectionLost(self, reason: Failure) -> None:
        """Whoever asked has gone."""
        self.is_gone = True
        super().connectionLost(reason)

    def answer(self, answer: Answer) -> None:
        """Send this."""
        if self.is_gone:
            return
        self.setResponseCode(answer.code)
        headers = {
            "Content-Type": answer.kind, "Content-Length": str(len(answer.body)), **answer.headers
        }  # fmt: skip
        for name, value in headers.items():
            self.responseHeaders.setRawHeaders(name, [value])
        self.write(answer.body)
        self.finish()


class Connection(http.HTTPChannel):
    """One client."""

    transport: Any
    requestFactory = Request
    totalHeadersSize = HEAD_MAX
    timeOut = REQUEST_TIME_MAX

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server

    def callLater(self, period: float, func: Callable[[], object]) -> IDelayedCall:
        """As the base class does it, on the reactor of this server."""
        return self.server.clock.callLater(period, func)

    def connectionMade(self) -> None:
        """Count it."""
        self.server.connections.add(self)
        super().connectionMade()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """It is gone."""
        self.server.connections.discard(self)
        super().connectionLost(reason)

    def resetTimeout(self) -> None:
        """A few bytes more buy no time: the limit is for the whole request."""

    def timeoutConnection(self) -> None:
        """It has not asked in time, or does not read."""
        self.transport.abortConnection()

    def allHeadersReceived(self) -> None:
        """Refuse what has a body, or begin to answer."""
        if self.length != 0:
            self.transport.write(b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\n\r\n")
            self.loseConnection()
        else:
            super().allHeadersReceived()
