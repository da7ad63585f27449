import base64
import hashlib
import json
import logging
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from certificates import Authority
from followed_files import Node, agent_of, bundled, member
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from serfd.config import Config
from serfd.errors import ConfigError
from serfd.hooks.loader import load
from serfd.metrics import Metrics
from serfd.serf.events import Member, Status, UserEvent

webhook = bundled("webhook")
MEMBER_EVENTS = ("member-join", "member-leave", "member-failed", "member-update", "member-reap")
PAGE = (Path(__file__).parents[2] / "docs/plugins/webhook.md").read_text()


class Request(NamedTuple):
    path: str
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Receiver(ThreadingHTTPServer):
    """Takes every post, or answers as it was told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Conversation)
        self.requests: list[Request] = []
        self.answers: list[tuple[int, Mapping[str, str]]] = []
        """Status and headers of the next ones."""
        self.answer: tuple[int, Mapping[str, str]] = (204, {})
        """Those of all others."""

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def posts(self) -> list[Any]:
        """What came since the last look."""
        seen, self.requests = self.requests, []
        return [request.json for request in seen]

    def post(self) -> Any:
        """The only one."""
        (one,) = self.posts()
        return one

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that refuses a certificate is what some tests are about."""


class _Conversation(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(Request(self.path, self.headers, body))
        status, headers = self.server.answers.pop(0) if self.server.answers else self.server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Turns(NamedTuple):
    """Calls the plugin's own functions."""

    clock: Any

    def call(self, function: Any) -> "Deferred[object]":
        return Deferred.fromCoroutine(function())


class Hosted:
    """The plugin on one node, on virtual time; hooks are called as the host does it."""

    def __init__(self, url: str, *, name: str = "me", **settings: Any) -> None:
        self.node = Node()
        self.node.metrics = Metrics()
        self.node.known.clear()
        self.node.name = name
        self.node.put(member(name))
        self.agent = agent_of(self.node, "webhook")
        self.agent.hook_timeout = 30.0
        self.agent.serve(Turns(self.node.reactor))
        settings = {"url": url, **settings}
        given = webhook.Plugin.Settings(**settings)
        self.plugin = webhook.Plugin(self.agent, given, Random(7))
        self.plugin.start()

    def happens(self, event: str, *members: Member) -> "Deferred[None]":
        """A change of members; gives the hook's end."""
        return self._called(getattr(self.plugin, event.replace("-", "_"))(members))

    def user(self, name: str, payload: bytes = b"", ltime: int = 7) -> "Deferred[None]":
        return self._called(self.plugin.user_event(UserEvent(ltime, name, payload, coalesce=True)))

    def _called(self, hook: Any) -> "Deferred[None]":
        called = Deferred.fromCoroutine(hook)
        self.node.pass_time(0)
        return called

    def numbers(self) -> dict[str, float]:
        return {
            name.removeprefix("plugins.webhook."): value
            for name, value in self.node.metrics.counters.items()
        }


@pytest.fixture
def hosted(receiver: Receiver) -> Hosted:
    return Hosted(f"http://{receiver.place}/serf")


# What is posted


def test_a_change_of_members_is_posted(hosted, receiver):
    three = member("n3", 9, {"role": "web"}, Status.FAILED)
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    hosted.happens("member-failed", member("n2", 8, status=Status.FAILED), three)
    (request,) = receiver.requests
    post = request.json
    assert before <= datetime.fromisoformat(post.pop("time")) <= datetime.now(UTC)
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", post["id"])
    assert request.headers["Idempotency-Key"] == post.pop("id")
    assert post == {
        "node": "me",
        "event": "member-failed",
        "members": [
            {"name": "n2", "ip": "10.0.0.8", "port": 7946, "tags": {}, "status": "failed"},
            {
                "name": "n3", "ip": "10.0.0.9", "port": 7946, "tags": {"role": "web"},
                "status": "failed",
            },
        ],
    }  # fmt: skip
    assert request.path == "/serf"
    assert request.headers["Content-Type"] == "application/json"
    assert "X-Serfd-Signature" not in request.headers
    assert hosted.numbers() == {"posted": 1}
    assert hosted.node.metrics.samples["plugins.webhook.seconds"].count == 1


@pytest.mark.parametrize(
    ("payload", "text"),
    [(b"v 1.2", "v 1.2"), ("grüße\n".encode(), "grüße\n"), (b"", ""), (b"\xff\0", None)],
)
def test_a_user_event_is_posted_with_its_payload(payload, text, receiver):
    hosted = Hosted(f"http://{receiver.place}", events=("user",))
    hosted.user("deploy", payload, ltime=12)
    post = receiver.post()
    assert base64.b64decode(post["payload"]) == payload
    assert (post["event"], post["name"], post["ltime"]) == ("user", "deploy", 12)
    assert post["text"] == text


def test_bytes_that_are_no_text_do_not_break_the_json(hosted, receiver):
    hosted.happens("member-join", member("n\udcff", 8, {"\udc80": "\udc80ä"}))
    (posted,) = receiver.post()["members"]
    assert (posted["name"], posted["tags"]) == ("n\ufffd", {"\ufffd": "\ufffdä"})


@pytest.mark.parametrize(
    ("events", "posted"),
    [
        (None, MEMBER_EVENTS),
        (("*",), (*MEMBER_EVENTS, "a", "b")),
        (("member-failed", "user:a"), ("member-failed", "a")),
        (("user",), ("a", "b")),
        (("user:",), ("a", "b")),
        (("user:b", "user"), ("a", "b")),
        ((), ()),
    ],
)
def test_the_filter_decides_what_is_posted(events, posted, receiver):
    hosted = Hosted(f"http://{receiver.place}", **({} if events is None else {"events": events}))
    for event in MEMBER_EVENTS:
        hosted.happens(event, member("n2"))
    hosted.user("a")
    hosted.user("b")
    assert [post.get("name", post["event"]) for post in receiver.posts()] == list(posted)


def test_headers_query_and_password_of_the_address_are_sent(receiver):
    url = f"http://al%40ert:s%C3%A4sam@{receiver.place}/a/b?token=x%20y#not-this"
    hosted = Hosted(url, headers={"X-Team": "ops"})
    hosted.happens("member-join", member("n2"))
    (request,) = receiver.requests
    assert request.path == "/a/b?token=x%20y"
    assert request.headers["X-Team"] == "ops"
    scheme, _, encoded = request.headers["Authorization"].partition(" ")
    assert (scheme, base64.b64decode(encoded).decode()) == ("Basic", "al@ert:säsam")
    assert request.headers["Host"] == receiver.place


# The signature


def hmac_by_hand(key: bytes, text: bytes) -> str:
    """RFC 2104, 2."""
    key = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key) + text).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in key) + inner).hexdigest()


