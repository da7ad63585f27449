"""What all tests share: Hypothesis without deadlines, and other people's programs."""

import pytest
from hypothesis import settings
from programs import require

settings.register_profile("serfd", deadline=None, max_examples=100)
settings.load_profile("serfd")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `interop` need the programs it names, or else a real Serf agent."""
    if marker := item.get_closest_marker("interop"):
        for program in marker.args or ("serf",):
            require(program)


@pytest.fixture(scope="session")
def serf_binary() -> str:
    """The path of a real Serf agent."""
    return require("serf")
