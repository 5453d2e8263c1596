"""Read rows of JSONL (plain, gzip, xz, zstd), Parquet and hub datasets, one at a time, with their line numbers.

Rows that cannot be used are counted by reason, shown in an error message, or written to a file of rejects.
"""

import gzip
import io
import json
import lzma
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from rgtg.errors import DataError, MissingExtraError, UsageError, first_line
from rgtg.tokenization.encoding import require_embeddings
from rgtg.utils.files import atomic_write

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "chat_template_kwargs", "tools")
MAX_LINE = 64 << 20  # bytes
_MAX_WINDOW = 256 << 20  # bytes of memory that decompression may use
_CHUNK = 1024  # compressed bytes at a time: a few can expand to megabytes
CORRECT_OR_SKIP = "Correct them, or leave them out with --on-bad skip."
_SHOWN = 5  # bad rows in an error message
_REPORT_EVERY = 1000  # rows between two reports of progress
_PLAIN = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".xz", ".zst")
_KNOWN = "a .jsonl file, .gz, .xz or .zst of one, or a .parquet file"
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%:+-]+))?")


def named_path(source: str) -> tuple[str | None, Path]:
    """Split NAME=FILE into name and path. The name is None if there is none, or if a file has the whole name.

    >>> named_path("pargs=runs/1.jsonl")
    ('pargs', PosixPath('runs/1.jsonl'))
    """
    name, equals, rest = source.partition("=")
    if equals and not Path(source).exists():
        return name, Path(rest)
    return None, Path(source)


class RejectReason(StrEnum):
    """Why a row cannot be used."""

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
    UNKNOWN_TOKEN = "unknown token"
    DUPLICATE = "duplicate row"
    BAD_REWARD = "bad reward"
    BAD_VALUE = "bad value"
    UNSUPPORTED = "unsupported field"
    DUPLICATE_ID = "duplicate id"


class RowError(Exception):
    """A row cannot be used. The reader, which knows file and line, catches it."""

    def __init__(self, reason: RejectReason, detail: str = "") -> None:
        self.reason = reason.value
        super().__init__(f"{reason}: {detail}" if detail else str(reason))


ReadProgress = Callable[[int, int], None]
# A line of a JSONL file, a row of a table, or a row that the library could not decode.
RawRow = bytes | dict[str, Any] | RowError
T = TypeVar("T")


@dataclass
class BadRowCounter:
    """Counts the rows of a source and the bad ones among them, by reason, and keeps the first few problems."""

    source: str
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_bad: list[str] = field(default_factory=list)

    def add(self, line: int, reason: str, problem: str) -> None:
        """Count a bad row."""
        self.reasons[reason] += 1
        if len(self.first_bad) < _SHOWN:
            self.first_bad.append(f"  {self.source}:{line}: {problem}")

    def counts(self) -> str:
        """Summarise, for example ``3 of 10 rows (bad UTF-8: 1, too long: 2)``."""
        by_reason = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common())
        return f"{self.reasons.total()} of {self.rows} rows ({by_reason})"

    def message(self, advice: str) -> str:
        """An error message: the counts, the first few bad rows, and what to do."""
        more = self.reasons.total() - len(self.first_bad)
        lines = [f"{self.source}: cannot use {self.counts()}", *self.first_bad]
        return "\n".join([*lines, *([f"  and {more} more"] if more else []), advice])

    def finish(self, kept: int, on_bad: str, rejects: Path | None, nothing_left: str) -> None:
        """Once the whole source is read: raise an error for bad rows, or warn that they are left out.

        Raises:
            DataError: there are bad rows (``on_bad`` error), or ``kept`` is 0.
        """
        if self.reasons and on_bad == "error":
            raise DataError(self.message(CORRECT_OR_SKIP))
        if not kept:
            raise DataError(self.message(nothing_left))
        if self.reasons:
            where = f"; they are in {rejects}" if rejects is not None else ""
            warnings.warn(f"{self.source}: left out {self.counts()}{where}", stacklevel=3)


