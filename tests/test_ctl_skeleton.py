"""`serfctl plugin new`: what it writes is a plugin whose tests pass, and find mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest
from serfctl_runs import no_environment, run

__all__ = ["no_environment", "run"]


def pytest_of(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["notes", "my-plugin", "3_plugins"])
def test_the_tests_of_a_new_plugin_pass(run, tmp_path, name):
    code, out, err = run("plugin", "new", "-dir", str(tmp_path), name)
    files = [tmp_path / f"{name}.py", tmp_path / f"test_{name}.py"]
    assert (code, err) == (0, "")
    assert sorted(tmp_path.iterdir()) == files
    assert out.startswith(f"Wrote {files[0]} and {files[1]}.\n")
    assert f"\n    pytest {files[1]}\n" in out
    assert f'\n    plugin_dirs = ["{tmp_path}"]\n\n    [plugins.{name}]\n' in out
    assert "@" not in out + "".join(file.read_text() for file in files).replace("@hookimpl", "")
    done = pytest_of(tmp_path)
    assert "3 passed" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("self._failed.append(member.name)", "pass"),
        ("maxlen=settings.remembered", "maxlen=7"),
        ('if query.name == "notes"', "if True"),
        ("in members:", "in member:"),
    ],
)
def test_its_tests_find_what_is_broken(run, tmp_path, right, wrong):
    run("plugin", "new", "notes", "-dir", str(tmp_path))
    plugin = tmp_path / "notes.py"
    text = plugin.read_text()
    assert right in text
    plugin.write_text(text.replace(right, wrong))
    done = pytest_of(tmp_path)
    assert done.returncode == 1
    assert "failed" in done.stdout


def test_without_a_directory_it_is_the_working_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("plugin", "new", "notes")
    assert code == 0
    assert out.startswith("Wrote notes.py and test_notes.py.\n")
    assert f'plugin_dirs = ["{tmp_path}"]' in out
    assert {path.name for path in tmp_path.iterdir()} == {"notes.py", "test_notes.py"}


@pytest.mark.parametrize("there", ["notes.py", "test_notes.py"])
def test_nothing_is_written_over_and_then_nothing_at_all(run, tmp_path, there):
    (tmp_path / there).write_text("mine")
    code, out, err = run("plugin", "new", "-dir", str(tmp_path), "notes")
    assert (code, out) == (1, "")
    assert err == f"{tmp_path / there} is there already; nothing was written\n"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["../notes", "no tes", "nötes", "", "a.b"])
def test_a_name_that_no_table_could_have_is_refused(run, tmp_path, name):
    code, out, err = run("plugin", "new", "-dir", str(tmp_path), name)
    assert (code, out) == (1, "")
    assert err == f"{name!r} is not a plugin's name: expected letters, digits, '_' and '-'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", ["plugin", "plugin new", "plugin old notes", "plugin new a b"])
def test_wrong_arguments_are_told_with_the_help(run, argv):
    code, out, err = run(*argv.split())
    assert (code, out) == (1, "")
    assert err.startswith("new and a name must be specified.\n\nUsage: serfctl plugin")


def test_a_directory_that_cannot_be_written_is_told(run, tmp_path):
    missing = tmp_path / "missing"
    code, _, err = run("plugin", "new", "-dir", str(missing), "notes")
    assert code == 1
    assert err == f"Cannot write {missing}/notes.py: No such file or directory\n"
