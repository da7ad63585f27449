import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from followed_files import Node, agent_of, ended, member
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from serfd.config import Seconds
from serfd.hooks import CannotMake, FileSettings, FollowedFile
from serfd.hooks.followed_file import MAKE_TIME_MAX, RELOAD_RETRY_MAX, RETRY, _beside
from serfd.logs import details_of
from serfd.serf.events import Status

CHECK = ("check", "{}")
RELOAD = ("reload", "now")


def names(members, me, old) -> bytes:
    return "".join(f"{each.name}\n" for each in members).encode()


class Followed:
    """A file of member names."""

    def __init__(self, folder: Path, make=names, **settings) -> None:
        self.target = folder / "file.conf"
        self.node = Node()
        self.made = 0
        self.make = make
        self.settings = {"target": str(self.target), **settings}
        self.file = self.another()

    def another(self) -> FollowedFile:
        return FollowedFile(agent_of(self.node, "web"), self.new_settings(), self._make)

    def _make(self, members, me, old) -> bytes:
        self.made += 1
        return self.make(members, me, old)

    def new_settings(self, **changed) -> FileSettings:
        return FileSettings(**{**self.settings, **changed})

    def start(self) -> None:
        self.file.start()
        self.node.pass_time(0)

    def change(self, *members) -> None:
        self.node.put(*members)
        self.file.changed()

    def settle(self, *members) -> None:
        self.change(*members)
        self.node.pass_time(0.5)

    @property
    def content(self) -> str | None:
        return self.target.read_text() if self.target.exists() else None

    @property
    def others(self) -> set[str]:
        """Everything in the directory that is not the file."""
        return {path.name for path in self.target.parent.iterdir()} - {self.target.name}


@pytest.fixture
def followed(tmp_path):
    return lambda make=names, **settings: Followed(tmp_path, make, **settings)


# When it is made


def test_at_the_start_the_file_is_written_at_once(followed):
    one = followed()
    one.start()
    assert (one.content, one.made) == ("me\n", 1)


def test_changes_are_waited_for_until_there_are_none_for_a_while(followed):
    one = followed()
    one.start()
    for number in range(5):
        one.change(member(f"n{number}"))
        one.node.pass_time(0.4)
    assert (one.content, one.made) == ("me\n", 1)
    one.node.pass_time(0.1)
    assert (one.content, one.made) == ("me\nn0\nn1\nn2\nn3\nn4\n", 2)


def test_but_not_for_longer_than_wait_max(followed):
    one = followed(wait=Seconds(1), wait_max=Seconds(3))
    one.start()
    for number in range(24):
        assert one.made == 1
        one.change(member(f"n{number:02}"))
        one.node.pass_time(0.125)
    assert one.made == 2
    # The next wait begins with the next change.
    one.node.pass_time(10)
    made = one.made
    one.change(member("later"))
    one.node.pass_time(0.875)
    assert one.made == made
    one.node.pass_time(0.125)
    assert one.made == made + 1


def test_content_that_is_the_same_is_neither_written_nor_reloaded(followed):
    one = followed(check=CHECK, reload=RELOAD)
    one.target.write_text("me\n")
    before = one.target.stat()
    one.start()
    one.settle(member("gone", status=Status.LEFT))
    assert one.node.programs() == []
    assert one.target.stat() == before
    assert one.others == set()


def test_members_are_those_of_the_statuses_and_tags_by_name(followed):
    one = followed(statuses=("alive", "failed"), tags={"role": "web|api"})
    one.node.put(
        member("b", tags={"role": "web"}, status=Status.FAILED),
        member("a", tags={"role": "api"}),
        member("c", tags={"role": "web"}, status=Status.LEFT),
        member("d", tags={"role": "db"}),
    )
    one.start()
    assert one.content == "a\nb\n"


def test_a_member_that_fails_is_out_and_back_when_it_is_back(followed):
    one = followed()
    one.start()
    one.settle(member("n2"))
    assert one.content == "me\nn2\n"
    one.settle(member("n2", status=Status.FAILED))
    assert one.content == "me\n"
    one.settle(member("n2"))
    assert one.content == "me\nn2\n"


def test_a_file_about_nobody_is_not_written_and_that_is_told_once(followed, caplog):
    one = followed(tags={"role": "web"}, reload=RELOAD)
    one.node.answers_at_once = ended()
    web = {"role": "web"}
    one.target.write_text("old\n")
    one.start()
    one.settle(member("n3"))
    assert one.content == "old\n"
    assert caplog.text.count("no member is left for it") == 1
    one.settle(member("n2", tags=web))
    assert one.content == "n2\n"
    one.settle(member("n2", tags=web, status=Status.FAILED))
    one.settle(member("n4"))
    assert one.content == "n2\n"
    assert caplog.text.count("no member is left for it") == 2


