"""This node's keyring, and changes of everybody's, one after the other (serf.md 12.1)."""

from collections import deque

from serfd.effects import Command, SaveKeyring
from serfd.errors import CommandError
from serfd.serf.asking import Queries
from serfd.serf.common import Common
from serfd.serf.events import Status
from serfd.serf.keys import LIST, KeyChange, KeyResult, answer, decode_base64, fitting
from serfd.serf.queries import HeardQuery, QueryParams
from serfd.wire.sealing import Keyring
from serfd.wire.serf_messages import KeyRequest, KeyResponse, encode

CHANGES_MAX = 64
"""Changes that wait for their turn."""


class Keyrings:
    """Asks for changes, and makes those that others ask for."""

    def __init__(self, common: Common, keyring: Keyring, queries: Queries) -> None:
        self._common = common
        self._keyring = keyring
        self._queries = queries
        self._changes: deque[tuple[Command[KeyResult], KeyChange]] = deque()
        """The first is under way."""
        self._unsaved: deque[tuple[HeardQuery, KeyResponse] | None] = deque()
        """Answers that wait for the keyring file to be written; None: nobody asked."""

    def change(self, query: str, key: str) -> Command[KeyResult]:
        """Ask all members to install, use, remove or list keys; `key` is base64."""
        command: Command[KeyResult] = Command(query)
        try:
            raw = b"" if query == LIST else decode_base64(key)
            if len(self._changes) >= CHANGES_MAX:
                raise CommandError(f"{CHANGES_MAX} key changes wait already; try later")
        except CommandError as error:
            self._common.finish(command, error)
            return command

        def over(result: KeyResult) -> None:
            self._common.finish(command, result)
            self._changes.popleft()
            self._next()

        nodes = sum(record.status is Status.ALIVE for record in self._common.members)
        self._changes.append((command, KeyChange(query, raw, nodes, over)))
        if len(self._changes) == 1:
            self._next()
        return command

    def asked(self, heard: HeardQuery) -> None:
        """Somebody asks for a change of this node's keyring."""
        query = heard.message.name
        response = answer(query, heard.message.payload, self._keyring)
        if response.result and query != LIST and self._common.config.keyring_file:
            self._unsaved.append((heard, response))
            self._common.effects.append(SaveKeyring(self._keyring.keys))
        else:
            self._answer(heard, response)

    def saved(self, error: str | None) -> None:
        """What came of the oldest `SaveKeyring`."""
        answer = self._unsaved.popleft()
        if answer is None:
            if error is not None:
                self._common.log.error("%s", error)
            return
        heard, response = answer
        if error is not None:
            response = response._replace(result=False, message=error)
        self._answer(heard, response)

    def prefer(self, key: bytes) -> None:
        """The cluster knows this key, but not the primary: it changed its keys meanwhile."""
        if key not in self._keyring.keys:
            return
        self._common.log.warning(
            "The cluster does not know the primary key any more: key %d of the keyring takes its "
            "place",
            self._keyring.keys.index(key) + 1,
        )
        self._keyring.use(key)
        if self._common.config.keyring_file:
            self._unsaved.append(None)
            self._common.effects.append(SaveKeyring(self._keyring.keys))

    def _answer(self, heard: HeardQuery, response: KeyResponse) -> None:
        limit = self._common.config.query_response_size_limit
        whole = fitting(response, heard.response(self._common.name, b""), limit)
        try:
            self._queries.answer(heard, whole.payload)
        except CommandError as error:
            self._common.log.error("failed to respond to key query: %s", error)

    def _next(self) -> None:
        while self._changes:
            command, change = self._changes[0]
            request = encode(KeyRequest(change.key))
            try:
                self._queries.ask(change.query, request, QueryParams(), change)
            except CommandError as error:
                self._common.finish(command, error)
                self._changes.popleft()
            else:
                return
