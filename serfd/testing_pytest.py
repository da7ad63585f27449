"""pytest's plugin: the fixture `serf_cluster` (docs/testing-plugins.md).

pytest imports this at every start, wherever serfd is installed: all else is imported by the
fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from serfd.testing import SerfCluster


@pytest.fixture
def serf_cluster(request: pytest.FixtureRequest) -> Iterator[Callable[..., SerfCluster]]:
    """Make simulated clusters: `serf_cluster(5)` has the nodes n1 to n5, all joined.

    The arguments are those of `serfd.testing.SerfCluster`. At the test's end plugins are stopped.
    """
    from serfd.testing import SerfCluster

    with ExitStack() as clusters:

        def make(size: int = 3, **options: Any) -> SerfCluster:
            options.setdefault("folder", request.path.parent)
            return clusters.enter_context(SerfCluster(size, **options))

        yield make
