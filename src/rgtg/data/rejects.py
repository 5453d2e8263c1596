"""Rows that cannot be used: counted by reason, shown in an error message, written to a file of rejects."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rgtg.data.sources import ReadProgress, RowError, iter_rows, parse_row, raw_text
from rgtg.errors import DataError, UsageError
from rgtg.utils.files import atomic_write

CORRECT_OR_SKIP = "Correct them, or leave them out with --on-bad skip."
_SHOWN = 5
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
        if self.reasons and rejects is None:
            warnings.warn(f"{self.source}: left out {self.counts()}", stacklevel=3)


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
