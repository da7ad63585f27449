"""What `serfctl` prints: the agent's answers as text for people, or as JSON (cli.md 2)."""

from __future__ import annotations

from serfd.plain import lines, plain
from serfd.rpc.client import address_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

HEALTH_SCORE_FINE = 2
"""Up to this score the agent counts as healthy: others that just failed raise it for a moment."""
FAILED_SHOWN = 10
"""Failed members that `status` lists."""


def members_text(members: Sequence[Mapping[str, Any]]) -> str:
    """One line per member, sorted by name, in columns (cli.md 2); of nobody, an empty line."""
    return columns([_row(member) for member in sorted(members, key=_name)])


def detailed_text(members: Sequence[Mapping[str, Any]]) -> str:
    """As `members_text`, with two more columns for the versions of Serf's protocol."""
    rows = [
        (
            *_row(member),
            f"Protocol Version: {member.get('DelegateCur') or 0}",
            "Available Protocol Range: "
            f"[{member.get('DelegateMin') or 0}, {member.get('DelegateMax') or 0}]",
        )
        for member in sorted(members, key=_name)
    ]
    return columns(rows)


def _row(member: Mapping[str, Any]) -> tuple[str, ...]:
    tags = sorted((member.get("Tags") or {}).items())
    return (
        plain(_name(member)),
        address_text(member),
        plain(member.get("Status") or ""),
        plain(",".join([f"{key}={value}" for key, value in tags])),
    )


def _name(member: Mapping[str, Any]) -> str:
    return member.get("Name") or ""


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of equal length as lines: columns padded to the widest, but for the last."""
    if not rows:
        return "\n"
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    line = "".join(f"%-{width}s  " for width in widths) + "%s"
    return "\n".join([line % row for row in rows]).rstrip() + "\n"


def members_json(members: Sequence[Mapping[str, Any]]) -> str:
    """All members as JSON, sorted by name (cli.md 2)."""
    return json_text({"members": _members(members) or None})


def _members(members: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": _name(member),
            "addr": address_text(member),
            "port": member.get("Port") or 0,
            "tags": dict(sorted((member.get("Tags") or {}).items())),
            "status": member.get("Status") or "",
            "protocol": {
                "max": member.get("DelegateMax") or 0,
                "min": member.get("DelegateMin") or 0,
                "version": member.get("DelegateCur") or 0,
            },
        }
        for member in sorted(members, key=_name)
    ]


def info_text(stats: Mapping[str, Mapping[str, str]]) -> str:
    """Sections and their values, sorted (cli.md 2)."""
    found = []
    for section, values in sorted(stats.items()):
        found.append(f"{plain(section)}:")
        found += [f"\t{plain(key)} = {plain(value)}" for key, value in sorted(values.items())]
    return "\n".join(found).strip() + "\n"


def info_json(stats: Mapping[str, Mapping[str, str]]) -> str:
    """The same as JSON (cli.md 2)."""
    return json_text({name: dict(sorted(values.items())) for name, values in sorted(stats.items())})


def change_text(when: str, record: Mapping[str, Any]) -> str:
    """A line for each member that a record of a stream tells of: when, what, who and where."""
    what = str(record.get("Event") or "").removeprefix("member-")
    return "".join(
        [
            f"{when}  {plain(what):<6}  {plain(_name(member))}  {address_text(member)}\n"
            for member in record.get("Members") or ()
        ]
    )


def change_json(when: str, record: Mapping[str, Any]) -> str:
    """The same, each line a JSON object."""
    what = str(record.get("Event") or "").removeprefix("member-")
    return "".join(
        [
            _json_line(
                {"time": when, "event": what, "name": _name(member), "addr": address_text(member)}
            )
            for member in record.get("Members") or ()
        ]
    )


def answer_text(answer: Mapping[str, Any]) -> str:
    """An acknowledgement or a response, as `query` prints it; a final newline is not doubled."""
    sender = plain(str(answer["From"]))
    if answer.get("Type") == "ack":
        return f"Ack from '{sender}'\n"
    return f"Response from '{sender}': {lines(payload_text(answer).removesuffix(chr(10)))}\n"


def payload_text(answer: Mapping[str, Any]) -> str:
    """What a response says."""
    payload = answer.get("Payload") or ""
    return payload if isinstance(payload, str) else payload.decode("utf-8", "surrogateescape")


def keys_text(answer: Mapping[str, Any]) -> str:
    """All keys, and how many members of how many have each."""
    nodes = answer.get("NumNodes")
    keys = sorted((answer.get("Keys") or {}).items())
    return columns([(plain(key), f"[{count}/{nodes}]") for key, count in keys])


def failures_text(messages: Mapping[str, str]) -> str:
    """What members had to say to a key command, a line each."""
    rows = [("failed:", plain(node), plain(text)) for node, text in sorted(messages.items())]
    return columns(rows) if rows else ""


def status_of(
    stats: Mapping[str, Mapping[str, str]], members: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How the agent is, from what it tells of itself: the object that `status` prints as JSON."""
    own, serf = stats["agent"]["name"], stats["serf"]
    counts = dict.fromkeys(("alive", "leaving", "left", "failed"), 0)
    for member in members:
        counts[member["Status"]] = counts.get(member["Status"], 0) + 1
    here = next((member for member in members if _name(member) == own), {})
    failed = sorted((m for m in members if m["Status"] == "failed"), key=_name)
    status = {
        "node": own,
        "addr": address_text(here),
        "problems": [],
        "members": counts,
        "encrypted": serf.get("encrypted") == "true",
        "health_score": int(serf.get("health_score") or 0),
        "queues": {
            name: int(serf.get(f"{name}_queue") or 0) for name in ("intent", "event", "query")
        },
        "failed": [{"name": _name(member), "addr": address_text(member)} for member in failed],
    }
    problems = _problems(status, here, int(serf.get("internal_errors") or 0))
    for name, summary in sorted(stats.get("plugins", {}).items()):
        if summary.startswith("failing"):
            problems.append(f"plugin {name} is failing: see serfctl plugins")
    status["problems"] = problems
    return status


