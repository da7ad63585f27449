"""Deploy what a user event names, say on a query how it went, and ask all nodes that."""

from serfd.hooks import Agent, Query, UserEvent, hookimpl


class Plugin:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._state = "nothing"

    @hookimpl
    async def user_event(self, event: UserEvent) -> None:
        if event.name == "deploy":
            version = event.payload.decode()
            done = await self._agent.run(["/usr/local/bin/deploy", version], timeout=20)
            self._state = f"{version}: {done.status_text}"
        elif event.name == "deploy-report":
            await self._report()

    @hookimpl
    def query(self, query: Query) -> str | None:
        return self._state if query.name == "deployed" else None

    async def _report(self) -> None:
        answers = self._agent.query("deployed", tags={"role": "web"}, timeout=5)
        async for answer in answers:
            self._agent.logger.info("%s has %s", answer.sender, answer.payload.decode())
        self._agent.logger.info("%d nodes have answered", answers.done.responses)
