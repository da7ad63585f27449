"""Count what happens, with every hook there is; say on a query `tally` how often what happened."""

from collections import Counter
from collections.abc import Sequence

from serfd.hooks import Agent, Member, Query, Struct, UserEvent, hookimpl


class Plugin:
    class Settings(Struct, frozen=True):
        unit: str = "times"

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self._agent, self._settings = agent, settings
        self._counts: Counter[str] = Counter()

    @hookimpl
    def start(self) -> None:
        self._agent.every(60, self._log)

    @hookimpl
    async def stop(self) -> None:
        file = self._agent.state_dir / "last.txt"
        await self._agent.in_thread(file.write_text, self._text())

    @hookimpl
    def member_join(self, members: Sequence[Member]) -> None:
        self._counts["join"] += len(members)

    @hookimpl
    def member_leave(self, members: Sequence[Member]) -> None:
        self._counts["leave"] += len(members)

    @hookimpl
    def member_failed(self, members: Sequence[Member]) -> None:
        self._counts["failed"] += len(members)

    @hookimpl
    def member_update(self, members: Sequence[Member]) -> None:
        self._counts[f"update of {members[0].name}"] += 1

    @hookimpl
    def member_reap(self, members: Sequence[Member]) -> None:
        self._counts["reap"] += len(members)

    @hookimpl
    def user_event(self, event: UserEvent) -> None:
        self._counts[event.name] += 1

    @hookimpl
    def events_lost(self, count: int) -> None:
        self._counts["lost"] += count

    @hookimpl
    def query(self, query: Query) -> str | None:
        return self._text() if query.name == "tally" else None

    @hookimpl
    def reload(self, settings: Settings) -> None:
        self._settings = settings

    def _log(self) -> None:
        self._agent.logger.info("%s", self._text())

    def _text(self) -> str:
        unit = self._settings.unit
        return ", ".join(f"{name}: {n} {unit}" for name, n in sorted(self._counts.items()))
