"""What the commands of `serfctl` do: options in, RPC calls, the text to print (cli.md 2)."""

from __future__ import annotations

import os
import sys
from time import monotonic, strftime

from serfd import __version__
from serfd.ctl_text import (
    answer_text,
    change_json,
    change_text,
    detailed_text,
    event_json,
    event_text,
    failures_text,
    info_json,
    info_text,
    json_text,
    keys_text,
    log_json,
    log_text,
    members_json,
    members_text,
    payload_text,
    plugins_text,
    status_of,
    status_text,
)
from serfd.errors import SerfdError
from serfd.plain import lines, plain
from serfd.rpc.client import Client, ConnectionClosed, RpcError, Tls, distance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from serfd.options import Parsed

RPC_ADDR = "127.0.0.1:7373"
"""Where to look for the agent if nothing else is said."""

_CHANGES = "member-join,member-leave,member-failed,member-update,member-reap"

_KEY_ACTIONS = {
    "install": (
        "Installing key on all members...", "Successfully installed key!", "installing key",
    ),
    "use": (
        "Changing primary key on all members...", "Successfully changed primary key!",
        "changing primary key",
    ),
    "remove": ("Removing key on all members...", "Successfully removed key!", "removing key"),
}  # fmt: skip
"""Of each: what is printed before, after, and of a failure."""

_LOST_GOSSIP = (
    "This could mean Serf gossip packets are being lost due to a misconfiguration or network issue."
)
_FALSE_FAILURES = (
    "This could mean Serf is detecting false-failures due to a misconfiguration or network issue."
)
_TIPS = """
Troubleshooting tips:
* Every member's gossip port must be open for UDP and TCP, from every other member.
* Every member must be reachable at the address it advertises: see `serfctl members`.
* Every member must have the same encryption key, or none: see `serfctl keys -list`.
* A machine that is overloaded or asleep answers late: see `serfctl status` there.
* Names must be unique in the cluster."""


class Failure(SerfdError):
    """The command failed; the text is all there is to say."""


class Misuse(SerfdError):
    """The command was given wrong arguments; its help follows the text."""


def complain(text: str) -> int:
    """Tell stderr; returns the exit code of an error."""
    print(lines(text), file=sys.stderr)
    return 1


# The commands, in the order of the alphabet. Each returns what is still to be printed.


def event(given: Parsed) -> str:
    """Send a user event."""
    as_json = _wants_json(given)
    name, payload = _name_and_payload(given, "An event name must be specified.")
    coalesce = given.values.get("coalesce") is not False
    with _client(
        given, "its turn: the agent sends events no faster than others can take"
    ) as client:
        client.event(name, payload, coalesce=coalesce)
    if as_json:
        return json_text({"event": name, "coalesce": coalesce})
    return f"Event '{plain(name)}' dispatched! Coalescing enabled: {str(coalesce).lower()}\n"


def force_leave(given: Parsed) -> str:
    """Declare a failed member as left."""
    as_json = _wants_json(given)
    if len(given.arguments) != 1:
        raise Misuse("A node name must be specified to force leave.")
    with _client(given, "the agent to spread the news (at most 5 s)") as client:
        client.force_leave(given.arguments[0], prune=given.flag("prune"))
    if as_json:
        return json_text({"name": given.arguments[0], "prune": given.flag("prune")})
    return ""


def info(given: Parsed) -> str:
    """Show what the agent tells of itself."""
    as_json = _wants_json(given)
    with _client(given) as client:
        stats = client.stats()
    return _written(info_json if as_json else info_text, stats)


def join(given: Parsed) -> str:
    """Join a cluster."""
    as_json = _wants_json(given)
    if not given.arguments:
        raise Misuse("At least one address to join must be specified.")
    with _client(given, "the nodes to answer (up to 10 s each)") as client:
        count = client.join(given.arguments, replay=given.flag("replay"))
    if as_json:
        return json_text({"contacted": count})
    return f"Successfully joined cluster by contacting {count} nodes.\n"