def test_a_post_is_signed_with_the_time_of_the_try(receiver):
    receiver.answers = [(503, {})]
    hosted = Hosted(f"http://{receiver.place}", secret="sesame")
    hosted.happens("member-join", member("n2"))
    hosted.node.pass_time(5)
    assert len(receiver.requests) == 2
    for request in receiver.requests:
        time = request.headers["X-Serfd-Timestamp"]
        assert abs(int(time) - datetime.now(UTC).timestamp()) < 60
        digest = hmac_by_hand(b"sesame", time.encode() + b"." + request.body)
        assert request.headers["X-Serfd-Signature"] == f"sha256={digest}"


@pytest.mark.parametrize("change", ["nothing", "body", "time", "secret", "late"])
def test_the_check_of_a_signature_in_the_docs_is_right(change, receiver):
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(source, names)
    hosted = Hosted(f"http://{receiver.place}", secret="sesame")
    hosted.happens("member-join", member("n2"))
    (request,) = receiver.requests
    headers, body, secret = dict(request.headers), request.body, b"sesame"
    match change:
        case "body":
            body += b" "
        case "time":
            headers["X-Serfd-Timestamp"] = str(int(headers["X-Serfd-Timestamp"]) + 1)
        case "secret":
            secret = b"simsim"
        case "late":
            time = str(int(headers["X-Serfd-Timestamp"]) - 3600)
            digest = hmac_by_hand(secret, time.encode() + b"." + body)
            headers |= {"X-Serfd-Timestamp": time, "X-Serfd-Signature": f"sha256={digest}"}
    assert names["is_genuine"](secret, headers, body) is (change == "nothing")


