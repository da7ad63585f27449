"""`python -m serfd.sim`: run clusters in which things go wrong, and tell what happened."""

import argparse
import logging
import sys
import time

from serfd.config import PROFILES
from serfd.sim.scenario import Outcome, play
from serfd.sim.story import Story

SEED_DEFAULT = 1
SEEDS_NODES, SEEDS_SECONDS = 16, 90.0
"""Size and length of each run when there are many."""
NODES, SECONDS = 50, 120.0


def main(arguments: list[str] | None = None) -> int:
    """Run as the command line says; 0 if every check held, 1 if one did not."""
    options = _options().parse_args(arguments)
    if not options.log:
        logging.getLogger("serfd").setLevel(logging.CRITICAL + 1)
    else:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s %(message)s", stream=sys.stdout)
    if options.seeds is None:
        seed = SEED_DEFAULT if options.seed is None else options.seed
        outcome = _play(options, seed, options.nodes or NODES, options.seconds or SECONDS)
        _tell(outcome)
        return 1 if outcome[0].failure is not None else 0
    failed = 0
    began = time.process_time()
    for seed in options.seeds:
        outcome = _play(
            options, seed, options.nodes or SEEDS_NODES, options.seconds or SEEDS_SECONDS
        )
        failed += outcome[0].failure is not None
        _tell_briefly(seed, outcome)
    cpu = time.process_time() - began
    print(f"{len(options.seeds)} seeds, {failed} failed, {cpu:.0f} s of CPU")
    return 1 if failed else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serfd.sim",
        description="Simulated clusters in which things go wrong, as the seed has it.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, help=f"what is drawn; {SEED_DEFAULT} if not given")
    which.add_argument(
        "--seeds", type=_seeds, metavar="A-B|COUNT", help="one short run for each of these"
    )
    parser.add_argument("--nodes", type=_positive, help="how many nodes")
    parser.add_argument("--seconds", type=_seconds, help="virtual time in which things go wrong")
    parser.add_argument(
        "--loss", type=_share, default=0.0, help="share of packets lost all the time, 0 to 0.5"
    )
    parser.add_argument("--profile", choices=sorted(PROFILES), default="lan", help="timings")
    parser.add_argument("--log", action="store_true", help="print the nodes' own logs, too")
    return parser


def _play(
    options: argparse.Namespace, seed: int, nodes: int, seconds: float
) -> tuple[Outcome, float]:
    replay = f"python -m serfd.sim --nodes {nodes} --seed {seed} --seconds {seconds:g}"
    if options.loss:
        replay += f" --loss {options.loss:g}"
    if options.profile != "lan":
        replay += f" --profile {options.profile}"
    began = time.process_time()
    outcome = play(
        seed,
        nodes=nodes,
        seconds=seconds,
        loss=options.loss,
        profile=options.profile,
        replay=replay,
    )
    return outcome, time.process_time() - began


def _tell(played: tuple[Outcome, float]) -> None:
    """Print the whole story of one run."""
    outcome, cpu = played
    cluster = outcome.cluster
    story = Story.of(cluster.history)
    for at, line in story.lines:
        print(f"{at:9.3f}  {line}")
    print()
    for kind in ("suspicion", "failure"):
        wrong = story.wrong.get(kind, 0)
        print(f"{kind}: {story.accusations.get(kind, 0)} episodes, {wrong} of healthy members")
    print(f"incarnations raised: {story.refutations}")
    print(
        f"all listed all {outcome.joined_in:.2f} s after joining; all agreed again "
        f"{outcome.agreed_in:.1f} s after the last fault ({outcome.agreed_bound:.0f} s allowed)"
    )
    lived = sum(
        (cluster.now if process.end is None else process.ended_at) - process.started_at
        for process in cluster.everyone
    )
    print(
        f"{cluster.packets} packets, {cluster.bytes} bytes, {lived:.0f} node-seconds in "
        f"{cpu:.2f} s of CPU: {lived / cpu:.0f} a second; trace {cluster.trace}"
    )
    if outcome.failure is None:
        print("all checks hold")
    else:
        print(f"FAILED: {outcome.failure}\nagain: {cluster.replay} --log")


def _tell_briefly(seed: int, played: tuple[Outcome, float]) -> None:
    """Print one line for a run that went well, and how to see one again that did not."""
    outcome, cpu = played
    if outcome.failure is not None:
        print(f"seed {seed} FAILED: {outcome.failure}\n  again: {outcome.cluster.replay}")
        return
    print(
        f"seed {seed}: {len(outcome.faults)} faults, agreed after {outcome.agreed_in:.1f} s of "
        f"{outcome.agreed_bound:.0f} s, {outcome.cluster.packets} packets, {cpu:.2f} s of CPU"
    )


def _seeds(text: str) -> range:
    first, dash, last = text.partition("-")
    try:
        seeds = range(int(first), int(last) + 1) if dash else range(1, int(first) + 1)
    except ValueError:
        seeds = range(0)
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count or a range like 1-200")
    return seeds


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 2 <= number <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of nodes, expected 2 to 1000")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a span of time in seconds")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 0.5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of packets, expected 0 to 0.5")
    return number


if __name__ == "__main__":
    sys.exit(main())
