"""Posts events as JSON to a web address.

    [plugins.webhook]
    url = "https://alerts.example.org/serf"
    events = ["member-failed", "member-join", "user:deploy"]
    secret = "..."

A post is tried again for as long as the hook may take, and the hook is not done before: so what a
durable plugin has not posted waits on disk. With `once`, one member reports each thing, not all.
"""

import hmac
import json
import math
import re
import ssl
from base64 import b64encode
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import count
from random import Random
from socket import SHUT_RDWR, socket
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote, urlsplit
from uuid import UUID

from twisted.internet.defer import TimeoutError
from twisted.internet.task import deferLater

from serfd.hooks import (
    Agent,
    Member,
    Meta,
    Seconds,
    Status,
    Struct,
    UserEvent,
    hookimpl,
    matcher,
)

MEMBER_EVENTS = ("member-join", "member-leave", "member-failed", "member-update", "member-reap")
BACKOFF_MIN, BACKOFF_MAX = Seconds(1.0), Seconds(60.0)
"""After a try that failed, wait about so long; then twice as long, and so on."""
RETRY_AFTER_MAX = Seconds(300.0)
"""A receiver that asks for a longer pause is asked again after this."""
USED_OF_HOOK = 0.95
"""So much of the hook's time is used: it must end by itself, or nobody hears what became of it."""

