"""docs/serf-compared.md names all there is, and what it names is there."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from serfd import ctl, serf_config
from serfd.config import Config, GossipConfig, MdnsConfig, RpcTlsConfig
from serfd.daemon import OPTIONS
from serfd.rpc.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serf-compared.md"
TEXT = PAGE.read_text(encoding="utf-8")

TABLES = {"gossip": GossipConfig, "mdns": MdnsConfig, "rpc_tls": RpcTlsConfig}
"""Those of the settings that are tables of settings."""

_CELLS = re.compile(r"(?<!\\)\|")
_CODE = re.compile(r"`([^`]+)`")


def rows(heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, without their heads."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        lines = [_CELLS.split(line)[1:-1] for line in table.splitlines()]
        assert set("".join(lines[1])) == {"-"}
        found += lines[2:]
    return [[cell.strip() for cell in row] for row in found]


def names(cells: Iterable[str]) -> set[str]:
    """What stands there as code."""
    return {name for cell in cells for name in _CODE.findall(cell)}


def test_every_row_has_a_cell_for_each_column() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE)
    assert tables
    for table in tables:
        lines = table.splitlines()
        wrong = [line for line in lines if len(_CELLS.split(line)) != len(_CELLS.split(lines[0]))]
        assert wrong == []


def test_every_command_of_the_rpc_has_a_row_and_every_row_a_command() -> None:
    firsts = [first for first, *_ in rows("RPC")]
    commands = [first.strip("`") for first in firsts if re.fullmatch("`[a-z-]+`", first)]
    assert sorted(commands) == sorted(COMMANDS)


def test_every_command_of_serfctl_has_a_row_with_its_options_and_every_row_a_command() -> None:
    agents = {option.name for option in ctl._AGENT}
    expected = {
        name: {f"-{option.name}" for option in command.options if option.name not in agents}
        for name, command in ctl.COMMANDS.items()
    }
    found: dict[str, set[str]] = {}
    for first, *_ in rows("Command line"):
        command = re.match("`([a-z-]+)", first)
        if command is not None:
            found[command[1]] = {name for name in names([first]) if name.startswith("-")}
    assert found.pop("agent") == set()  # Serf's; here it is a program of its own
    assert found == expected
    (common,) = [first for first, *_ in rows("Command line") if first.startswith("all that ask")]
    assert names([common]) == {f"-{name}" for name in agents}


def test_every_option_of_serfd_has_a_row_and_every_row_an_option() -> None:
    found = names(first for first, *_ in rows("The agent"))
    assert {name for name in found if name.startswith("-")} == {f"-{o.name}" for o in OPTIONS}


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    found = names(first for first, *_ in rows("The agent"))
    settings = {*Config.__struct_fields__, *serf_config.KEYS} - TABLES.keys()
    for table, kind in TABLES.items():
        settings.update(f"{table}.{key}" for key in kind.__struct_fields__)
    assert {name for name in found if not name.startswith("-")} == settings


def test_every_plugin_that_comes_with_serfd_is_named() -> None:
    bundled = {path.stem for path in (ROOT / "plugins").glob("*.py")}
    assert bundled <= names(first for first, *_ in rows("What serfd has beyond Serf"))


def test_every_defect_has_a_test_that_there_is() -> None:
    tests = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for defect, *_, shown_by in rows("Defects of Serf that serfd does not share"):
        assert names([shown_by]), defect
        assert names([shown_by]) <= tests, defect


@pytest.mark.parametrize("page", ["README.md", "docs/migrating-from-serf.md"])
def test_the_page_is_found_from(page: str) -> None:
    assert "serf-compared.md)" in (ROOT / page).read_text(encoding="utf-8")
