"""Deploy what a user event names, say on a query how it went, and ask all nodes that."""

import logging

from serfd.hooks import Agent, Query, QueryAnswer, QueryParams, Seconds, UserEvent, hookimpl

log = logging.getLogger("serfd.plugins.deploy")


class Plugin:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._state = "nothing"

    @hookimpl
    async def user_event(self, event: UserEvent) -> None:
        if event.name == "deploy":
            version = event.payload.decode()
            program = ["/usr/local/bin/deploy", version]
            done = await self._agent.run(program, env={}, timeout=Seconds(20), output_max=1000)
            self._state = f"{version}: {done.status_text}"
        elif event.name == "deploy-report":
            await self._report()

    @hookimpl
    def query(self, query: Query) -> str | None:
        return self._state if query.name == "deployed" else None

    async def _report(self) -> None:
        answers: list[QueryAnswer] = []
        web = QueryParams(tags={"role": "web"}, timeout=5.0)
        done = await self._agent.query("deployed", answered=answers.append, params=web)
        for answer in answers:
            log.info("%s has deployed %s", answer.sender, answer.payload.decode())
        log.info("%d nodes have answered", done.responses)
