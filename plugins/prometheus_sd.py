"""Writes the members as targets for Prometheus, in the form of its `file_sd_configs`.

    [plugins.prometheus_sd]
    target = "/etc/prometheus/serf.json"
    tags = { role = "web" }
    port = 9100

Prometheus reads the file again by itself. Each member is a group: its targets, and for relabelling
the labels `__meta_serf_name`, `__meta_serf_ip`, `__meta_serf_status` and `__meta_serf_tag_TAG`. The
settings but `port` and `port_tag` are those of all plugins that write files,
`serfd.hooks.FileSettings`.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from serfd.hooks import Agent, CannotMake, FileSettings, FollowedFile, Member, Meta, hookimpl

PORT_MAX = 65535
TARGETS_MAX = 16
"""Targets of one member."""

_PREFIX = "__meta_serf_"
_NO_LABEL = re.compile("[^a-zA-Z0-9_]")


class Plugin:
    """Puts the targets together; the rest is `FollowedFile`'s."""

    class Settings(FileSettings, frozen=True, kw_only=True):
        """The table [plugins.prometheus_sd]."""

        port: Annotated[int, Meta(ge=1, le=PORT_MAX)] | None = None
        """The port to ask each member at; without one, those without `port_tag` are left out."""

        port_tag: str = ""
        """A tag with a member's own port, or several with commas between."""

        def __post_init__(self) -> None:
            """Check what has a form of its own."""
            super().__post_init__()
            if self.port is None and not self.port_tag:
                raise ValueError("port or port_tag is missing")

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self._agent = agent
        self._file = FollowedFile(agent, settings, Targets(settings, agent.logger))

    @hookimpl
    def start(self) -> None:
        """Write them."""
        self._file.start()

    @hookimpl
    def member_join(self) -> None:
        """Write them again."""
        self._file.changed()

    member_leave = member_failed = member_update = member_reap = events_lost = member_join

    @hookimpl
    def reload(self, settings: Settings) -> None:
        """Write them with the new settings."""
        self._file.take(settings, Targets(settings, self._agent.logger))

    @hookimpl
    async def stop(self) -> None:
        """Let what is under way finish."""
        await self._file.stop()


class Targets:
    """The content of the file."""

    def __init__(self, settings: Plugin.Settings, log: logging.Logger) -> None:
        self._settings = settings
        self._log = log
        self._told: set[str] = set()

    def __call__(self, members: Sequence[Member], me: Member, old: bytes | None) -> bytes:
        """A group for each member, as JSON. Raises CannotMake."""
        groups: list[Mapping[str, object]] = []
        left_out: dict[str, str] = {}
        for member in members:
            try:
                ports = self._ports(member)
            except ValueError as error:
                left_out[member.name] = str(error)
                continue
            host = f"[{member.ip}]" if ":" in member.ip else member.ip
            groups.append(
                {"targets": [f"{host}:{port}" for port in ports], "labels": labels(member)}
            )
        for name, why in left_out.items():
            if name not in self._told:
                self._log.warning("%r is left out: %s", name, why)
        self._told = set(left_out)
        if not (groups or self._settings.allow_empty):
            raise CannotMake("no member has a port")
        return json.dumps(groups, indent=2).encode() + b"\n"

    def _ports(self, member: Member) -> list[int]:
        """Raises ValueError."""
        settings = self._settings
        if len(member.addr) not in (4, 16):
            raise ValueError("its address is none")
        text = member.tags.get(settings.port_tag) if settings.port_tag else None
        if text is None:
            if settings.port is None:
                raise ValueError(f"it has no tag {settings.port_tag!r}")
            return [settings.port]
        ports = [part.strip() for part in text.split(",")]
        if len(ports) > TARGETS_MAX or not all(is_port(port) for port in ports):
            raise ValueError(f"its tag {settings.port_tag!r} is {text!r}, expected a port")
        return [int(port) for port in dict.fromkeys(ports)]


def is_port(text: str) -> bool:
    """Whether it is a number of a port, 1 to 65535."""
    return re.fullmatch("[0-9]{1,5}", text) is not None and 1 <= int(text) <= PORT_MAX


def labels(member: Member) -> dict[str, str]:
    """The member's labels; of tags whose names get the same, the first by name has it."""
    found = {
        f"{_PREFIX}name": readable(member.name),
        f"{_PREFIX}ip": member.ip,
        f"{_PREFIX}status": member.status.text,
    }
    for tag, value in sorted(member.tags.items()):
        found.setdefault(f"{_PREFIX}tag_{_NO_LABEL.sub('_', tag)}", readable(value))
    return found


def readable(text: str) -> str:
    """The text with � for bytes that are no UTF-8, which Prometheus refuses."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
