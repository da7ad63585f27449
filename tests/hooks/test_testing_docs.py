"""docs/testing-plugins.md says what is true: its examples are run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

from serfd.testing import SerfCluster

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/testing-plugins.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)


def test_the_examples_pass(tmp_path):
    (tmp_path / "notebook.py").write_text((Path(__file__).parent / "notebook.py").read_text())
    for number, example in enumerate(EXAMPLES):
        (tmp_path / f"test_example_{number}.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    count = sum(example.count("def test_") for example in EXAMPLES)
    assert f"{count} passed" in done.stdout, done.stdout + done.stderr


class Ping:
    def __init__(self, agent):
        agent.later(3, lambda: agent.metrics.count("sent"))


def test_figures_of_a_plugin_are_where_the_page_says(serf_cluster):
    (name,) = re.findall(r'`metrics.counters\["(.*?)"\]`', DOCS)
    cluster = serf_cluster(1)
    cluster.load(Ping)
    cluster.run(10)
    assert cluster.metrics.counters[name] == 1


def test_everything_a_cluster_can_do_is_there():
    made = vars(SerfCluster) | {"simulation": None}
    public = {name for name in made if not name.startswith("_")} - {"close"}
    table = DOCS.partition("\n## What can be done\n")[2].partition("\n## ")[0]
    table += DOCS.partition("\n## When something goes wrong\n")[2]
    missing = {name for name in public if not re.search(rf"\b{name}\b", table)}
    assert missing == set()
