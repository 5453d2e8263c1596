"""Files of prompts: texts, chats or OpenAI batch requests, each with an id that its result carries."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rgtg.config import DecodingSettings, validate
from rgtg.data.formats import require_unicode, to_prompt_or_chat, to_template_kwargs
from rgtg.data.openai_batch import Endpoint, is_batch_line, to_request
from rgtg.data.sources import (
    CORRECT_OR_SKIP,
    BadRowCounter,
    ReadProgress,
    RejectReason,
    RowError,
    iter_rows,
    parse_row,
    usable_rows,
)
from rgtg.errors import DataError, UsageError
from rgtg.tokenization.conversation import Message

_PROMPT = ("prompt", "messages", "chosen", "rejected", "chat_template_kwargs", "tools")
_COLUMNS = (*_PROMPT, "id", "custom_id")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt to complete.

    Attributes:
        number: of its line or row in the file, from 1.
        id: the row's own, or ``row-NUMBER``.
        prompt: text, or chat messages.
        settings: decoding settings of this row, which override those of the run.
        seed: of this row's generator, if the row has one.
        endpoint: of an OpenAI batch line; None for other rows.
    """

    number: int
    id: str
    prompt: str | list[Message]
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    endpoint: Endpoint | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be completed, and why. ``id`` is None if it cannot be read."""

    number: int
    id: str | None
    reason: str
    error: str


@dataclass
class PromptFile:
    """The usable rows of a file in order, and the bad ones. ``fingerprint`` covers all of them."""

    source: str
    rows: list[PromptRow]
    bad: list[BadRow]
    fingerprint: str
    models: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Rows in the file."""
        return len(self.rows) + len(self.bad)


def chat_of(text: str, system: str | None = None) -> list[Message]:
    """A conversation that begins with a user's text, after a system message if one is given.

    Raises:
        DataError: the text is blank.

    >>> chat_of("Two and two?")
    [{'role': 'user', 'content': 'Two and two?'}]
    """
    if not text.strip():
        raise DataError("the prompt is empty; give at least one character")
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def raise_for_bad_rows(source: str, bad: Sequence[BadRow], total: int) -> None:
    """Raise an error if there are bad rows.

    Raises:
        DataError: with counts by reason and the first few rows.
    """
    counter = BadRowCounter(source, rows=total)
    for row in bad:
        counter.add(row.number, row.reason, row.error)
    if bad:
        raise DataError(counter.message(CORRECT_OR_SKIP))


def read_prompts(path: str | Path) -> list[str | list[Message]]:
    """Read prompts, text or chat messages, without ids and settings of their own; of pairs, the prompts.

    Raises:
        DataError: bad rows, with file and line; or the file is empty, truncated or corrupt.
        UsageError: no such file, or an unknown kind of file.
    """
    bad = BadRowCounter(str(path))
    prompts = list(usable_rows(path, _PROMPT, lambda _line, row: _prompt_without_settings(row), bad))
    if bad.reasons:
        raise DataError(bad.message('Each line must be an object with a text or chat messages: {"prompt": ...}.'))
    return prompts


def _prompt_without_settings(row: Any) -> str | list[Message]:
    if is_batch_line(row):
        raise RowError(RejectReason.UNSUPPORTED, 'a line of an OpenAI batch; give its messages as {"prompt": [...]}')
    if to_template_kwargs(row):
        raise RowError(RejectReason.UNSUPPORTED, "chat_template_kwargs of one row; give them for all prompts")
    return to_prompt_or_chat(row)


