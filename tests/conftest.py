"""What all tests share: Hypothesis without deadlines, and Debian's `serf` for the interop tests."""

import os
import shutil

import pytest
from hypothesis import settings

settings.register_profile("serfd", deadline=None, max_examples=100)
settings.load_profile("serfd")


def require_serf() -> str:
    """The path of a real Serf agent; without one the test is skipped, or fails if it must run."""
    found = shutil.which("serf")
    if found is not None:
        return found
    reason = "needs a real Serf agent, `serf`: apt-get install serf"
    if os.environ.get("SERFD_INTEROP") == "required":
        pytest.fail(f"{reason} (SERFD_INTEROP=required)", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `interop` need a real Serf agent."""
    if item.get_closest_marker("interop"):
        require_serf()


@pytest.fixture(scope="session")
def serf_binary() -> str:
    """The path of a real Serf agent."""
    return require_serf()