SETTLED = Seconds(30.0)
"""A member that came less than this ago is not relied on to report."""
TAKEOVER = Seconds(120.0)
"""What another is to report is remembered for this long, in case it fails."""
LEFT_MAX = 1024
"""So many occasions are remembered, and so many taken over wait to be posted."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t -~]*")
_OWN_HEADERS = re.compile(
    "connection|content-length|content-type|host|idempotency-key|transfer-encoding|x-serfd-.*"
)
_AGAIN = (408, 425, 429)
_MIX = 0x9E3779B97F4A7C15


class Occasion(NamedTuple):
    """Something that is to be posted."""

    id: str
    time: str
    event: str
    """`member-failed`, `user` …"""
    what: Sequence[Member] | UserEvent

    def __str__(self) -> str:
        """For logs."""
        if isinstance(self.what, UserEvent):
            return f"user event {self.what.name!r}"
        names = [member.name for member in self.what]
        return f"{self.event} of {names[0]!r}" + f" and {len(names) - 1} more" * (len(names) > 1)

    def body(self, node: str) -> bytes:
        """The text that is posted. Bytes that are no UTF-8 are shown as U+FFFD."""
        fields: dict[str, Any] = {
            "id": self.id, "time": self.time, "node": node, "event": self.event,
        }  # fmt: skip
        if isinstance(self.what, UserEvent):
            event = self.what
            fields |= {"name": event.name, "ltime": event.ltime}
            fields |= {"payload": b64encode(event.payload).decode(), "text": _text(event.payload)}
        else:
            fields["members"] = [
                {
                    "name": member.name,
                    "ip": member.ip,
                    "port": member.port,
                    "tags": dict(member.tags),
                    "status": member.status.text,
                }
                for member in self.what
            ]
        text = json.dumps(fields, ensure_ascii=False)
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode()


class Plugin:
    """One post at a time, in the order of events."""

    class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """The table [plugins.webhook]."""

        url: str
        """Where to post to, `https://` or `http://`; a user and password in it are sent as such."""

        events: tuple[str, ...] = MEMBER_EVENTS
        """What is posted: `member-join` and so on, `user`, `user:NAME`, `*` for everything."""

        headers: Mapping[str, str] = {}
        """More headers of each request."""

        secret: str = ""
        """Each post is signed with it; empty: none is."""

        timeout: Seconds = Seconds(10.0)
        """A try that takes longer has failed."""

        rate: Annotated[float, Meta(ge=0.1, le=1000)] = 10.0
        """Requests a second; after a pause, those of one second may come at once."""

        verify: bool = True
        """Check the receiver's certificate."""

        ca_file: str = ""
        """Certificates of the authorities to trust, PEM; empty: those of the system."""

        once: bool = False
        """One member reports each thing, not everybody who has this plugin."""

        once_tags: Mapping[str, str] = {}
        """With `once`, those with these tags report: a regular expression for the whole value."""

        def __post_init__(self) -> None:
            """Check what has a form of its own."""
            for item in self.events:
                if item not in (*MEMBER_EVENTS, "*", "user") and not item.startswith("user:"):
                    known = ", ".join((*MEMBER_EVENTS, "user", "user:NAME"))
                    raise ValueError(f"events has {item!r}, expected of {known} and *")
            for name, value in self.headers.items():
                if not _TOKEN.fullmatch(name) or _OWN_HEADERS.fullmatch(name.lower()):
                    raise ValueError(f"headers: there cannot be one named {name!r}")
                if not _VALUE.fullmatch(value):
                    raise ValueError(f"headers: {name!r} must be of printable ASCII characters")
            if self.timeout <= 0:
                raise ValueError("timeout must be longer than 0")
            for tag, pattern in self.once_tags.items():
                try:
                    matcher(pattern, whole=True)
                except ValueError as error:
                    raise ValueError(f"once_tags: the pattern of {tag!r}: {error}") from None
            Receiver(self)

    def __init__(self, agent: Agent, settings: Settings, rng: Random | None = None) -> None:
        self._agent = agent
        self._settings = settings
        self._rng = rng or Random()
        self._receiver = Receiver(settings)
        self._bucket = Bucket(settings.rate)
        self._reporters = Reporters(agent, settings.once_tags)
        self._orphans: deque[Occasion] = deque()
        """What members that have failed were to report, and this one does now."""

    @hookimpl
    def start(self) -> None:
        """Who is there now has been there."""
        self._reporters.begin()

    @hookimpl
    async def member_join(self, members: Sequence[Member]) -> None:
        """Post it."""
        self._reporters.came(members)
        await self._happened("member-join", members)

    @hookimpl
    async def member_leave(self, members: Sequence[Member]) -> None:
        """Post it."""
        self._reporters.went(members)
        await self._happened("member-leave", members)

    @hookimpl
    async def member_failed(self, members: Sequence[Member]) -> None:
        """Post it, and what these were to report."""
        self._reporters.went(members)
        self._adopt(self._reporters.left_by(members))
        await self._happened("member-failed", members)

    @hookimpl
    async def member_update(self, members: Sequence[Member]) -> None:
        """Post it."""
        await self._happened("member-update", members)

    @hookimpl
    async def member_reap(self, members: Sequence[Member]) -> None:
        """Post it."""
        self._reporters.went(members)
        await self._happened("member-reap", members)

    @hookimpl
    async def user_event(self, event: UserEvent) -> None:
        """Post it."""
        await self._happened("user", event)

    @hookimpl
    def events_lost(self, count: int) -> None:
        """Say so: nobody else will."""
        self._agent.logger.warning("%d user events were dropped and are not posted", count)

    async def _happened(self, event: str, what: Sequence[Member] | UserEvent) -> None:
        name = what.name if isinstance(what, UserEvent) else ""
        if not {"*", event, f"{event}:", f"{event}:{name}"}.intersection(self._settings.events):
            return
        identity = str(UUID(int=self._rng.getrandbits(128), version=4))
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        occasion = Occasion(identity, time, event, what)
        own = self._reporters.own_part(occasion) if self._settings.once else occasion
        if own is not None:
            await self._deliver(own)

    def _adopt(self, left: Iterable[Occasion]) -> None:
        """Report them beside what happens now, one after the other."""
        is_idle = not self._orphans
        own = [part for part in map(self._reporters.own_part, left) if part is not None]
        room = LEFT_MAX - len(self._orphans)
        self._orphans.extend(own[:room])
        if dropped := own[room:]:
            self._agent.metrics.count("gave_up", len(dropped))
        if self._orphans and is_idle:
            self._agent.later(0, self._report_orphan)

    async def _report_orphan(self) -> None:
        try:
            await self._deliver(self._orphans[0])
        finally:
            self._orphans.popleft()
            if self._orphans:
                self._agent.later(0, self._report_orphan)

    async def _deliver(self, occasion: Occasion) -> None:
        """Post it until it is taken or refused, or the hook's time is over."""
        clock, metrics, log = self._agent.reactor, self._agent.metrics, self._agent.logger
        deadline = clock.seconds() + USED_OF_HOOK * self._agent.hook_timeout
        body = occasion.body(self._agent.name)
        for tries in count(1):
            await deferLater(clock, self._bucket.take(clock.seconds()))
            answer = await self._try(occasion, body, deadline - clock.seconds())
            if answer.is_taken:
                metrics.count("posted")
                return
            metrics.count("failed")
            backoff = min(BACKOFF_MAX, BACKOFF_MIN * 2.0 ** min(tries - 1, 10))
            pause = max(backoff * self._rng.uniform(0.5, 1.0), answer.pause)
            left = deadline - clock.seconds()
            if 0 < left - self._settings.timeout < pause:
                pause = left - self._settings.timeout  # just in time for one more
            if not answer.is_worth_another or pause >= left:
                metrics.count("gave_up")
                log.error(
                    "%s is given up, %s after %d tries: %s",
                    occasion, self._receiver.name, tries, answer.problem,
                )  # fmt: skip
                return
            log.warning(
                "%s is posted to %s again in %.1f s: %s",
                occasion, self._receiver.name, pause, answer.problem,
            )  # fmt: skip
            await deferLater(clock, pause)

    async def _try(self, occasion: Occasion, body: bytes, left: float) -> "Answer":
        clock = self._agent.reactor
        limit = min(left, self._settings.timeout)
        if limit <= 0:
            return Answer("no time is left")
        headers = {"Idempotency-Key": occasion.id, **signature(self._settings.secret, body)}
        post = self._receiver.post(limit)
        began = clock.seconds()
        try:
            return await self._agent.in_thread(post.run, body, headers).addTimeout(limit, clock)
        except TimeoutError:
            return Answer(f"no answer in {limit:.1f} s")
        except (OSError, HTTPException) as error:
            return Answer(repr(error)[:200])
        finally:
            post.end()
            self._agent.metrics.sample("seconds", clock.seconds() - began)


