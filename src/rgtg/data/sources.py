"""Where rows come from: JSONL (plain, gzip, xz, zstd), Parquet and hub datasets, one row at a time with its number."""

import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from rgtg.errors import DataError, MissingExtraError, UsageError

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
MAX_LINE = 64 << 20  # bytes
_WINDOW = 256 << 20  # bytes of memory that a compressed file may ask for
_FED = 1024  # compressed bytes at a time
_TOLD = 1000  # rows between two reports of progress
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
    BAD_VALUE = "bad value"
    UNSUPPORTED = "unsupported field"
    DUPLICATE_ID = "duplicate id"


class RowProblem(Exception):
    """One row is unusable; caught by the reader, which knows file and line."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else str(reason))


Progress = Callable[[int, int], None]
# A line of a JSONL file as it stands, a row of a table, or a row that its library could not decode.
RawRow = bytes | dict[str, Any] | RowProblem


def iter_rows(
    source: str | Path, columns: tuple[str, ...] | None = PAIR_COLUMNS, *, progress: Progress | None = None
) -> Iterator[tuple[int, RawRow]]:
    """Yield (line or row number from 1, raw row) of a file or hub dataset; blank lines are passed over.

    One row is held at a time, and a line of at most ``MAX_LINE`` bytes, however far a file expands.

    Args:
        source: a path, or a hub dataset.
        columns: those of a table that are read; None reads all.
        progress: told now and then how much of the source is read, and how much there is (in bytes or rows).

    Raises:
        UsageError: no such file, not a kind that is read, or a hub dataset that cannot be reached.
        DataError: an empty, truncated or corrupt file, or a line beyond all measure.
    """
    path, tell = Path(source), progress or (lambda done, total: None)
    if _exists(path):
        rows = _file_rows(path, columns, tell)
    elif isinstance(source, str) and _looks_like_hub_id(source):
        rows = _hub_rows(source, columns, tell)
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


def _exists(path: Path) -> bool:
    """Not Path.exists, which raises on an over-long name, as os.path.exists does on one with a null byte."""
    try:
        return os.path.exists(path)
    except ValueError:
        return False


def _file_rows(path: Path, columns: tuple[str, ...] | None, progress: Progress) -> Iterator[tuple[int, RawRow]]:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected {_KNOWN}")
    if suffix == ".parquet":
        return _parquet_rows(path, columns, progress)
    if suffix in _PLAIN or suffix in _COMPRESSED:
        return _lines(path, suffix, progress)
    raise UsageError(f"{path}: cannot tell what the file is from its name; expected {_KNOWN}")


def _lines(path: Path, suffix: str, progress: Progress) -> Iterator[tuple[int, RawRow]]:
    number = 0
    try:
        with path.open("rb") as raw:
            size = os.path.getsize(path)
            for number, line in enumerate(_bounded_lines(_decompressed(raw, path, suffix)), start=1):
                bare = line.rstrip(b"\r\n")
                if number == 1:
                    bare = bare.removeprefix(b"\xef\xbb\xbf")  # a byte order mark belongs to the file, not the row
                if number % _TOLD == 0:
                    progress(raw.tell(), size)
                if bare.strip():
                    yield number, bare
            progress(size, size)
    except _LineTooLongError as error:
        raise DataError(
            f"{path}:{number + 1}: the line is longer than {MAX_LINE >> 20} MiB; expected one JSON object per line"
        ) from error
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        kind = "is truncated" if isinstance(error, EOFError) else "cannot be read"
        where = f" after line {number}" if number else ""
        raise DataError(f"{path} {kind}{where} ({error}); download or write it again") from error


class _LineTooLongError(Exception):
    pass


def _bounded_lines(file: io.BufferedIOBase) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise _LineTooLongError
        yield line


def _decompressed(raw: io.BufferedReader, path: Path, suffix: str) -> io.BufferedIOBase:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if suffix == ".xz":
        return io.BufferedReader(_Frames(raw, lambda: lzma.LZMADecompressor(memlimit=_WINDOW), "xz stream"))
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise MissingExtraError(f"reading {path} needs zstandard: pip install 'rgtg[train]'") from error
        make = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj
        return io.BufferedReader(_Frames(raw, make, "zstd frame", zstandard.ZstdError))
    return raw


class _Frames(io.RawIOBase):
    """Decompressed bytes of a file of frames; a cut-off one is an error (the libraries' own readers just end there).

    It is fed little at a time, since a few bytes may stand for megabytes.
    """

    def __init__(self, raw: Any, make: Callable[[], Any], what: str, failure: type[Exception] = OSError) -> None:
        self._raw, self._make, self._what, self._failure = raw, make, what, failure
        self._frame: Any = None
        self._ready = memoryview(b"")

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
        over = self._frame is not None and self._frame.eof
        rest = self._frame.unused_data.lstrip(b"\0") if over else b""  # xz pads its streams
        chunk = rest or self._raw.read(_FED)
        if not chunk:
            if self._frame is not None and not over:
                raise EOFError(f"the last {self._what} is not complete")
            return False
        if self._frame is None or over:
            self._frame = self._make()
        try:
            self._ready = memoryview(self._frame.decompress(chunk))
        except self._failure as error:
            raise OSError(f"not a valid {self._what}: {error}") from error
        return True


def _parquet_rows(path: Path, columns: tuple[str, ...] | None, progress: Progress) -> Iterator[tuple[int, RawRow]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(f"reading {path} needs pyarrow: pip install 'rgtg[train]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = _wanted(str(path), file.schema_arrow.names, columns)
            done, total = 0, file.metadata.num_rows
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                yield from enumerate(_batch_rows(batch), start=done + 1)
                done += batch.num_rows
                progress(done, total)
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


def _hub_rows(source: str, columns: tuple[str, ...] | None, progress: Progress) -> Iterator[tuple[int, RawRow]]:
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
    for number, row in enumerate(table, start=1):
        yield number, row
        if number % _TOLD == 0:
            progress(number, len(table))


def _looks_like_hub_id(source: str) -> bool:
    match = _HUB_ID.fullmatch(source)
    if match is None or source.startswith((".", "/")):
        return False
    return Path(match["name"]).suffix.lower() not in (*_PLAIN, *_COMPRESSED, ".parquet", ".json")


def _wanted(source: str, names: list[str], columns: tuple[str, ...] | None) -> list[str]:
    if columns is None:
        return names
    wanted = [name for name in columns if name in names]
    if not wanted:
        raise DataError(f"{source} has the columns {', '.join(names) or 'none'}; expected {', '.join(columns)}")
    return wanted


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
