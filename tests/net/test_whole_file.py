"""A file is replaced whole or not at all, and is nobody else's."""

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
