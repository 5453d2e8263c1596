"""Preference pairs: read, check, summarise, split and tokenize them (formats: docs/data-formats.md)."""

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from rgtg.data.formats import to_pair
from rgtg.data.sources import (
    PAIR_COLUMNS,
    BadRowCounter,
    ReadProgress,
    RejectReason,
    RowError,
    check_arguments,
    require_known_tokens,
    usable_rows,
)
from rgtg.errors import DataError, UsageError
from rgtg.tokenization.conversation import RenderedReplies, TemplateKwargs, check_template_kwargs, encode_replies
from rgtg.tokenization.encoding import encode_completion, encode_prompt
from rgtg.types.base import FORMAT_VERSION, Record
from rgtg.types.generation import PreferencePair

_EXAMPLE = 30  # characters on each side of where prompt and completion meet
# Scripts that put no spaces between words, by the first word of their characters' names.
_WITHOUT_SPACES = {
    "CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC", "HENTAIGANA", "YI", "THAI", "LAO", "KHMER", "MYANMAR",
    "TIBETAN", "TAI", "NEW", "JAVANESE", "BALINESE",
}  # fmt: skip
# Marks after which a space follows; after brackets, quotes, slashes and the like it need not.
_BEFORE_SPACE = ".,;:!?…"


class LengthStats(Record):
    """Lengths of one field over the kept rows, in the unit of the summary."""

    mean: float
    median: float
    p95: float


class DataSummary(Record):
    """What a file of pairs holds. Token counts are those of ``tokenize_pairs``, with the final EOS.

    ``chosen_longer``, ``chosen_equal`` and ``chosen_shorter`` are fractions of the kept rows and sum to 1. If
    ``chosen_longer`` is far from a half, a scorer can win by length alone. ``run_together`` is the fraction whose
    prompt and completion lack a space between them (`run_together`; chats never do), and
    ``run_together_example`` is where those of the first one meet.
    """

    version: int = FORMAT_VERSION
    rows: int
    kept: int
    rejects_by_reason: dict[str, int]
    unit: Literal["tokens", "characters"]
    prompt: LengthStats
    chosen: LengthStats
    rejected: LengthStats
    chosen_longer: float
    chosen_equal: float
    chosen_shorter: float
    run_together: float = 0.0
    run_together_example: str | None = None


@dataclass
class Pairs:
    """The usable rows of a source in order. ``fingerprint`` is a hash of their contents and order."""

    pairs: list[PreferencePair]
    fingerprint: str
    summary: DataSummary


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Token ids of one pair. ``chosen_ids`` and ``rejected_ids`` hold the completions without the prompt."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def parts(self) -> tuple[list[int], list[int], list[int]]:
        """Prompt, chosen and rejected."""
        return self.prompt_ids, self.chosen_ids, self.rejected_ids

    @property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, completion) of both sides, the chosen one first."""
        return [(self.prompt_ids, self.chosen_ids), (self.prompt_ids, self.rejected_ids)]


class PairReader:
    """Read and check preference pairs one at a time. Only a hash and three lengths of each stay in memory.

    Iterating yields every usable pair in order, with its token ids if there is a tokenizer. After that, ``fingerprint``
    and ``summary`` cover the whole source. Arguments and errors are those of ``read_pairs``; ``progress`` is called now
    and then with how much of the source is read, and how much there is.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        embeddings: int | None = None,
        on_bad: Literal["error", "skip"] = "error",
        rejects: Path | None = None,
        progress: ReadProgress | None = None,
        chat_template_kwargs: TemplateKwargs | None = None,
        readable: bool = False,
    ) -> None:
        check_arguments(source, tokenizer, max_length, on_bad, rejects)
        if chat_template_kwargs:
            if tokenizer is None:
                raise UsageError("chat_template_kwargs are variables of a chat template: give its tokenizer")
            check_template_kwargs(tokenizer, chat_template_kwargs)
        self.source, self.on_bad, self.progress = source, on_bad, progress
        self.rejects = rejects if on_bad == "skip" else None
        self._bad = BadRowCounter(str(source))
        self._checker = _PairChecker(str(source), tokenizer, max_length, embeddings, chat_template_kwargs, readable)

    def __iter__(self) -> "Iterator[tuple[PreferencePair, TokenizedPair | None]]":
        yield from usable_rows(
            self.source, PAIR_COLUMNS, self._checker.check, self._bad, rejects=self.rejects, progress=self.progress
        )
        nothing = "Nothing is left to use: check that the file is in a format rgtg reads."
        self._bad.finish(len(self._checker.seen), self.on_bad, self.rejects, nothing)
        if self._checker.template_kwargs and not self._checker.chats:
            raise UsageError(f"chat_template_kwargs applies to chats, and {self.source} holds none")

    @property
    def fingerprint(self) -> str:
        """Hash of the pairs that were read, in order."""
        return str(self._checker.digest.hexdigest()[:16])

    @property
    def summary(self) -> DataSummary:
        """Counts and lengths of the pairs that were read."""
        return self._checker.summary(self._bad)


