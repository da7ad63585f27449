"""One running node: everything RPC clients and plugins may ask of it."""

import logging
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool

from serfd.config import Config, Seconds
from serfd.effects import Address
from serfd.errors import JoinFailed
from serfd.net.driver import Driver
from serfd.net.keyring_file import save_keyring
from serfd.net.process import ProcessResult, run_process
from serfd.net.resolve import resolve
from serfd.net.snapshot_file import SnapshotFile
from serfd.serf.coordinates import Coordinate
from serfd.serf.events import Event, Member, MemberEvent, Query, UserEvent
from serfd.serf.keys import KeyResult
from serfd.serf.node import Node
from serfd.serf.queries import EVERYBODY, QueryAnswer, QueryDone, QueryParams

P = ParamSpec("P")
T = TypeVar("T")

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386"}
"""Go's names, which Serf's `stats` shows."""

_log = logging.getLogger("serfd.agent")


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
    ) -> None:
        """`port`: the bound gossip port; `shut_down` stops the daemon."""
        self._config = config
        self._node = node
        self._reactor = reactor
        self._port = port
        self._shut_down = shut_down
        self._listeners: list[Callable[[Event], None]] = []
        self.driver = Driver(
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

    def members(self) -> list[Member]:
        """Everybody known: alive, leaving, left and failed, this node included."""
        return self._node.members()

    @property
    def members_version(self) -> int:
        """As long as this number stays the same, `members` does too."""
        return self._node.members_version

    def join(self, addresses: Sequence[str], *, replay: bool = False) -> "Deferred[int]":
        """Join a cluster through any of `addresses`; gives the number that answered.

        Fails with JoinFailed if none did. An empty list gives 0.
        """
        return Deferred.fromCoroutine(self._join(addresses, replay=replay))

    def leave(self) -> "Deferred[None]":
        """Leave the cluster gracefully. Fails with CommandError if a leave is under way."""
        return self.driver.run(self._node.leave)

    def force_leave(self, name: str, *, prune: bool = False) -> "Deferred[None]":
        """Declare a failed member as left; with `prune` forget it altogether."""
        return self.driver.run(self._node.force_leave, name, prune=prune)

    def update_tags(
        self, tags: Mapping[str, str], *, delete: Sequence[str] = ()
    ) -> "Deferred[None]":
        """Delete tags, then set others. Fails with CommandError if they get too long."""
        return self.driver.run(self._node.update_tags, tags, delete=delete)

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

        Fails with CommandError if it cannot be asked.
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
        """Sections `agent`, `runtime`, `serf`, `tags`, `event_handlers` of texts (rpc.md 5)."""
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
        pool = self._reactor.getThreadPool()
        return deferToThreadPool(self._reactor, pool, function, *args, **kwargs)

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
            self._reactor, argv, stdin=stdin, env=env, timeout=timeout, output_max=output_max
        )

    def shut_down(self) -> None:
        """Stop the daemon, in this turn's end; called after an RPC client's leave."""
        self._shut_down()

    # Steps.

    def _must_stop(self, reason: str) -> None:
        _log.error("stopping: %s", reason)
        self._shut_down()

    async def _join(self, texts: Sequence[str], *, replay: bool) -> int:
        if not texts:
            return 0
        addresses: list[Address] = []
        failures: list[str] = []
        _log.info("joining: [%s] replay: %s", " ".join(texts), str(replay).lower())
        for text in texts:
            try:
                addresses += await resolve(self._reactor, text, default_port=self._port)
            except ValueError as error:
                failures.append(f"Failed to resolve {text}: {error}")
        contacted = 0
        if addresses:
            joined = await self.driver.run(self._node.join, addresses, replay=replay)
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