def require_known_tokens(ids: Sequence[int], embeddings: int | None) -> None:
    """Check that a model with so many embeddings (None: any number) can read a row's tokens.

    Raises:
        RowError: it has none for one of them.
    """
    try:
        require_embeddings(ids, embeddings, "the model")
    except DataError as error:
        raise RowError(RejectReason.UNKNOWN_TOKEN, str(error)) from error


def check_arguments(
    source: str | Path, tokenizer: Any, max_length: int | None, on_bad: str, rejects: Path | None
) -> None:
    """Check the arguments of a reader before it reads.

    Raises:
        UsageError: an argument is invalid, or the rejects would overwrite the source.
    """
    if on_bad not in ("error", "skip"):
        raise UsageError(f"on_bad = {on_bad!r}: expected 'error' or 'skip'")
    if max_length is not None and tokenizer is None:
        raise UsageError("max_length counts tokens: give the tokenizer too (--tokenizer DIR)")
    if rejects is not None and Path(source).resolve() == rejects.resolve():
        raise UsageError(f"the rejects would overwrite the data {source}: choose another file with --rejects")


def usable_rows(
    source: str | Path,
    columns: tuple[str, ...],
    check: Callable[[int, Any], T],
    bad: BadRowCounter,
    *,
    rejects: Path | None = None,
    progress: ReadProgress | None = None,
) -> Iterator[T]:
    """Yield what ``check`` makes of each usable row; count the others in ``bad`` and write them to ``rejects``.

    Args:
        source: a file or hub dataset.
        columns: the fields of a table that are read.
        check: takes a row's number and JSON value; raises `RowError` if the row cannot be used.
        bad: of this source.
        rejects: JSONL of each bad row's file, line, reason and raw text.
        progress: called now and then with how much of the source is read, and how much there is.
    """
    with rejects_writer(rejects) as write:
        for line, raw in iter_rows(source, columns, progress=progress):
            bad.rows += 1
            try:
                row = check(line, parse_row(raw))
            except RowError as problem:
                bad.add(line, problem.reason, str(problem))
                about = {"file": str(source), "line": line, "reason": str(problem), "raw": raw_text(raw)}
                write(json.dumps(about) + "\n")
                continue
            yield row


