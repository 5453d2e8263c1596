"""Read and check files of completions, as ``rgtg generate`` and ``rgtg score`` write them."""

from pathlib import Path
from typing import Any

from rgtg.data.formats import to_chat, to_template_kwargs
from rgtg.data.sources import RowError, iter_rows, parse_row
from rgtg.errors import DataError
from rgtg.tokenization.conversation import Message

# Values of ``finish_reason`` of a text that did not come to its end.
UNFINISHED = ("length", "abstained")


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Read rows with a "prompt" and a "text" or "completion", and keep all their fields.

    The prompt of a chat is its messages, under "messages" or "prompt"; `completion_source` returns it.

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
        _check(row, f"{path}:{number}")
        rows.append(row)
    return rows


def completion_text(row: dict[str, Any]) -> str:
    """The completion of a row, under either name.

    >>> completion_text({"prompt": "Hi", "completion": " there"})
    ' there'
    """
    return str(row["text"] if "text" in row else row["completion"])


def is_chat(row: dict[str, Any]) -> bool:
    """Whether the prompt of a row is chat messages."""
    return row.get("messages") is not None or isinstance(row.get("prompt"), list)


def completion_source(row: dict[str, Any]) -> str | list[Message]:
    """The prompt of a row, which other models read: the messages of a chat, else text.

    Raises:
        RowError: what should be messages is not.

    >>> completion_source({"prompt": "<s>[user] Hi", "messages": [{"role": "user", "content": "Hi"}], "text": "Ho"})
    [{'role': 'user', 'content': 'Hi'}]
    """
    if not is_chat(row):
        return str(row["prompt"])
    name = "messages" if row.get("messages") is not None else "prompt"
    return to_chat(row[name], name)


def _check(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    try:
        chat = is_chat(row)
        if chat:
            completion_source(row)
        if to_template_kwargs(row) and not chat:
            raise DataError(f'{where}: "chat_template_kwargs" belongs to a chat; expected "messages" beside it')
    except RowError as problem:
        raise DataError(f"{where}: {problem}") from problem
    for name in ([] if chat else ["prompt"]) + ["text" if "text" in row else "completion"]:
        # a generated text may be empty, if the model stopped at once
        if not isinstance(row.get(name), str) or not (row[name] or name == "text"):
            raise DataError(
                f'{where}: "{name}" must be a non-empty text; expected "prompt" with "text" or "completion"'
            )
