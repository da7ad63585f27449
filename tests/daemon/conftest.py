"""Every test of the real program starts its agents with this fixture."""

from processes import agents

__all__ = ["agents"]
