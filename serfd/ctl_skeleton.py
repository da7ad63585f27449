"""The files of a new plugin, for `serfctl plugin new`: the plugin, and its tests."""

from __future__ import annotations

_PLUGIN = '''\
"""@NAME@: log who has failed, and answer the query "@NAME@" with their names."""

from collections import deque
from collections.abc import Sequence

from serfd.hooks import Agent, Member, Query, Struct, hookimpl


class Plugin:
    class Settings(Struct, frozen=True, kw_only=True):
        """The keys of the table [plugins.@NAME@]."""

        remembered: int = 10
        """So many failed nodes are remembered."""

    def __init__(self, agent: Agent, settings: Settings) -> None:
        self._agent = agent
        self._failed: deque[str] = deque(maxlen=settings.remembered)

    @hookimpl
    def member_failed(self, members: Sequence[Member]) -> None:
        for member in members:
            self._agent.logger.warning("%s at %s has failed", member.name, member.address)
            self._failed.append(member.name)

    @hookimpl
    def query(self, query: Query) -> str | None:
        return " ".join(self._failed) if query.name == "@NAME@" else None
'''

_TESTS = '''\
"""@NAME@ in simulated clusters: the plugin runs on n1."""


def test_it_logs_who_has_failed_and_answers_with_the_name(serf_cluster):
    cluster = serf_cluster(5)
    cluster.load("@NAME@.py")
    cluster.fail("n3")
    assert "n3 at" in cluster.log
    assert cluster.query("@NAME@") == {"n1": b"n3"}


def test_it_remembers_no_more_than_its_settings_say(serf_cluster):
    cluster = serf_cluster(5)
    cluster.load("@NAME@.py", remembered=1)
    cluster.fail("n3")
    cluster.fail("n4")
    assert cluster.query("@NAME@") == {"n1": b"n4"}


def test_it_leaves_other_queries_to_others(serf_cluster):
    cluster = serf_cluster(3)
    cluster.load("@NAME@.py")
    assert cluster.query("load") == {}
'''

_NEXT_STEPS = """\
Wrote @FILES@.

Run its tests:
    pytest @TEST@
Switch it on in serfd's configuration, and reload serfd:
    plugin_dirs = ["@DIR@"]

    [plugins.@NAME@]
"""


def files(name: str) -> dict[str, str]:
    """What to write, by file name: the plugin first."""
    texts = {f"{name}.py": _PLUGIN, f"test_{name}.py": _TESTS}
    return {file: text.replace("@NAME@", name) for file, text in texts.items()}


def next_steps(name: str, directory: str, paths: list[str]) -> str:
    """What to tell who has a new plugin; `paths` are those of `files`, `directory` a whole path."""
    text = _NEXT_STEPS.replace("@FILES@", " and ".join(paths)).replace("@TEST@", paths[-1])
    return text.replace("@DIR@", directory).replace("@NAME@", name)
