import shutil
import sys
from itertools import count
from pathlib import Path

import pytest
from followed_files import Node, agent_of, bundled, ended, member
from twisted.internet.defer import Deferred

from serfd.config import Config, Seconds
from serfd.errors import ConfigError
from serfd.hooks import CannotMake
from serfd.hooks.loader import bundled_dir, load
from serfd.serf.events import Member, Status

template = bundled("template")
ME = member("me", 1, {"role": "lb"})
EXAMPLES = sorted((Path(__file__).parents[2] / "conf/templates").glob("*.j2"))


@pytest.fixture
def render(tmp_path):
    """Writes a template and gives what it makes of members."""

    def made(text: str, *members: Member, **more: str) -> str:
        path = tmp_path / "t.j2"
        path.write_text(text)
        for name, included in more.items():
            (tmp_path / name).write_text(included)
        return template.Template(str(path)).render(members, ME, None).decode()

    return made


class Running:
    """The plugin with its hooks, on virtual time."""

    def __init__(self, folder: Path, text: str, **settings) -> None:
        self.path, self.target = folder / "t.j2", folder / "out"
        self.path.write_text(text)
        self.node = Node()
        self.table = {"template": str(self.path), "target": str(self.target), **settings}
        self.plugin = template.Plugin(agent_of(self.node, "template"), self.settings())
        self.plugin.start()
        self.node.pass_time(0)

    def settings(self, **changed):
        return template.Plugin.Settings(**{**self.table, **changed})

    @property
    def content(self) -> str | None:
        return self.target.read_text() if self.target.exists() else None


def test_a_template_knows_the_members_and_this_node(render):
    text = render(
        "{% for m in members %}\n"
        "{{ m.name }} {{ m.ip }} {{ m.port }} {{ m.address }} {{ m.tags.role }} {{ m.status }}\n"
        "{% endfor %}\n"
        "{{ me.name }} {{ name }} {{ tags.role }}\n",
        member("a", 7, {"role": "web"}),
        Member("b", bytes(15) + b"\1", 7947, {"role": "db"}, Status.FAILED, bytes(6)),
    )
    assert text == (
        "a 10.0.0.7 7946 10.0.0.7:7946 web alive\nb ::1 7947 [::1]:7947 db failed\nme me lb\n"
    )


def test_a_template_includes_others_of_its_directory(render):
    assert render("{% include 'more' %}!", more="and more") == "and more!"
    with pytest.raises(CannotMake, match="TemplateNotFound"):
        render("{% include '../../etc/passwd' %}")


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("a\n{% for %}", 2, "Expected"),
        ("a\nb\n{{ nothing }}", 3, "'nothing' is undefined"),
        ("a\n{{ me.tags.port }}", 2, "has no attribute 'port'"),
        ("a\n{{ 1 / 0 }}", 2, "ZeroDivisionError"),
        ("{{ 'x' | no_filter }}", 1, "no_filter"),
        ("a\n{{ me.__class__ }}", 2, "SecurityError"),
        ("a\n{{ ''.__class__.__mro__ }}", 2, "SecurityError"),
        ("a\n{{ me._replace(name='x') }}", 2, "SecurityError"),
        ("a\n{{ range(10 ** 9) | list }}", 2, "OverflowError"),
        ("{% include 'more' %}", 3, "'wrong' is undefined"),
    ],
)
def test_an_error_names_file_and_line(render, text, line, told):
    with pytest.raises(CannotMake) as caught:
        render(text, more="1\n2\n{{ wrong }}")
    file = "more" if "include" in text else "t.j2"
    assert f"{file}:{line}: " in str(caught.value)
    assert told in str(caught.value)


def test_a_missing_template_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CannotMake, match=r"gone\.j2"):
        template.Template(str(tmp_path / "gone.j2")).render([], ME, None)


def test_no_name_and_no_tag_breaks_out_of_its_line(render):
    evil = member("n1\n    server evil", 7, {"a\nb": "1\r\n\x00\x1b\u2028\udc80", "c": "grüße"})
    text = render("{{ members[0].name }}|{{ members[0].tags }}", evil)
    assert text == "n1_    server evil|{'a_b': '1______', 'c': 'grüße'}"


def test_a_word_has_nothing_that_separates_words(render):
    assert render("{{ 'web-1.x_y:8' | word }}") == "web-1.x_y:8"
    assert render("{{ 'a b#\"{};é' | word }} {{ '' | word }} {{ 7 | word }}") == "a_b______ _ 7"


def test_a_template_cannot_give_too_much(render, monkeypatch):
    monkeypatch.setattr(template, "RENDERED_MAX", 1 << 20)
    loop = (
        "{% for a in range(10000) %}{% for b in range(10000) %}0123456789{% endfor %}{% endfor %}"
    )
    with pytest.raises(CannotMake, match="more than 1 Mi characters"):
        render(loop)