def keygen(given: Parsed) -> str:
    """Make an encryption key."""
    from binascii import b2a_base64

    as_json, key = _wants_json(given), b2a_base64(os.urandom(32)).decode()
    return json_text({"key": key.rstrip()}) if as_json else key


def keys(given: Parsed) -> str:
    """Install, use, remove or list keys."""
    as_json = _wants_json(given)
    chosen = [name for name in ("install", "use", "remove", "list") if given.values.get(name)]
    if len(chosen) > 1:
        raise Failure("Only one of -install, -use, -remove, or -list allowed")
    if not chosen:
        raise Misuse("One of -install, -use, -remove or -list must be specified.")
    (action,) = chosen
    if action == "list":
        start, end = "Asking all members for installed keys...", "Keys gathered, listing cluster"
        end, failing = f"{end} keys...", "Failed to gather member keys: "
    else:
        start, end, doing = _KEY_ACTIONS[action]
        failing = f"Error {doing}: "
    failure = None
    with _client(given, "the members to answer") as client:
        if not as_json:
            _say(f"==> {start}\n")
        try:
            if action == "list":
                answer = client.list_keys()
            else:
                change = getattr(client, f"{action}_key")
                answer = change(given.text(action))
        except RpcError as error:
            answer, failure = error.body, error
    if as_json and answer:
        _say(_written(_keys_json, answer))
    told = _written(failures_text, answer.get("Messages") or {})
    if failure is not None:
        text = f"{failing}{failure}\n{failure.advice}".rstrip()
        raise Failure(text if as_json else f"{told}\n{text}" if told else text)
    if as_json:
        return ""
    if told:
        # A list that was cut, for example.
        complain(told.rstrip().replace("failed:", "warning:"))
    return f"==> {end}\n" + ("\n" + _written(keys_text, answer) if action == "list" else "")


def leave(given: Parsed) -> str:
    """Let the agent leave and stop."""
    as_json = _wants_json(given)
    with _client(given, "the agent to tell the others and to stop (some seconds)") as client:
        client.leave()
    return json_text({"left": True}) if as_json else "Graceful leave complete\n"


def members(given: Parsed) -> str:
    """List the members, or with -watch their changes as they come."""
    as_json = _wants_json(given)
    tags = _tags_of(given.texts("tag"))
    if given.text("role"):
        complain("Deprecation warning: 'Role' has been replaced with 'Tags'")
        tags["role"] = given.text("role")
    filters = {"status": given.text("status"), "name": given.text("name")}
    if given.flag("watch"):
        if tags or any(filters.values()):
            raise Misuse("-watch shows all changes: it takes no -name, -status or -tag.")
        return _watch(given, change_json if as_json else change_text)
    with _client(given) as client:
        try:
            found = client.members_filtered(tags=tags, **filters)
        except ConnectionClosed as error:
            if tags or any(filters.values()):
                error.advice = "The agent closes like this when a pattern is no valid regex."
            raise
    if as_json:
        return _written(members_json, found)
    return _written(detailed_text if given.flag("detailed") else members_text, found)


def monitor(given: Parsed) -> str:
    """Show events and log as they come."""
    as_json = _wants_json(given)
    write_event, write_log = (event_json, log_json) if as_json else (event_text, log_text)
    client = _client(given)
    streams: list[int] = []
    try:
        with _told("Error starting stream: "):
            streams.append(client.start("stream", {"Type": "*"}))
        streams.append(client.start("monitor", {"LogLevel": given.text("log-level", "INFO")}))
        for stream, record in _until_gone(client.records(), "monitor"):
            _say(_written(write_event if stream == streams[0] else write_log, record))
    except KeyboardInterrupt:
        _stop(client, reversed(streams))
    finally:
        client.close()
    return ""


