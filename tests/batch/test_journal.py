"""The journal of a job: unfinished and damaged lines, other jobs' files, two writers, and the order of rows."""

import json
import os

import pytest

from rgtg.batch.journal import Journal, JournalEntry
from rgtg.errors import DataError, OutputError, UsageError

MADE = {"beta": 1.0, "policy": "abc"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl.partial"


def begin(path, made=MADE, rows=4, counts=2, **settings):
    return Journal.open(path, made, rows=rows, counts=counts, **settings)


def entry(index, text="x"):
    return JournalEntry(index, json.dumps({"id": index, "text": text}), (index, 1))


def fill(path, *indices):
    with begin(path) as journal:
        journal.append([entry(index) for index in indices])
    return path


def held(journal):
    return [(index, json.loads(line)["text"]) for index, line in journal.records()]


def test_rows_are_read_back_in_order_with_summed_counts(path):
    with begin(path) as journal:
        journal.append([entry(2, "c")])
        journal.append([entry(0, "ä\n"), entry(2, "again")], ['{"id":"y"}'])
        assert (journal.finished, journal.counts) == (2, [2, 2])
        assert held(journal) == [(0, "ä\n"), (2, "c")]
    with begin(path) as journal:
        assert [index in journal for index in range(4)] == [True, False, True, False]
        assert (journal.finished, journal.counts) == (2, [2, 2])
        journal.append([entry(3)])
        assert [index for index, _ in journal.records()] == [0, 2, 3]


def test_an_unfinished_last_line_is_cut_off(path):
    whole = fill(path, 0, 1).read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last + 1, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.warns(UserWarning, match="the last line was not finished"):
            journal = begin(path)
        with journal:
            assert journal.finished == 1
            journal.append([entry(1)])
            assert path.read_bytes() == whole


def test_an_unfinished_header_starts_a_new_job(path):
    whole = fill(path, 0).read_bytes()
    for end in (0, 1, whole.index(b"\n")):
        path.write_bytes(whole[:end])
        with begin(path) as journal:
            assert journal.finished == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b'"x"', b'"y"'),
        lambda line: line.replace(b'"index":1', b'"index":9'),
        lambda line: line.replace(b'"counts":[1,1]', b'"counts":[1]'),
        lambda line: line[:-2] + b"\n",
        lambda line: b"\0" * (len(line) - 1) + b"\n",
        lambda line: b"{}\n",
    ],
)
def test_a_line_with_a_wrong_checksum_is_skipped(path, damage):
    lines = fill(path, 0, 1, 2).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage(lines[2]), lines[3]]))
    with pytest.warns(UserWarning, match="1 damaged lines; their rows are completed again"):
        journal = begin(path)
    with journal:
        assert [index in journal for index in range(4)] == [True, False, True, False]
        journal.append([entry(1)])
        assert held(journal) == [(0, "x"), (1, "x"), (2, "x")]


def test_the_journal_of_another_job_is_refused_and_force_replaces_it(path):
    fill(path, 0)
    with pytest.raises(UsageError, match=r"another beta, top_k \(beta: 1.0 there, 2.0 now\): .* --force"):
        begin(path, MADE | {"beta": 2.0, "top_k": 3})
    with begin(path, MADE | {"beta": 2.0}, force=True) as journal:
        assert journal.finished == 0
    with begin(path, MADE | {"beta": 2.0}) as journal:  # it is that job's now
        assert journal.finished == 0


@pytest.mark.parametrize("content", [b"{}\n", b"[1]\n", b"\xff\n", b'{"version":1,"kind":"generate","made_with":1}\n'])
def test_a_file_that_is_not_a_journal_is_not_changed(path, content):
    path.write_bytes(content)
    with pytest.raises(DataError, match="not the journal of a job"):
        begin(path)
    assert path.read_bytes() == content


def test_a_second_writer_is_refused(path):
    pytest.importorskip("fcntl")
    with begin(path), pytest.raises(UsageError, match="another process is writing"):
        begin(path)
    begin(path).__exit__(None, None, None)


def test_a_full_disk_keeps_the_finished_rows(path, monkeypatch):
    before = fill(path, 0).read_bytes()
    with begin(path) as journal:
        real, calls = journal._file, []

        class Full:
            def write(self, data):
                if calls:
                    raise OSError(28, "No space left on device")
                calls.append(data)
                return real.write(data[: len(data) // 2])

            def __getattr__(self, name):
                return getattr(real, name)

        journal._file = Full()
        with pytest.raises(OutputError, match="No space left on device; the 1 rows it holds are kept"):
            journal.append([entry(1), entry(2)])
    assert path.read_bytes() == before


def test_rows_are_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    fill(path, 0)
    assert synced[-1] == path.stat().st_size
