"""Tests beside real Serf agents start their agents as those of the daemon do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "daemon"))

from processes import agents

__all__ = ["agents"]
