"""Outputs are written whole or not at all."""

import pytest

from rgtg.errors import ModelNotFoundError, OutputError
from rgtg.outputs import atomic_write, make_folder, write_text


def test_a_file_appears_whole_in_a_folder_that_is_made_for_it(tmp_path):
    path = tmp_path / "new" / "folder" / "x.json"
    write_text(path, "ü\n")
    assert path.read_text(encoding="utf-8") == "ü\n"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(28, "No space left on device")])
def test_a_failure_leaves_what_was_there_before(tmp_path, error):
    path = tmp_path / "x.json"
    path.write_text("before")

    def write():
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        write()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_error_of_ours_in_the_block_keeps_its_name(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no model"), atomic_write(tmp_path / "x"):
        raise ModelNotFoundError("no model")


def test_a_folder_is_made_or_refused(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=r"cannot write to .*; choose another --output"):
            make_folder(folder)