# Again and again


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_what_the_receiver_takes_is_done(status, hosted, receiver):
    receiver.answer = (status, {})
    assert hosted.happens("member-join", member("n2")).called
    assert len(receiver.requests) == 1
    assert hosted.numbers() == {"posted": 1}


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_what_may_be_taken_later_is_posted_again_under_the_same_id(status, hosted, receiver):
    receiver.answers = [(status, {}), (status, {})]
    ended = hosted.happens("member-join", member("n2"))
    assert not ended.called
    hosted.node.pass_time(4)
    assert ended.called
    first, *others = receiver.requests
    assert [request.body for request in others] == [first.body] * 2
    assert {request.headers["Idempotency-Key"] for request in others} == {first.json["id"]}
    assert hosted.numbers() == {"failed": 2, "posted": 1}


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 403, 404, 410, 413, 422])
def test_what_the_receiver_refuses_is_given_up_at_once(status, hosted, receiver, caplog):
    receiver.answer = (status, {"Location": "/elsewhere"})
    assert hosted.happens("member-join", member("n2"), member("n3")).called
    assert [request.path for request in receiver.requests] == ["/serf"]
    assert hosted.numbers() == {"failed": 1, "gave_up": 1}
    assert caplog.messages == [
        f"member-join of 'n2' and 1 more is given up, http://{receiver.place} after 1 tries: "
        f"status {status}"
    ]


def test_pauses_double_up_to_a_minute_with_chance_in_them(receiver):
    receiver.answer = (503, {})
    hosted = Hosted(f"http://{receiver.place}", timeout=1.0)
    hosted.agent.hook_timeout = 600.0
    ended = hosted.happens("member-join", member("n2"))
    times = [0.0]
    while not ended.called:
        hosted.node.pass_time(0.01)
        if len(receiver.requests) > len(times):
            times.append(hosted.node.reactor.seconds())
    pauses = [later - sooner for sooner, later in pairwise(times)]
    for number, pause in enumerate(pauses[:-1]):
        whole = min(60, 2**number)
        assert whole / 2 - 0.02 <= pause <= whole + 0.02
    # Chance: not all the same part of the whole.
    assert len({round(pause / min(60, 2**n), 2) for n, pause in enumerate(pauses[:-1])}) > 3
    assert len(pauses) > 12
    # The last one is as late as a try may be.
    assert times[-1] == pytest.approx(0.95 * 600 - 1, abs=0.02)
    assert hosted.numbers() == {"failed": len(times), "gave_up": 1}


@pytest.mark.parametrize(
    ("header", "waited"),
    [
        ("3", 3),
        ("0", 1),
        ("soon", 1),
        ("-4", 1),
        # No longer than there is time for one more try.
        ("1000", 0.95 * 30 - 10),
    ],
)
def test_a_receiver_may_ask_for_a_longer_pause(header, waited, hosted, receiver):
    receiver.answers = [(503, {"Retry-After": header})]
    ended = hosted.happens("member-join", member("n2"))
    hosted.node.pass_time(waited / 2 - 0.01)
    assert len(receiver.requests) == 1
    hosted.node.pass_time(waited / 2 + 0.02)
    assert len(receiver.requests) == 2
    assert ended.called