def _problems(
    status: Mapping[str, Any], here: Mapping[str, Any], internal_errors: int
) -> list[str]:
    problems = []
    members, score = status["members"], status["health_score"]
    if here.get("Status") != "alive":
        problems.append(f"it is {here.get('Status') or 'not a member'}")
    elif members["alive"] + members["leaving"] < 2:
        why = f"{members['failed']} failed" if members["failed"] else "it has joined nobody"
        problems.append(f"isolated, it sees no other member: {why}")
    if score > HEALTH_SCORE_FINE:
        problems.append(f"health score {score}: it is slow, or its network loses packets")
    if internal_errors:
        problems.append(f"{internal_errors} internal errors: see its log")
    return problems


def status_text(status: Mapping[str, Any]) -> str:
    """The agent's state on one screen."""
    counts = ", ".join([f"{count} {name}" for name, count in status["members"].items() if count])
    queues = ", ".join([f"{count} {name}" for name, count in status["queues"].items()])
    rows = [
        ("Agent:", f"{plain(status['node'])} at {status['addr']}"),
        ("State:", plain("; ".join(status["problems"])) or "healthy"),
        ("Members:", counts),
        ("Encrypted:", "yes" if status["encrypted"] else "no"),
        ("Health score:", f"{status['health_score']} (0 is best, 8 is worst)"),
        ("Queues:", queues),
    ]
    failed = status["failed"]
    for member in failed[:FAILED_SHOWN]:
        rows.append(("Failed:", f"{plain(member['name'])} at {member['addr']}"))
    if len(failed) > FAILED_SHOWN:
        rows.append(("", f"and {len(failed) - FAILED_SHOWN} more"))
    return columns(rows)


