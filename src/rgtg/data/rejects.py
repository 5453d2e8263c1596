"""Rows that cannot be used: counted by reason, told to a person, written to a file of rejects."""

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rgtg.data.sources import RawRow, RowProblem, raw_text
from rgtg.errors import DataError, UsageError
from rgtg.utils.files import atomic_write

_SHOWN = 5


@dataclass
class RefusedRows:
    """Bad rows of a source so far: how many, of which kinds, and the first few."""

    source: str
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_bad: list[str] = field(default_factory=list)

    def refuse(self, line: int, problem: RowProblem) -> None:
        """Count a bad row, and remember the first few."""
        self.count(line, problem.reason.value, str(problem))

    def count(self, line: int, reason: str, text: str) -> None:
        """The same for a problem in words."""
        self.reasons[reason] += 1
        if len(self.first_bad) < _SHOWN:
            self.first_bad.append(f"  {self.source}:{line}: {text}")

    def counts(self) -> str:
        """Such as ``3 of 10 rows (bad UTF-8: 1, too long: 2)``."""
        by_reason = ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common())
        return f"{self.reasons.total()} of {self.rows} rows ({by_reason})"

    def complaint(self, advice: str) -> str:
        """The bad rows for a person: how many, of which kinds, the first few, and what to do."""
        more = self.reasons.total() - len(self.first_bad)
        lines = [f"{self.source}: cannot use {self.counts()}", *self.first_bad]
        return "\n".join([*lines, *([f"  and {more} more"] if more else []), advice])

    def settle(self, kept: int, on_bad: str, rejects: Path | None, nothing_left: str) -> None:
        """Once all is read: refuse the source for its bad rows, or for having no other, or say how many are left out.

        Raises:
            DataError: bad rows (``on_bad`` error), or ``kept`` is 0.
        """
        if self.reasons and on_bad == "error":
            raise DataError(self.complaint("Correct them, or leave them out with --on-bad skip."))
        if not kept:
            raise DataError(self.complaint(nothing_left))
        if self.reasons and rejects is None:
            warnings.warn(f"{self.source}: left out {self.counts()}", stacklevel=3)


def check_arguments(
    source: str | Path, tokenizer: Any, max_length: int | None, on_bad: str, rejects: Path | None
) -> None:
    """Refuse arguments of a reader that cannot be carried out, or would destroy what is read.

    Raises:
        UsageError: saying which, and what to give instead.
    """
    if on_bad not in ("error", "skip"):
        raise UsageError(f"on_bad = {on_bad!r}: expected 'error' or 'skip'")
    if max_length is not None and tokenizer is None:
        raise UsageError("max_length counts tokens: give the tokenizer too (--tokenizer DIR)")
    if rejects is not None and Path(source).resolve() == rejects.resolve():
        raise UsageError(f"the rejects would overwrite the data {source}: choose another file with --rejects")


def reject_line(source: str | Path, line: int, problem: RowProblem, raw: RawRow) -> str:
    """One line of the rejects file: where the row is, what is wrong with it, and its raw text."""
    found = {"file": str(source), "line": line, "reason": str(problem), "raw": raw_text(raw)}
    return json.dumps(found) + "\n"


@contextmanager
def rejects_writer(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Yield a function that writes one line; the file takes its name only when the whole source has been read.

    It is written even if no row is bad, so that an earlier run's rejects are never taken for this one's.
    """
    if path is None:
        yield lambda _line: None
        return
    advice = "choose another file with --rejects"
    with atomic_write(path, advice=advice) as partial, partial.open("w", encoding="utf-8") as file:
        yield file.write
