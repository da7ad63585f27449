"""What several tests of the wire need."""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest


@pytest.fixture
def peak_below() -> Callable[[int], AbstractContextManager[None]]:
    """Check that what happens inside allocates at most so many bytes at any moment."""

    @contextmanager
    def measure(limit: int) -> Iterator[None]:
        tracemalloc.start()
        try:
            yield
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < limit

    return measure