@contextmanager
def rejects_writer(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Yield a function that writes one line of a file of rejects; the file appears once the whole source is read.

    The file is written even if no row is bad: rejects of an earlier run must not pass for those of this one.
    """
    if path is None:
        yield lambda _line: None
        return
    advice = "choose another file with --rejects"
    with atomic_write(path, advice=advice) as partial, partial.open("w", encoding="utf-8") as file:
        yield file.write


def iter_rows(
    source: str | Path, columns: tuple[str, ...] | None = PAIR_COLUMNS, *, progress: ReadProgress | None = None
) -> Iterator[tuple[int, RawRow]]:
    """Yield (line or row number from 1, raw row) of a file or hub dataset; blank lines are skipped.

    Memory holds one row at a time, at most ``MAX_LINE`` bytes, however far a file expands.

    Args:
        source: a path, or a hub dataset.
        columns: of a table to read; None reads all.
        progress: called now and then with how much of the source is read, and how much there is (in bytes or rows).

    Raises:
        UsageError: no such file, an unknown kind of file, or a hub dataset that cannot be reached.
        DataError: an empty, truncated or corrupt file, or a line that is too long.
    """
    path, report = Path(source), progress or (lambda done, total: None)
    if _exists(path):
        rows = _file_rows(path, columns, report)
    elif isinstance(source, str) and _looks_like_hub_id(source):
        rows = _hub_rows(source, columns, report)
    else:
        raise UsageError(f"{source}: no such file; expected {_KNOWN}, or a hub dataset as owner/name[:split]")
    number = 0
    for number, row in rows:
        yield number, row
    if number == 0:
        raise DataError(f"{source} is empty: it holds no rows")


def parse_row(raw: RawRow) -> Any:
    """Parse a row's JSON value.

    Raises:
        RowError: not UTF-8, or not JSON.
    """
    if isinstance(raw, RowError):
        raise raw
    if isinstance(raw, dict):
        return raw
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(RejectReason.BAD_UTF8, f"byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise RowError(RejectReason.NOT_JSON, f"{error.msg} at column {error.colno}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number with thousands of digits, or brackets nested thousands deep
        raise RowError(RejectReason.NOT_JSON, "a number is too long or lists are nested too deeply") from error


def raw_text(raw: RawRow) -> str:
    """A row as text for the file of rejects; bytes that are not UTF-8 are escaped."""
    if isinstance(raw, bytes):
        return raw.decode("utf-8", errors="backslashreplace")
    return str(raw) if isinstance(raw, RowError) else json.dumps(raw, default=str)


def _exists(path: Path) -> bool:
    """Whether a path exists. Path.exists raises for a name that is too long, os.path.exists for a null byte."""
    try:
        return os.path.exists(path)
    except ValueError:
        return False


def _file_rows(path: Path, columns: tuple[str, ...] | None, progress: ReadProgress) -> Iterator[tuple[int, RawRow]]:
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected {_KNOWN}")
    if suffix == ".parquet":
        return _parquet_rows(path, columns, progress)
    if suffix in _PLAIN or suffix in _COMPRESSED:
        return _lines(path, suffix, progress)
    raise UsageError(f"{path}: cannot tell what the file is from its name; expected {_KNOWN}")


def _lines(path: Path, suffix: str, progress: ReadProgress) -> Iterator[tuple[int, RawRow]]:
    number = 0
    try:
        with path.open("rb") as raw:
            size = os.path.getsize(path)
            for number, line in enumerate(_bounded_lines(_decompressed(raw, path, suffix)), start=1):
                bare = line.rstrip(b"\r\n")
                if number == 1:
                    bare = bare.removeprefix(b"\xef\xbb\xbf")  # byte order mark
                if number % _REPORT_EVERY == 0:
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
        return io.BufferedReader(_FrameReader(raw, lambda: lzma.LZMADecompressor(memlimit=_MAX_WINDOW), "xz stream"))
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise MissingExtraError(f"reading {path} needs zstandard: pip install 'rgtg[train]'") from error
        make = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj
        return io.BufferedReader(_FrameReader(raw, make, "zstd frame", zstandard.ZstdError))
    return raw


class _FrameReader(io.RawIOBase):
    """Decompress a file of frames. A truncated frame is an error; the libraries' own readers just stop there."""

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
        chunk = rest or self._raw.read(_CHUNK)
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


def _parquet_rows(path: Path, columns: tuple[str, ...] | None, progress: ReadProgress) -> Iterator[tuple[int, RawRow]]:
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
            f"{path} is not a readable Parquet file ({first_line(error)}); download or write it again"
        ) from error


def _batch_rows(batch: Any) -> Iterator[RawRow]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        # One bad cell fails the whole batch: decode row by row to find it.
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield RowError(RejectReason.BAD_UTF8, f"byte {error.start + 1} of a cell")


def _hub_rows(source: str, columns: tuple[str, ...] | None, progress: ReadProgress) -> Iterator[tuple[int, RawRow]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(f"reading {source} from the hub needs datasets: pip install 'rgtg[train]'") from error
    match = _HUB_ID.fullmatch(source)
    assert match is not None, "checked by iter_rows"
    split = match["split"] or "train"
    try:
        table = datasets.load_dataset(match["name"], split=split)
        table = table.select_columns(_wanted(source, table.column_names, columns))
    except DataError:
        raise
    except Exception as error:  # the hub client, its HTTP library and the dataset builders raise many kinds
        raise UsageError(
            f"{source}: no such file, and split {split!r} of a hub dataset of that name cannot be loaded: "
            f"{first_line(error)}. Check the name (owner/name:split) and the connection, or download the file."
        ) from error
    for number, row in enumerate(table, start=1):
        yield number, row
        if number % _REPORT_EVERY == 0:
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
