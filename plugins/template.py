"""Writes a file from a Jinja2 template and the members: the configuration of a load balancer, say.

    [plugins.template]
    template = "/etc/serfd/haproxy.cfg.j2"
    target = "/etc/haproxy/haproxy.cfg"
    tags = { role = "web" }
    check = ["haproxy", "-c", "-f", "{}"]
    reload = ["systemctl", "reload", "haproxy"]

Members come and go: the file is rendered, checked, put in place in one step, and the program is
told to read it again. Whatever fails leaves the old file and is tried again. The settings but
`template` are those of all plugins that write files, `serfd.hooks.FileSettings`.
"""

import os
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from serfd.hooks import Agent, CannotMake, FileSettings, FollowedFile, Member, hookimpl

try:
    from jinja2 import FileSystemLoader, StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import SandboxedEnvironment
except ImportError as error:
    raise ImportError(f"{error}; pip install 'serfd[template]'") from error

RENDERED_MAX = 16 << 20
"""Characters a template may give."""
RENDER_TIME_MAX = 10.0
"""Seconds it may take."""
LOOK_INTERVAL = 5.0
"""Seconds between two looks at whether the template itself has changed."""

_NO_WORD = re.compile(r"[^A-Za-z0-9_.:-]")


class Shown(NamedTuple):
    """A member, as a template sees it. Control characters in names and tags are `_`."""

    name: str
    ip: str
    port: int
    """Its gossip port."""
    address: str
    """`ip:port`, `[ip]:port`."""
    tags: Mapping[str, str]
    status: str
    """`alive`, `failed` …"""


class Plugin:
    """Renders the template; the rest is `FollowedFile`'s."""

    class Settings(FileSettings, frozen=True, kw_only=True):
        """The table [plugins.template]."""

        template: str
        """The template's file, with its whole path; it may include others of its directory."""

        def __post_init__(self) -> None:
            """Check what has a form of its own."""
            super().__post_init__()
            if not os.path.isabs(self.template):
                raise ValueError(f"template is {self.template!r}, expected a path beginning with /")

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self._agent = agent
        self._file = FollowedFile(agent, settings, Template(settings.template).render)
        self._path = settings.template
        self._seen: tuple[int, ...] = ()

    @hookimpl
    def start(self) -> None:
        """Render it, and look now and then whether somebody has changed the template."""
        self._seen = version(self._path)
        self._file.start()
        self._agent.every(LOOK_INTERVAL, self._look)

    @hookimpl
    def member_join(self) -> None:
        """Render it again."""
        self._file.changed()

    member_leave = member_failed = member_update = member_reap = events_lost = member_join

    @hookimpl
    def reload(self, settings: Settings) -> None:
        """Render it with the new settings."""
        self._path = settings.template
        self._file.take(settings, Template(settings.template).render)

    @hookimpl
    async def stop(self) -> None:
        """Let what is under way finish."""
        await self._file.stop()

    def _look(self) -> None:
        before, self._seen = self._seen, version(self._path)
        if self._seen != before:
            self._file.changed()


class Template:
    """A template's file; read when it is rendered, and again when it has changed."""

    def __init__(self, path: str) -> None:
        self._path = path
        folder, self._name = os.path.split(path)
        # In a sandbox: what members call themselves must not reach Python's insides.
        self._environment = SandboxedEnvironment(
            loader=FileSystemLoader(folder),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self._environment.filters["word"] = word

    def render(self, members: Sequence[Member], me: Member, old: bytes | None) -> bytes:
        """The text for these members. Raises CannotMake with the template's file and line."""
        own = shown(me)
        variables = {
            "members": [shown(member) for member in members],
            "me": own, "name": own.name, "tags": own.tags,
        }  # fmt: skip
        try:
            text = self._text(variables)
        except CannotMake:
            raise
        except TemplateSyntaxError as error:
            raise CannotMake(f"{error.filename}:{error.lineno}: {error.message}") from error
        except Exception as error:
            raise CannotMake(f"{self._place(error)}: {type(error).__name__}: {error}") from error
        return text.encode()

    def _text(self, variables: Mapping[str, object]) -> str:
        parts: list[str] = []
        length = 0
        deadline = time.monotonic() + RENDER_TIME_MAX
        # Piece by piece, so that one without an end has one.
        for part in self._environment.get_template(self._name).generate(variables):
            parts.append(part)
            length += len(part)
            if length > RENDERED_MAX:
                raise CannotMake(
                    f"{self._path}: gives more than {RENDERED_MAX >> 20} Mi characters"
                )
            if time.monotonic() > deadline:
                raise CannotMake(f"{self._path}: takes longer than {RENDER_TIME_MAX:g} s")
        return "".join(parts)

    def _place(self, error: Exception) -> str:
        """The last line of a template that was rendered."""
        folder = os.path.dirname(self._path) + os.sep
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename.startswith(folder):
                return f"{frame.filename}:{frame.lineno}"
        return self._path


def shown(member: Member) -> Shown:
    """The member with texts that cannot break out of a line."""
    return Shown(
        name=printable(member.name),
        ip=member.ip,
        port=member.port,
        address=member.address,
        tags={printable(key): printable(value) for key, value in member.tags.items()},
        status=member.status.text,
    )


def printable(text: str) -> str:
    """The text with `_` for every character that is none to see, such as a line's end."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "_" for c in text)


def word(value: object) -> str:
    """The filter `word`: `_` for all but letters, digits, `_`, `.`, `:`, `-`. Never empty."""
    return _NO_WORD.sub("_", str(value)) or "_"


def version(path: str) -> tuple[int, ...]:
    """Changes when the file does."""
    try:
        stat = os.stat(path)
    except OSError:
        return ()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
