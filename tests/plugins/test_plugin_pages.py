"""Every bundled plugin has a page, docs/plugins/NAME.md, and it says what is true."""

import ast
import re
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from followed_files import Node, bundled

from serfd.config import Config, Seconds, parse_duration
from serfd.hooks.loader import load

ROOT = Path(__file__).parents[2]
PLUGINS = {path.stem for path in (ROOT / "plugins").glob("*.py")}
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs/plugins").glob("*.md")}

_ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", re.MULTILINE)
_each = pytest.mark.parametrize("name", sorted(PAGES.keys() & PLUGINS))


def rows(name: str) -> dict[str, tuple[str, str]]:
    """Default and sentence of each setting, as the page has them."""
    section = PAGES[name].partition("\n## Settings\n")[2].partition("\n## ")[0]
    return {key: (default, text) for key, default, text in _ROW.findall(section)}


def docstrings(plugin: ModuleType) -> dict[str, str]:
    """The text below each setting, on one line; of inherited ones too."""
    kind = plugin.Plugin.Settings
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__[: kind.__mro__.index(msgspec.Struct)]):
        module = plugin if each.__module__ == plugin.__name__ else sys.modules[each.__module__]
        tree = ast.parse(Path(module.__file__).read_text())
        (body,) = [
            node.body
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.name == each.__name__
        ]
        found |= {
            attribute.target.id: " ".join(text.value.value.split())
            for attribute, text in pairwise(body)
            if isinstance(attribute, ast.AnnAssign)
            and isinstance(attribute.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        }
    return found


def default_of(field: msgspec.structs.FieldInfo) -> object:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return list(field.default) if isinstance(field.default, tuple) else field.default


def shown(text: str, *, like: object) -> object:
    """A default as the page has it, as the value that the code has."""
    value = tomllib.loads(f"it = {text.strip('`')}")["it"]
    return parse_duration(value) if isinstance(like, Seconds) else value


def test_every_plugin_has_a_page_and_every_page_a_plugin():
    assert PAGES.keys() == PLUGINS


@_each
def test_a_page_lists_every_setting_with_its_default(name):
    fields = msgspec.structs.fields(bundled(name).Plugin.Settings)
    table = rows(name)
    assert table.keys() == {field.name for field in fields}
    for field in fields:
        default, _ = table[field.name]
        if field.required:
            assert default == "required", field.name
        elif default_of(field) is None:
            assert default == "none", field.name
        else:
            wanted = default_of(field)
            assert shown(default, like=wanted) == wanted, field.name


@_each
def test_a_page_says_of_each_setting_what_the_code_says(name):
    meant, table = docstrings(bundled(name)), rows(name)
    assert meant.keys() == table.keys()
    for key, text in meant.items():
        assert table[key][1].startswith(text), key


@_each
def test_the_first_example_of_a_page_loads(name):
    example = re.search(r"^```toml\n(.*?)^```$", PAGES[name], re.DOTALL | re.MULTILINE)
    assert example is not None
    (loaded,) = load(Config(plugins=tomllib.loads(example[1])["plugins"]), Node())
    assert loaded.name == name
    assert PAGES[name].startswith(f"# {name}: ")


@_each
def test_the_pages_are_found_from_the_page_on_plugins(name):
    assert f"](plugins/{name}.md)" in (ROOT / "docs/plugins.md").read_text()
