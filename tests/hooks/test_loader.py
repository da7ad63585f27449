import sys
from pathlib import Path

import pytest

from serfd.errors import ConfigError
from serfd.hooks import Seconds
from serfd.hooks.loader import bundled_dir

EMPTY = "pass"
WEBHOOK = """
class Plugin:
    class Settings(Struct, frozen=True, kw_only=True):
        url: str
        retries: int = 3
        every: Seconds = Seconds(10)
        api_token: str = ""
    def __init__(self, agent, settings):
        self.settings = settings
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes packages that are as if installed, each with an entry point."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(name, value, source, *, package=None, version="1.2"):
        package = package or f"serfd_{name}"
        site = tmp_path / "site"
        info = site / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[serfd.plugins]\n{name} = {value}\n")
        module = value.partition(":")[0]
        monkeypatch.delitem(sys.modules, module, raising=False)
        (site / f"{module}.py").write_text(source)

    return install


def error_of(plugins, *names, **tables) -> str:
    with pytest.raises(ConfigError) as caught:
        plugins.load(*names, **tables)
    return str(caught.value)


def test_plugin_dirs_come_before_installed_packages_and_those_before_what_comes_with_serfd(
    plugins, installed
):
    installed("a", "ep_a:Plugin", "class Plugin:\n    def __init__(self, agent): ...\n")
    for name in ("a", "b"):
        plugins.write(name, EMPTY, to=plugins.bundled)
    loaded = plugins.load("a", "b")
    assert [p.source for p in loaded] == [
        "serfd_a 1.2, ep_a:Plugin (installed package)",
        f"{plugins.bundled}/b.py (comes with serfd)",
    ]
    plugins.write("a", EMPTY)
    assert plugins.load("a")[0].source == f"{plugins.own}/a.py (plugin_dirs)"


def test_an_entry_point_names_a_class_or_a_module(plugins, installed):
    source = "class {}:\n    def __init__(self, agent): self.agent = agent\n"
    installed("a", "ep_a:Elsewhere", source.format("Elsewhere"))
    installed("b", "ep_b", source.format("Plugin"))
    assert [type(p.plugin).__name__ for p in plugins.load("a", "b")] == ["Elsewhere", "Plugin"]


def test_plugins_come_in_the_order_of_the_config(plugins):
    for name in ("c", "a", "b"):
        plugins.write(name, EMPTY)
    assert [p.name for p in plugins.load("c", "a", "b")] == ["c", "a", "b"]
    assert [p.name for p in plugins.load("b", "c")] == ["b", "c"]


def test_settings_are_typed_and_have_defaults(plugins):
    plugins.write("webhook", WEBHOOK)
    (loaded,) = plugins.load(webhook={"url": "http://x", "every": "1m30s"})
    settings = loaded.plugin.settings
    assert (settings.url, settings.retries, settings.every) == ("http://x", 3, 90.0)
    assert isinstance(settings.every, Seconds)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (
            {"ulr": "x"},
            "plugin 'webhook': unknown key 'ulr' in [plugins.webhook]; did you mean 'url'?",
        ),
        ({"url": "x", "zzz": 1}, "plugin 'webhook': unknown key 'zzz' in [plugins.webhook]"),
        (
            {"url": "x", "durabel": True},
            "plugin 'webhook': unknown key 'durabel' in [plugins.webhook]; did you mean 'durable'?",
        ),
        ({}, "plugin 'webhook': missing key 'url' in [plugins.webhook]"),
        (
            {"url": 7},
            "plugin 'webhook': key 'url' in [plugins.webhook]: expected `str`, got `int`, found 7",
        ),
        (
            {"url": "x", "every": "2 sec"},
            "plugin 'webhook': key 'every' in [plugins.webhook]: '2 sec' is not a duration like "
            "'500ms', '10s', '5m' or '24h'",
        ),
        (
            {"url": "x", "every": 2},
            "plugin 'webhook': key 'every' in [plugins.webhook]: found 2, expected a duration in "
            "quotes like '500ms', '10s', '5m' or '24h'",
        ),
        (
            {"url": "x", "api_token": 12345},
            "plugin 'webhook': key 'api_token' in [plugins.webhook]: expected `str`, got `int`, "
            "found a value that is not shown",
        ),
        (
            {"url": {"Authorization": "Bearer 12345"}},
            "plugin 'webhook': key 'url' in [plugins.webhook]: expected `str`, got `object`, "
            "found a value that is not shown",
        ),
        (
            {"url": "x", "hook_timeout": 300},
            "key 'hook_timeout' in [plugins.webhook]: found 300, expected a duration in quotes "
            "like '500ms', '10s', '5m' or '24h'",
        ),
        (
            {"url": "x", "hook_timeout": "0s"},
            "key 'hook_timeout' in [plugins.webhook]: must be longer than 0",
        ),
    ],
)
def test_wrong_settings_name_the_plugin_the_key_what_was_found_and_expected(plugins, table, text):
    plugins.write("webhook", WEBHOOK)
    assert error_of(plugins, webhook=table) == text


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"inner": {"lst": [1, "x"]}}, "key 'inner.lst[1]' in [plugins.a]: expected `int`, got "
         "`str`, found 'x'"),
        ({"inner": {"zzz": 1}}, "unknown key 'zzz' in key 'inner' in [plugins.a]"),
        ({"free": {"x": "y"}}, "key 'free[...]' in [plugins.a]: expected `int`, got `str`, found "
         "{'x': 'y'}"),
        ({"inner": {"lst": [-1]}}, "must not be negative"),
    ],
)  # fmt: skip
def test_errors_inside_nested_settings_name_their_place(plugins, table, text):
    plugins.write(
        "a",
        """
        class Inner(Struct, frozen=True, forbid_unknown_fields=True):
            lst: tuple[int, ...] = ()
            def __post_init__(self):
                if any(n < 0 for n in self.lst): raise ValueError("must not be negative")
        class Plugin:
            class Settings(Struct):
                inner: Inner = Inner()
                free: dict[str, int] = {}
            def __init__(self, agent, settings): ...
        """,
    )
    assert text in error_of(plugins, a=table)


@pytest.mark.parametrize(("key", "hint"), [("x", ""), ("durabel", "; did you mean 'durable'?")])
def test_without_settings_the_table_must_be_empty(plugins, key, hint):
    plugins.write("a", EMPTY)
    assert error_of(plugins, a={key: 1}) == (
        f"plugin 'a': takes no settings, found {key!r} in [plugins.a]{hint}"
    )


@pytest.mark.parametrize("kind", ["Seconds", "Seconds | None", "Annotated[Seconds, Meta()]"])
@pytest.mark.parametrize(
    ("default", "text"),
    [
        ("'90m'", "the default of 'every' is the text '90m', expected Seconds(5400)"),
        ("'soon'", "'soon' is not a duration like '500ms', '10s', '5m' or '24h'"),
        ("Seconds(5)", ""),
        ("5", ""),
    ],
)
def test_a_text_is_no_default_of_a_duration(plugins, kind, default, text):
    plugins.write(
        "a",
        f"""
        from typing import Annotated
        class Plugin:
            class Settings(Struct):
                every: {kind} = {default}
            def __init__(self, agent, settings): ...
        """,
    )
    if text:
        assert error_of(plugins, a={}) == f"plugin 'a': Plugin.Settings is wrong: {text}"
    else:
        assert plugins.load("a")[0].settings.every == 5


@pytest.mark.parametrize("error", ["ConfigError", "ValueError"])
def test_what_settings_find_wrong_is_told_with_the_plugins_name(plugins, error):
    plugins.write(
        "a",
        f"""
        from serfd.hooks import ConfigError
        class Plugin:
            class Settings(Struct):
                n: int = 0
                def __post_init__(self): raise {error}("n is odd")
            def __init__(self, agent, settings): ...
        """,
    )
    assert error_of(plugins, a={}) == "plugin 'a': n is odd"


def test_a_config_error_of_init_is_told_with_the_plugin_and_its_table(plugins):
    plugins.write(
        "a",
        """
        from serfd.hooks import ConfigError
        class Plugin:
            def __init__(self, agent): raise ConfigError("no serial port")
        """,
    )
    assert error_of(plugins, a={}) == (
        "plugin 'a' could not be built from [plugins.a]: no serial port"
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def Plugin(): class", ":7: SyntaxError"),
        ("class Plugin: pass\n1 / 0", ":6: ZeroDivisionError: division by zero"),
        ("import nosuchmodule\nclass Plugin: pass", ":5: ModuleNotFoundError: No module named"),
        ("raise SystemExit('bye')\nclass Plugin: pass", ":5: SystemExit: bye"),
        ("class Plugins: pass", "there is no class named Plugin"),
        ("Plugin = 'class Plugin'", "there is no class named Plugin"),
        ("class Plugin:\n    def __init__(self): ...",
         "__init__ must take (self, agent), found ()"),
        ("class Plugin:\n    def __init__(self, agent): self.x", ":6: AttributeError"),
        ("class Plugin:\n    Settings = dict", "expected a subclass of serfd.hooks.Struct"),
        ("class Plugin:\n    class Settings(Struct):\n        x: Deferred = None\n    "
         "def __init__(self, agent, settings): ...", "a setting cannot be of type Deferred"),
        ("class Plugin:\n    class Settings(Struct): ...\n    def __init__(self, agent): ...",
         "__init__ must take (self, agent, settings), found (agent)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_named_with_its_place(plugins, source, text):
    path = plugins.write("a", source)
    text_seen = error_of(plugins, a={"x": 1} if "Deferred" in source else {})
    assert text in text_seen
    assert str(path) in text_seen or "plugin 'a'" in text_seen


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("@hookimpl\ndef member_jion(self): ...",
         "there is no hook 'member_jion'; the hooks are start, stop, member_join, member_leave, "
         "member_failed, member_update, member_reap, user_event, events_lost, reload, query; "
             "did you mean "
         "'member_join'?"),
        ("@hookimpl\ndef zzz(self): ...", "there is no hook 'zzz'; the hooks are start, stop,"),
        ("@hookimpl(specname='member_fail')\ndef zzz(self): ...",
         "there is no hook 'member_fail'; the hooks are start,"),
        ("@hookimpl\ndef member_join(self, member): ...",
         "hook 'member_join' gets no argument 'member'; serfd passes members; did you mean "
         "'members'?"),
        ("@hookimpl\ndef start(self, agent): ...",
         "hook 'start' gets no argument 'agent'; serfd passes no arguments"),
        ("@hookimpl\ndef member_join(self, members, more=1): ...", "no argument 'more=1'"),
        ("@hookimpl\ndef member_join(self, *args): ...", "no argument '*args'"),
        ("@hookimpl\ndef member_join(members): ...", "member_join lacks its first argument, self"),
        ("@hookimpl\ndef start(): ...", "start lacks its first argument, self"),
        ("@hookimpl(wrapper=True)\ndef start(self): yield", "start is a hook wrapper"),
        ("@hookimpl(hookwrapper=True)\ndef start(self): yield", "start is a hook wrapper"),
        ("@hookimpl\ndef start(self): yield", "start contains yield"),
        ("@hookimpl\nasync def start(self): yield", "start contains yield"),
        ("@hookimpl\nclass start: ...", "start is marked with @hookimpl but is no method"),
        ("@hookimpl\ndef start(self): ...\n@hookimpl(specname='start')\ndef two(self): ...",
         "two and start both implement 'start'"),
    ],
)  # fmt: skip
def test_a_hook_that_would_not_be_called_as_its_author_thinks_is_refused(plugins, method, text):
    path = plugins.write("a", method)
    seen = error_of(plugins, "a")
    assert text in seen
    assert seen.startswith(f"plugin 'a': {path}:" if "class start" not in method else "plugin 'a':")


def test_a_hook_put_on_the_instance_is_checked_by_pluggy(plugins):
    source = "class Plugin:\n    def __init__(self, agent): self.{} = hookimpl(lambda {}: None)"
    plugins.write("a", source.format("member_join", "member"))
    assert "'member'" in error_of(plugins, "a")
    plugins.write("a", source.format("zzz", ""))
    assert "unknown hook 'zzz'" in error_of(plugins, "a")


def test_a_hook_of_a_later_serfd_can_be_marked_optional(plugins):
    plugins.write("a", "@hookimpl(optionalhook=True)\ndef key_changed(self, key): ...")
    assert plugins.load("a")[0].hooks == {}


def test_a_method_with_a_hooks_name_but_without_its_mark_is_warned_of(plugins, caplog):
    plugins.write("a", "def member_join(self, members): ...")
    assert plugins.load("a")[0].hooks == {}
    assert "plugin a: method member_join has the name of a hook but no @hookimpl" in caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("webhok", "was not found; looked in {own}, installed packages, {bundled}; "
         "did you mean 'webhook'?"),
        ("../own/webhook", "is not a plugin's name"),
        ("", "is not a plugin's name"),
    ],
)  # fmt: skip
def test_an_unknown_plugin_is_told_with_where_it_was_looked_for(plugins, name, text):
    plugins.write("webhook", EMPTY)
    assert text.format(own=plugins.own, bundled=plugins.bundled) in error_of(plugins, name)


def test_two_packages_with_one_plugin_are_refused(plugins, installed):
    source = "class Plugin:\n    def __init__(self, agent): ...\n"
    installed("a", "ep_one", source, package="one")
    installed("a", "ep_two", source, package="two")
    assert error_of(plugins, "a") == (
        "plugin 'a' is offered twice: by one 1.2, ep_one (installed package) and two 1.2, ep_two "
        "(installed package)"
    )


def test_an_entry_point_that_cannot_be_imported_or_is_no_class_is_a_config_error(
    plugins, installed
):
    installed("a", "ep_bad:Plugin", "1 / 0\n")
    assert "ep_bad.py:1: ZeroDivisionError" in error_of(plugins, "a")
    installed("b", "ep_value:Plugin", "Plugin = 3\n")
    assert "expected a class, found 3" in error_of(plugins, "b")


def test_a_plugin_dir_must_exist(plugins):
    plugins.own.rmdir()
    assert error_of(plugins, "a") == f"plugin_dirs: '{plugins.own}' is not a directory"


def test_all_are_built_or_none(agent, plugins):
    plugins.write("good", "class Plugin:\n    def __init__(self, agent): agent.seen.append('made')")
    plugins.write("bad", "@hookimpl\ndef no_such(self): ...")
    before = set(sys.modules)
    error_of(plugins, "good", "bad")
    assert agent.seen == []
    assert set(sys.modules) - before == set()


def test_new_code_is_another_module_and_the_old_one_is_let_go(plugins):
    plugins.write("a", "TEXT = 'old'\nclass Plugin:\n    def __init__(self, agent): ...\n"
                  "    def text(self): return TEXT")  # fmt: skip
    (old,) = plugins.load("a")
    plugins.write("a", "TEXT = 'new'\nclass Plugin:\n    def __init__(self, agent): ...\n"
                  "    def text(self): return TEXT")  # fmt: skip
    (new,) = plugins.load("a", held=[old])
    assert new is not old
    assert (old.plugin.text(), new.plugin.text()) == ("old", "new")
    assert old.module.__name__ != new.module.__name__
    old.forget()
    assert old.module.__name__ not in sys.modules
    assert sys.modules[new.module.__name__] is new.module


def test_a_failed_load_leaves_the_running_code_as_it_was(plugins):
    plugins.write("a", WEBHOOK)
    (old,) = plugins.load(a={"url": "1"})
    plugins.write("bad", "1 / 0")
    with pytest.raises(ConfigError):
        plugins.load("bad", held=[old], a={"url": "2"})
    assert sys.modules[old.module.__name__] is old.module


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("nothing", True),
        ("touched", True),
        ("file", False),
        ("settings", False),
        ("place", False),
        ("limit", False),
        ("handed back only if held", False),
    ],
)
def test_only_what_changed_is_built_anew(plugins, change, kept):
    path = plugins.write("a", WEBHOOK)
    (old,) = plugins.load(a={"url": "1"})
    held, table = [old], {"url": "1"}
    match change:
        case "touched":
            path.touch()
        case "file":
            path.write_text(path.read_text() + "\n# changed")
        case "settings":
            table = {"url": "2"}
        case "place":
            path.rename(plugins.bundled / "a.py")
        case "limit":
            table = {"url": "1", "hook_timeout": "5m"}
        case "handed back only if held":
            held = []
    (new,) = plugins.load(a=table, held=held)
    assert (new is old) is kept


HANDLERS = """
class Plugin:
    class Settings(Struct, frozen=True):
        handlers: tuple[str, ...] = ()
        timeout: Seconds = Seconds(60)
    def __init__(self, agent, settings): self.settings = settings