def test_with_allow_empty_it_is_written(followed):
    one = followed(tags={"role": "web"}, allow_empty=True)
    one.target.write_text("old\n")
    one.start()
    assert one.content == ""


def test_new_settings_hold_at_once(followed, tmp_path):
    one = followed()
    one.start()
    one.file.take(one.new_settings(target=str(tmp_path / "new")), lambda *_: b"new")
    one.node.pass_time(0)
    assert (tmp_path / "new").read_bytes() == b"new"


# What is made of errors


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CannotMake("no tag"), "no tag"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (ZeroDivisionError("by zero"), "Traceback"),
    ],
)
def test_what_cannot_be_made_leaves_the_old_file_and_is_tried_again(followed, caplog, error, told):
    broken = True

    def make(members, me, old):
        if broken:
            raise error
        return b"good\n"

    one = followed(make)
    one.target.write_text("old\n")
    one.start()
    assert one.content == "old\n"
    assert told in caplog.text + "".join(map(details_of, caplog.records))
    one.node.pass_time(RETRY - 1)
    assert one.made == 1
    one.node.pass_time(1)
    assert one.made == 2
    broken = False
    one.settle()
    assert one.content == "good\n"
    one.node.pass_time(10 * RETRY)
    assert one.made == 3


def test_what_takes_too_long_to_make_is_given_up_and_not_begun_a_second_time(followed, caplog):
    one = followed()
    one.node.holds_threads = True
    one.start()
    ((path, find_path),) = one.node.held
    path.callback(find_path())
    one.node.pass_time(MAKE_TIME_MAX)
    assert "longer than 20 s" in caplog.text
    (_, (_, make)) = one.node.held
    one.node.holds_threads = False
    one.settle()
    assert "still goes on" in caplog.text
    assert (one.made, one.content) == (0, None)
    make()  # the thread ends after all
    one.settle()
    assert (one.made, one.content) == (2, "me\n")


def test_the_check_sees_the_new_file_in_the_same_directory_before_it_is_in_place(followed):
    one = followed(check=("haproxy", "-c", "-f{}"), check_timeout=Seconds(3))
    one.target.write_text("old\n")
    one.start()
    program = one.node.program()
    path = Path(program.argv[2].removeprefix("-f"))
    assert program.argv[:2] == ["haproxy", "-c"]
    assert (path.parent, path.read_text()) == (one.target.parent, "me\n")
    assert program.timeout == 3
    assert one.content == "old\n"
    program.done.callback(ended())
    assert one.content == "me\n"
    assert one.others == set()


def test_no_glob_of_a_directory_of_configurations_finds_the_new_file_too_early(followed):
    one = followed(check=CHECK)
    one.start()
    (name,) = one.others
    assert name.startswith(".")
    assert Path(name).suffix == ".tmp"


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (
            ended(1, b"".join(b"line %d\n" % n for n in range(25))),
            "its check failed: exit status 1",
        ),
        (ended(0, timed_out=True), "its check failed: no end after 10 s"),
    ],
)
def test_a_refused_file_goes_and_the_old_one_stays(followed, caplog, result, told):
    one = followed(check=CHECK, reload=RELOAD)
    one.target.write_text("old\n")
    one.start()
    one.node.program().done.callback(result)
    assert (one.content, one.others) == ("old\n", set())
    assert told in caplog.text
    if result.stdout:
        assert "(5 lines are left out)" in caplog.text
        assert "check: line 24" in caplog.text
        assert "line 4\n" not in caplog.text
    # Again by itself, and at the next change.
    one.node.pass_time(RETRY)
    one.node.program().done.callback(result)
    one.settle(member("n2"))
    one.node.program().done.callback(ended())
    assert one.content == "me\nn2\n"
    assert one.node.program().argv == list(RELOAD)


def test_a_check_that_cannot_be_run_is_an_error_that_is_told(followed, caplog):
    one = followed(check=CHECK)
    one.start()
    one.node.program().done.errback(OSError(2, "No such file or directory"))
    assert "No such file or directory" in caplog.text
    assert (one.content, one.others) == (None, set())


def test_after_a_change_the_program_is_reloaded_once(followed, caplog):
    caplog.set_level("INFO")
    one = followed(reload=RELOAD, reload_timeout=Seconds(7))
    one.start()
    program = one.node.program()
    assert (program.argv, program.timeout) == (list(RELOAD), 7)
    assert one.content == "me\n"
    program.done.callback(ended())
    one.node.pass_time(1000)
    assert one.node.programs() == []
    assert one.others == set()
    assert "reloaded" in caplog.text