def read_prompt_rows(
    path: str | Path, *, chats: bool = False, system: str | None = None, progress: ReadProgress | None = None
) -> PromptFile:
    """Read prompts with their ids: text, chat messages, pairs, or lines of an OpenAI batch, in any mixture.

    A row's id is its ``id`` or ``custom_id``, else its number. Bad rows are returned separately.

    Args:
        path: a file of the same kinds as pairs.
        chats: make each plain-text prompt a user's message. Lines of an OpenAI batch stay as they are: their url says
            how they are read.
        system: message before each of them.
        progress: called now and then with how much of the file is read, and how much there is.

    Raises:
        DataError: the file is empty, truncated or corrupt, or asks for several models.
        UsageError: no such file, an unknown kind of file, or a system message that no prompt takes.
    """
    parser = _PromptParser(chats=chats, system=system)
    for number, raw in iter_rows(path, _COLUMNS, progress=progress):
        id = None
        try:
            value = parse_row(raw)
            id = given_id(value)
            parser.add(number, id, value)
        except RowError as problem:
            parser.add_bad(number, id, problem)
    if system is not None and parser.rows and not parser.made_chats:
        raise UsageError(
            f"a system message goes before plain-text prompts, and {path} holds none: chats and lines of an OpenAI "
            "batch keep their own",
            setting="system",
        )
    models = sorted(parser.models)
    if len(models) > 1:
        raise DataError(f"{path} asks for several models: {', '.join(models)}. One run has one policy: split the file")
    return PromptFile(str(path), parser.rows, parser.bad, parser.digest.hexdigest()[:16], models)


def given_id(row: Any) -> str | None:
    """The row's own id: text, or a whole number as text; None if it has none.

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
        raise RowError(RejectReason.WRONG_TYPE, f"{name} is {value!r:.60}, expected text or a whole number")
    require_unicode(name, str(value))
    return str(value)


@dataclass
class _PromptParser:
    """Collects the rows of a file, good and bad, and a hash of them."""

    chats: bool = False
    system: str | None = None
    made_chats: int = 0
    rows: list[PromptRow] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    digest: Any = field(default_factory=hashlib.sha256)
    _ids: dict[str, int] = field(default_factory=dict)
    _checked: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, number: int, given: str | None, value: Any) -> None:
        """Parse and keep a row; raise RowError if it cannot be used."""
        id = f"row-{number}" if given is None else given
        row = self._row(number, id, value)
        if id in self._ids:
            raise RowError(RejectReason.DUPLICATE_ID, f"{id!r:.60} is also the id of line {self._ids[id]}")
        self._ids[id] = number
        self.rows.append(row)
        self._hash(row.id, row.prompt, row.settings, row.seed, row.endpoint)

    def add_bad(self, number: int, given: str | None, problem: RowError) -> None:
        self.bad.append(BadRow(number, given, problem.reason, str(problem)))
        self._hash(number, problem.reason)

    def _row(self, number: int, id: str, value: Any) -> PromptRow:
        if not is_batch_line(value):
            prompt, kwargs = to_prompt_or_chat(value), to_template_kwargs(value)
            if self.chats and isinstance(prompt, str):
                prompt = chat_of(prompt, self.system)
                self.made_chats += 1
            if kwargs and isinstance(prompt, str):
                raise RowError(RejectReason.UNSUPPORTED, "chat_template_kwargs: the prompt is plain text, not a chat")
            settings = self._check({"chat_template_kwargs": kwargs}) if kwargs else {}
            return PromptRow(number, id, prompt, settings)
        if value.get("custom_id") is None:
            raise RowError(RejectReason.MISSING_FIELD, "custom_id")
        request = to_request(value)
        if request.settings.get("chat_template_kwargs") and isinstance(request.prompt, str):
            raise RowError(RejectReason.UNSUPPORTED, "body.chat_template_kwargs: the prompt is plain text, not a chat")
        settings = self._check(request.settings)
        if request.model is not None:
            self.models.add(request.model)
        return PromptRow(number, id, request.prompt, settings, request.seed, request.endpoint)

    def _check(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Validate and convert settings; equal ones share one object."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self._checked:
            try:
                whole = validate(DecodingSettings, settings)
            except UsageError as error:
                raise RowError(RejectReason.BAD_VALUE, f"{error!s:.200}") from error
            self._checked[key] = whole.model_dump(include=set(settings))
        return self._checked[key]

    def _hash(self, *parts: Any) -> None:
        self.digest.update(json.dumps(parts).encode() + b"\n")
