"""Files of prompts: texts, chats or OpenAI batch requests, each row with an id that its result is filed under."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rgtg.config import DecodingSettings, validate
from rgtg.data.formats import Message, require_unicode, to_prompt, to_prompt_or_chat
from rgtg.data.openai_batch import Endpoint, is_batch_line, to_request
from rgtg.data.rejects import RefusedRows
from rgtg.data.sources import Progress, Reason, RowProblem, iter_rows, parse_row
from rgtg.errors import DataError, UsageError

COLUMNS = ("prompt", "messages", "id", "custom_id", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt to complete.

    Attributes:
        number: of its line or row in the file, from 1.
        id: its own, or ``row-NUMBER``.
        prompt: text, or chat messages.
        settings: decoding settings of this row alone, over those of the run.
        seed: of this row's generator, where the row says so.
        endpoint: that an OpenAI batch line names; None for other rows.
    """

    number: int
    id: str
    prompt: str | list[Message]
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    endpoint: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be completed, and why; ``id`` is None where it has none that can be read."""

    number: int
    id: str | None
    reason: str
    error: str


@dataclass
class PromptFile:
    """The rows of a file in its order, and those that are unusable; ``fingerprint`` is of all of them."""

    source: str
    rows: list[PromptRow]
    bad: list[BadRow]
    fingerprint: str
    models: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Rows in the file."""
        return len(self.rows) + len(self.bad)


def refuse_rows(source: str, bad: Sequence[BadRow], total: int) -> None:
    """Refuse a file for its bad rows, if it has any.

    Raises:
        DataError: with counts by reason and the first few.
    """
    refused = RefusedRows(source, rows=total)
    for row in bad:
        refused.count(row.number, row.reason, row.error)
    if bad:
        raise DataError(refused.complaint("Correct them, or leave them out with --on-bad skip."))


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file of ``{"prompt": text}`` lines, or of plain-text or HH-style pairs; other fields are not read.

    Raises:
        DataError: any bad row, with file and line, or a file that is empty, truncated or corrupt.
        UsageError: no such file, or an unknown kind of file.
    """
    prompts: list[str] = []
    refused = RefusedRows(str(path))
    for line, raw in iter_rows(path):
        refused.rows += 1
        try:
            prompts.append(to_prompt(parse_row(raw)))
        except RowProblem as problem:
            refused.refuse(line, problem)
    if refused.reasons:
        raise DataError(refused.complaint('Each line must be an object with a text field: {"prompt": "..."}.'))
    return prompts


def read_prompt_rows(path: str | Path, *, progress: Progress | None = None) -> PromptFile:
    """Read prompts with their ids: text or chat messages, pairs, or lines of an OpenAI batch, in any mixture.

    A row is known by its ``id`` (or ``custom_id``), else by its number. Bad rows are kept apart, for the caller to
    judge.

    Args:
        path: a file of the kinds that pairs come in.
        progress: told how far the file is read.

    Raises:
        DataError: a file that is empty, truncated or corrupt, or that asks for several models.
        UsageError: no such file, or an unknown kind of file.
    """
    reading = _Reading()
    for number, raw in iter_rows(path, COLUMNS, progress=progress):
        found = None
        try:
            value = parse_row(raw)
            found = given_id(value)
            reading.add(number, found, value)
        except RowProblem as problem:
            reading.refuse(number, found, problem)
    if len(reading.models) > 1:
        raise DataError(
            f"{path} asks for several models: {', '.join(sorted(reading.models))}. One run has one policy: split it"
        )
    return PromptFile(
        str(path), reading.rows, reading.bad, reading.digest.hexdigest()[:16], sorted(reading.models)
    )  # fmt: skip


def given_id(row: Any) -> str | None:
    """The row's own id: text, or a whole number as text; None where it has none.

    >>> given_id({"custom_id": "a"}), given_id({"id": 17}), given_id({})
    ('a', '17', None)
    """
    if not isinstance(row, dict):
        return None
    name = "custom_id" if row.get("custom_id") is not None else "id"
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RowProblem(Reason.WRONG_TYPE, f"{name} is {value!r:.60}, expected text or a whole number")
    require_unicode(name, str(value))
    return str(value)


@dataclass
class _Reading:
    rows: list[PromptRow] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    digest: Any = field(default_factory=hashlib.sha256)
    _ids: dict[str, int] = field(default_factory=dict)
    _checked: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, number: int, found: str | None, value: Any) -> None:
        """Keep a row, or raise RowProblem."""
        id = f"row-{number}" if found is None else found
        row = self._row(number, id, value)
        if id in self._ids:
            raise RowProblem(Reason.DUPLICATE_ID, f"{id!r:.60} is that of line {self._ids[id]} too")
        self._ids[id] = number
        self.rows.append(row)
        self._hash(row.id, row.prompt, row.settings, row.seed, row.endpoint)

    def refuse(self, number: int, found: str | None, problem: RowProblem) -> None:
        self.bad.append(BadRow(number, found, problem.reason.value, str(problem)))
        self._hash(number, problem.reason.value)

    def _row(self, number: int, id: str, value: Any) -> PromptRow:
        if not is_batch_line(value):
            return PromptRow(number, id, to_prompt_or_chat(value))
        if value.get("custom_id") is None:
            raise RowProblem(Reason.MISSING_FIELD, "custom_id")
        asked = to_request(value)
        settings = self._check(asked.settings)
        if asked.model is not None:
            self.models.add(asked.model)
        return PromptRow(number, id, asked.prompt, settings, asked.seed, asked.endpoint)

    def _check(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings, valid and as they will be used; equal ones are one object."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self._checked:
            try:
                whole = validate(DecodingSettings, settings)
            except UsageError as error:
                raise RowProblem(Reason.BAD_VALUE, f"{error!s:.200}") from error
            self._checked[key] = whole.model_dump(include=set(settings))
        return self._checked[key]

    def _hash(self, *parts: Any) -> None:
        self.digest.update(json.dumps(parts).encode() + b"\n")
