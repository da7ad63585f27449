"""Keeps the members in a hosts file, between two lines of its own.

    [plugins.hosts]
    domain = "cluster.local"

writes `10.0.0.7 web1.cluster.local web1` for each member between `# BEGIN serfd hosts` and
`# END serfd hosts` of /etc/hosts, and leaves every other byte as it is. The settings but `domain`
are those of all plugins that write files, `serfd.hooks.FileSettings`.
"""

import logging
import re
from collections.abc import Iterable, Sequence

from serfd.hooks import Agent, CannotMake, FileSettings, FollowedFile, Member, hookimpl

NAME_LENGTH_MAX = 253
"""Characters of a host's name with its domain. RFC 1035, 2.3.4."""

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


class Plugin:
    """Puts the block together; the rest is `FollowedFile`'s."""

    class Settings(FileSettings, frozen=True, kw_only=True):
        """The table [plugins.hosts]."""

        target: str = "/etc/hosts"
        """The hosts file, with its whole path."""

        domain: str = ""
        """Each member is written with this domain first, then without; empty: only without."""

        def __post_init__(self) -> None:
            """Check what has a form of its own."""
            super().__post_init__()
            if self.domain and not is_host_name(self.domain):
                raise ValueError(f"domain is {self.domain!r}, expected one like 'cluster.local'")

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self._agent = agent
        self._file = FollowedFile(agent, settings, self._block(settings))

    @hookimpl
    def start(self) -> None:
        """Write the block."""
        self._file.start()

    @hookimpl
    def member_join(self) -> None:
        """Write it again."""
        self._file.changed()

    member_leave = member_failed = member_update = member_reap = events_lost = member_join

    @hookimpl
    def reload(self, settings: Settings) -> None:
        """Write it with the new settings."""
        self._file.take(settings, self._block(settings))

    @hookimpl
    async def stop(self) -> None:
        """Let what is under way finish."""
        await self._file.stop()

    def _block(self, settings: Settings) -> "Block":
        return Block(
            self._agent.plugin, settings.domain,
            allow_empty=settings.allow_empty, log=self._agent.logger,
        )  # fmt: skip


class Block:
    """The lines of one plugin in a hosts file."""

    def __init__(self, name: str, domain: str, *, allow_empty: bool, log: logging.Logger) -> None:
        self._begin, self._end = (f"# {word} serfd {name}".encode() for word in ("BEGIN", "END"))
        self._domain = domain
        self._allow_empty = allow_empty
        self._log = log
        self._told: set[str] = set()

    def __call__(self, members: Sequence[Member], me: Member, old: bytes | None) -> bytes:
        """The file with the block as it should be. Raises CannotMake."""
        before, after = self._around(old or b"")
        lines = self._lines(members, names_in(before + after))
        if not (lines or self._allow_empty):
            raise CannotMake("no member has a name for it")
        block = b"\n".join([self._begin, *(line.encode() for line in lines), self._end, b""])
        # What has no line's end would run into the block.
        gap = b"\n" if before and not before.endswith(b"\n") else b""
        return before + gap + block + after

    def _around(self, text: bytes) -> tuple[bytes, bytes]:
        """What stands before the block and behind it; without a block, all is before it."""
        lines = text.splitlines(keepends=True)
        marks = [
            (number, line.strip())
            for number, line in enumerate(lines)
            if line.strip() in (self._begin, self._end)
        ]
        if not marks:
            return text, b""
        if [mark for _, mark in marks] != [self._begin, self._end]:
            where = ", ".join(f"{mark.decode()!r} in line {number + 1}" for number, mark in marks)
            raise CannotMake(
                f"expected {self._begin.decode()!r} once and {self._end.decode()!r} once after it, "
                f"found {where}; put that right"
            )
        (first, _), (last, _) = marks
        return b"".join(lines[:first]), b"".join(lines[last + 1 :])

    def _lines(self, members: Iterable[Member], taken: set[str]) -> list[str]:
        """A line for each member. A name stands for one address only: what was first has it."""
        lines: list[str] = []
        left_out: dict[str, str] = {}
        for member in members:
            if len(member.addr) not in (4, 16) or not is_host_name(self._full(member.name)):
                left_out[member.name] = "is no host name"
                continue
            both = dict.fromkeys((self._full(member.name), member.name))
            names = [name for name in both if name.lower() not in taken]
            if len(names) < len(both):
                left_out[member.name] = "is in the file already"
            if names:
                taken.update(name.lower() for name in names)
                lines.append(f"{member.ip} {' '.join(names)}")
        for name, why in left_out.items():
            if name not in self._told:
                self._log.warning("%r %s and is left out", name, why)
        self._told = set(left_out)
        return lines

    def _full(self, name: str) -> str:
        return f"{name}.{self._domain}" if self._domain else name


def is_host_name(text: str) -> bool:
    """Whether it is a host's name. RFC 1123, 2.1."""
    return len(text) <= NAME_LENGTH_MAX and _HOST_NAME.fullmatch(text) is not None


def names_in(text: bytes) -> set[str]:
    """All names in a hosts file, in lower case. hosts(5)."""
    entries = (line.partition(b"#")[0].split()[1:] for line in text.splitlines())
    return {name.decode("utf-8", "replace").lower() for names in entries for name in names}
