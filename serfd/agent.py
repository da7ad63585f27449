"""One running node: everything RPC clients and plugins may ask of it."""

import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool

from serfd.config import Config, Seconds
from serfd.effects import Address
from serfd.errors import JoinFailed
from serfd.metrics import Metrics
from serfd.net.driver import Driver
from serfd.net.keyring_file import save_keyring
from serfd.net.process import ProcessResult, run_process
from serfd.net.resolve import resolve
from serfd.net.snapshot_file import SnapshotFile
from serfd.net.tags_file import save_tags
from serfd.serf.coordinates import Coordinate
from serfd.serf.events import Event, Member, MemberEvent, Query, Status, UserEvent
from serfd.serf.keys import KeyResult
from serfd.serf.node import Joined, Node
from serfd.serf.queries import EVERYBODY, QueryAnswer, QueryDone, QueryParams

P = ParamSpec("P")
T = TypeVar("T")

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386"}
"""Go's names, which Serf's `stats` shows."""

_log = logging.getLogger("serfd.agent")


@dataclass(frozen=True, slots=True)
class PluginStats:
    """One plugin's numbers since it was built."""

    name: str
    state: str
    """`loaded`, `starting`, `running`, `failing`, `stopping` or `stopped`."""
    source: str
    """Its file, or the installed package."""
    durable: bool
    """Whether what waits for it outlives the daemon."""
    calls: int
    """Hooks and functions called, `start` and `stop` included."""
    errors: int
    """Of them, those that raised."""
    timeouts: int
    """Of them, those that were cancelled because their time was up."""
    merged: int
    """Changes of members that were told together with others."""
    lost: int
    """Events never delivered: too many waited, or the plugin had to stop."""
    waiting: int
    """Events in the mailbox now."""
    seconds: float
    """Time that it held the daemon."""
    last_error: str
    """Empty if there was none."""


