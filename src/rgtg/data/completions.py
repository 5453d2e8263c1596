"""Files of finished completions: what ``rgtg generate`` and ``rgtg score`` write, read back and checked by line."""

from pathlib import Path
from typing import Any

from rgtg.data.sources import RowProblem, iter_rows, parse_row
from rgtg.errors import DataError


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Rows with a "prompt" and a completion, called "text" or "completion"; all their fields are kept.

    Raises:
        DataError: a row that is not such an object, with file and line, or an empty file.
        UsageError: no such file, or an unknown kind of file.
    """
    rows = []
    for number, raw in iter_rows(path, None):
        try:
            row = parse_row(raw)
        except RowProblem as problem:
            raise DataError(f"{path}:{number}: {problem}; expected one JSON object per line") from problem
        _require_texts(row, f"{path}:{number}")
        rows.append(row)
    return rows


def completion_text(row: dict[str, Any]) -> str:
    """The completion of a row, whichever of its two names it goes by.

    >>> completion_text({"prompt": "Hi", "completion": " there"})
    ' there'
    """
    return str(row["text"] if "text" in row else row["completion"])


def _require_texts(row: Any, place: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object, got {type(row).__name__}")
    for name in ("prompt", "text" if "text" in row else "completion"):
        # a generated text may be empty: the model ended at once
        if not isinstance(row.get(name), str) or not (row[name] or name == "text"):
            raise DataError(
                f'{place}: "{name}" must be a non-empty text; expected "prompt" with "text" or "completion"'
            )
