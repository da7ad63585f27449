import pluggy
import pytest

from serfd.hooks import specs


def test_the_hooks_and_what_they_pass():
    assert {
        "start": (),
        "stop": (),
        **dict.fromkeys(
            ("member_join", "member_leave", "member_failed", "member_update", "member_reap"),
            ("members",),
        ),
        "user_event": ("event",),
        "events_lost": ("count",),
        "reload": ("settings",),
        "query": ("query",),
    } == specs.HOOKS


@pytest.mark.parametrize("hook", specs.HOOKS)
def test_pluggy_knows_every_hook(hook):
    manager = pluggy.PluginManager(specs.PROJECT)
    manager.add_hookspecs(specs)
    assert getattr(manager.hook, hook).spec.argnames == specs.HOOKS[hook]
