import logging

import pytest
from followed_files import Node, agent_of, bundled, member
from hypothesis import given
from hypothesis import strategies as st

from serfd.config import Config
from serfd.errors import ConfigError
from serfd.hooks import CannotMake
from serfd.hooks.loader import load
from serfd.serf.events import Member, Status

hosts = bundled("hosts")
ME = member("me", 1)
LOG = logging.getLogger("serfd.plugins.hosts")


def block(domain: str = "", *, name: str = "hosts", allow_empty: bool = False):
    return hosts.Block(name, domain, allow_empty=allow_empty, log=LOG)


def made(old: str | None, *members: Member, domain: str = "") -> str:
    before = None if old is None else old.encode()
    return block(domain)(members, ME, before).decode()


def lines(*members: Member, domain: str = "", old: str = "") -> list[str]:
    return made(old, *members, domain=domain).removeprefix(old).splitlines()[1:-1]


def test_each_member_has_a_line_with_and_without_the_domain():
    assert made(None, member("web1", 7), domain="cluster.local") == (
        "# BEGIN serfd hosts\n10.0.0.7 web1.cluster.local web1\n# END serfd hosts\n"
    )


def test_without_a_domain_there_is_the_name_alone():
    six = Member("web2", bytes(15) + b"\7", 7946, {}, Status.ALIVE, bytes(6))
    assert lines(member("web1.eu", 7), six) == ["10.0.0.7 web1.eu", "::7 web2"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "[]"),
        ("127.0.0.1 localhost\n", "127.0.0.1 localhost\n[]"),
        # Without a line's end the last line would run into the block.
        ("127.0.0.1 localhost", "127.0.0.1 localhost\n[]"),
        ("a\n# BEGIN serfd hosts\n1.1.1.1 old\n# END serfd hosts\nb", "a\n[]b"),
        ("# BEGIN serfd hosts\n# END serfd hosts", "[]"),
        ("\n# BEGIN serfd hosts  \r\nx\n# END serfd hosts\n\n\n", "\n[]\n\n"),
        # Somebody else's.
        ("# BEGIN serfd other\n# END serfd other\n", "# BEGIN serfd other\n# END serfd other\n[]"),
        ("\ufeff# grüße\r\n\tx  y\r", "\ufeff# grüße\r\n\tx  y\r\n[]"),
    ],
)
def test_everything_outside_the_block_stays_as_it_is(old, new):
    own = "# BEGIN serfd hosts\n10.0.0.7 n1\n# END serfd hosts\n"
    assert made(old, member("n1")) == new.replace("[]", own)


@given(
    st.binary().filter(lambda text: b"serfd" not in text),
    st.binary().filter(lambda text: b"serfd" not in text),
)
def test_every_byte_around_the_block_is_kept_and_a_second_time_changes_nothing(before, after):
    old = before + b"\n# BEGIN serfd hosts\n1.1.1.1 old\n# END serfd hosts\n" + after
    new = block()([member("unheard-of")], ME, old)
    own = b"\n# BEGIN serfd hosts\n10.0.0.7 unheard-of\n# END serfd hosts\n"
    assert new == before + own + after
    assert block()([member("unheard-of")], ME, new) == new