NOW = datetime(2026, 11, 23, 20, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", 0), ("120", 120), ("301", 300), ("9" * 500, 300), ("1.5", 0), ("x", 0), ("²", 0),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), 0),
        (format_datetime(NOW + timedelta(days=9), usegmt=True), 300),
        ("Mon, 23 Nov 2026 20:01:00 -0000", 0),
        ("Mon, 99 Nov 2026 20:01:00 GMT", 0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date_within_limits(text, seconds):
    assert webhook.retry_after(text, NOW) == seconds


def test_nobody_there_is_tried_again_until_the_hook_must_end(receiver, caplog):
    receiver.server_close()
    hosted = Hosted(f"http://{receiver.place}/secret")
    ended = hosted.happens("member-leave", member("n2"))
    hosted.node.pass_time(30 * 0.95 - 10)
    assert ended.called
    assert hosted.numbers()["failed"] >= 5
    assert hosted.numbers()["gave_up"] == 1
    assert "ConnectionRefusedError" in caplog.messages[-1]
    assert caplog.records[-1].levelname == "ERROR"


def test_a_try_that_takes_too_long_has_failed_and_its_thread_is_let_go(hosted, receiver):
    hosted.node.holds_threads = True
    ended = hosted.happens("member-join", member("n2"))
    hosted.node.pass_time(9.9)
    assert hosted.numbers() == {}
    hosted.node.pass_time(0.2)
    assert hosted.numbers() == {"failed": 1}
    hosted.node.pass_time(18.3)
    assert not ended.called
    # The last one ends before the hook would be cancelled.
    hosted.node.pass_time(0.2)
    assert ended.called
    assert hosted.numbers() == {"failed": 3, "gave_up": 1}


def test_a_hook_that_is_cancelled_posts_no_more(hosted, receiver):
    receiver.answer = (503, {})
    ended = hosted.happens("member-join", member("n2")).addErrback(lambda failure: None)
    ended.cancel()
    hosted.node.pass_time(100)
    assert len(receiver.requests) == 1
    assert hosted.numbers() == {"failed": 1}


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_thread_that_waits_for_an_answer_can_be_freed(scheme, tmp_path):
    authority = Authority(tmp_path)
    heard = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.set()
            self.rfile.read(int(self.headers["Content-Length"]) + 1)  # never comes

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        if scheme == "https":
            server.socket = _encrypted(server.socket, *authority.sign("r", "127.0.0.1"))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
        settings = webhook.Plugin.Settings(url=url, ca_file=str(authority.file))
        post = webhook.Receiver(settings).post(3600)
        raised: list[BaseException] = []

        def run() -> None:
            try:
                post.run(b"{}", {})
            except (OSError, webhook.HTTPException) as error:
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert heard.wait(30)
        post.end()
        thread.join(30)
        assert not thread.is_alive()
        assert raised
        server.shutdown()


# How often


def test_posts_come_at_the_rate_after_those_of_one_second(receiver):
    hosted = Hosted(f"http://{receiver.place}", rate=5.0, events=("user",))
    times = []
    for number in range(20):
        ended = hosted.user(str(number))
        while not ended.called:
            hosted.node.pass_time(0.01)
        times.append(hosted.node.reactor.seconds())
    assert [post["name"] for post in receiver.posts()] == list(map(str, range(20)))
    assert times[:5] == [0] * 5
    for number, time in enumerate(times[5:], 1):
        assert time == pytest.approx(number / 5, abs=0.02)


@given(
    st.floats(0.1, 1000),
    st.lists(st.floats(0, 10), min_size=1, max_size=100),
)
def test_no_second_has_more_posts_than_the_rate_twice(rate, pauses):
    bucket, now, times = webhook.Bucket(rate), 0.0, []
    for pause in pauses:
        now += pause
        times.append(now + bucket.take(now))
        now = times[-1]
    for number, begin in enumerate(times):
        within = sum(begin <= time < begin + 1 for time in times[number:])
        assert within <= max(1, rate) + rate + 1e-6 + 1
    assert times == sorted(times)


# TLS


def _encrypted(plain: Any, certificate: Path, key: Path) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)


@pytest.mark.parametrize(
    ("certified", "settings", "problem"),
    [
        ("127.0.0.1", {"ca_file": "authority.crt"}, None),
        ("127.0.0.1", {}, "CERTIFICATE_VERIFY_FAILED"),
        ("127.0.0.1", {"ca_file": "other.crt"}, "CERTIFICATE_VERIFY_FAILED"),
        ("127.0.0.2", {"ca_file": "authority.crt"}, "CERTIFICATE_VERIFY_FAILED"),
        ("127.0.0.2", {"verify": False}, None),
    ],
)
def test_over_tls_the_receiver_must_show_its_certificate(
    certified, settings, problem, receiver, tmp_path, caplog
):
    Authority(tmp_path, "other")
    receiver.socket = _encrypted(receiver.socket, *Authority(tmp_path).sign("r", certified))
    if "ca_file" in settings:
        settings = {"ca_file": str(tmp_path / settings["ca_file"])}
    hosted = Hosted(f"https://{receiver.place}/x", **settings)
    hosted.happens("member-join", member("n2"))
    assert len(receiver.requests) == (problem is None)
    if problem is not None:
        assert problem in caplog.text


# What must not be


@pytest.mark.parametrize("status", [400, 503])
def test_no_secret_is_logged(status, receiver, caplog):
    caplog.set_level(logging.DEBUG)
    receiver.answer = (status, {})
    url = f"http://user:sesame1@{receiver.place}/services/sesame2?key=sesame3"
    hosted = Hosted(url, secret="sesame4", headers={"Authorization": "sesame5"})
    hosted.happens("member-join", member("n2"))
    hosted.node.pass_time(30)
    assert hosted.numbers()["gave_up"] == 1
    assert f"http://{receiver.place}" in caplog.text
    assert "sesame" not in caplog.text


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"url": "ftp://sesame/"}, "url is not of the form https://HOST[:PORT]/PATH"),
        ({"url": "sesame"}, "url is not"),
        ({"url": "https://"}, "url is not"),
        ({"url": "https://x:99999/sesame"}, "url is not"),
        ({"url": "https://x/sesame\r\nX: y"}, "url is not"),
        ({"url": "https://x/sesäme"}, "url is not"),
        ({"url": "https://[x/sesame"}, "url is not"),
        ({"events": ["query"]}, "events has 'query', expected of member-join, "),
        ({"events": ["member-joined"]}, "events has 'member-joined', expected of"),
        ({"headers": {"a b": "x"}}, "headers: there cannot be one named 'a b'"),
        ({"headers": {"Content-Length": "1"}}, "headers: there cannot be one named"),
        ({"headers": {"X-Serfd-Signature": "sesame"}}, "headers: there cannot be one named"),
        ({"headers": {"x": "sesame\r\n"}}, "headers: 'x' must be of printable ASCII characters"),
        ({"headers": {"Authorization": "sesame", "x": 1}}, "found a value that is not shown"),
        ({"timeout": "0s"}, "timeout must be longer than 0"),
        ({"rate": 0}, "key 'rate' in [plugins.webhook]: expected `float` >= 0.1, found 0"),
        ({"once_tags": {"role": "("}}, "once_tags: the pattern of 'role': "),
        ({"ca_file": "/nowhere.pem"}, "ca_file: cannot use /nowhere.pem: "),
    ],
)
def test_wrong_settings_are_told_and_no_secret_with_them(table, text):
    with pytest.raises(ConfigError) as caught:
        load(Config(plugins={"webhook": {"url": "https://x", **table}}), Node())
    assert "plugin 'webhook': " in str(caught.value)
    assert text in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_what_was_dropped_is_told(hosted, caplog):
    hosted.plugin.events_lost(3)
    assert caplog.messages == ["3 user events were dropped and are not posted"]
    assert caplog.records[0].name == "serfd.plugins.webhook"