class Answer(NamedTuple):
    """What came of a request."""

    problem: str
    """Why it failed, for the log."""
    status: int = 0
    """HTTP's; 0: there was no answer."""
    pause: float = 0.0
    """Seconds after which the receiver wants to be asked again."""

    @property
    def is_taken(self) -> bool:
        """Whether the receiver has it now."""
        return 200 <= self.status < 300

    @property
    def is_worth_another(self) -> bool:
        """Whether it may be taken the next time."""
        return self.status == 0 or self.status >= 500 or self.status in _AGAIN


class Receiver:
    """Where events are posted to."""

    def __init__(self, settings: Plugin.Settings) -> None:
        """Raises ValueError for an address or file that cannot be; it does not show the address."""
        try:
            if not re.fullmatch("[!-~]+", settings.url):
                raise ValueError
            url = urlsplit(settings.url)
            self._host, self._port = url.hostname, url.port
            if url.scheme not in ("http", "https") or not self._host:
                raise ValueError
        except ValueError:
            raise ValueError("url is not of the form https://HOST[:PORT]/PATH") from None
        self._path = (url.path or "/") + f"?{url.query}" * bool(url.query)
        # What comes after the host is for many receivers the secret that lets one post.
        self.name = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
        """As it is shown in logs."""
        self._headers = {"Content-Type": "application/json", "User-Agent": "serfd"}
        if url.username is not None:
            user = f"{unquote(url.username)}:{unquote(url.password or '')}"
            self._headers["Authorization"] = f"Basic {b64encode(user.encode()).decode()}"
        self._headers |= settings.headers
        self._tls = tls_context(settings) if url.scheme == "https" else None

    def post(self, timeout: float) -> "Post":
        """A request that can be made; `timeout` is in seconds, for each of its steps."""
        assert self._host is not None
        if self._tls is None:
            connection = HTTPConnection(self._host, self._port, timeout=timeout)
        else:
            connection = HTTPSConnection(self._host, self._port, timeout=timeout, context=self._tls)
        return Post(connection, self._path, self._headers)


class Post:
    """One request, for a thread."""

    def __init__(self, connection: HTTPConnection, path: str, headers: dict[str, str]) -> None:
        self._connection = connection
        self._path = path
        self._headers = headers

    def run(self, body: bytes, headers: dict[str, str]) -> Answer:
        """Make the request; blocks. Fails with OSError or HTTPException."""
        try:
            self._connection.request("POST", self._path, body, {**self._headers, **headers})
            response = self._connection.getresponse()
            pause = retry_after(response.headers.get("Retry-After", ""), datetime.now(UTC))
            return Answer(f"status {response.status}", response.status, pause)
        finally:
            self._connection.close()

    def end(self) -> None:
        """Let what blocks fail. Any thread may call it, at any time."""
        connected: socket | None = self._connection.sock
        if connected is not None:
            with suppress(OSError):  # it was closed just now
                # Not that of a TLS socket, which is for the thread that reads from it.
                socket.shutdown(connected, SHUT_RDWR)


def tls_context(settings: Plugin.Settings) -> ssl.SSLContext:
    """Raises ValueError for a file that cannot be used."""
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
    except OSError as error:  # ssl.SSLError among them
        raise ValueError(f"ca_file: cannot use {settings.ca_file}: {error}") from None
    if not settings.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def signature(secret: str, body: bytes) -> dict[str, str]:
    """The headers that prove to a receiver who knows the secret that serfd said this, and when."""
    if not secret:
        return {}
    time = str(int(datetime.now(UTC).timestamp()))
    digest = hmac.new(secret.encode(), f"{time}.".encode() + body, "sha256").hexdigest()
    return {"X-Serfd-Timestamp": time, "X-Serfd-Signature": f"sha256={digest}"}


