"""The hooks. This file is the plugin API.

An implementation takes any subset of a hook's arguments. It is a plain function, a coroutine
(`async def`, awaiting Deferreds) or returns a Deferred.
"""

import inspect
from collections.abc import Awaitable, Mapping, Sequence

from msgspec import Struct
from pluggy import HookimplMarker, HookspecMarker

from serfd.serf.events import Member, Query, UserEvent

PROJECT = "serfd"
"""What pluggy marks and finds the implementations by."""

hookspec = HookspecMarker(PROJECT)
hookimpl = HookimplMarker(PROJECT)
"""Marks a method of a plugin as the implementation of the hook of its name."""


@hookspec
def start() -> Awaitable[None] | None:
    """The node is up and has joined. The daemon reports ready when every plugin's start is done."""


@hookspec
def stop() -> Awaitable[None] | None:
    """The daemon is stopping, or a reload replaces or removes this plugin."""


@hookspec
def member_join(members: Sequence[Member]) -> Awaitable[None] | None:
    """Nodes joined the cluster or came back."""


@hookspec
def member_leave(members: Sequence[Member]) -> Awaitable[None] | None:
    """Nodes left the cluster on purpose, or were forced out of it."""


@hookspec
def member_failed(members: Sequence[Member]) -> Awaitable[None] | None:
    """Nodes do not answer any more."""


@hookspec
def member_update(members: Sequence[Member]) -> Awaitable[None] | None:
    """Nodes changed their tags."""


@hookspec
def member_reap(members: Sequence[Member]) -> Awaitable[None] | None:
    """Nodes that left or failed long ago were forgotten."""


@hookspec
def user_event(event: UserEvent) -> Awaitable[None] | None:
    """Somebody told the whole cluster something."""


@hookspec
def events_lost(count: int) -> Awaitable[None] | None:
    """So many user events were dropped, because too many waited for this plugin."""


@hookspec
def reload(settings: Struct) -> Awaitable[None] | None:
    """The plugin's settings have changed: take these. Without this hook it is replaced."""


@hookspec(firstresult=True)
def query(query: Query) -> Awaitable[bytes | str | None] | bytes | str | None:
    """Give the answer to a query, or None to leave it to the next plugin."""


HOOKS: Mapping[str, tuple[str, ...]] = {
    spec.__name__: tuple(inspect.signature(spec).parameters)
    for spec in (
        start, stop, member_join, member_leave, member_failed, member_update, member_reap,
        user_event, events_lost, reload, query,
    )
}  # fmt: skip
"""Every hook with the names of the arguments serfd passes."""
