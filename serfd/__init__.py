"""serfd: a cluster agent that speaks Serf and runs plugins in-process."""

__version__ = "0.1.0"