class Agent:
    """What RPC and plugins see of the node. All results are plain values or Deferreds."""

    def __init__(
        self,
        config: Config,
        node: Node,
        reactor: Any,
        *,
        port: int,
        shut_down: Callable[[], None],
        snapshot: SnapshotFile | None = None,
        driver: Callable[..., Any] = Driver,
    ) -> None:
        """`port`: the bound gossip port; `shut_down` stops the daemon.

        `driver` makes what carries out the node's effects; a simulated node has another.
        """
        self._config = config
        self._node = node
        self.reactor = reactor
        """Twisted's."""
        self._port = port
        self._shut_down = shut_down
        self._listeners: list[Callable[[Event], None]] = []
        self.plugins: Callable[[], Sequence[PluginStats]] = tuple
        """Each plugin's numbers; whoever hosts them says where they come from."""
        self.driver: Driver = driver(
            node,
            reactor,
            self._publish,
            save_keyring=lambda keys: save_keyring(config.keyring_file, keys),
            stop=self._must_stop,
            snapshot=snapshot,
        )
        """For the daemon, which connects it to the sockets."""

    @property
    def name(self) -> str:
        """This node's name."""
        return self._node.name

    @property
    def tags(self) -> Mapping[str, str]:
        """This node's tags as they are now."""
        return self._node.tags

    @property
    def metrics(self) -> Metrics:
        """What the node counts and measures; plugins may add to it."""
        return self._node.metrics

    def members(self) -> list[Member]:
        """Everybody known: alive, leaving, left and failed, this node included."""
        return self._node.members()

    def member(self, name: str) -> Member | None:
        """The member of that name, if there is one."""
        return self._node.member(name)

    def status_counts(self) -> Mapping[Status, int]:
        """How many members are in each status; 0 where there are none."""
        return self._node.status_counts()

    @property
    def members_version(self) -> int:
        """As long as this number stays the same, `members` does too."""
        return self._node.members_version

    def join(self, addresses: Sequence[str], *, replay: bool = False) -> "Deferred[int]":
        """Join a cluster through any of `addresses`; gives the number that answered.

        Fails with JoinFailed if none did. An empty list gives 0.
        """
        return Deferred.fromCoroutine(self._join(addresses, replay=replay))

    def resolve(self, text: str) -> "Deferred[list[Address]]":
        """What a text of `join` stands for, as it is now. Fails with ValueError."""
        return Deferred.fromCoroutine(resolve(self.reactor, text, default_port=self._port))

    def contact(self, addresses: Sequence[Address], *, replay: bool = False) -> "Deferred[Joined]":
        """As `join`, but nothing of it is logged, and it does not fail if nobody answers."""
        return self.driver.run(self._node.join, addresses, replay=replay)

    def leave(self) -> "Deferred[None]":
        """Leave the cluster gracefully. Fails with CommandError if a leave is under way."""
        _log.info("requesting graceful leave from Serf")
        return self.driver.run(self._node.leave)

    def force_leave(self, name: str, *, prune: bool = False) -> "Deferred[None]":
        """Declare a failed member as left; with `prune` forget it altogether."""
        return self.driver.run(self._node.force_leave, name, prune=prune)

    def update_tags(
        self, tags: Mapping[str, str], *, delete: Sequence[str] = ()
    ) -> "Deferred[None]":
        """Delete tags, then set others; with a tags file, there before anybody hears of them.

        Fails with CommandError if they get too long or the file cannot be written: then nothing has
        changed.
        """
        return Deferred.fromCoroutine(self._update_tags(tags, delete))

    def check_tags(self, tags: Mapping[str, str], *, delete: Sequence[str] = ()) -> None:
        """Raise CommandError if they would get too long by such an `update_tags`."""
        self._node.tags_after(tags, delete=delete)

    def user_event(
        self, name: str, payload: bytes = b"", *, coalesce: bool = True
    ) -> "Deferred[None]":
        """Tell everybody something; fires when it is on its way. Fails with CommandError.

        One that may `coalesce` may be replaced by a later one of its name before it is heard.
        """
        return self.driver.run(self._node.user_event, name, payload, coalesce=coalesce)

    def query(
        self,
        name: str,
        payload: bytes = b"",
        *,
        answered: Callable[[QueryAnswer], None],
        params: QueryParams = EVERYBODY,
    ) -> "Deferred[QueryDone]":
        """Ask everybody something: `answered` gets each answer, the Deferred fires at the end.

        Fails with CommandError if it cannot be asked. Cancel it, and it ends. A timeout of more
        than a day is cut to that.
        """
        return self.driver.ask(self._node.query, answered, name, payload, params)

    def respond(self, query: Query, payload: bytes) -> "Deferred[None]":
        """Answer a query, once and before its deadline. Fails with CommandError."""
        return self.driver.run(self._node.respond, query, payload)

    def change_keys(self, query: str, key: str = "") -> "Deferred[KeyResult]":
        """Install, use, remove or list keys on all members (`serfd.serf.keys`); `key` is base64.

        Fails with CommandError if nobody could be asked.
        """
        return self.driver.run(self._node.change_keys, query, key)

    def coordinate(self, name: str) -> Coordinate | None:
        """Where a member is in the network, if that is known."""
        return self._node.coordinate(name)

    def stats(self) -> dict[str, dict[str, str]]:
        """Sections `agent`, `runtime`, `serf`, `tags`, `event_handlers` of texts (rpc.md 5).

        And `plugins`, which Serf has not, if there are any.
        """
        plugins = self.plugins()
        driver = self.driver
        return {
            "agent": {"name": self.name},
            "runtime": {
                "os": sys.platform,
                "arch": _ARCHITECTURES.get(platform.machine(), platform.machine()),
                "version": f"python{platform.python_version()}",
                "max_procs": "1",
                "goroutines": str(threading.active_count()),
                "cpu_count": str(os.cpu_count() or 1),
            },
            "serf": self._node.stats()
            | {
                "internal_errors": str(driver.internal_errors),
                "send_errors": str(driver.send_errors),
            },
            "tags": dict(self.tags),
            "event_handlers": _handlers(self._config.event_handlers),
            **({"plugins": {each.name: _summary(each) for each in plugins}} if plugins else {}),
        }

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` with every event from now on; call what is returned to end it."""
        self._listeners.append(listener)

        def end() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return end

    def in_thread(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> "Deferred[T]":
        """Run blocking code in a thread; gives its result."""
        pool = self.reactor.getThreadPool()
        return deferToThreadPool(self.reactor, pool, function, *args, **kwargs)

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str],
        timeout: Seconds,
        output_max: int,
    ) -> "Deferred[ProcessResult]":
        """Run a program in a process group of its own; gives how it ended, whatever its status.

        After `timeout` the whole group gets SIGTERM, and SIGKILL 5 s later. `output_max` is in
        bytes, for the end of stdout and of stderr each. Fails with OSError if it cannot be started.
        """
        return run_process(
            self.reactor, argv, stdin=stdin, env=env, timeout=timeout, output_max=output_max
        )

    def shut_down(self) -> None:
        """Stop the daemon, in this turn's end; called after an RPC client's leave."""
        self._shut_down()

    # Steps.

    def _must_stop(self, reason: str) -> None:
        _log.error("stopping: %s", reason)
        self._shut_down()

    async def _update_tags(self, tags: Mapping[str, str], delete: Sequence[str]) -> None:
        if self._config.tags_file:
            save_tags(self._config.tags_file, self._node.tags_after(tags, delete=delete))
        await self.driver.run(self._node.update_tags, tags, delete=delete)

    async def _join(self, texts: Sequence[str], *, replay: bool) -> int:
        if not texts:
            return 0
        addresses: list[Address] = []
        failures: list[str] = []
        _log.info("joining: [%s] replay: %s", " ".join(texts), str(replay).lower())
        for text in texts:
            try:
                addresses += await self.resolve(text)
            except ValueError as error:
                failures.append(f"Failed to resolve {text}: {error}")
        contacted = 0
        if addresses:
            joined = await self.contact(addresses, replay=replay)
            contacted = joined.contacted
            failures += joined.failures
        if contacted:
            _log.info("joined: %d nodes", contacted)
            return contacted
        count = f"{len(failures)} error{'s' if len(failures) > 1 else ''} occurred:"
        # The form that a real agent's users and scripts know, blank line at the end included.
        text = "\n".join([count, *(f"\t* {failure}" for failure in failures), "\n"])
        _log.warning("error joining: %s", "; ".join(failures))
        raise JoinFailed(text)

    def _publish(self, event: Event) -> None:
        _log.info("Received event: %s", _shown(event))
        for listener in tuple(self._listeners):
            listener(event)


def _shown(event: Event) -> str:
    """`member-join`, `user-event: deploy`, `query: load`, as Serf logs them (agent.md 6)."""
    match event:
        case MemberEvent():
            return event.name
        case UserEvent():
            return f"user-event: {_one_line(event.name)}"
        case Query():
            return f"query: {_one_line(event.name)}"


def _summary(plugin: PluginStats) -> str:
    """`running: 12 calls, 1 error, 0 lost, 0 waiting`."""
    errors = plugin.errors + plugin.timeouts
    return (
        f"{plugin.state}: {plugin.calls} calls, {errors} error{'s' if errors != 1 else ''}, "
        f"{plugin.lost} lost, {plugin.waiting} waiting"
    )


def _one_line(name: str) -> str:
    """As it is, unless a stranger has put a line's end or the like into it."""
    return name if name.isprintable() else repr(name)


def _handlers(specs: Sequence[str]) -> dict[str, str]:
    """Event scripts as Serf's `stats` shows them: `"query:load"`, `"member-join:"`, `"*:"`."""
    shown: dict[str, str] = {}
    for spec in specs:
        filters, equals, script = spec.partition("=")
        if not equals:
            filters, script = "", spec
        for event in (filters or "*").split(","):
            kind, _, name = event.partition(":")
            shown[f"{kind}:{name}"] = script
    return shown