# Once


class Cluster:
    """The plugin on several nodes, each with a view of its own."""

    def __init__(self, url: str, *names: str, tags: Mapping[str, Mapping[str, str]] = {}) -> None:
        self.nodes: dict[str, Hosted] = {}
        everybody = [member(name, tags=tags.get(name)) for name in names]
        asked = {"role": "a"} if tags else {}
        for name in names:
            settings = {"once": True, "events": ("*",), "once_tags": asked, "rate": 1000.0}
            self.nodes[name] = Hosted(url, name=name, **settings)
            self.nodes[name].node.put(*everybody)
            self.nodes[name].plugin.start()

    def sees(self, name: str, event: str, *members: Member) -> None:
        """What this node is told, and how it sees them then."""
        hosted = self.nodes[name]
        hosted.node.put(*members)
        hosted.happens(event, *members)

    def pass_time(self, seconds: float) -> None:
        for hosted in self.nodes.values():
            hosted.node.pass_time(seconds)


NAMES = [f"n{number}" for number in range(1, 8)]


def gone(*names: str) -> list[Member]:
    return [member(name, status=Status.FAILED) for name in names]


def test_of_members_that_agree_one_reports_each_thing(receiver):
    cluster = Cluster(f"http://{receiver.place}", *NAMES)
    for number in range(20):
        for name in NAMES:
            cluster.nodes[name].user("deploy", b"%d" % number)
    posts = receiver.posts()
    assert sorted(int(post["text"]) for post in posts) == list(range(20))
    # Not all the same one.
    assert len({post["node"] for post in posts}) > 2


