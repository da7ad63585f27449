"""The fixture `serf_cluster`, as a plugin's author has it: in a pytest of its own."""

import subprocess
import sys
from pathlib import Path

PLUGIN = """
from serfd.hooks import hookimpl

class Plugin:
    def __init__(self, agent):
        self.failed = []

    @hookimpl
    def member_failed(self, members):
        self.failed += [member.name for member in members]

    @hookimpl
    def user_event(self, event):
        return 1 / int(event.payload)
"""


def pytest_says(folder: Path, tests: str, *options: str) -> tuple[int, str]:
    """The exit status and the output of pytest in `folder`, called from elsewhere."""
    (folder / "plugin.py").write_text(PLUGIN)
    file = folder / "test_plugin.py"
    file.write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(file)]
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_test_has_clusters_that_load_the_files_beside_it(tmp_path):
    status, told = pytest_says(
        tmp_path,
        """
def test_two_clusters(serf_cluster):
    small, large = serf_cluster(), serf_cluster(5, seed=3, hook_timeout="5s")
    for cluster in (small, large):
        plugin = cluster.load("plugin.py")
        cluster.fail("n3")
        assert plugin.failed == ["n3"]
    assert large.simulation.replay == "SerfCluster(5, seed=3)"
""",
    )
    assert (status, "1 passed" in told) == (0, True), told


def test_a_hook_that_raises_fails_its_test_with_its_place_and_what_was_logged(tmp_path):
    status, told = pytest_says(
        tmp_path,
        """
def test_an_event(serf_cluster):
    cluster = serf_cluster(2)
    cluster.load("plugin.py")
    cluster.user_event("fine", "1")
    cluster.user_event("bad", "0")
    assert False, "not reached"
""",
    )
    assert status == 1
    assert "1 failed" in told
    assert "HookFailed: plugin plugin: user_event('bad') failed: ZeroDivisionError" in told
    assert "/plugin.py:14: ZeroDivisionError" in told
    assert ">       return 1 / int(event.payload)" in told
    assert 'cluster.user_event("bad", "0")' in told
    assert "not reached" not in told.partition("short test summary")[2]


def test_pytest_imports_next_to_nothing_of_serfd_unless_the_fixture_is_used(tmp_path):
    status, told = pytest_says(
        tmp_path,
        """
import sys

def test_imports():
    serfd = {name for name in sys.modules if name.split(".")[0] == "serfd"}
    assert serfd == {"serfd", "serfd.testing_pytest"}
    assert "twisted" not in sys.modules
""",
    )
    assert status == 0, told