def plugins_text(plugins: Sequence[Mapping[str, Any]]) -> str:
    """A line for each plugin below a heading; then the last error of each that has one."""
    numbers = ("Calls", "Errors", "Timeouts", "Lost", "Waiting")
    rows = [("NAME", "STATE", *map(str.upper, numbers), "SOURCE")]
    errors = []
    for plugin in plugins:
        name, state = plain(plugin["Name"]), plugin["State"]
        shown = state + (", durable" if plugin["Durable"] else "")
        rows.append((name, shown, *(str(plugin[n]) for n in numbers), plain(plugin["Source"])))
        if plugin["LastError"]:
            # It may be long over: the state tells.
            errors.append(f"{name} is {state}; its last error: {plain(plugin['LastError'])}\n")
    return columns(rows) + "".join(errors)


def event_text(record: Mapping[str, Any]) -> str:
    """An event as `monitor` prints it (cli.md 2)."""
    found = ["Event Info:"]
    for key in _fields(record):
        value = record[key]
        if key == "Members" and isinstance(value, list):
            found.append("\tMembers:")
            found += ["\t\t" + line for line in members_text(value).rstrip().split("\n")]
        elif key == "Payload" and isinstance(value, str):
            found.append(f"\t{key}: {_go_syntax(value.encode('utf-8', 'surrogateescape'))}")
        else:
            found.append(f"\t{plain(key)}: {_go_syntax(value)}")
    return "\n".join(found) + "\n"


def event_json(record: Mapping[str, Any]) -> str:
    """The same as a line of JSON: names in small letters, members as `members_json` has them."""
    found: dict[str, Any] = {}
    for key in _fields(record):
        value = record[key]
        if key == "Members":
            value = _members(value or ())
        elif key == "Payload":
            value = payload_text(record)
        found[key.lower()] = value
    return _json_line(found)


def _fields(record: Mapping[str, Any]) -> list[str]:
    return sorted(record, key=lambda key: (key != "Event", key))


def log_text(record: Mapping[str, Any]) -> str:
    """A log line as `monitor` prints it; further lines of one message stand behind blanks."""
    return lines(str(record.get("Log", ""))).replace("\n", "\n    ") + "\n"


def log_json(record: Mapping[str, Any]) -> str:
    """The same as a line of JSON, which has nothing else in it."""
    return _json_line({"log": str(record.get("Log", ""))})


def json_text(value: object) -> str:
    """JSON as Go writes it, indented; characters that could steer a terminal are escaped."""
    from json import dumps
    from json.encoder import encode_basestring

    # json.dumps(indent=2) writes the same in three times the time: with 5,000 members that is half
    # of what the whole command takes.
    def written(value: object, margin: str) -> str:
        if isinstance(value, str):
            return encode_basestring(value)
        inner = margin + "  "
        if isinstance(value, dict) and value:
            items = [f"{inner}{written(k, '')}: {written(v, inner)}" for k, v in value.items()]
            return "{" + ",".join(items) + margin + "}"
        if isinstance(value, list) and value:
            return "[" + ",".join([inner + written(item, inner) for item in value]) + margin + "]"
        return str(value) if type(value) is int else dumps(value)

    return written(value, "\n").translate(_JsonEscapes()) + "\n"


def _json_line(value: object) -> str:
    """The same, but on one line."""
    from json import dumps

    return dumps(value, ensure_ascii=False).translate(_JsonEscapes()) + "\n"


class _JsonEscapes(dict[int, str]):
    """For `str.translate`: what Go escapes (`<`, `>`, `&`), and what is not printable.

    Bytes that were not UTF-8, here lone surrogates, become U+FFFD, as Go writes them.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        if "\ud800" <= char <= "\udfff":
            char = "\\ufffd"
        elif char in "<>&" or (code <= 0xFFFF and char != "\n" and not char.isprintable()):
            char = f"\\u{code:04x}"
        self[code] = char
        return char


def _go_syntax(value: object) -> str:
    if value is None:
        return "<nil>"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, bytes):
        return "[]byte{" + ", ".join([f"0x{byte:x}" for byte in value]) + "}"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{plain(quoted)}"'
    return plain(str(value))