def test_changes_during_a_reload_give_one_more(followed):
    one = followed(reload=RELOAD)
    one.start()
    first = one.node.program()
    for number in range(3):
        one.settle(member(f"n{number}"))
    assert (one.node.programs(), one.content) == ([], "me\n")
    first.done.callback(ended())
    one.node.pass_time(0)
    assert one.content == "me\nn0\nn1\nn2\n"
    one.node.program().done.callback(ended())
    one.node.pass_time(1000)
    assert one.node.programs() == []


def test_a_reload_that_fails_is_tried_again_and_again_with_longer_waits(followed, caplog):
    one = followed(reload=RELOAD)
    one.start()
    waits = []
    for _ in range(9):
        one.node.program().done.callback(ended(1, b"unit is broken\n"))
        began = one.node.reactor.seconds()
        while not one.node.started:
            one.node.pass_time(1)
        waits.append(one.node.reactor.seconds() - began)
    assert waits == [1, 2, 4, 8, 16, 32, RELOAD_RETRY_MAX, RELOAD_RETRY_MAX, RELOAD_RETRY_MAX]
    assert "reload: unit is broken" in caplog.text
    one.node.program().done.callback(ended())
    one.node.pass_time(1000)
    assert one.node.programs() == []
    # The next time it begins with short waits again.
    one.settle(member("n2"))
    one.node.program().done.callback(ended(1))
    one.node.pass_time(1)
    assert one.node.program().argv == list(RELOAD)


def test_a_reload_that_is_due_is_tried_even_if_the_next_content_is_refused(followed):
    one = followed(check=CHECK, reload=RELOAD)
    one.start()
    one.node.program().done.callback(ended())
    one.node.program().done.callback(ended(1))
    one.settle(member("n2"))
    one.node.program().done.callback(ended(1))  # the check
    assert one.node.program().argv == list(RELOAD)


def test_a_serfd_that_comes_after_a_crash_makes_up_for_the_reload(followed):
    one = followed(reload=RELOAD)
    one.start()
    one.node.program()  # it never ends, serfd does
    later = one.another()
    later.start()
    one.node.pass_time(0)
    one.node.program().done.callback(ended())
    assert one.others == set()
    last = one.another()
    last.start()
    one.node.pass_time(0)
    assert one.node.programs() == []


def test_without_a_reload_in_the_new_settings_none_is_tried_any_more(followed):
    one = followed(reload=RELOAD)
    one.start()
    one.node.program().done.callback(ended(1))
    one.file.take(one.new_settings(reload=()), names)
    one.node.pass_time(1000)
    assert one.node.programs() == []


def test_a_text_is_for_the_shell_and_the_path_in_it_is_quoted(tmp_path):
    folder = tmp_path / "with space"
    folder.mkdir()
    one = Followed(folder, check="test -s {} && true", reload="kill -HUP $(cat pid)")
    one.start()
    check = one.node.program()
    assert check.argv[:2] == ["/bin/sh", "-c"]
    assert check.argv[2].startswith(f"test -s '{folder}/.file.conf.")
    check.done.callback(ended())
    assert one.node.program().argv == ["/bin/sh", "-c", "kill -HUP $(cat pid)"]


# The end


def test_stopping_waits_for_what_is_under_way_and_begins_nothing_more(followed):
    one = followed(reload=RELOAD)
    one.start()
    one.settle(member("n2"))
    stopped = Deferred.fromCoroutine(one.file.stop())
    assert not stopped.called
    one.node.program().done.callback(ended(1))
    assert stopped.called
    one.node.pass_time(1000)
    assert (one.node.programs(), one.content) == ([], "me\n")


def test_stopping_with_nothing_under_way_is_done_at_once(followed):
    one = followed()
    one.start()
    one.change(member("n2"))
    assert Deferred.fromCoroutine(one.file.stop()).called
    one.node.pass_time(1000)
    assert one.content == "me\n"


def test_a_stop_whose_time_is_up_ends_the_check_and_leaves_no_new_file(followed, caplog):
    one = followed(check=CHECK)
    one.start()
    stopped = Deferred.fromCoroutine(one.file.stop())
    stopped.addErrback(lambda _: None)
    check = one.node.program()
    stopped.cancel()
    assert isinstance(check.done.result, Failure | None)
    assert check.done.called
    one.node.pass_time(1000)
    assert (one.content, one.others) == (None, set())
    assert caplog.text == ""


# The file


def test_a_new_file_has_the_mode_of_the_settings(followed):
    one = followed(mode="0640")
    one.start()
    assert stat.S_IMODE(one.target.stat().st_mode) == 0o640


def test_an_old_one_keeps_its_mode_and_owner(followed):
    one = followed()
    one.target.write_text("old\n")
    one.target.chmod(0o604)
    if os.getuid() == 0:
        os.chown(one.target, 1234, 2345)
    before = one.target.stat()
    one.start()
    after = one.target.stat()
    assert one.content == "me\n"
    for name in ("st_mode", "st_uid", "st_gid"):
        assert getattr(after, name) == getattr(before, name)
    assert after.st_ino != before.st_ino
    assert after.st_mtime_ns >= before.st_mtime_ns