def retry_after(text: str, now: datetime) -> float:
    """The header of that name in seconds, within limits; 0 for what is none. RFC 9110, 10.2.3."""
    try:
        seconds = (
            float(text) if text.isdecimal() else (parsedate_to_datetime(text) - now).total_seconds()
        )
    except (ValueError, TypeError):
        return 0.0
    return min(max(0.0, seconds), RETRY_AFTER_MAX)


class Bucket:
    """Lets so many through in a second; after a pause, as many at once."""

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._saved_max = max(rate - 1, 0.0) * self._interval
        self._next = -math.inf
        """When the next would come if all came evenly."""

    def take(self, now: float) -> float:
        """One wants to pass: seconds it has to wait."""
        self._next = max(self._next, now - self._saved_max)
        wait = max(0.0, self._next - now)
        self._next += self._interval
        return wait


class Reporters:
    """Says which member reports a thing: the first in an order that each finds alone.

    Each thing has an order of its own (rendezvous hashing: Thaler and Ravishankar, 1998). Whoever
    is first in truth is first in its own eyes too, whatever others see: so a thing is reported
    twice rather than never. What is left to another is remembered until it can be relied on.
    """

    def __init__(self, agent: Agent, tags: Mapping[str, str]) -> None:
        self._agent = agent
        self._tags = tags
        self._since: dict[str, float] = {}
        """When each member that is alive came."""
        self._left: deque[tuple[float, str, Occasion]] = deque(maxlen=LEFT_MAX)
        """When, to whom, and what."""

    def begin(self) -> None:
        """All that are there were there before."""
        there = self._agent.members(status=Status.ALIVE)
        self._since = {member.name: -math.inf for member in there}

    def came(self, members: Iterable[Member]) -> None:
        """They are alive."""
        now = self._agent.reactor.seconds()
        for member in members:
            self._since.setdefault(member.name, now)

    def went(self, members: Iterable[Member]) -> None:
        """They are not."""
        for member in members:
            self._since.pop(member.name, None)

    def own_part(self, occasion: Occasion) -> Occasion | None:
        """What of it this node reports; the rest is left to others."""
        if isinstance(occasion.what, UserEvent):
            event = occasion.what
            thing = _bytes(f"user\0{event.ltime}\0{event.name}\0") + event.payload
            (first,) = self._first([thing], about=())
            parts = {first: occasion}
        else:
            members: dict[str, list[Member]] = {}
            names = [member.name for member in occasion.what]
            things = [_bytes(f"{occasion.event}\0{name}") for name in names]
            for first, member in zip(self._first(things, about=names), occasion.what, strict=True):
                members.setdefault(first, []).append(member)
            parts = {first: occasion._replace(what=what) for first, what in members.items()}
        own = parts.pop(self._agent.name, None)
        parts.pop("", None)
        now = self._agent.reactor.seconds()
        while self._left and self._left[0][0] < now - TAKEOVER:
            self._left.popleft()
        self._left.extend((now, first, part) for first, part in parts.items())
        return own

    def left_by(self, failed: Iterable[Member]) -> list[Occasion]:
        """Take out what those that failed were to report, not long ago."""
        names = {member.name for member in failed}
        begin = self._agent.reactor.seconds() - TAKEOVER
        left = [each for each in self._left if each[0] >= begin]
        self._left = deque((each for each in left if each[1] not in names), LEFT_MAX)
        return [occasion for _, first, occasion in left if first in names]

    def _first(self, things: Iterable[bytes], *, about: Collection[str]) -> list[str]:
        """Who reports each of these things, which are `about` members; empty: nobody can."""
        settled = self._agent.reactor.seconds() - SETTLED
        me = self._agent.name
        able = {
            member.name: _number(_bytes(member.name))
            for member in self._agent.members(status=Status.ALIVE, tags=self._tags)
            if member.name not in about
            and (member.name == me or self._since.get(member.name, math.inf) <= settled)
        }
        firsts: list[str] = []
        for thing in things:
            number = _number(thing)
            rank = {name: (own ^ number) * _MIX % 2**64 for name, own in able.items()}
            firsts.append(max(rank, key=rank.__getitem__, default=""))
        return firsts


def _number(text: bytes) -> int:
    return int.from_bytes(sha256(text).digest()[:8])


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(payload: bytes) -> str | None:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return None