@pytest.mark.parametrize(
    ("old", "told"),
    [
        ("x\n# BEGIN serfd hosts\ny\n", "found '# BEGIN serfd hosts' in line 2;"),
        ("# END serfd hosts\n", "found '# END serfd hosts' in line 1;"),
        ("# END serfd hosts\n# BEGIN serfd hosts\n", "line 1, '# BEGIN serfd hosts' in line 2;"),
        ("# BEGIN serfd hosts\n# BEGIN serfd hosts\n# END serfd hosts\n", "in line 3;"),
        ("# BEGIN serfd hosts\n# END serfd hosts\n" * 2, "in line 4;"),
    ],
)
def test_marks_that_do_not_fit_are_refused_and_told(old, told):
    with pytest.raises(CannotMake) as caught:
        made(old, member("n1"))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "a_b",
        "-a",
        "a-",
        "a..b",
        ".a",
        "",
        "a\nb",
        "#",
        "ä",
        "a" * 64,
        "a." * 130 + "a",
        "\udc80",
    ],
)
def test_what_is_no_host_name_is_left_out_and_told_once(name, caplog):
    one = block("cluster.local")
    for _ in range(3):
        text = one([member("web"), member(name)], ME, None)
        assert text.splitlines()[1:-1] == [b"10.0.0.7 web.cluster.local web"]
    assert caplog.text.count("is no host name and is left out") == 1
    # When it comes back later it is news again.
    one([member("web")], ME, None)
    one([member("web"), member(name)], ME, None)
    assert caplog.text.count("is left out") == 2


def test_an_address_that_is_none_is_left_out():
    strange = Member("n1", b"abc", 7946, {}, Status.ALIVE, bytes(6))
    assert lines(strange, member("n2")) == ["10.0.0.7 n2"]


def test_a_name_stands_for_one_address_the_first_has_it(caplog):
    assert lines(member("Web", 1), member("web", 2), domain="x") == ["10.0.0.1 Web.x Web"]
    assert "'web' is in the file already and is left out" in caplog.text


def test_nobody_takes_a_name_that_stands_outside_the_block(caplog):
    old = "127.0.0.1 localhost db.x # web\n"
    found = lines(member("localhost"), member("db"), member("web"), domain="x", old=old)
    assert found == ["10.0.0.7 localhost.x", "10.0.0.7 db", "10.0.0.7 web.x web"]
    assert "'localhost' is in the file already" in caplog.text


def test_a_block_without_a_name_is_written_only_if_it_may_be():
    with pytest.raises(CannotMake, match="no member has a name for it"):
        made("", member("_"))
    text = block(allow_empty=True)([member("_")], ME, b"x\n")
    assert text == b"x\n# BEGIN serfd hosts\n# END serfd hosts\n"


def test_the_file_follows_the_members_under_the_plugins_name(tmp_path):
    target = tmp_path / "hosts"
    target.write_text("127.0.0.1 localhost\n")
    node = Node()
    settings = hosts.Plugin.Settings(target=str(target), domain="c")
    plugin = hosts.Plugin(agent_of(node, "inner"), settings)
    plugin.start()
    node.pass_time(0)
    before = "127.0.0.1 localhost\n# BEGIN serfd inner\n10.0.0.1 me.c me\n"
    assert target.read_text() == before + "# END serfd inner\n"
    node.put(member("n2", 2))
    plugin.member_join()
    node.pass_time(0.5)
    assert target.read_text() == before + "10.0.0.2 n2.c n2\n# END serfd inner\n"
    plugin.reload(hosts.Plugin.Settings(target=str(target)))
    node.pass_time(0)
    assert "10.0.0.1 me\n10.0.0.2 n2\n" in target.read_text()


def test_two_of_them_share_a_file(tmp_path):
    target = tmp_path / "hosts"
    node = Node()
    node.put(member("db", 2, {"role": "db"}))
    for name, tags in (("all", {}), ("dbs", {"role": "db"})):
        settings = hosts.Plugin.Settings(target=str(target), domain=name, tags=tags)
        hosts.Plugin(agent_of(node, name), settings).start()
        node.pass_time(0)
    assert target.read_text() == (
        "# BEGIN serfd all\n10.0.0.2 db.all db\n10.0.0.1 me.all me\n# END serfd all\n"
        "# BEGIN serfd dbs\n10.0.0.2 db.dbs\n# END serfd dbs\n"
    )


def test_its_settings_are_checked_and_all_have_defaults():
    (loaded,) = load(Config(plugins={"hosts": {}}), Node())
    assert loaded.settings.target == "/etc/hosts"
    with pytest.raises(ConfigError, match="domain is 'a b'"):
        load(Config(plugins={"hosts": {"domain": "a b"}}), Node())
