"""What a plugin needs; the only module of serfd it imports."""

from msgspec import Meta, Struct

from serfd.agent import PluginStats
from serfd.config import Seconds
from serfd.errors import CommandError, ConfigError
from serfd.hooks.followed_file import CannotMake, FileSettings, FollowedFile
from serfd.hooks.plugin_agent import Answers
from serfd.hooks.plugin_agent import PluginAgent as Agent
from serfd.hooks.specs import hookimpl
from serfd.metrics import METRICS, Metrics
from serfd.net.process import ProcessResult, inherited_environment, last_lines
from serfd.serf.coordinates import Coordinate
from serfd.serf.events import Member, MemberEvent, Query, Status, UserEvent
from serfd.serf.patterns import matcher
from serfd.serf.queries import QueryAnswer, QueryDone

__all__ = [
    "Agent",
    "Member",
    "MemberEvent",
    "UserEvent",
    "Query",
    "Status",
    "Answers",
    "QueryAnswer",
    "QueryDone",
    "Coordinate",
    "CommandError",
    "ConfigError",
    "PluginStats",
    "METRICS",
    "Metrics",
    "ProcessResult",
    "inherited_environment",
    "last_lines",
    "matcher",
    "FollowedFile",
    "FileSettings",
    "CannotMake",
    "Struct",
    "Meta",
    "Seconds",
    "hookimpl",
]
