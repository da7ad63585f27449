"""Two nodes of one name: the cluster decides (serf.md 12.2)."""

from collections.abc import Callable

from serfd.errors import WireError
from serfd.gossip.member_table import Peer, socket_address
from serfd.serf.common import Common
from serfd.serf.members import Record, tags_of
from serfd.serf.queries import QueryAnswer, QueryDone
from serfd.wire.serf_messages import ConflictMember, ConflictResponse, decode

QUERY = "_serf_conflict"


def whois(record: Record | None) -> ConflictResponse:
    """What this node knows of a name."""
    if record is None:
        return ConflictResponse(None)
    p: Peer = record.peer
    tags = dict(tags_of(p.meta))
    return ConflictResponse(ConflictMember(p.name, p.addr, p.port, tags, record.status, p.versions))


class NameVote:
    """Counts who takes this node for the bearer of its name."""

    has_enough = False

    def __init__(self, common: Common, tell: Callable[..., None]) -> None:
        """`tell(lost=…)`: whether the majority takes somebody else for it."""
        self._common = common
        self._tell = tell
        self._responses = 0
        self._matching = 0

    def answered(self, answer: QueryAnswer) -> None:
        """One member says where it knows the name to be."""
        log = self._common.log
        try:
            response = decode(answer.payload)
        except WireError as error:
            log.error("Failed to decode conflict query response of %s: %s", answer.sender, error)
            return
        if not isinstance(response, ConflictResponse):
            log.error("Invalid conflict query response of %s", answer.sender)
            return
        self._responses += 1
        member, local = response.member, self._common.memberlist.local
        self._matching += (
            member is not None
            and len(member.addr) in (4, 16)
            and socket_address(member.addr, member.port) == local.address
        )

    def over(self, done: QueryDone) -> None:
        """Say how it went."""
        log, votes = self._common.log, (self._matching, self._responses)
        if not self._responses:
            # In Serf both of two lone nodes quit; here a stranger's word is not enough.
            log.error("nobody says who bears this node's name: it stays")
        elif self._matching >= self._responses // 2 + 1:
            log.info("majority in name conflict resolution [%d / %d]", *votes)
        else:
            log.warning("minority in name conflict resolution, quitting [%d / %d]", *votes)
            self._tell(lost=True)
            return
        self._tell(lost=False)
