"""The working file of a job: torn and damaged lines, other jobs' files, two writers, and the order of rows."""

import json
import os

import pytest

from rgtg.batch.journal import Entry, JobLog
from rgtg.errors import DataError, OutputError, UsageError

MADE = {"beta": 1.0, "policy": "abc"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl.partial"


def begin(path, made=MADE, rows=4, sums=2, **settings):
    return JobLog.open(path, made, rows=rows, sums=sums, **settings)


def entry(index, text="x"):
    return Entry(index, json.dumps({"id": index, "text": text}), (index, 1))


def fill(path, *indices):
    with begin(path) as log:
        log.append([entry(index) for index in indices])
    return path


def held(log):
    return [(index, json.loads(line)["text"]) for index, line in log.records()]


def test_rows_come_back_in_their_order_with_their_sums(path):
    with begin(path) as log:
        log.append([entry(2, "c")])
        log.append([entry(0, "ä\n"), entry(2, "again")], ['{"id":"y"}'])
        assert (log.finished, log.counts) == (2, [2, 2])
        assert held(log) == [(0, "ä\n"), (2, "c")]
    with begin(path) as log:
        assert [index in log for index in range(4)] == [True, False, True, False]
        assert (log.finished, log.counts) == (2, [2, 2])
        log.append([entry(3)])
        assert [index for index, _ in log.records()] == [0, 2, 3]


def test_every_torn_end_is_cut_off_and_made_again(path):
    whole = fill(path, 0, 1).read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last + 1, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.warns(UserWarning, match="the last line was not finished"):
            log = begin(path)
        with log:
            assert log.finished == 1
            log.append([entry(1)])
            assert path.read_bytes() == whole


def test_a_torn_header_is_a_new_job(path):
    whole = fill(path, 0).read_bytes()
    for end in (0, 1, whole.index(b"\n")):
        path.write_bytes(whole[:end])
        with begin(path) as log:
            assert log.finished == 0


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
def test_a_line_that_does_not_fit_its_checksum_is_made_again(path, damage):
    lines = fill(path, 0, 1, 2).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage(lines[2]), lines[3]]))
    with pytest.warns(UserWarning, match="1 damaged lines; their rows are made again"):
        log = begin(path)
    with log:
        assert [index in log for index in range(4)] == [True, False, True, False]
        log.append([entry(1)])
        assert held(log) == [(0, "x"), (1, "x"), (2, "x")]


def test_another_job_is_refused_by_name_and_begun_anew_by_force(path):
    fill(path, 0)
    with pytest.raises(UsageError, match=r"another beta, top_k \(beta: 1.0 there, 2.0 now\): .* --force"):
        begin(path, MADE | {"beta": 2.0, "top_k": 3})
    with begin(path, MADE | {"beta": 2.0}, force=True) as log:
        assert log.finished == 0
    with begin(path, MADE | {"beta": 2.0}) as log:  # it is that job's now
        assert log.finished == 0


@pytest.mark.parametrize("content", [b"{}\n", b"[1]\n", b"\xff\n", b'{"version":1,"kind":"generate","made_with":1}\n'])
def test_a_file_that_is_no_working_file_is_not_touched(path, content):
    path.write_bytes(content)
    with pytest.raises(DataError, match="not the working file of a job"):
        begin(path)
    assert path.read_bytes() == content


def test_two_writers_are_one_too_many(path):
    pytest.importorskip("fcntl")
    with begin(path), pytest.raises(UsageError, match="another process is writing"):
        begin(path)
    begin(path).__exit__(None, None, None)


def test_a_full_disk_keeps_what_was_there(path, monkeypatch):
    before = fill(path, 0).read_bytes()
    with begin(path) as log:
        real, calls = log._file, []

        class Full:
            def write(self, data):
                if calls:
                    raise OSError(28, "No space left on device")
                calls.append(data)
                return real.write(data[: len(data) // 2])

            def __getattr__(self, name):
                return getattr(real, name)

        log._file = Full()
        with pytest.raises(OutputError, match="No space left on device; the 1 rows it holds are kept"):
            log.append([entry(1), entry(2)])
    assert path.read_bytes() == before


def test_rows_are_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    fill(path, 0)
    assert synced[-1] == path.stat().st_size