def test_each_member_of_an_event_is_reported_once_however_the_event_is_split(receiver):
    cluster = Cluster(f"http://{receiver.place}", *NAMES)
    five, six = gone("n5", "n6")
    for name in ("n1", "n2"):
        cluster.nodes[name].node.put(five, six)
        cluster.sees(name, "member-failed", five, six)
    for name in ("n3", "n4", "n7"):
        cluster.nodes[name].node.put(five, six)
        cluster.sees(name, "member-failed", six)
        cluster.sees(name, "member-failed", five)
    told = [each["name"] for post in receiver.posts() for each in post["members"]]
    assert sorted(told) == ["n5", "n6"]


def test_who_comes_is_reported_by_those_who_were_there_and_not_by_the_newcomer(receiver):
    cluster = Cluster(f"http://{receiver.place}", *NAMES)
    # It knows everybody when its plugin starts; what it is told of its own join comes after that.
    cluster.sees("n7", "member-join", *map(member, NAMES))
    assert receiver.posts() == []
    for name in NAMES[:-1]:
        cluster.nodes[name].plugin._reporters.went([member("n7")])
        cluster.sees(name, "member-join", member("n7"))
    (told,) = receiver.post()["members"]
    assert told["name"] == "n7"


def test_two_halves_that_meet_again_miss_nobody(receiver):
    """A half that comes back does not hear of itself, and is not relied on."""
    cluster = Cluster(f"http://{receiver.place}", *NAMES)
    here, there = NAMES[:4], NAMES[4:]
    for half, others in ((here, there), (there, here)):
        for name in half:
            cluster.sees(name, "member-failed", *gone(*others))
    receiver.posts()
    cluster.pass_time(1000)
    for half, others in ((here, there), (there, here)):
        for name in half:
            for other in others:
                cluster.sees(name, "member-join", member(other))
    told = [each["name"] for post in receiver.posts() for each in post["members"]]
    assert sorted(told) == NAMES


@given(st.data())
def test_however_they_disagree_somebody_reports(data):
    """Everybody sees itself, and any of the others."""
    reports = 0
    event = UserEvent(data.draw(st.integers(0, 9)), "deploy", b"", coalesce=True)
    for name in NAMES:
        node = Node()
        node.known.clear()
        node.name = name
        others = data.draw(st.sets(st.sampled_from(NAMES)))
        node.put(*map(member, {name, *others}))
        reporters = webhook.Reporters(agent_of(node, "webhook"), {})
        reporters.begin()
        reports += reporters.own_part(webhook.Occasion("", "", "user", event)) is not None
    assert reports >= 1


def reporters_of(names: list[str]) -> dict[str, Any]:
    made = {}
    for name in names:
        node = Node()
        node.known.clear()
        node.name = name
        node.put(*map(member, names))
        made[name] = webhook.Reporters(agent_of(node, "webhook"), {})
        made[name].begin()
    return made


