"""Reading rows of every kind of file and of the hub; missing, truncated and corrupt files."""

import gzip
import json
import lzma
import random
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from rgtg.data.pairs import read_pairs
from rgtg.errors import DataError, UsageError
from rgtg.types.generation import PreferencePair

GOOD = {"prompt": "Say hi", "chosen": " hello there", "rejected": " no"}
OTHER = {"prompt": "Say bye", "chosen": " goodbye", "rejected": " never mind that"}


def write_rows(path: Path, *rows) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, suffix):
    path = tmp_path / f"pairs.{suffix}"
    text = b"".join(json.dumps(row).encode() + b"\n" for row in (GOOD, OTHER))
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, OTHER]), path)
    else:
        pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}.get(suffix.split(".")[-1], bytes)
        path.write_bytes(pack(text))
    read = read_pairs(path)
    assert read.pairs == [PreferencePair(**GOOD), PreferencePair(**OTHER)]
    assert read.fingerprint == read_pairs(write_rows(tmp_path / "plain.jsonl", GOOD, OTHER)).fingerprint


def test_zstd_with_many_frames_and_chunks_is_read_whole(tmp_path):
    rows = [{**GOOD, "prompt": f"{i} {random.Random(i).random()}" * 20} for i in range(2000)]
    text = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    middle = len(text) // 2
    path = tmp_path / "pairs.jsonl.zst"
    path.write_bytes(zstandard.compress(text[:middle]) + zstandard.compress(text[middle:]))
    assert [pair.prompt for pair in read_pairs(path).pairs] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("suffix", "pack"), [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstandard.compress)]
)
def test_truncated_and_corrupt_archives_are_errors(tmp_path, suffix, pack):
    whole = pack(b"".join(json.dumps({**GOOD, "prompt": str(i)}).encode() + b"\n" for i in range(500)))
    cut = tmp_path / f"cut.jsonl.{suffix}"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"cut\.jsonl\.{suffix} is truncated"):
        read_pairs(cut)
    junk = tmp_path / f"junk.jsonl.{suffix}"
    junk.write_bytes(b"this is no archive at all")
    with pytest.raises(DataError, match=rf"junk\.jsonl\.{suffix} cannot be read"):
        read_pairs(junk)


def test_corrupt_parquet_and_missing_columns_are_errors(tmp_path):
    corrupt = tmp_path / "corrupt.parquet"
    corrupt.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match=r"corrupt\.parquet is not a readable Parquet file"):
        read_pairs(corrupt)
    foreign = tmp_path / "foreign.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"], "answer": ["b"]}), foreign)
    with pytest.raises(DataError, match="has the columns question, answer; expected prompt, chosen, rejected"):
        read_pairs(foreign)


def test_errors_of_parquet_name_the_row_number(tmp_path):
    path = tmp_path / "pairs.parquet"
    table = pyarrow.Table.from_pylist([GOOD, {**OTHER, "chosen": None}, OTHER])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"pairs\.parquet:2: null field: chosen"):
        read_pairs(path)
    column = pyarrow.array([b"fine", b"\xff\xfe"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": column, "chosen": ["a", "b"], "rejected": ["c", "d"]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"pairs\.parquet:2: bad UTF-8"):
        read_pairs(path)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_an_empty_file_is_an_error(tmp_path, suffix):
    path = tmp_path / f"empty.{suffix}"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"empty\.{suffix} is empty"):
        read_pairs(path)


def test_a_source_that_is_not_a_data_file_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.jsonl: no such file"):
        read_pairs(tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="no such file"):
        read_pairs("data/absent.jsonl.gz")
    with pytest.raises(UsageError, match="no such file"):
        read_pairs("x" * 5000)
    with pytest.raises(UsageError, match="is a folder"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.txt").write_text("{}")
    with pytest.raises(UsageError, match="cannot tell what the file is"):
        read_pairs(tmp_path / "pairs.txt")


def test_a_hub_dataset_is_read_with_its_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{**GOOD, "extra": 1}, {**OTHER, "extra": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_pairs("owner/name:test[:10%]").pairs) == 2
    assert len(read_pairs("owner/name").pairs) == 2
    assert asked == [("owner/name", "test[:10%]"), ("owner/name", "train")]


def test_an_unreachable_hub_dataset_is_an_error(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError(f"Couldn't reach {name}\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError, match=r"no such file, and split 'test' of a hub dataset.*Couldn't reach owner/name"):
        read_pairs("owner/name:test")
