"""The tags on disk: byte for byte as a real agent writes them, and read as it reads them."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serfd.errors import CommandError, ConfigError
from serfd.net.tags_file import SIZE_MAX, load_tags, save_tags

# What a real agent (0.9.4) made of these, set by its command line.
TAGS = {
    "a": '<b>&\b\f\n\t\r"\\/\x01\x7f', "ünï": "é \u2028\udcff", "Z": "1", "_": "2", "10": "",
    "9": "x",
}  # fmt: skip
WRITTEN = (
    b'{\n  "10": "",\n  "9": "x",\n  "Z": "1",\n  "_": "2",\n'
    b'  "a": "\\u003cb\\u003e\\u0026\\u0008\\u000c\\n\\t\\r\\"\\\\/\\u0001\x7f",\n'
    b'  "\xc3\xbcn\xc3\xaf": "\xc3\xa9 \\u2028\\ufffd"\n}'
)


@pytest.mark.parametrize(("tags", "written"), [(TAGS, WRITTEN), ({}, b"{}")])
def test_tags_are_written_as_a_real_agent_writes_them(
    tmp_path: Path, tags: dict[str, str], written: bytes
) -> None:
    file = tmp_path / "tags.json"
    save_tags(str(file), tags)
    assert file.read_bytes() == written
    assert file.stat().st_mode & 0o777 == 0o600


TEXT = st.text()  # without surrogates, which stand for bytes that no text file can hold


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(TEXT, TEXT))
def test_what_is_saved_is_loaded(tmp_path: Path, tags: dict[str, str]) -> None:
    file = str(tmp_path / "tags.json")
    save_tags(file, tags)
    assert load_tags(file) == tags


@pytest.mark.parametrize(
    ("content", "tags"),
    [
        (b"null", {}),
        (b" {} \n", {}),
        (b'{"a": null}', {"a": ""}),
        (b'{"a": "1", "a": "2"}', {"a": "2"}),
        (b'{"a": "\xff", "\\ud800": "\\ud83d\\ude00"}', {"a": "\ufffd", "\ufffd": "😀"}),
    ],
)
def test_what_a_real_agent_reads_is_read(
    tmp_path: Path, content: bytes, tags: dict[str, str]
) -> None:
    file = tmp_path / "tags.json"
    file.write_bytes(content)
    assert load_tags(str(file)) == tags


def test_without_a_file_there_are_no_tags_yet(tmp_path: Path) -> None:
    assert load_tags(str(tmp_path / "tags.json")) == {}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Failed to decode tags file: Expecting value: line 1"),
        (b'{"a": "1"} x', "Failed to decode tags file: Extra data"),
        (b'["a"]', "Failed to decode tags file: expected a JSON object of texts"),
        (b'{"a": 1}', "Failed to decode tags file: expected a text for the tag 'a'"),
        (b'{"%s": 1}' % (b"x" * 999), f"expected a text for the tag '{'x' * 60}'$"),
        (b"[" * 100_000, "Failed to decode tags file: "),
        (b" " * (SIZE_MAX + 1), f"longer than {SIZE_MAX} bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_none_is_refused_with_its_name(
    tmp_path: Path, content: bytes, why: str
) -> None:
    file = tmp_path / "tags.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^tags_file {file}: .*{why}"):
        load_tags(str(file))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^tags_file {tmp_path}: Is a directory"):
        load_tags(str(tmp_path))


def test_a_file_that_cannot_be_written_is_told_and_the_old_one_stays(tmp_path: Path) -> None:
    file = tmp_path / "tags.json"
    save_tags(str(file), {"a": "1"})
    (tmp_path / "tags.json.new").mkdir()
    with pytest.raises(CommandError, match=f"^cannot write the tags file {file}: Is a directory"):
        save_tags(str(file), {"a": "2"})
    assert load_tags(str(file)) == {"a": "1"}
