"""Read and check files of completions, as ``rgtg generate`` and ``rgtg score`` write them."""

from pathlib import Path
from typing import Any

from rgtg.data.sources import RowError, iter_rows, parse_row
from rgtg.errors import DataError


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Read rows with a "prompt" and a "text" or "completion", and keep all their fields.

    Raises:
        DataError: names the file and line of a row that lacks them; or the file is empty.
        UsageError: no such file, or an unknown kind of file.
    """
    rows = []
    for number, raw in iter_rows(path, None):
        try:
            row = parse_row(raw)
        except RowError as problem:
            raise DataError(f"{path}:{number}: {problem}; expected one JSON object per line") from problem
        _check_texts(row, f"{path}:{number}")
        rows.append(row)
    return rows


def completion_text(row: dict[str, Any]) -> str:
    """The completion of a row, under either name.

    >>> completion_text({"prompt": "Hi", "completion": " there"})
    ' there'
    """
    return str(row["text"] if "text" in row else row["completion"])


def _check_texts(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    for name in ("prompt", "text" if "text" in row else "completion"):
        # a generated text may be empty, if the model stopped at once
        if not isinstance(row.get(name), str) or not (row[name] or name == "text"):
            raise DataError(
                f'{where}: "{name}" must be a non-empty text; expected "prompt" with "text" or "completion"'
            )
