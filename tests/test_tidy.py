"""What no tool knows: the example configuration is complete, and the project's texts are true."""

import ast
import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import serfd
from serfd import config
from serfd.config import Config, GossipConfig, MdnsConfig, RpcTlsConfig, load
from serfd.hooks import loader
from serfd.metrics import Metrics

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "conf" / "serfd.toml"
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")])

# In the example these are not at their default, so that it works on every machine.
NOT_DEFAULT = {"bind"}

# Modules without a test module of their name: what they say is tested where it is used.
TESTED_ELSEWHERE = {
    "serfd/errors.py",
    "serfd/serf/common.py",
}

_SETTING = re.compile(r"#?([a-z0-9_]+) = ")
_COMMENTED_OUT = re.compile(r"^#(?=[a-z0-9_]+ = )", re.MULTILINE)


def project_files() -> Iterator[Path]:
    """Every file that is part of the project, nothing that tools make."""
    made = {"__pycache__", "build", "dist", "htmlcov"}
    for top in ROOT.iterdir():
        if top.name in made or (top.name.startswith(".") and top.name not in {".ci", ".gitignore"}):
            continue
        for path in [top] if top.is_file() else top.rglob("*"):
            if path.is_file() and not made.intersection(path.parts):
                yield path


# conf/serfd.toml


def uncommented() -> str:
    """The example with every setting at its default switched on."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    at_default = [line for line in lines if line.partition(" = ")[0] not in NOT_DEFAULT]
    return _COMMENTED_OUT.sub("", "\n".join(at_default))


def comments() -> dict[str, str]:
    """What stands above each setting of the example, on one line; of a table's too."""
    found: dict[str, str] = {}
    table, paragraph = "", ""
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            paragraph += line[1:]
        elif setting := _SETTING.match(line):
            found.setdefault(f"{table}{setting[1]}", paragraph.strip())
        elif line.startswith("["):
            found[line.strip("[]")] = paragraph.strip()
            table = line.strip("[]") + "."
        else:
            paragraph = ""
    return found


def docstrings(settings: type) -> dict[str, str]:
    """The text below each attribute of a class in config.py, on one line."""
    module = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    body = next(
        node.body
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name == settings.__name__
    )
    return {
        attribute.target.id: " ".join(text.value.value.split())
        for attribute, text in pairwise(body)
        if isinstance(attribute, ast.AnnAssign)
        and isinstance(attribute.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def test_the_example_with_every_setting_switched_on_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "serfd.toml"
    path.write_text(uncommented(), encoding="utf-8")
    assert load([path]) == Config()


def test_the_example_as_it_is_differs_from_the_default_in_the_bind_address_only() -> None:
    changed = {"bind": "127.0.0.1:7946"}
    assert changed.keys() == NOT_DEFAULT
    assert load([EXAMPLE]) == msgspec.structs.replace(Config(), **changed)


def test_the_example_names_every_setting() -> None:
    table = tomllib.loads(uncommented()) | dict.fromkeys(NOT_DEFAULT)
    assert table.keys() == set(Config.__struct_fields__) - {"plugins"}
    assert table["gossip"].keys() == set(GossipConfig.__struct_fields__)


@pytest.mark.parametrize(
    ("settings", "prefix"),
    [
        (Config, ""),
        (GossipConfig, "gossip."),
        (MdnsConfig, "mdns."),
        (RpcTlsConfig, "rpc_tls."),
    ],
    ids=["Config", "[gossip]", "[mdns]", "[rpc_tls]"],
)
def test_the_example_says_of_each_setting_what_the_code_says(settings: type, prefix: str) -> None:
    said, meant = comments(), docstrings(settings)
    fields = set(settings.__struct_fields__)  # type: ignore[attr-defined]
    assert meant.keys() == fields
    for name in sorted(fields - {"plugins"}):
        assert said[prefix + name].startswith(meant[name]), name


def test_the_example_shows_the_script_plugin_with_all_its_settings() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    start = lines.index("#   [plugins.script]")
    shown = tomllib.loads("\n".join(line.removeprefix("#") for line in lines[start:]))
    table = shown["plugins"]["script"]
    node: Any = SimpleNamespace(metrics=Metrics())
    made = loader.load(Config(plugins={"script": table}), agent=node)
    settings = type(made[0].plugin).Settings  # type: ignore[attr-defined]
    assert table.keys() == set(settings.__struct_fields__)
    read = msgspec.convert(table, settings, dec_hook=config._duration)
    default = settings()
    assert msgspec.structs.replace(read, handlers=default.handlers) == default


# The code


def test_every_module_has_a_test_module_of_its_name() -> None:
    tested = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    modules = [p for p in (ROOT / "serfd").rglob("*.py") if not p.name.startswith("__")]
    untested = {
        str(path.relative_to(ROOT)) for path in modules if f"test_{path.name}" not in tested
    }
    assert untested == TESTED_ELSEWHERE


@pytest.mark.parametrize("path", PLUGINS, ids=[path.stem for path in PLUGINS])
def test_a_plugin_imports_nothing_of_serfd_but_the_hooks(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a plugin is one file: it has no siblings"
            assert node.module is not None
            imported.add(node.module)
    assert {name for name in imported if name.split(".")[0] == "serfd"} == {"serfd.hooks"}
    assert not imported & {other.stem for other in PLUGINS}


# The texts


def test_the_changelog_has_an_entry_for_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{serfd.__version__}]" in changelog


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    machine = re.compile(rb"/(?:work|farm|root|Users|home/[a-z]+)/|/tmp/(?:venv|h)/")
    found = [
        f"{path.relative_to(ROOT)}: {hit[0].decode()}"
        for path in project_files()
        for hit in machine.finditer(path.read_bytes())
    ]
    assert found == []


def anchors(page: Path) -> set[str]:
    """What `#…` may be appended to a link to this page; as web pages of repositories make it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_to_files_and_headings_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{target}: there is no such file"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{target}: there is no such heading"