def query(given: Parsed) -> str:
    """Ask the cluster something, and show who answers what."""
    as_json = _wants_json(given, "Invalid format: {}")
    tags = _tags_of(given.texts("tag"))
    name, payload = _name_and_payload(given, "A query name must be specified.")
    relay_factor = given.integer("relay-factor")
    if not 0 <= relay_factor <= 255:
        raise Failure("Relay factor must be between 0 and 255")
    want_ack, timeout = not given.flag("no-ack"), given.seconds("timeout")
    acks: list[str] = []
    responses: dict[str, str] = {}
    with _client(given, "the members to answer; the agent ends the query in time") as client:
        answers = client.query(
            name,
            payload,
            nodes=given.texts("node") or None,
            tags=tags,
            want_ack=want_ack,
            relay_factor=relay_factor,
            timeout=timeout,
            wait_all=given.flag("wait-all"),
        )
        if not as_json:
            _say(f"Query '{plain(name)}' dispatched\n")
        try:
            for answer in answers:
                if answer.get("Type") == "ack":
                    acks.append(str(answer["From"]))
                else:
                    responses[str(answer["From"])] = _written(payload_text, answer)
                if not as_json:
                    _say(_written(answer_text, answer))
        except ConnectionClosed:
            complain("The agent has closed the connection: this is what came until then.")
        except KeyboardInterrupt:
            raise Failure("Query interrupted") from None
    if as_json:
        return json_text({"Acks": acks or None, "Responses": dict(sorted(responses.items()))})
    totals = f"Total Acks: {len(acks)}\n" if want_ack else ""
    return f"{totals}Total Responses: {len(responses)}\n"


def reachability(given: Parsed) -> str:
    """See whether gossip reaches all members and their answers come back."""
    as_json, verbose = _wants_json(given), given.flag("verbose")
    acks: list[str] = []
    twice: list[str] = []
    with _client(given, "the members to answer; the agent ends the query in time") as client:
        with _told("Error getting members: "):
            known = client.members()
        live = {str(member.get("Name")) for member in known if member.get("Status") == "alive"}
        if not as_json:
            _say(f"Total members: {len(known)}, live members: {len(live)}\n")
            _say("Starting reachability test...\n")
        started = last = monotonic()
        try:
            for answer in client.query("_serf_ping", want_ack=True):
                name, last = str(answer["From"]), monotonic()
                (twice if name in acks else acks).append(name)
                if verbose and not as_json:
                    _say(f"\tAck from '{plain(name)}'\n")
                if name in twice:
                    complain(f"Duplicate response from '{name}'")
        except KeyboardInterrupt:
            raise Failure("Test interrupted") from None
    took, until_last = monotonic() - started, last - started
    missing, unexpected = sorted(live.difference(acks)), sorted(set(acks) - live)
    if as_json:
        _say(
            json_text(
                {
                    "members": len(known),
                    "live": len(live),
                    "acks": acks,
                    "missing": missing,
                    "unexpected": unexpected,
                    "duplicates": twice,
                    "seconds": round(took, 3),
                    "seconds_to_last": round(until_last, 3),
                }
            )
        )
    elif verbose:
        _say(f"Query time: {took:.2f} sec, time to last response: {until_last:.2f} sec\n")
    if len(acks) < len(live):
        head = "Received less acks than live nodes! Missing acks from:"
        raise Failure("\n".join([head, *_tabbed(missing), _LOST_GOSSIP, _TIPS]))
    if len(acks) > len(live):
        head = "Received more acks than live nodes! Acks from non-live nodes:"
        raise Failure("\n".join([head, *_tabbed(unexpected), _FALSE_FAILURES, _TIPS]))
    if twice:
        raise Failure(
            "Duplicate responses means there is a misconfiguration. Verify that node names are "
            "unique."
        )
    return "" if as_json else "Successfully contacted all live nodes\n"


