"""`FollowedFile`: a file that follows the members, and the program told that reads it.

Its rule: a program that worked goes on working. What is new is looked at by a command before it
takes the old file's place, and takes it in one step. What fails leaves the old file and is tried
again by itself, since nobody looks at it at night.
"""

import errno
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.python.failure import Failure

from serfd.config import Seconds
from serfd.hooks.plugin_agent import PluginAgent
from serfd.net.process import last_lines
from serfd.serf.events import Member, Status
from serfd.serf.patterns import matcher

MAKE_TIME_MAX = Seconds(20.0)
"""A content that is not made in this time is given up."""
RETRY = Seconds(60.0)
"""What could not be made, or was refused by its check, is tried again after this long."""
RELOAD_RETRY_MIN = Seconds(1.0)
"""A reload that failed is tried again after this long; then after twice as long, and so on."""
RELOAD_RETRY_MAX = Seconds(60.0)

_PLACE = "{}"
# The directory lets no other file take the old one's place. A file that is mounted by itself, as
# /etc/hosts is in a container, cannot be renamed over; a directory may be read-only for us.
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV)
_CANNOT_CREATE = (errno.EACCES, errno.EPERM, errno.EROFS)

Command: TypeAlias = str | tuple[str, ...]
"""A program with its arguments, or a text for the shell."""


class CannotMake(Exception):
    """There is no content to write now; the text says why, for the log."""


Make: TypeAlias = Callable[[Sequence[Member], Member, bytes | None], bytes]
"""Gives a file's content from the members it is about, this node, and the file as it is now (None:
there is none). Runs in a thread, once at a time; raises CannotMake."""


class FileSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of all plugins that write files."""

    target: str
    """The file to write, with its whole path."""

    tags: dict[str, str] = {}
    """Only members with these tags: a regular expression for the whole value of each."""

    statuses: Annotated[
        tuple[Literal["alive", "leaving", "left", "failed"], ...], Meta(min_length=1)
    ] = ("alive",)
    """Only members of these statuses, of `alive`, `leaving`, `left` and `failed`."""

    wait: Seconds = Seconds(0.5)
    """After a change, wait until nothing has changed for this long."""

    wait_max: Seconds = Seconds(5.0)
    """But never longer than this after the first change."""

    check: Command = ()
    """A program that is run on a new file, `{}`; if it fails, the old file stays."""

    check_timeout: Seconds = Seconds(10.0)
    """A check that takes longer has failed."""

    reload: Command = ()
    """A program that is run when the file has changed, and again until it works."""

    reload_timeout: Seconds = Seconds(30.0)
    """A reload that takes longer has failed."""

    allow_empty: bool = False
    """Write the file even if it is about no member at all."""

    mode: str = "0644"
    """Permissions of a file that is not there yet; one that is keeps its own."""

    def __post_init__(self) -> None:
        """Check what has a form of its own."""
        if not os.path.isabs(self.target):
            raise ValueError(f"target is {self.target!r}, expected a path that begins with '/'")
        for tag, pattern in self.tags.items():
            try:
                matcher(pattern, whole=True)
            except ValueError as error:
                raise ValueError(f"tags: the pattern of {tag!r}: {error}") from None
        if not 0 <= self.wait <= self.wait_max:
            raise ValueError("wait must not be longer than wait_max")
        if min(self.check_timeout, self.reload_timeout) <= 0:
            raise ValueError("check_timeout and reload_timeout must be longer than 0")
        if self.check and not any(_PLACE in part for part in _argv(self.check)):
            raise ValueError("check must have {} where the new file's path belongs")
        if not re.fullmatch("0?[0-7]{3}", self.mode):
            raise ValueError(f"mode is {self.mode!r}, expected three octal digits like '0644'")


class FollowedFile:
    """One file; told of every change, it is as it should be soon after."""

    def __init__(self, agent: PluginAgent, settings: FileSettings, make: Make) -> None:
        self._agent = agent
        self._settings = settings
        self._make = make
        self._end_timer: Callable[[], None] | None = None
        self._changed_since: float | None = None
        """When the first change came that no work has begun for."""
        self._work: Deferred[None] | None = None
        self._again = False
        """Whether more work is due when this is done."""
        self._is_making = False
        self._is_empty = False
        self._reload_due = False
        self._reload_retry = RELOAD_RETRY_MIN
        self._has_ended: Deferred[None] | None = None

    def start(self) -> None:
        """Bring the file up to date now."""
        self._in(0)

    def changed(self) -> None:
        """Members have changed: bring the file up to date when they keep still."""
        now = self._agent.reactor.seconds()
        if self._changed_since is None:
            self._changed_since = now
        left = self._changed_since + self._settings.wait_max - now
        self._in(max(0.0, min(self._settings.wait, left)))

    def take(self, settings: FileSettings, make: Make) -> None:
        """Go on with these settings, at once."""
        self._settings = settings
        self._make = make
        self._in(0)

    async def stop(self) -> None:
        """Begin nothing more; wait for what is under way. If cancelled, end that."""
        self._forget_timer()
        if self._work is not None:
            self._has_ended = Deferred()
            try:
                await self._has_ended
            except CancelledError:
                self._work.cancel()
                raise

    # When.

    def _in(self, delay: float) -> None:
        self._forget_timer()
        self._end_timer = self._agent.later(delay, self._begin)

    def _forget_timer(self) -> None:
        if self._end_timer is not None:
            self._end_timer()
            self._end_timer = None

    def _begin(self) -> None:
        self._end_timer = None
        if self._work is not None:
            self._again = True
            return
        self._changed_since = None
        # Not the hook's own: with a slow check and reload it may take longer than a hook has.
        self._work = work = Deferred.fromCoroutine(self._bring_up_to_date())
        _ = work.addErrback(self._went_wrong).addCallback(self._done)

    def _went_wrong(self, failure: Failure) -> None:
        if not failure.check(CancelledError):
            self._agent.logger.error(
                "Keeping %s up to date failed", self._settings.target, extra={"details": failure}
            )

    def _done(self, _: None) -> None:
        self._work = None
        if self._has_ended is not None:
            if not self._has_ended.called:
                self._has_ended.callback(None)
        elif self._again:
            self._again = False
            self._in(0)

    async def _bring_up_to_date(self) -> None:
        # Whatever goes wrong with the content, a reload that is due is tried all the same.
        write = Deferred.fromCoroutine(self._write())
        retries = [
            await write.addErrback(self._not_written),
            await self._reload(),
        ]
        retry = min((each for each in retries if each is not None), default=None)
        # A change that came meanwhile has its timer already, and sooner.
        if retry is not None and self._end_timer is None and self._has_ended is None:
            self._in(retry)

    # The content.

    async def _write(self) -> float | None:
        """Make it and write it if it is another; gives the seconds until the next try."""
        settings, agent = self._settings, self._agent
        members = agent.members(
            status=[Status[status.upper()] for status in settings.statuses], tags=settings.tags
        )
        if self._refuses(members):
            return None
        path = await agent.in_thread(os.path.realpath, settings.target)
        marker = _beside(path, agent.plugin, "reload-due") if settings.reload else ""
        old, new = await self._made(path, marker, members)
        if new == old:
            return None
        beside = _beside(path, agent.plugin, "tmp")
        try:
            can_replace = await agent.in_thread(
                _write_beside, beside, path, new, mode=int(settings.mode, 8),
                must=bool(settings.check),
            )  # fmt: skip
            if settings.check:
                await self._run("check", settings.check, settings.check_timeout, beside)
            is_done = await agent.in_thread(
                _replace, path, old, new, beside if can_replace else "", marker
            )
        finally:
            # Here and not in a thread: nothing can come between, and it is one system call.
            with suppress(OSError):
                os.unlink(beside)
        if not is_done:
            agent.logger.info("%s was changed by somebody else meanwhile", path)
            return settings.wait_max
        agent.logger.info("%s written: %d members", path, len(members))
        agent.metrics.count("written")
        self._reload_due = bool(settings.reload)
        self._reload_retry = RELOAD_RETRY_MIN
        return None

    def _refuses(self, members: Sequence[Member]) -> bool:
        """Whether the old file stays because the new one would be about nobody."""
        was_empty, self._is_empty = self._is_empty, not members
        if members or self._settings.allow_empty:
            return False
        if not was_empty:
            self._agent.logger.warning(
                "%s: no member is left for it, it stays as it is (allow_empty = true would write "
                "it)",
                self._settings.target,
            )
        return True

    async def _made(
        self, path: str, marker: str, members: Sequence[Member]
    ) -> tuple[bytes | None, bytes]:
        """The content as it is and as it should be."""
        if self._is_making:
            raise CannotMake("making it was given up, and still goes on")
        make, me = self._make, self._agent.me

        def read_and_make() -> tuple[bool, bytes | None, bytes]:
            try:
                old = _content(path)
                return bool(marker) and os.path.exists(marker), old, make(members, me, old)
            finally:
                self._is_making = False

        self._is_making = True
        making = self._agent.in_thread(read_and_make)
        try:
            is_marked, old, new = await making.addTimeout(MAKE_TIME_MAX, self._agent.reactor)
        except TimeoutError:
            raise CannotMake(f"making it takes longer than {MAKE_TIME_MAX:g} s") from None
        # The serfd before this one did not get to it.
        self._reload_due |= is_marked
        return old, new

    def _not_written(self, failure: Failure) -> float:
        if failure.check(CancelledError):
            failure.raiseException()
        is_known = failure.check(CannotMake, OSError)
        self._agent.logger.error(
            "%s stays as it is, next try in %g s at the latest: %s",
            self._settings.target, RETRY, failure.getErrorMessage(),
            extra={} if is_known else {"details": failure},
        )  # fmt: skip
        self._agent.metrics.count("failures")
        return RETRY

    # The programs.

    async def _reload(self) -> float | None:
        """Run the command if it is due; gives the seconds until the next try."""
        settings, agent = self._settings, self._agent
        if not (self._reload_due and settings.reload):
            self._reload_due = False
            return None
        try:
            await self._run("reload", settings.reload, settings.reload_timeout)
        except (CannotMake, OSError) as error:
            retry = self._reload_retry
            self._reload_retry = min(Seconds(2 * retry), RELOAD_RETRY_MAX)
            agent.logger.error("%s: %s; next try in %g s", settings.target, error, retry)
            agent.metrics.count("failures")
            return retry
        self._reload_due = False
        agent.logger.info("%s: reloaded", settings.target)
        agent.metrics.count("reloads")
        path = await agent.in_thread(os.path.realpath, settings.target)
        with suppress(OSError):
            os.unlink(_beside(path, agent.plugin, "reload-due"))
        return None

    async def _run(self, what: str, command: Command, timeout: Seconds, path: str = "") -> None:
        """Raises CannotMake if it fails, with what it wrote in the log."""
        result = await self._agent.run(_argv(command, path), timeout=timeout)
        if result.status == 0 and not result.timed_out:
            return
        for line in last_lines(result.stdout + result.stderr):
            self._agent.logger.error("%s: %s: %s", self._settings.target, what, line)
        how = f"no end after {timeout:g} s" if result.timed_out else result.status_text
        raise CannotMake(f"its {what} failed: {how}")


def _argv(command: Command, path: str = _PLACE) -> Sequence[str]:
    if isinstance(command, str):
        quoted = path if path == _PLACE else shlex.quote(path)
        return ("/bin/sh", "-c", command.replace(_PLACE, quoted))
    return [part.replace(_PLACE, path) for part in command]


def _beside(path: str, plugin: str, kind: str) -> str:
    """A name in the same directory that no `*.conf` or `*.json` takes for one of its files."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.serfd-{plugin}.{kind}")


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _write_beside(beside: str, path: str, content: bytes, *, mode: int, must: bool) -> bool:
    """Write a file that may take the place of `path`; gives whether it may.

    It may not if it cannot have the same owner, or if the directory refuses it and it is no `must`.
    Raises OSError.
    """
    try:
        with suppress(FileNotFoundError):
            os.unlink(beside)  # of a serfd that was killed
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if must or error.errno not in _CANNOT_CREATE or not os.path.exists(path):
            raise
        return False
    with os.fdopen(fd, "wb") as out:
        can_replace = True
        try:
            old = os.stat(path)
        except FileNotFoundError:
            os.fchmod(fd, mode)
        else:
            try:
                os.fchown(fd, old.st_uid, old.st_gid)
            except PermissionError:
                can_replace = False
            shutil.copystat(path, beside)  # permissions, and the labels of SELinux
        out.write(content)
        out.flush()
        os.fsync(fd)
    return can_replace


def _replace(path: str, old: bytes | None, new: bytes, beside: str, marker: str) -> bool:
    """Give the file its new content, by renaming what is `beside` if anything is. Raises OSError.

    False if it is not the `old` any more: then nothing is done. The marker says that a reload is
    due, to whoever comes after a crash.
    """
    if _content(path) != old:
        return False
    if marker:
        with suppress(OSError):
            os.close(os.open(marker, os.O_WRONLY | os.O_CREAT, 0o600))
    if beside and _renamed(beside, path):
        return True
    with open(path, "r+b") as out:
        out.write(new)
        out.truncate()
        out.flush()
        os.fsync(out.fileno())
    return True


def _renamed(beside: str, path: str) -> bool:
    """Whether it could be done. Raises OSError."""
    try:
        os.replace(beside, path)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME:
            raise
        return False
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True
