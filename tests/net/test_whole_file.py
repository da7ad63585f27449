"""A file is replaced whole or not at all, and is nobody else's."""

import os
from pathlib import Path

import pytest

from serfd.net.whole_file import write_whole


def test_what_is_written_is_in_the_file_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "held"
    file.write_text("a longer text than the new one")
    file.chmod(0o644)
    write_whole(str(file), "ünï")
    assert file.read_bytes() == "ünï".encode()
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_crash_left_beside_it_is_not_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "held"
    (tmp_path / "held.new").write_text("half of some")
    write_whole(str(file), "new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_if_it_cannot_be_written_the_old_one_stays(tmp_path: Path) -> None:
    file = tmp_path / "held"
    write_whole(str(file), "old")
    (tmp_path / "held.new").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(str(file), "new")
    assert file.read_text() == "old"


def test_what_lies_beside_it_lends_the_new_file_neither_its_mode_nor_its_reader(
    tmp_path: Path,
) -> None:
    file, beside = tmp_path / "held", tmp_path / "held.new"
    beside.write_text("")
    beside.chmod(0o644)
    with beside.open() as reader:
        write_whole(str(file), "secret")
        assert reader.read() == ""
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_link_beside_it_is_not_followed(tmp_path: Path) -> None:
    file, elsewhere = tmp_path / "held", tmp_path / "elsewhere"
    elsewhere.write_text("of somebody else")
    (tmp_path / "held.new").symlink_to(elsewhere)
    write_whole(str(file), "secret")
    assert elsewhere.read_text() == "of somebody else"
    assert not file.is_symlink()
    assert file.read_text() == "secret"


def test_the_file_and_then_its_directory_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.chdir(tmp_path)
    write_whole("held", "new")
    assert synced == [f"{tmp_path}/held.new", str(tmp_path)]
