"""Keyring changes across the cluster (serf.md 12.1)."""

import base64
from collections.abc import Callable
from typing import NamedTuple

from serfd.errors import CommandError, WireError
from serfd.serf.queries import QueryAnswer, QueryDone
from serfd.wire.sealing import Keyring
from serfd.wire.serf_messages import KeyRequest, KeyResponse, QueryResponse, decode, encode

INSTALL, USE, REMOVE, LIST = (
    "_serf_install-key",
    "_serf_use-key",
    "_serf_remove-key",
    "_serf_list-keys",
)
KEY_QUERIES = (INSTALL, USE, REMOVE, LIST)
NO_KEYRING = "No keyring to modify (encryption not enabled)"
NO_KEYS = "Keyring is empty (encryption not enabled)"
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_PAD, _NEWLINES = ord("="), b"\r\n"
KEYS_MAX = 64
"""Keys of a ring that peers may add to; a cluster that changes its key has two or three."""
TRUNCATED = 40
"""A list too long for a packet is cut to at most so many keys."""


class KeyResult(NamedTuple):
    """What came of a key command over all members."""

    messages: dict[str, str]
    """Node → what it had to say."""
    keys: dict[str, int]
    """Base64 key → number of nodes that have it; of a list only."""
    nodes: int
    errors: int
    responses: int
    error: str
    """Empty if all is well."""


def answer(query: str, payload: bytes, keyring: Keyring) -> KeyResponse:
    """Do what a key query asks of this node's keyring; what it answers."""
    if not keyring.keys:
        return _refused(NO_KEYS if query == LIST else NO_KEYRING)
    if query == LIST:
        keys = [base64.b64encode(key).decode() for key in keyring.keys]
        return KeyResponse(result=True, message="", keys=keys, primary_key=keys[0])
    try:
        request = decode(payload)
    except WireError:
        # An empty payload kills a real agent.
        return _refused("")
    if not isinstance(request, KeyRequest):
        return _refused("")
    try:
        if query == INSTALL:
            if len(keyring) >= KEYS_MAX and request.key not in keyring.keys:
                return _refused(f"the keyring holds {KEYS_MAX} keys, no more may be installed")
            keyring.add(request.key)
        elif query == USE:
            keyring.use(request.key)
        else:
            keyring.remove(request.key)
    except CommandError as error:
        return _refused(str(error))
    return KeyResponse(result=True, message="", keys=[], primary_key="")


def _refused(why: str) -> KeyResponse:
    return KeyResponse(result=False, message=why, keys=[], primary_key="")


def fitting(response: KeyResponse, query: QueryResponse, limit: int) -> QueryResponse:
    """The answer to a query, its list of keys cut until the whole is at most `limit` bytes."""
    whole = query._replace(payload=encode(response))
    count = len(response.keys)
    shown = min(TRUNCATED, count)
    while len(encode(whole)) > limit and shown:
        message = f"truncated key list response, showing first {shown} of {count} keys"
        cut = response._replace(keys=response.keys[:shown], message=message)
        whole = query._replace(payload=encode(cut))
        shown -= 1
    return whole


class KeyChange:
    """Asks all members to change their keyrings, or to list them, and counts their answers."""

    def __init__(
        self, query: str, key: bytes, nodes: int, tell: Callable[[KeyResult], None]
    ) -> None:
        """`nodes`: how many are alive, so how many answers there should be."""
        self.query = query
        self.key = key
        self._nodes = nodes
        self._tell = tell
        self._messages: dict[str, str] = {}
        self._keys: dict[str, int] = {}
        self._errors = 0
        self._responses = 0

    def answered(self, answer: QueryAnswer) -> None:
        """One node's answer."""
        self._responses += 1
        try:
            response = decode(answer.payload)
        except WireError as error:
            self._errors += 1
            self._messages[answer.sender] = f"Failed to decode key query response: {error}"
            return
        if not isinstance(response, KeyResponse):
            self._errors += 1
            what = type(response).__name__
            self._messages[answer.sender] = f"Invalid key query response type: {what}"
            return
        if response.message:
            self._messages[answer.sender] = response.message
        self._errors += not response.result
        for key in response.keys:
            self._keys[key] = self._keys.get(key, 0) + 1

    @property
    def has_enough(self) -> bool:
        """Everybody has answered."""
        return self._responses >= self._nodes

    def over(self, done: QueryDone) -> None:
        """Tell what came of it."""
        error = ""
        if self._errors:
            error = f"{self._errors}/{self._nodes} nodes reported failure"
        elif self._responses != self._nodes:
            error = f"{self._responses}/{self._nodes} nodes reported success"
        self._tell(
            KeyResult(self._messages, self._keys, self._nodes, self._errors, self._responses, error)
        )


def decode_base64(text: str) -> bytes:
    """A key as users give it. Raises CommandError in Go's words, with the place Go would name."""
    data = text.encode("utf-8", "surrogateescape")
    held = 0
    for place, char in enumerate(data):
        if char in _BASE64:
            held = (held + 1) % 4
        elif char not in _NEWLINES:
            if char != _PAD or held < 2:
                raise _illegal(place)
            _check_padding(data, place + 1, wanted=held == 2)
            held = 0
            break
    if held:
        raise _illegal(len(data) - held)
    return base64.b64decode(data)


def _check_padding(data: bytes, start: int, *, wanted: bool) -> None:
    """What follows the first `=`: another one if it is `wanted`, then nothing but newlines."""
    for place in range(start, len(data)):
        if data[place] in _NEWLINES:
            continue
        if not wanted:
            raise _illegal(place)
        if data[place] != _PAD:
            raise _illegal(place - 1)
        wanted = False
    if wanted:
        raise _illegal(len(data))


def _illegal(place: int) -> CommandError:
    return CommandError(f"illegal base64 data at input byte {place}")
