"""What a plugin needs; the only module of serfd it imports."""

from msgspec import Meta, Struct

from serfd.agent import Agent
from serfd.config import Seconds
from serfd.errors import CommandError
from serfd.hooks.specs import hookimpl
from serfd.net.process import ProcessResult
from serfd.serf.events import Member, MemberEvent, Query, Status, UserEvent
from serfd.serf.queries import QueryAnswer, QueryDone, QueryParams

__all__ = [
    "Agent",
    "Member",
    "MemberEvent",
    "UserEvent",
    "Query",
    "Status",
    "QueryParams",
    "QueryAnswer",
    "QueryDone",
    "CommandError",
    "ProcessResult",
    "Struct",
    "Meta",
    "Seconds",
    "hookimpl",
]