def read_pairs(
    source: str | Path,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    embeddings: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    rejects: Path | None = None,
    chat_template_kwargs: TemplateKwargs | None = None,
    readable: bool = False,
) -> Pairs:
    """Read and check all preference pairs of a file or a hub dataset.

    Args:
        source: ``.jsonl``, ``.gz``, ``.xz`` or ``.zst`` of it, ``.parquet``, or a hub id ``owner/name[:split]``.
        tokenizer: renders chat messages and counts lengths in tokens; without it, lengths are in characters.
        max_length: longest prompt + completion in tokens; needs a tokenizer.
        embeddings: number of tokens that the model which reads the pairs has embeddings for; None is not checked.
        on_bad: ``error`` raises an error if any row is bad; ``skip`` leaves bad rows out.
        rejects: file to which ``skip`` writes each bad row with file, line, reason and raw text, as JSONL.
        chat_template_kwargs: variables of the tokenizer's chat template, for rows that have none of their own.
        readable: write chats as people read them, instead of rendering them.

    Raises:
        DataError: bad rows (``error``), no usable row, chat rows without a chat template, or a file that is empty,
            truncated or corrupt.
        UsageError: no such file, an unknown kind of file, an unreachable hub dataset, or invalid arguments.
        OutputError: ``rejects`` cannot be written.
    """
    reader = PairReader(
        source, tokenizer=tokenizer, max_length=max_length, embeddings=embeddings, on_bad=on_bad, rejects=rejects,
        chat_template_kwargs=chat_template_kwargs, readable=readable,
    )  # fmt: skip
    pairs = [pair for pair, _ in reader]
    return Pairs(pairs, reader.fingerprint, reader.summary)


class HasPrompt(Protocol):
    """Anything that belongs to a prompt: a pair, or a completion with its reward."""

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        ...


HasPromptT = TypeVar("HasPromptT", bound=HasPrompt)


def split_pairs(pairs: list[HasPromptT], eval_fraction: float, seed: int) -> tuple[list[HasPromptT], list[HasPromptT]]:
    """Split into (train, eval) so that no prompt is in both.

    A prompt goes to eval if its hash with the seed, read as a number in [0, 1), is below ``eval_fraction``. So its side
    does not depend on the order of rows or on other rows. If that leaves one side empty, the prompt nearest to the
    threshold moves there (a single prompt stays in train).

    Raises:
        UsageError: ``eval_fraction`` outside [0, 1).
    """
    held = held_out_prompts(np.array([split_position(pair.prompt, seed) for pair in pairs]), eval_fraction)
    sides: tuple[list[HasPromptT], list[HasPromptT]] = [], []
    for pair, out in zip(pairs, held, strict=True):
        sides[int(out)].append(pair)
    return sides


def held_out_prompts(positions: "np.ndarray[Any, Any]", eval_fraction: float) -> "np.ndarray[Any, Any]":
    """Mask of the rows that ``split_pairs`` holds out.

    Args:
        positions: `split_position` of each row's prompt.
        eval_fraction: of the prompts to hold out.

    Raises:
        UsageError: ``eval_fraction`` outside [0, 1).
    """
    if not 0 <= eval_fraction < 1:
        raise UsageError(f"eval_fraction = {eval_fraction}: expected a fraction of the prompts, 0 <= fraction < 1")
    held = positions < eval_fraction
    if eval_fraction > 0 and len(positions):
        held = held if held.any() else positions == positions.min()
        held = held & (positions != positions.max()) if held.all() else held
    return held


def tokenize_pairs(pairs: Sequence[PreferencePair], tokenizer: Any, *, append_eos: bool = True) -> list[TokenizedPair]:
    """Tokenize every pair exactly as generation does.

    Plain completions end with EOS if ``append_eos``. Templated ones get no second ending: the template ends the turn,
    or the reader has added EOS. What a template writes after the token that ends a reply (a newline) is cut off if
    ``append_eos``, because a policy that stops there never generates it.

    Raises:
        DataError: a prompt is empty or has no token.
    """
    return [_tokenize(pair, tokenizer, append_eos) for pair in pairs]


def _tokenize(pair: PreferencePair, tokenizer: Any, append_eos: bool) -> TokenizedPair:
    if pair.prompt_templated:
        rendered = RenderedReplies(pair.prompt, [pair.chosen, pair.rejected])
        prompt_ids, (chosen_ids, rejected_ids) = encode_replies(tokenizer, rendered, whole=not append_eos)
        return TokenizedPair(prompt_ids, chosen_ids, rejected_ids)
    prompt_ids = encode_prompt(tokenizer, pair.prompt)
    chosen_ids, rejected_ids = (
        encode_completion(tokenizer, pair.prompt, completion, append_eos=append_eos, prompt_ids=prompt_ids)
        for completion in (pair.chosen, pair.rejected)
    )
    return TokenizedPair(prompt_ids, chosen_ids, rejected_ids)


