"""What all tests of whole clusters share: fifty nodes' logs are not worth their time."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def silent_nodes() -> Iterator[None]:
    """No log of any node, so that nothing is formatted; a failure is replayed with its log."""
    logger = logging.getLogger("serfd")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(before)