def test_the_work_is_shared_and_who_leaves_moves_only_its_own():
    def firsts(names: list[str]) -> list[str]:
        one = reporters_of(names)[names[0]]
        return one._first([b"%d" % number for number in range(4000)], about=())

    names = [f"node-{number}" for number in range(10)]
    before, after = firsts(names), firsts(names[:-1])
    for name in names:
        assert 300 < before.count(name) < 500
    moved = [old for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {names[-1]}


def test_only_those_with_the_tags_report(receiver):
    tags = {"n2": {"role": "a"}, "n3": {"role": "b"}}
    cluster = Cluster(f"http://{receiver.place}", "n1", "n2", "n3", tags=tags)
    for number in range(10):
        for name in cluster.nodes:
            cluster.nodes[name].user("deploy", b"%d" % number)
    assert {post["node"] for post in receiver.posts()} == {"n2"}


def failed_together(cluster: Cluster) -> tuple[str, str]:
    """A pair of which the first's failure is for the second to report."""
    one = cluster.nodes["n1"].plugin._reporters
    return next(
        (lost, first)
        for lost in NAMES[1:]
        for first in one._first([f"member-failed\0{lost}".encode()], about=[lost])
        if first != "n1"
    )


@pytest.mark.parametrize(("later", "is_told"), [(20, True), (119, True), (121, False)])
def test_what_a_member_was_to_report_that_fails_too_is_reported_by_the_next(
    later, is_told, receiver
):
    cluster = Cluster(f"http://{receiver.place}", *NAMES)
    lost, reporter = failed_together(cluster)
    alive = [name for name in NAMES if name not in (lost, reporter)]
    for name in alive:
        cluster.sees(name, "member-failed", *gone(lost))
    assert receiver.posts() == []
    cluster.pass_time(later)
    for name in alive:
        cluster.sees(name, "member-failed", *gone(reporter))
    told = [each["name"] for post in receiver.posts() for each in post["members"]]
    assert sorted(told) == sorted([reporter, *[lost] * is_told])


def test_what_is_taken_over_is_posted_one_by_one_with_the_time_it_happened(receiver):
    cluster = Cluster(f"http://{receiver.place}", "n1", "n2")
    for number in range(40):
        cluster.nodes["n1"].user("deploy", b"%d" % number)
    own = [int(post["text"]) for post in receiver.posts()]
    cluster.pass_time(10)
    before = datetime.now(UTC)
    cluster.sees("n1", "member-failed", *gone("n2"))
    cluster.pass_time(10)
    posts = receiver.posts()
    (failed,) = [post for post in posts if post["event"] == "member-failed"]
    taken = [post for post in posts if post["event"] == "user"]
    assert [each["name"] for each in failed["members"]] == ["n2"]
    assert [int(post["text"]) for post in taken] == sorted(set(range(40)) - set(own))
    assert all(datetime.fromisoformat(post["time"]) < before for post in taken)


# The whole


def test_in_a_cluster_a_failure_is_posted_and_what_a_stopped_daemon_owes_after_its_restart(
    serf_cluster, receiver
):
    cluster = serf_cluster(4)
    url = f"http://{receiver.place}"
    events = ["member-failed", "user:deploy"]
    cluster.load("webhook", url=url, events=events, durable=True, secret="sesame")
    cluster.fail("n3")
    (failed,) = receiver.post()["members"]
    assert (failed["name"], failed["status"]) == ("n3", "failed")

    receiver.answer = (503, {})
    cluster.simulation.user_event("n2", "deploy", b"1.2", coalesce=False)
    cluster.simulation.pass_time(3)
    owed = {post["id"] for post in receiver.posts()}
    assert len(owed) == 1
    with cluster.errors_allowed() as errors:
        cluster.stop()
    assert "user_event('deploy') was not done in time" in str(errors[0])
    receiver.posts()
    receiver.answer = (204, {})
    cluster.restart("n1")
    assert receiver.post()["text"] == "1.2"
    assert cluster.stats("webhook").waiting == 0


def test_in_a_cluster_a_hook_that_gives_up_ends_by_itself(serf_cluster, receiver):
    cluster = serf_cluster(2)
    url = f"http://{receiver.place}"
    receiver.answer = (503, {})
    cluster.load("webhook", url=url, events=["*"], hook_timeout="5m", timeout="2s")
    receiver.posts()
    began = cluster.now
    cluster.user_event("deploy")
    assert 250 < cluster.now - began < 300
    assert cluster.stats("webhook").timeouts == 0
    assert cluster.metrics.counters["plugins.webhook.gave_up"] >= 1