def split_position(prompt: str, seed: int) -> float:
    """A prompt's hash with the seed as a number in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@dataclass
class _PairChecker:
    """Checks pairs, and keeps the hash and the lengths of each usable one."""

    source: str
    tokenizer: Any
    max_length: int | None
    embeddings: int | None = None
    template_kwargs: TemplateKwargs | None = None
    readable: bool = False
    chats: int = 0
    lengths: list["array[int]"] = field(default_factory=lambda: [array("Q") for _ in range(3)])
    seen: dict[bytes, int] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)
    run_together: int = 0
    run_together_example: str | None = None

    def check(self, line: int, row: Any) -> tuple[PreferencePair, TokenizedPair | None]:
        """Convert and tokenize a row; raise RowError if it cannot be used."""
        try:
            pair = to_pair(row, self.tokenizer, template_kwargs=self.template_kwargs, readable=self.readable)
        except UsageError as error:  # chat messages without a chat template
            raise DataError(f"{self.source}:{line}: {error}") from error
        content = json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.prompt_templated]).encode()
        key = hashlib.sha256(content).digest()[:16]
        if key in self.seen:
            raise RowError(RejectReason.DUPLICATE, f"the same as line {self.seen[key]}")
        ids = self._tokenized(pair)
        self.seen[key] = line
        self.chats += pair.prompt_templated
        self.digest.update(content + b"\n")
        parts = (pair.prompt, pair.chosen, pair.rejected) if ids is None else ids.parts
        for lengths, part in zip(self.lengths, parts, strict=True):
            lengths.append(len(part))
        self._check_boundary(line, pair)
        return pair, ids

    def _check_boundary(self, line: int, pair: PreferencePair) -> None:
        """Count a pair whose prompt and completions lack a space between them, and keep the first as an example."""
        if pair.prompt_templated:
            return
        for completion in (pair.chosen, pair.rejected):
            if run_together(pair.prompt, completion):
                self.run_together += 1
                if self.run_together_example is None:
                    meeting = f"{pair.prompt[-_EXAMPLE:]}{completion[:_EXAMPLE]}"
                    self.run_together_example = f"line {line}: {meeting!r}"
                return

    def summary(self, bad: BadRowCounter) -> DataSummary:
        lengths = [np.frombuffer(column, np.uint64).astype(np.int64) for column in self.lengths]
        prompt, chosen, rejected = (_stats(column) for column in lengths)
        return DataSummary(
            rows=bad.rows,
            kept=len(self.seen),
            rejects_by_reason=dict(bad.reasons.most_common()),
            unit="characters" if self.tokenizer is None else "tokens",
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            chosen_longer=float((lengths[1] > lengths[2]).mean()),
            chosen_equal=float((lengths[1] == lengths[2]).mean()),
            chosen_shorter=float((lengths[1] < lengths[2]).mean()),
            run_together=self.run_together / max(len(self.seen), 1),
            run_together_example=self.run_together_example,
        )

    def _tokenized(self, pair: PreferencePair) -> TokenizedPair | None:
        """Tokenize, if there is a tokenizer, and make the checks that need token ids."""
        if self.tokenizer is None:
            return None
        try:
            ids = _tokenize(pair, self.tokenizer, append_eos=True)
        except DataError as error:
            raise RowError(RejectReason.EMPTY_PROMPT, str(error)) from error
        if ids.chosen_ids == ids.rejected_ids:
            raise RowError(RejectReason.EQUAL, "they are the same tokens")
        longest = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
        if self.max_length is not None and longest > self.max_length:
            raise RowError(RejectReason.TOO_LONG, f"{longest} tokens, at most {self.max_length} allowed")
        for part in ids.parts:
            require_known_tokens(part, self.embeddings)
        return ids


def run_together(prompt: str, completion: str) -> bool:
    """Whether a space is missing between a prompt and its completion, which are joined as they are.

    True where a letter, a digit or one of ``. , ; : ! ? …`` meets a letter or a digit. Not in scripts without spaces
    between words, such as Chinese, Japanese and Thai.

    >>> run_together("What is it?", "A cat."), run_together("What is it?", " A cat."), run_together("这是什么?", "猫")
    (True, False, False)
    """
    if not prompt or not completion:
        return False
    last, first = prompt[-1], completion[0]
    if not first.isalnum() or not (last.isalnum() or last in _BEFORE_SPACE):
        return False
    letter = next((char for char in reversed(prompt[-200:]) if char.isalpha()), last)
    return not any(map(_without_spaces, (last, first, letter)))


@cache
def _without_spaces(char: str) -> bool:
    name = unicodedata.name(unicodedata.normalize("NFKC", char)[0], "")
    return name.split(" ")[0].split("-")[0] in _WITHOUT_SPACES


def _stats(lengths: "np.ndarray[Any, Any]") -> LengthStats:
    return LengthStats(
        mean=float(lengths.mean()), median=float(np.median(lengths)), p95=float(np.percentile(lengths, 95))
    )