"""


@pytest.mark.parametrize(
    ("handlers", "tables", "order", "given"),
    [
        (["a"], {}, ["script"], ("a",)),
        (["a"], {"other": {}}, ["script", "other"], ("a",)),
        (["a"], {"other": {}, "script": {"handlers": ["b"]}}, ["other", "script"], ("a", "b")),
        ([], {"script": {"handlers": ["b"]}}, ["script"], ("b",)),
        ([], {"other": {}}, ["other"], None),
    ],
)
def test_event_handlers_are_settings_of_the_script_plugin(plugins, handlers, tables, order, given):
    plugins.write("script", HANDLERS, to=plugins.bundled)
    plugins.write("other", EMPTY)
    loaded = plugins.load(handlers=handlers, **tables)
    assert [p.name for p in loaded] == order
    found = [p.plugin.settings.handlers for p in loaded if p.name == "script"]
    assert found == ([] if given is None else [given])


def test_wrong_handlers_in_the_table_are_told_even_beside_event_handlers(plugins):
    plugins.write("script", HANDLERS, to=plugins.bundled)
    with pytest.raises(ConfigError, match=r"key 'handlers' in \[plugins.script\]: expected"):
        plugins.load(handlers=["a"], script={"handlers": "b"})


def test_the_bundled_folder_is_found_in_a_source_checkout():
    assert (bundled_dir() / "script.py").is_file()


def test_the_bundled_folder_is_found_in_an_installed_wheel(tmp_path, monkeypatch):
    package = tmp_path / "serfd"
    (package / "bundled_plugins").mkdir(parents=True)
    monkeypatch.setattr("serfd.__file__", str(package / "__init__.py"))
    assert bundled_dir() == Path(package / "bundled_plugins")


def test_a_durable_plugin_needs_a_state_dir(plugins, monkeypatch):
    plugins.write("a", "@hookimpl\ndef start(self): ...")
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match=r"'durable' in \[plugins.a\] needs .* set state_dir"):
        plugins.load(a={"durable": True})
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/serfd:/var/lib/other")
    (loaded,) = plugins.load(a={"durable": True})
    assert loaded.durable
    assert loaded.agent._state_root == Path("/var/lib/serfd")


def test_several_may_have_one_file(plugins):
    plugins.write(
        "a",
        """
        class Plugin:
            class Settings(Struct):
                level: int = 0
            def __init__(self, agent, settings): self.agent, self.level = agent, settings.level
        """,
    )
    first, second = plugins.load(one={"plugin": "a", "level": 1}, two={"plugin": "a", "level": 2})
    assert [p.plugin.level for p in (first, second)] == [1, 2]
    assert [p.plugin.agent.plugin for p in (first, second)] == ["one", "two"]
    assert type(first.plugin) is type(second.plugin)
    # One of them goes: the other's code stays where pickle and typing look for it.
    kept = plugins.load(held=[first, second], two={"plugin": "a", "level": 2})
    assert kept == [second]


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"plugin": 5}, "key 'plugin' in [plugins.a]: found 5, expected a plugin's name"),
        ({"durable": "yes"}, "key 'durable' in [plugins.a]: found 'yes', expected true or false"),
        ({"plugin": "../a"}, "'../a' is not a plugin's name"),
        ({"plugin": "nope"}, "plugin 'nope', switched on by [plugins.a], was not found"),
    ],
)
def test_serfds_own_keys_are_checked(plugins, table, text):
    with pytest.raises(ConfigError) as caught:
        plugins.load(a=table)
    assert text in str(caught.value)


@pytest.mark.parametrize("key", ["plugin", "durable"])
def test_a_setting_cannot_have_the_name_of_one_of_serfds(plugins, key):
    plugins.write(
        "a",
        f"class Plugin:\n    class Settings(Struct):\n        {key}: int = 0\n"
        "    def __init__(self, agent, settings): ...",
    )
    with pytest.raises(ConfigError, match=f"a setting cannot be named '{key}', serfd has it"):
        plugins.load("a")
