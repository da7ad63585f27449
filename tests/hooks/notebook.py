"""Write down who failed, and when it was noticed."""

from collections.abc import Sequence
from datetime import UTC, datetime

from serfd.hooks import Agent, Member, Struct, hookimpl


class Plugin:
    class Settings(Struct, frozen=True, kw_only=True):
        file: str

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self._agent = agent
        self._file = settings.file

    @hookimpl
    async def member_failed(self, members: Sequence[Member]) -> None:
        names = " ".join(member.name for member in members)
        await self._agent.in_thread(append, self._file, f"{datetime.now(UTC)} {names}\n")


def append(file: str, line: str) -> None:
    with open(file, "a") as notebook:
        notebook.write(line)
