"""A job's working file: finished rows as they come, each with a checksum, read back in the order of the prompts.

Line 1 is a header with all that the rows depend on. Each further line holds one row:

    {"index":17,"counts":[0,0,0],"crc":"89abcdef","record":{…}}

``record`` is the line of the output as it stands. What a killed process left of a line is cut off when the file is
opened again, and a line that does not fit its checksum (blocks that a power failure lost) is passed over: those rows
are made anew. Opening takes a lock, since two processes that append would make rows twice.
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

LOG_VERSION = 1
_ENTRY = re.compile(rb'\{"index":(\d{1,18}),"counts":(\[(?:\d{1,15}(?:,\d{1,15})*)?\]),"crc":"([0-9a-f]{8})","record":')
_FAILURE = b'{"failed":'


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished row: its place among the rows, its line of the output, and figures that are added up."""

    index: int
    record: str
    counts: tuple[int, ...] = ()


class JobLog:
    """The working file of one job; `open` it with ``with``.

    Attributes:
        finished: rows that it holds.
        counts: sums of their figures.
    """

    def __init__(self, path: Path, file: FileIO, rows: int, sums: int) -> None:
        self.path, self._file = path, file
        self._places = array("q", [-1]) * rows  # where each row's line begins
        self.counts = [0] * sums
        self.finished = 0

    @classmethod
    def open(cls, path: Path, made_with: dict[str, Any], *, rows: int, sums: int = 0, force: bool = False) -> Self:
        """Begin a job, or go on with what a file of the same job holds.

        Args:
            path: of the file; made where there is none.
            made_with: all that the rows depend on.
            rows: how many there are to make.
            sums: how many figures each entry counts.
            force: begin anew where the file is of another job, or no such file.

        Raises:
            UsageError: a file of other settings, models or prompts, without ``force``; or another process writes it.
            DataError: no such file, without ``force``.
            OutputError: it cannot be written.
        """
        try:
            log = cls(path, _locked(path), rows, sums)
            try:
                log._load(made_with, force)
            except BaseException:
                log._file.close()
                raise
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another --output") from error
        return log

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, index: int) -> bool:
        return self._places[index] >= 0

    def append(self, entries: Iterable[Entry], failures: Iterable[str] = ()) -> None:
        """Add finished rows; they are on the disk when this returns. Failures are noted for a reader, no more.

        Raises:
            OutputError: no room, or no permission; what the file held stays.
        """
        lines = [(entry, _line(entry)) for entry in entries if entry.index not in self]
        notes = "".join(f'{{"failed":{text}}}\n' for text in failures).encode()
        place = os.fstat(self._file.fileno()).st_size
        try:
            write_synced(self._file, b"".join(line for _, line in lines) + notes)
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(place)
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}; {self._kept()}") from error
        for entry, line in lines:
            self._note(entry.index, place, entry.counts)
            place += len(line)

    def _kept(self) -> str:
        if self.finished:
            return f"the {self.finished} rows it holds are kept, and the same command goes on from them"
        self.path.unlink(missing_ok=True)
        return "no row was finished"

    def records(self) -> Iterator[tuple[int, bytes]]:
        """Every finished row's index and line of the output, in the order of the rows."""
        with self.path.open("rb") as file:
            for index, place in enumerate(self._places):
                if place >= 0:
                    file.seek(place)
                    line = file.readline()
                    match = _ENTRY.match(line)
                    assert match is not None, "it was checked when it was read or written"
                    yield index, line[match.end() : -2]

    def remove(self) -> None:
        """The output is written: the working file has done its part."""
        self.path.unlink(missing_ok=True)

    def _load(self, made_with: dict[str, Any], force: bool) -> None:
        with self.path.open("rb") as file:
            header = file.readline()
            if header.endswith(b"\n"):
                problem = _unfit(self.path, header, made_with)
                if problem is None:
                    self._read_entries(file)
                    return
                if not force:
                    raise problem
        self._file.truncate(0)
        about = {"version": LOG_VERSION, "kind": "generate", "made_with": made_with}
        try:
            write_synced(self._file, json.dumps(about).encode() + b"\n")
        except OSError:
            self.path.unlink()
            raise

    def _read_entries(self, file: BinaryIO) -> None:
        damaged, place = 0, file.tell()
        while line := file.readline():
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                warnings.warn(f"{self.path}: the last line was not finished; its row is made again", stacklevel=5)
                break
            if not self._read_entry(line, place) and not line.startswith(_FAILURE):
                damaged += 1
            place += len(line)
        if damaged:
            warnings.warn(f"{self.path}: {damaged} damaged lines; their rows are made again", stacklevel=5)

    def _read_entry(self, line: bytes, place: int) -> bool:
        match = _ENTRY.match(line)
        if match is None or not line.endswith(b"}\n"):
            return False
        index, counts, record = int(match[1]), json.loads(match[2]), line[match.end() : -2]
        if index >= len(self._places) or len(counts) != len(self.counts) or _checksum(record) != match[3].decode():
            return False
        self._note(index, place, counts)
        return True

    def _note(self, index: int, place: int, counts: Iterable[int]) -> None:
        if index not in self:
            self.finished += 1
            self.counts = [total + n for total, n in zip(self.counts, counts, strict=True)]
        self._places[index] = place


def changes(now: dict[str, Any], before: dict[str, Any], what: str, advice: str) -> UsageError | None:
    """Why rows made with ``before`` cannot be those of ``now``; None where they are."""
    changed = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    if not changed:
        return None
    first = changed[0]
    return UsageError(
        f"{what} was made with another {', '.join(changed)} ({first}: {before.get(first)!r:.80} there, "
        f"{now.get(first)!r:.80} now): {advice}"
    )


def _unfit(path: Path, header: bytes, made_with: dict[str, Any]) -> Exception | None:
    """Why the file is not that of this job; None where it is."""
    try:
        about = json.loads(header)
        kind, before = about["kind"], about["made_with"]
        if kind != "generate" or about["version"] != LOG_VERSION or not isinstance(before, dict):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        return DataError(f"{path} is not the working file of a job: move it away, or give --force to begin anew")
    now = json.loads(json.dumps(made_with))  # as it reads back
    return changes(now, before, str(path), "give another --output, or --force to begin anew")


def _line(entry: Entry) -> bytes:
    record = entry.record.encode()
    counts = ",".join(map(str, entry.counts))
    return b'{"index":%d,"counts":[%s],"crc":"%s","record":%s}\n' % (
        entry.index, counts.encode(), _checksum(record).encode(), record,
    )  # fmt: skip


def _checksum(record: bytes) -> str:
    return f"{zlib.crc32(record):08x}"


def _locked(path: Path) -> FileIO:
    """The file, open to append, and locked until it is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = FileIO(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666), "r+")
    try:
        lock_file(file.fileno(), path)
    except UsageError:
        file.close()
        raise
    return file