def test_a_link_stays_and_what_it_leads_to_is_replaced(followed, tmp_path):
    one = followed()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old\n")
    one.target.symlink_to("real/file")
    one.start()
    assert one.target.is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "me\n"
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["file"]


def test_what_a_killed_serfd_has_left_is_in_nobodys_way(followed):
    one = followed()
    left = Path(_beside(str(one.target), "web", "tmp"))
    left.write_text("half")
    one.start()
    assert (one.content, one.others) == ("me\n", set())


def test_a_file_that_somebody_else_changes_meanwhile_is_made_again(followed):
    one = followed(lambda members, me, old: (old or b"") + b"more\n", check=CHECK)
    one.target.write_text("old\n")
    one.start()
    one.target.write_text("new\n")
    one.node.program().done.callback(ended())
    assert (one.content, one.others) == ("new\n", set())
    one.node.pass_time(5)
    one.node.program().done.callback(ended())
    assert one.content == "new\nmore\n"


def test_a_directory_that_is_not_there_is_told_of(followed, caplog, tmp_path):
    one = followed(target=str(tmp_path / "none" / "file"))
    one.start()
    assert "No such file or directory" in caplog.text


# What a file is like that cannot be replaced, for the shell; in mounts of its own.
MOUNTED_BY_ITSELF = 'mount --bind "$1/other" "$1/etc/file.conf"'
IN_A_READ_ONLY_DIRECTORY = (
    'mount --bind "$1/etc" "$1/etc" && mount -o remount,bind,ro "$1/etc" && ' + MOUNTED_BY_ITSELF
)
CHILD = """
import os, sys, pathlib
from test_followed_file import Followed, ended
settings = {"check": "true {}"} if sys.argv[2] == "checked" else {}
one = Followed(pathlib.Path(sys.argv[1]) / "etc", **settings)
inode = one.target.stat().st_ino
one.node.answers_at_once = ended()
one.start()
assert one.target.stat().st_ino == inode
print(one.content, one.others)
"""


def in_child(folder: Path, *argv: str, checked: bool = False) -> str:
    """What a process prints that lets the file in `etc` follow."""
    (folder / "etc").mkdir()
    for name in ("etc/file.conf", "other"):
        (folder / name).write_text("an old and longer content\n")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [*argv, sys.executable, "-c", CHILD, str(folder), "checked" if checked else ""],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    return done.stdout


def mounted(folder: Path, mounts: str, *, checked: bool = False) -> str:
    script = f'{mounts} && shift && exec "$@"'
    return in_child(
        folder, "unshare", "-rm", "sh", "-ec", script, "sh", str(folder), checked=checked
    )


@pytest.mark.parametrize("checked", [False, True])
def test_a_file_that_is_mounted_by_itself_is_written_in_place(tmp_path, checked):
    assert mounted(tmp_path, MOUNTED_BY_ITSELF, checked=checked) == "me\n set()\n"


def test_so_is_one_in_a_read_only_directory(tmp_path):
    assert mounted(tmp_path, IN_A_READ_ONLY_DIRECTORY) == "me\n set()\n"


def test_but_not_if_it_must_be_checked_before(tmp_path):
    text = mounted(tmp_path, IN_A_READ_ONLY_DIRECTORY, checked=True)
    assert text == "an old and longer content\n set()\n"


def test_one_whose_owner_cannot_be_kept_is_written_in_place(tmp_path, monkeypatch):
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    monkeypatch.chdir("/")
    if subprocess.run([*nobody, sys.executable, "-c", "import serfd"]).returncode != 0:
        pytest.skip("cannot become somebody else, or has no Python then")
    with tempfile.TemporaryDirectory() as name:  # where others may go too
        folder = Path(name)
        folder.chmod(0o755)
        script = 'chmod 777 "$1/etc"; chmod 666 "$1/etc/file.conf"; shift; exec "$@"'
        text = in_child(folder, "sh", "-ec", script, "sh", name, *nobody)
        assert text == "me\n set()\n"
        assert (folder / "etc/file.conf").stat().st_uid == 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"target": "file"}, "expected a path that begins with '/'"),
        ({"tags": {"role": "("}}, "the pattern of 'role'"),
        ({"wait": Seconds(6)}, "wait must not be longer than wait_max"),
        ({"check_timeout": Seconds(0)}, "must be longer than 0"),
        ({"check": ("haproxy", "-c")}, "check must have {}"),
        ({"check": "haproxy -c"}, "check must have {}"),
        ({"mode": "0999"}, "expected three octal digits"),
    ],
)
def test_settings_that_cannot_work_are_refused(changed, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        FileSettings(**{"target": "/file", **changed})