def test_a_template_cannot_take_for_ever(render, monkeypatch):
    seconds = count()
    clock = type("Clock", (), {"monotonic": staticmethod(lambda: float(next(seconds)))})
    monkeypatch.setattr(template, "time", clock)
    with pytest.raises(CannotMake, match="longer than 10 s"):
        render("{% for a in range(100000) %}x{% endfor %}")


def test_the_file_follows_the_members(tmp_path):
    one = Running(tmp_path, "{{ members | map(attribute='name') | join(' ') }}")
    assert one.content == "me"
    one.node.put(member("n2"))
    one.plugin.member_join()
    one.node.pass_time(0.5)
    assert one.content == "me n2"


@pytest.mark.parametrize(
    "hook",
    ["member_join", "member_leave", "member_failed", "member_update", "member_reap", "events_lost"],
)
def test_every_change_counts(tmp_path, hook):
    one = Running(tmp_path, "{{ members | length }}")
    one.node.put(member("n2"))
    getattr(one.plugin, hook)()
    one.node.pass_time(0.5)
    assert one.content == "2"


def test_an_error_leaves_the_old_file_and_is_told(tmp_path, caplog):
    one = Running(tmp_path, "good")
    one.path.write_text("line\n{{ wrong }}")
    one.plugin.member_join()
    one.node.pass_time(0.5)
    assert one.content == "good"
    assert f"{one.path}:2: UndefinedError: 'wrong' is undefined" in caplog.text


def test_a_change_of_the_template_is_noticed(tmp_path):
    one = Running(tmp_path, "old")
    one.path.write_text("newer")
    one.node.pass_time(template.LOOK_INTERVAL + 0.5)
    assert one.content == "newer"
    one.path.unlink()
    one.node.pass_time(template.LOOK_INTERVAL + 0.5)
    assert one.content == "newer"
    one.path.write_text("newest")
    one.node.pass_time(template.LOOK_INTERVAL + 0.5)
    assert one.content == "newest"


def test_new_settings_hold_at_once(tmp_path):
    one = Running(tmp_path, "old", reload=("reload",))
    one.node.program().done.callback(ended())
    (tmp_path / "other.j2").write_text("other")
    one.plugin.reload(one.settings(template=str(tmp_path / "other.j2")))
    one.node.pass_time(0)
    assert one.content == "other"
    assert one.node.program().argv == ["reload"]
    (tmp_path / "other.j2").write_text("changed")
    one.node.pass_time(template.LOOK_INTERVAL + 0.5)
    assert one.content == "other"  # the reload before is under way
    assert Deferred.fromCoroutine(one.plugin.stop()).called is False


def test_it_loads_as_the_daemon_does_it_under_several_names(tmp_path):
    tables = {
        name: {
            "plugin": "template",
            "template": str(tmp_path / name),
            "target": str(tmp_path / f"{name}.out"),
            "check": "nginx -t -c {}",
            "reload": ["nginx", "-s", "reload"],
            "wait": "1s",
            "tags": {"role": "web"},
            "statuses": ["alive", "failed"],
        }
        for name in ("web", "api")
    }
    loaded = load(Config(plugins=tables), Node())
    assert [each.name for each in loaded] == ["web", "api"]
    settings = loaded[0].settings
    assert (settings.wait, settings.reload) == (Seconds(1), ("nginx", "-s", "reload"))


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"target": "/x"}, "missing key 'template'"),
        ({"target": "/x", "template": "t"}, "template is 't', expected a path"),
        ({"target": "x", "template": "/t"}, "target is 'x', expected a path"),
        ({"target": "/x", "template": "/t", "statuses": ["dead"]}, "statuses"),
        ({"target": "/x", "template": "/t", "statuses": []}, "statuses"),
        ({"target": "/x", "template": "/t", "relaod": ""}, "did you mean 'reload'?"),
    ],
)
def test_wrong_settings_are_told_before_anything_starts(table, told):
    with pytest.raises(ConfigError) as caught:
        load(Config(plugins={"template": table}), Node())
    assert told in str(caught.value)


def test_without_jinja2_the_error_says_what_to_install(tmp_path, monkeypatch):
    shutil.copy(bundled_dir() / "template.py", tmp_path)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    table = {"template": {"target": "/x", "template": "/t"}}
    with pytest.raises(ConfigError, match=r"pip install 'serfd\[template\]'"):
        load(Config(plugins=table), Node(), bundled=tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_the_examples_render(path):
    members = [
        member("web 1", 7, {"port": "8081"}),
        Member("web2", bytes(15) + b"\1", 7946, {"port": "no"}, Status.ALIVE, bytes(6)),
    ]
    text = template.Template(str(path)).render(members, ME, None).decode()
    assert "10.0.0.7:8081 " in text
    assert "[::1]:8080 " in text
    assert "web_1" in text
