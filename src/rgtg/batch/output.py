"""Where a job lives: its output, and the files beside it; what is there already, and how a finished job is written."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rgtg.batch.journal import Entry, JobLog, changes
from rgtg.batch.lines import COUNTED, Shape, counts_of, failure_line, id_of
from rgtg.errors import OutputError, RgtgError, UsageError
from rgtg.types.base import FileChecksum
from rgtg.types.batch import JobResult, RowFailure
from rgtg.utils.files import atomic_write, file_checksum, make_folder, sync_file

_ANOTHER = "give another --output, or --force to make it anew"


@dataclass(frozen=True)
class Place:
    """The files of one job, by the name of its output."""

    output: Path

    @property
    def log(self) -> Path:
        """Finished rows while the job is under way."""
        return self._beside("partial")

    @property
    def errors(self) -> Path:
        """Rows that got no completion."""
        return self._beside("errors.jsonl")

    @property
    def about(self) -> Path:
        """What the finished output was made from."""
        return self._beside("job.json")

    @property
    def settings(self) -> Path:
        """The settings as they were used."""
        return self._beside("settings.json")

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the job may write or remove."""
        return self.output, self.log, self.errors, self.about, self.settings

    def check(self, *, force: bool) -> None:
        """Refuse an output that cannot or must not be written, before any work.

        Raises:
            OutputError: its folder cannot be made or written, it is a folder, or read-only.
            UsageError: it is there and no job made it, without ``force``.
        """
        make_folder(self.output.parent)
        if self.output.is_dir():
            raise OutputError(f"cannot write {self.output}: it is a folder; give a file name")
        if not self.output.exists():
            return
        try:  # a rename would replace it whatever its permissions
            self.output.open("ab").close()
        except OSError as error:
            raise OutputError(f"cannot write {self.output}: {error.strerror}; choose another --output") from error
        if not self.log.exists() and self._read_about() is None and not force:
            raise UsageError(f"{self.output} is there, and no job made it: {_ANOTHER}")

    def finished(self, made_with: dict[str, Any], *, force: bool) -> JobResult | None:
        """The job that is finished here, if it is this one; None where there is none (or one to make anew).

        The output is read, a second or so for each gigabyte: what was damaged since must not pass for complete.

        Raises:
            UsageError: an output of another job, or not as the job wrote it, without ``force``.
            OutputError: the output cannot be read.
        """
        if not self.output.exists() or self.log.exists():  # a working file decides by its own header
            return None
        result = self._read_about()
        if result is None:  # checked before
            return None
        problem = changes(made_with, result.made_with, str(self.output), _ANOTHER) or self._damage(result)
        if problem is not None and not force:
            raise problem
        return result if problem is None else None

    def reopen(self, log: JobLog, places: dict[str, int]) -> None:
        """Put the rows of the finished output into a working file, to try again those that failed.

        Args:
            log: of the same job, empty.
            places: id of each row that can be completed → its index.

        Raises:
            UsageError: the output is no longer what the job wrote.
        """
        with self.output.open("rb") as file:
            for part in _chunks(file, 1000):
                try:
                    entries = [Entry(places[id_of(line)], line.decode().rstrip("\n"), counts_of(line)) for line in part]
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UsageError(
                        f"{self.output} was changed after the job wrote it: move it away to make it anew"
                    ) from error
                log.append(entries)

    def write(self, log: JobLog, failures: Sequence[RowFailure], result: JobResult, shape: Shape) -> JobResult:
        """Write the finished job, each file whole or not at all; the working file goes last.

        Returns:
            The result, with what was written.

        Raises:
            OutputError: a file cannot be written; the working file stays.
            RgtgError: the rows do not add up, which is a fault of this program.
        """
        try:
            if failures:
                _write_lines(self.errors, (failure_line(failure, shape).encode() for failure in failures))
            else:
                self.errors.unlink(missing_ok=True)
            count, content = _write_lines(self.output, (line for _, line in log.records()))
            if count != result.completions or count + len(failures) != result.rows:
                raise RgtgError(
                    f"{result.rows} rows became {count} completions and {len(failures)} failures: they do not add up. "
                    f"This is a fault of rgtg; {log.path} holds what was made"
                )
            result = result.model_copy(update={"content": content})
            _write_lines(self.about, [result.model_dump_json(indent=2).encode()])
        except OSError as error:
            size = log.path.stat().st_size
            raise OutputError(
                f"{error}; all {log.finished} finished rows are kept in {log.path}, and the same command goes on from "
                f"them once there is room for the output beside it, at most {-(-size // 10**6):,} MB more"
            ) from error
        log.remove()
        return result

    def _damage(self, result: JobResult) -> UsageError | None:
        """How the output differs from what the job wrote; None where it does not."""
        wrote = result.content
        try:
            if wrote is None:  # an early rgtg kept no more than the number of its lines
                lines = _lines_of(self.output)
                found = f"{lines} lines there, {result.completions} written" if lines != result.completions else None
            else:
                found = _difference(file_checksum(self.output), wrote)
        except OSError as error:
            raise OutputError(f"cannot read {self.output}: {error.strerror or error}") from error
        if found is None:
            return None
        return UsageError(f"{self.output} was changed after the job wrote it ({found}): {_ANOTHER}")

    def _read_about(self) -> JobResult | None:
        try:
            return JobResult.model_validate_json(self.about.read_bytes())
        except (OSError, ValidationError):
            return None

    def _beside(self, kind: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{kind}")


def sums(counts: Sequence[int]) -> dict[str, int]:
    """Figures of a job by name."""
    return dict(zip(COUNTED, counts, strict=True))


def _chunks(lines: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    for line in lines:
        part.append(line)
        if len(part) == size:
            yield part
            part = []
    yield part


def _write_lines(path: Path, lines: Iterable[bytes]) -> tuple[int, FileChecksum]:
    """Write a file, whole or not at all, down to the disk; how many lines it has, and what is in it."""
    count, size, digest = 0, 0, hashlib.sha256()
    with atomic_write(path) as partial, partial.open("wb") as file:
        for count, line in enumerate(lines, start=1):  # noqa: B007
            size += file.write(line + b"\n")
            digest.update(line + b"\n")
        sync_file(file)
    return count, FileChecksum(bytes=size, sha256=digest.hexdigest())


def _difference(there: FileChecksum, wrote: FileChecksum) -> str | None:
    """How a file differs from what was written; None where it does not."""
    if there == wrote:
        return None
    if there.bytes != wrote.bytes:
        return f"{there.bytes:,} bytes there, {wrote.bytes:,} written"
    return f"SHA-256 {there.sha256[:12]}… there, {wrote.sha256[:12]}… written"


def _lines_of(path: Path) -> int:
    """How many lines of a file are whole."""
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)