def rtt(given: Parsed) -> str:
    """Estimate how long a packet to another member and its answer take."""
    as_json = _wants_json(given)
    if len(given.arguments) not in (1, 2):
        raise Misuse("One or two node names must be specified")
    with _client(given) as client:
        nodes = given.arguments
        if len(nodes) == 1:
            nodes = [*nodes, _written(_own_name, client.stats())]
        places = []
        for node in nodes:
            with _told("Error getting coordinates: "):
                place = client.coordinate(node)
            if place is None:
                raise Failure(f'Could not find a coordinate for node "{node}"')
            places.append(place)
    estimate = _written(lambda both: f"{1000 * distance(*both):.3f}", places)
    if as_json:
        return json_text({"nodes": nodes, "rtt_ms": float(estimate)})
    first, second = map(plain, nodes)
    return f"Estimated {first} <-> {second} rtt: {estimate} ms\n"


def status(given: Parsed) -> str:
    """Show on one screen how the agent is."""
    as_json = _wants_json(given)
    with _client(given) as client:
        stats, everybody = client.stats(), client.members()
    found: dict[str, Any] = {}

    def write(answers: tuple[Any, Any]) -> str:
        found.update(status_of(*answers))
        return json_text(found) if as_json else status_text(found)

    _say(_written(write, (stats, everybody)))
    if found["problems"]:
        raise Failure(f"serfctl status: {len(found['problems'])} problem(s)")
    return ""


def plugin(given: Parsed) -> str:
    """Write the files of a new plugin."""
    from serfd import ctl_skeleton

    if len(given.arguments) != 2 or given.arguments[0] != "new":
        raise Misuse("new and a name must be specified.")
    name, directory = given.arguments[1], given.text("dir")
    # As serfd has it, for the file and for the table.
    if not name.replace("_", "a").replace("-", "a").isalnum() or not name.isascii():
        raise Failure(f"{name!r} is not a plugin's name: expected letters, digits, '_' and '-'")
    texts = {os.path.join(directory, file): text for file, text in ctl_skeleton.files(name).items()}
    for path in texts:
        if os.path.lexists(path):
            raise Failure(f"{path} is there already; nothing was written")
    try:
        for path, text in texts.items():
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise Failure(f"Cannot write {path}: {error.strerror}") from None
    return ctl_skeleton.next_steps(name, os.path.abspath(directory), list(texts))


def plugins(given: Parsed) -> str:
    """Show the agent's plugins."""
    as_json = _wants_json(given)
    with _client(given) as client:
        found = client.plugins()
    if as_json:
        return _written(json_text, {"plugins": [_small(each) for each in found]})
    return _written(plugins_text, found) if found else "No plugins run.\n"


def tags(given: Parsed) -> str:
    """Change the agent's tags."""
    as_json = _wants_json(given)
    if not given.values.keys() & {"set", "delete"}:
        raise Misuse("At least one -set or -delete must be specified.")
    changed = _tags_of(given.texts("set"))
    with _client(given, "the agent to spread the news (at most 5 s)") as client:
        client.tags(changed, delete=given.texts("delete"))
    if as_json:
        return json_text({"set": changed, "deleted": given.texts("delete")})
    return "Successfully updated agent tags\n"


def version(given: Parsed) -> str:
    """Say which version this is."""
    if _wants_json(given):
        return json_text({"version": __version__, "protocol": {"max": 5, "min": 2}})
    return f"{__version__}\nAgent Protocol: 5 (Understands back to: 2)\n"


# Steps.


def _client(given: Parsed, awaited: str = "the agent to answer") -> Client:
    """A connection to the agent that options and environment name. Raises CannotConnect."""

    def waiting() -> None:
        print(f"Waiting for {awaited} ...", file=sys.stderr)

    return Client(
        given.text("rpc-addr", os.environ.get("SERF_RPC_ADDR") or RPC_ADDR),
        given.text("rpc-auth", os.environ.get("SERF_RPC_AUTH", "")),
        tls=_tls(given),
        waiting=waiting if sys.stderr.isatty() else None,
    )


