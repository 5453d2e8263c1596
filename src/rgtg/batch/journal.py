"""A job's journal (``OUTPUT.partial``): finished rows as they come, each with a checksum.

Line 1 is a header with everything that the rows depend on. Each further line holds one row:

    {"index":17,"counts":[0,0,0],"crc":"89abcdef","record":{…}}

``record`` is the line of the output as it will be written. When a journal is opened again, an unfinished last line is
cut off, and a line that does not match its checksum (blocks lost in a power failure) is skipped. Those rows are
completed again. The file is locked while it is open, because two processes that append would complete rows twice.
"""

import json
import os
import re
import warnings
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from rgtg.errors import DataError, OutputError, UsageError
from rgtg.utils.files import lock_file, write_synced

JOURNAL_VERSION = 1
_ENTRY = re.compile(rb'\{"index":(\d{1,18}),"counts":(\[(?:\d{1,15}(?:,\d{1,15})*)?\]),"crc":"([0-9a-f]{8})","record":')
_FAILURE = b'{"failed":'


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A finished row: its position among the rows, its line of the output, and counts that are summed over the job."""

    index: int
    record: str
    counts: tuple[int, ...] = ()


class Journal:
    """The journal of one job; use `open` in a ``with`` statement.

    Attributes:
        finished: number of rows that it holds.
        counts: sums of their counts.
    """

    def __init__(self, path: Path, file: FileIO, rows: int, counts: int) -> None:
        self.path, self._file = path, file
        self._offsets = array("q", [-1]) * rows  # where each row's line begins
        self.counts = [0] * counts
        self.finished = 0

    @classmethod
    def open(cls, path: Path, made_with: dict[str, Any], *, rows: int, counts: int = 0, force: bool = False) -> Self:
        """Start a job, or resume the same job.

        Args:
            path: of the file, created if it does not exist.
            made_with: everything that the rows depend on.
            rows: how many there are to complete.
            counts: how many counts each entry has.
            force: start again if the file belongs to another job, or is not a journal.

        Raises:
            UsageError: the file belongs to a job with other settings, models or prompts, without ``force``; or another
                process is writing it.
            DataError: the file is not a journal, without ``force``.
            OutputError: it cannot be written.
        """
        try:
            journal = cls(path, _open_locked(path), rows, counts)
            try:
                journal._load(made_with, force)
            except BaseException:
                journal._file.close()
                raise
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error
        return journal

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, index: int) -> bool:
        return self._offsets[index] >= 0

    def append(self, entries: Iterable[JournalEntry], failures: Iterable[str] = ()) -> None:
        """Append finished rows; they are on the disk when this returns. Failures are only noted, for a human reader.

        Raises:
            OutputError: no room, or no permission; what the file held stays.
        """
        lines = [(entry, _entry_line(entry)) for entry in entries if entry.index not in self]
        notes = "".join(f'{{"failed":{text}}}\n' for text in failures).encode()
        offset = os.fstat(self._file.fileno()).st_size
        try:
            write_synced(self._file, b"".join(line for _, line in lines) + notes)
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(offset)
            if self.finished:
                advice = f"the {self.finished} rows it holds are kept, and the same command resumes from them"
            else:
                self.path.unlink(missing_ok=True)
                advice = "no row was finished"
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}; {advice}") from error
        for entry, line in lines:
            self._add(entry.index, offset, entry.counts)
            offset += len(line)

    def records(self) -> Iterator[tuple[int, bytes]]:
        """Yield every finished row's index and line of the output, in the order of the rows."""
        with self.path.open("rb") as file:
            for index, offset in enumerate(self._offsets):
                if offset >= 0:
                    file.seek(offset)
                    line = file.readline()
                    match = _ENTRY.match(line)
                    assert match is not None, "it was checked when it was read or written"
                    yield index, line[match.end() : -2]

    def remove(self) -> None:
        """Delete the file, once the output is written."""
        self.path.unlink(missing_ok=True)

    def _load(self, made_with: dict[str, Any], force: bool) -> None:
        with self.path.open("rb") as file:
            header = file.readline()
            if header.endswith(b"\n"):
                problem = _header_problem(self.path, header, made_with)
                if problem is None:
                    self._read_entries(file)
                    return
                if not force:
                    raise problem
        self._file.truncate(0)
        about = {"version": JOURNAL_VERSION, "kind": "generate", "made_with": made_with}
        try:
            write_synced(self._file, json.dumps(about).encode() + b"\n")
        except OSError:
            self.path.unlink()
            raise

    def _read_entries(self, file: BinaryIO) -> None:
        damaged, offset = 0, file.tell()
        while line := file.readline():
            if not line.endswith(b"\n"):
                self._file.truncate(offset)
                warnings.warn(f"{self.path}: the last line was not finished; its row is completed again", stacklevel=5)
                break
            if not self._read_entry(line, offset) and not line.startswith(_FAILURE):
                damaged += 1
            offset += len(line)
        if damaged:
            warnings.warn(f"{self.path}: {damaged} damaged lines; their rows are completed again", stacklevel=5)

    def _read_entry(self, line: bytes, offset: int) -> bool:
        match = _ENTRY.match(line)
        if match is None or not line.endswith(b"}\n"):
            return False
        index, counts, record = int(match[1]), json.loads(match[2]), line[match.end() : -2]
        if index >= len(self._offsets) or len(counts) != len(self.counts) or _checksum(record) != match[3].decode():
            return False
        self._add(index, offset, counts)
        return True

    def _add(self, index: int, offset: int, counts: Iterable[int]) -> None:
        if index not in self:
            self.finished += 1
            self.counts = [total + n for total, n in zip(self.counts, counts, strict=True)]
        self._offsets[index] = offset


def mismatch(now: dict[str, Any], before: dict[str, Any], what: str, advice: str) -> UsageError | None:
    """The error for rows that were made with ``before`` if ``now`` differs; None if they are equal."""
    changed = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    if not changed:
        return None
    first = changed[0]
    return UsageError(
        f"{what} was made with another {', '.join(changed)} ({first}: {before.get(first)!r:.80} there, "
        f"{now.get(first)!r:.80} now): {advice}"
    )


def _header_problem(path: Path, header: bytes, made_with: dict[str, Any]) -> Exception | None:
    """Why the file is not the journal of this job; None if it is."""
    try:
        about = json.loads(header)
        kind, before = about["kind"], about["made_with"]
        if kind != "generate" or about["version"] != JOURNAL_VERSION or not isinstance(before, dict):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        return DataError(f"{path} is not the journal of a job: move it away, or give --force to start again")
    now = json.loads(json.dumps(made_with))  # the values as JSON gives them back
    return mismatch(now, before, str(path), "give another --output, or --force to start again")


def _entry_line(entry: JournalEntry) -> bytes:
    record = entry.record.encode()
    counts = ",".join(map(str, entry.counts))
    return b'{"index":%d,"counts":[%s],"crc":"%s","record":%s}\n' % (
        entry.index, counts.encode(), _checksum(record).encode(), record,
    )  # fmt: skip


def _checksum(record: bytes) -> str:
    return f"{zlib.crc32(record):08x}"


def _open_locked(path: Path) -> FileIO:
    """Open the file to append, locked until it is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = FileIO(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666), "r+")
    try:
        lock_file(file.fileno(), path)
    except UsageError:
        file.close()
        raise
    return file
