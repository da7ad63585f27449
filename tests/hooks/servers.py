"""Keep the addresses of servers in a file, one a line."""

from collections.abc import Sequence

from serfd.hooks import Agent, CannotMake, FileSettings, FollowedFile, Member, hookimpl


class Plugin:
    Settings = FileSettings

    def __init__(self, agent: Agent, settings: FileSettings) -> None:
        self._file = FollowedFile(agent, settings, addresses)

    @hookimpl
    def start(self) -> None:
        self._file.start()

    @hookimpl
    def member_join(self) -> None:
        self._file.changed()

    member_leave = member_failed = member_update = member_reap = member_join

    @hookimpl
    def reload(self, settings: FileSettings) -> None:
        self._file.take(settings, addresses)

    @hookimpl
    async def stop(self) -> None:
        await self._file.stop()


def addresses(members: Sequence[Member], me: Member, old: bytes | None) -> bytes:
    for member in members:
        if "port" not in member.tags:
            raise CannotMake(f"{member.name} has no tag `port`")
    return "".join(f"{member.ip}:{member.tags['port']}\n" for member in members).encode()