def _tls(given: Parsed) -> Tls | None:
    authority, certificate, key = [
        given.text(f"rpc-tls-{what}", os.environ.get(f"SERFD_RPC_TLS_{what.upper()}", ""))
        for what in ("ca", "cert", "key")
    ]
    if certificate and not authority:
        raise Misuse("-rpc-tls-cert is for TLS, which -rpc-tls-ca switches on: give both.")
    if key and not certificate:
        raise Misuse("-rpc-tls-key is the key of -rpc-tls-cert: give both.")
    return Tls(authority, certificate, key) if authority else None


class _told:
    """In this block what the agent refuses is told behind these words. Raises Failure."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RpcError):
            raise Failure(f"{self._what}{error}\n{error.advice}".rstrip()) from None


def _watch(given: Parsed, write: Callable[[str, Mapping[str, Any]], str]) -> str:
    client = _client(given)
    streams: list[int] = []
    try:
        with _told("Error starting stream: "):
            streams.append(client.start("stream", {"Type": _CHANGES}))
        for _, record in _until_gone(client.records(), "watch"):
            _say(_written(lambda now: write(*now), (strftime("%Y-%m-%d %H:%M:%S"), record)))
    except KeyboardInterrupt:
        _stop(client, streams)
    finally:
        client.close()
    return ""


def _until_gone(
    records: Iterator[tuple[int, dict[str, Any]]], what: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        yield from records
    except ConnectionClosed:
        raise Failure(
            f"\nRemote side ended the {what}! This usually means that the\n"
            "remote side has exited or crashed."
        ) from None


def _stop(client: Client, streams: Iterator[int] | list[int]) -> None:
    # Serf's agents may crash if a client goes while an event is on its way to it (rpc.md 11).
    try:
        for stream in streams:
            client.stop(stream)
    except ConnectionClosed:
        return


def _say(text: str) -> None:
    """Print at once what is not the end of it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _name_and_payload(given: Parsed, missing: str) -> tuple[str, bytes | None]:
    if not given.arguments:
        raise Misuse(missing)
    if len(given.arguments) > 2:
        raise Misuse("Too many command line arguments. Only a name and payload must be specified.")
    name, *payload = given.arguments
    return name, payload[0].encode("utf-8", "surrogateescape") if payload else None


def _wants_json(given: Parsed, wrong: str = 'Encoding error: Invalid output format "{}"') -> bool:
    form = given.text("format", "text")
    if form not in ("text", "json"):
        raise Failure(f"{wrong.format(form)}\nExpected text or json.")
    return form == "json"


def _tags_of(texts: Sequence[str]) -> dict[str, str]:
    """`["role=web"]` → `{"role": "web"}`."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise Failure(f"Error: Invalid tag: '{text}'\nExpected KEY=VALUE.")
        found[key] = value
    return found


def _tabbed(names: Sequence[str]) -> list[str]:
    return [f"\t{plain(name)}" for name in names]


def _small(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`LastError` → `last_error`, as JSON has it everywhere here."""
    return {
        "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_"): value
        for name, value in fields.items()
    }


def _own_name(stats: Mapping[str, Mapping[str, str]]) -> str:
    return stats["agent"]["name"]


def _keys_json(answer: Mapping[str, Any]) -> str:
    return json_text(
        {
            "nodes": answer["NumNodes"],
            "responses": answer["NumResp"],
            "errors": answer["NumErr"],
            "messages": dict(sorted((answer["Messages"] or {}).items())),
            "keys": dict(sorted((answer["Keys"] or {}).items())),
        }
    )


def _written(write: Callable[[Any], str], answer: object) -> str:
    try:
        return write(answer)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RpcError(f"the agent's answer is not as Serf's: {error}") from None
