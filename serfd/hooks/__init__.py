"""What a plugin needs; the only module of serfd it imports."""

from msgspec import Meta, Struct

from serfd.agent import Agent
from serfd.config import Seconds
from serfd.hooks.specs import hookimpl
from serfd.net.process import ProcessResult
from serfd.serf.events import Member, MemberEvent, Status

__all__ = [
    "Agent",
    "Member",
    "MemberEvent",
    "Status",
    "ProcessResult",
    "Struct",
    "Meta",
    "Seconds",
    "hookimpl",
]
