"""Where rows come from: JSONL (plain, gzip, xz, zstd), Parquet and hub datasets, one row at a time with its number."""

import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from rgtg.errors import DataError, MissingExtraError, UsageError

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
_PLAIN = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".xz", ".zst")
_KNOWN = "a .jsonl file, .gz, .xz or .zst of one, or a .parquet file"
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:+-]+))?")


def named_path(source: str) -> tuple[str | None, Path]:
    """Name and path of NAME=FILE; no name where there is none, or where a file of the whole name exists.

    >>> named_path("pargs=runs/1.jsonl")
    ('pargs', PosixPath('runs/1.jsonl'))
    """
    name, equals, rest = source.partition("=")
    if equals and not Path(source).exists():
        return name, Path(rest)
    return None, Path(source)


class Reason(StrEnum):
    """Why a row was refused."""

    NOT_JSON = "not JSON"
    BAD_UTF8 = "bad UTF-8"
    MISSING_FIELD = "missing field"
    NULL_FIELD = "null field"
    WRONG_TYPE = "wrong type"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_COMPLETION = "empty completion"
    EQUAL = "chosen equals rejected"
    NO_SHARED_PROMPT = "no shared prompt"
    CHAT_TEMPLATE = "chat template"
    TOO_LONG = "too long"
    DUPLICATE = "duplicate row"
    BAD_REWARD = "bad reward"


class RowProblem(Exception):
    """One row is unusable; caught by the reader, which knows file and line."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else str(reason))


# A line of a JSONL file as it stands, a row of a table, or a row that its library could not decode.
RawRow = bytes | dict[str, Any] | RowProblem


def iter_rows(source: str | Path, columns: tuple[str, ...] = PAIR_COLUMNS) -> Iterator[tuple[int, RawRow]]:
    """Yield (line or row number from 1, raw row) of a file or hub dataset; blank lines are passed over.

    Raises:
        UsageError: no such file, not a kind that is read, or a hub dataset that cannot be reached.
        DataError: an empty, truncated or corrupt file.
    """
    path = Path(source)
    if os.path.exists(path):  # not Path.exists, which raises on an over-long name
        rows = _file_rows(path, columns)
    elif isinstance(source, str) and _looks_like_hub_id(source):
        rows = _hub_rows(source, columns)
    else:
        raise UsageError(f"{source}: no such file; expected {_KNOWN}, or a hub dataset as owner/name[:split]")
    number = 0
    for number, row in rows:
        yield number, row
    if number == 0:
        raise DataError(f"{source} is empty: it holds no rows")


def parse_row(raw: RawRow) -> Any:
    """The row's JSON value.

    Raises:
        RowProblem: not UTF-8, or not JSON.
    """
    if isinstance(raw, RowProblem):
        raise raw
    if isinstance(raw, dict):
        return raw
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowProblem(Reason.BAD_UTF8, f"byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise RowProblem(Reason.NOT_JSON, f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise RowProblem(Reason.NOT_JSON, "a number is too long or lists are nested too deeply") from error


def raw_text(raw: RawRow) -> str:
    """A row as text for the rejects file; bytes that are not UTF-8 appear as escapes."""
    if isinstance(raw, bytes):
        return raw.decode("utf-8", errors="backslashreplace")
    return str(raw) if isinstance(raw, RowProblem) else json.dumps(raw, default=str)


def _file_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, RawRow]]:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected {_KNOWN}")
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    if suffix in _PLAIN or suffix in _COMPRESSED:
        return _lines(path, suffix)
    raise UsageError(f"{path}: cannot tell what the file is from its name; expected {_KNOWN}")


def _lines(path: Path, suffix: str) -> Iterator[tuple[int, RawRow]]:
    number = 0
    try:
        with _open(path, suffix) as file:
            for number, line in enumerate(file, start=1):
                bare = line.rstrip(b"\r\n")
                if number == 1:
                    bare = bare.removeprefix(b"\xef\xbb\xbf")  # a byte order mark belongs to the file, not the row
                if bare.strip():
                    yield number, bare
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        kind = "is truncated" if isinstance(error, EOFError) else "cannot be read"
        where = f" after line {number}" if number else ""
        raise DataError(f"{path} {kind}{where} ({error}); download or write it again") from error


def _open(path: Path, suffix: str) -> io.BufferedIOBase:
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise MissingExtraError(f"reading {path} needs zstandard: pip install 'rgtg[train]'") from error
        return io.BufferedReader(_ZstdFile(path, zstandard))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a zstd file; a cut-off frame is an error (zstandard's own reader just ends there)."""

    def __init__(self, path: Path, library: Any) -> None:
        self._library = library
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._fill():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _fill(self) -> bool:
        """Decompress the next chunk; False at the end of the file."""
        rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        chunk = rest or self._file.read(1 << 16)
        if not chunk:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("the last zstd frame is not complete")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            self._ready = self._frame.decompress(chunk)
        except self._library.ZstdError as error:
            raise OSError(f"not valid zstd: {error}") from error
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, RawRow]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"reading {path} needs pyarrow: pip install 'rgtg[train]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = _wanted(str(path), file.schema_arrow.names, columns)
            batches = file.iter_batches(batch_size=1024, columns=wanted)
            rows = (row for batch in batches for row in _batch_rows(batch))
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file ({_first_line(error)}); download or write it again"
        ) from error


def _batch_rows(batch: Any) -> Iterator[RawRow]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        # One bad cell fails the whole batch: go row by row to find it.
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield RowProblem(Reason.BAD_UTF8, f"byte {error.start + 1} of a cell")


def _hub_rows(source: str, columns: tuple[str, ...]) -> Iterator[tuple[int, RawRow]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"reading {source} from the hub needs datasets: pip install 'rgtg[train]'") from error
    match = _HUB_ID.fullmatch(source)
    assert match is not None  # iter_rows has looked
    split = match["split"] or "train"
    try:
        table = datasets.load_dataset(match["name"], split=split)
        table = table.select_columns(_wanted(source, table.column_names, columns))
    except DataError:
        raise
    except Exception as error:  # the hub client, its HTTP library and the dataset builders each raise their own kinds
        raise UsageError(
            f"{source}: no such file, and split {split!r} of a hub dataset of that name cannot be loaded: "
            f"{_first_line(error)}. Check the name (owner/name:split) and the connection, or download the file."
        ) from error
    yield from enumerate(table, start=1)


def _looks_like_hub_id(source: str) -> bool:
    match = _HUB_ID.fullmatch(source)
    if match is None or source.startswith((".", "/")):
        return False
    return Path(match["name"]).suffix.lower() not in (*_PLAIN, *_COMPRESSED, ".parquet", ".json")


def _wanted(source: str, names: list[str], columns: tuple[str, ...]) -> list[str]:
    wanted = [name for name in columns if name in names]
    if not wanted:
        raise DataError(f"{source} has the columns {', '.join(names) or 'none'}; expected {', '.join(columns)}")
    return wanted


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
