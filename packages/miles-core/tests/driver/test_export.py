import pytest

from miles.core.driver.export import replaced


def test_new_directory_takes_the_place_of_the_old_one(tmp_path):
    target = tmp_path / "hf"
    for text in ("first", "second"):
        with replaced(target) as fresh:
            (fresh / text).write_text(text)
            assert fresh != target
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_failed_export_leaves_the_old_one_whole(tmp_path):
    target = tmp_path / "hf"
    target.mkdir()
    (target / "model").write_text("whole")
    with pytest.raises(FileExistsError), replaced(target) as fresh:
        fresh.mkdir()
    assert (target / "model").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_a_kill_left_behind_is_no_obstacle(tmp_path):
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "torn").write_text("torn")
    with replaced(tmp_path / "hf") as fresh:
        assert not list(fresh.iterdir())
