"""Files that are written completely or not at all."""

from pathlib import Path

import pytest

from oag_transform import atomic


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    for content in ("first", "second"):
        with atomic.replaced(target) as partial:
            partial.write_text(content)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == content
    assert list(target.parent.iterdir()) == [target]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def interrupted() -> None:
        with atomic.replaced(target) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == [(target, "old")]


def test_a_name_as_long_as_a_file_system_takes(tmp_path: Path) -> None:
    target = tmp_path / ("a" * 251 + ".txt")
    with atomic.replaced(target) as partial:
        partial.write_text("there")
    assert target.read_text() == "there"
