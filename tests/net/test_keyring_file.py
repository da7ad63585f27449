"""The keyring on disk: whole or not at all, and nobody else's."""

import base64
import json
import logging
from pathlib import Path

import pytest

from serfd.errors import ConfigError
from serfd.net.keyring_file import SIZE_MAX, load_keyring, save_keyring

A, B = bytes(16), bytes(range(32))


def test_what_is_saved_is_loaded_and_only_the_owner_may_read_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keyring.json"
    assert save_keyring(str(file), (B, A)) is None
    caplog.set_level(logging.INFO, logger="serfd.agent")
    assert load_keyring(str(file)) == [B, A]
    assert caplog.messages == [f"Restored keyring with 2 keys from {file}"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text())[0] == base64.b64encode(B).decode()
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_was_readable_by_others_is_no_longer(tmp_path: Path) -> None:
    file = tmp_path / "keyring.json"
    file.write_text("[]")
    file.chmod(0o644)
    save_keyring(str(file), (A,))
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written_is_told_and_the_old_one_stays(tmp_path: Path) -> None:
    file = tmp_path / "keyring.json"
    save_keyring(str(file), (A,))
    (tmp_path / "keyring.json.new").mkdir()
    assert save_keyring(str(file), (B,)) == "cannot write the keyring file: Is a directory"
    assert load_keyring(str(file)) == [A]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "keyring_file .*: Expecting value"),
        ("{}", "expected a JSON list of base64 keys"),
        ("[]", "at least one"),
        ('["!!"]', "is not base64"),
        ('["AAAA"]', "holds 3 bytes, expected 16, 24 or 32"),
        ("[1]", "is not base64|holds"),
        ("[" * 100_000, "keyring_file .*: maximum recursion depth"),
        (" " * (SIZE_MAX + 1), f"longer than {SIZE_MAX} bytes"),
        ("ü", "keyring_file .*: 'ascii' codec"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_that_is_no_keyring_is_refused(tmp_path: Path, content: str, why: str) -> None:
    file = tmp_path / "keyring.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=why):
        load_keyring(str(file))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nokeys\.json: No such file or directory"):
        load_keyring(str(tmp_path / "nokeys.json"))
