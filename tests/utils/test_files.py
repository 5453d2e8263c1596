"""Outputs are written whole or not at all, with the permissions that the user's other files have."""

import os

import pytest

from rgtg.data.rejects import rejects_writer
from rgtg.errors import ModelNotFoundError, OutputError, UsageError
from rgtg.utils.files import atomic_write, keep_inputs, make_folder, write_text


def test_a_file_appears_whole_in_a_folder_that_is_made_for_it(tmp_path):
    path = tmp_path / "new" / "folder" / "x.json"
    write_text(path, "ü\n")
    assert path.read_text(encoding="utf-8") == "ü\n"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.fixture(params=[(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=lambda pair: f"{pair[0]:03o}")
def new_mode(request):
    """The permissions of a new file, under a umask."""
    before = os.umask(request.param[0])
    yield request.param[1]
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_new_file_is_as_open_as_the_umask_lets_it_be(tmp_path, new_mode):
    write_text(tmp_path / "text", "x")
    with atomic_write(tmp_path / "library") as partial:
        partial.unlink()
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors does
    with rejects_writer(tmp_path / "rejects") as write:
        write("x\n")
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("text", "library", "rejects"), new_mode
    )


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o444, 0o755])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, new_mode, kept):
    path = tmp_path / "x"
    path.write_text("before")
    path.chmod(kept)
    with atomic_write(path) as partial:
        assert mode(partial) & 0o077 & ~kept == 0, "no one reads meanwhile who may not read it afterwards"
        partial.write_text("after")
    assert (path.read_text(), mode(path)) == ("after", kept)


def test_inputs_are_found_among_outputs_by_any_name(tmp_path):
    kept, other, link = (tmp_path / name for name in ("kept", "other", "link"))
    kept.write_text("")
    other.write_text("")
    link.symlink_to(kept)
    keep_inputs([("--a", "kept"), ("--b", None), ("--c", "owner/name"), ("--d", other)], [kept, tmp_path / "new"])
    for given, output in ((kept, kept), (link, kept), (kept, link), (str(tmp_path / "." / "kept"), link)):
        with pytest.raises(UsageError, match=r"--b .* would be written over: it is .*; choose another output"):
            keep_inputs([("--a", other), ("--b", given)], [tmp_path / "new", output])


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
