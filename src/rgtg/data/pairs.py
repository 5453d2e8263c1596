"""Preference pairs: read, validate with file and line, summarise, split, tokenise (formats: docs/data-formats.md)."""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from rgtg.data.formats import to_pair
from rgtg.data.rejects import RefusedRows, check_arguments, reject_line, rejects_writer
from rgtg.data.sources import Progress, Reason, RowProblem, iter_rows, parse_row
from rgtg.errors import DataError, UsageError
from rgtg.tokenization.encoding import encode_completion, encode_prompt
from rgtg.types.base import FORMAT_VERSION, Record
from rgtg.types.generation import PreferencePair


class LengthStats(Record):
    """Lengths of one field over the kept rows, in the summary's unit."""

    mean: float
    median: float
    p95: float


class DataSummary(Record):
    """What a pairs file holds. Token counts are those of ``tokenize_pairs``, the closing EOS included.

    ``chosen_longer``, ``chosen_equal`` and ``chosen_shorter`` are fractions of the kept rows (they add up to 1): far
    from a half, a scorer can win by looking at the length alone.
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


@dataclass
class Pairs:
    """The usable rows of a source, in its order; ``fingerprint`` is the hash of their contents and order."""

    pairs: list[PreferencePair]
    fingerprint: str
    summary: DataSummary


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """Token ids of one pair; ``chosen_ids`` and ``rejected_ids`` are of the completions only."""

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
    """Reads and checks preference pairs one at a time: what is kept of each is its hash and three lengths.

    Iterating yields every usable pair in the source's order, with its token ids where there is a tokenizer; once that
    is over, ``fingerprint`` and ``summary`` are those of the whole. Arguments and errors are those of ``read_pairs``.

    Args:
        source: as there.
        tokenizer: as there.
        max_length: as there.
        on_bad: as there.
        rejects: as there.
        progress: told now and then how much of the source is read, and how much there is.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        on_bad: Literal["error", "skip"] = "error",
        rejects: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_arguments(source, tokenizer, max_length, on_bad, rejects)
        self.source, self.on_bad, self.rejects, self.progress = source, on_bad, rejects, progress
        self._reading = _Reading(str(source), tokenizer=tokenizer, max_length=max_length)

    def __iter__(self) -> "Iterator[tuple[PreferencePair, TokenizedPair | None]]":
        reading = self._reading
        with rejects_writer(self.rejects if self.on_bad == "skip" else None) as write:
            for line, raw in iter_rows(self.source, progress=self.progress):
                reading.rows += 1
                try:
                    kept = reading.check(line, parse_row(raw))
                except RowProblem as problem:
                    reading.refuse(line, problem)
                    write(reject_line(self.source, line, problem, raw))
                except UsageError as error:  # chat messages, and no template to render them with
                    raise DataError(f"{self.source}:{line}: {error}") from error
                else:
                    yield kept
        nothing = "Nothing is left to use: check that the file is in a format rgtg reads."
        reading.settle(len(reading.seen), self.on_bad, self.rejects, nothing)

    @property
    def fingerprint(self) -> str:
        """Hash of the pairs that were read, in their order."""
        return str(self._reading.digest.hexdigest()[:16])

    @property
    def summary(self) -> DataSummary:
        """Of the pairs that were read."""
        return self._reading.summary()


def read_pairs(
    source: str | Path,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    rejects: Path | None = None,
) -> Pairs:
    """Read and check preference pairs from a file or a hub dataset, all of them into memory.

    Args:
        source: ``.jsonl``, ``.gz``, ``.xz`` or ``.zst`` of it, ``.parquet``, or a hub id ``owner/name[:split]``.
        tokenizer: renders chat messages and counts lengths in tokens; without it lengths are in characters.
        max_length: longest prompt + completion in tokens; needs a tokenizer.
        on_bad: ``error`` refuses the file if any row is bad; ``skip`` leaves bad rows out.
        rejects: where ``skip`` writes each bad row with file, line, reason and raw text, as JSONL.

    Raises:
        DataError: bad rows (``error``), no usable row, chat rows without a chat template, or a file that is empty,
            truncated or corrupt.
        UsageError: no such file, an unknown kind of file, an unreachable hub dataset, or unfit arguments.
        OutputError: ``rejects`` cannot be written.
    """
    reader = PairReader(source, tokenizer=tokenizer, max_length=max_length, on_bad=on_bad, rejects=rejects)
    pairs = [pair for pair, _ in reader]
    return Pairs(pairs, reader.fingerprint, reader.summary)


class Prompted(Protocol):
    """Anything that belongs to a prompt: a pair, a completion with its reward."""

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        ...


PromptedT = TypeVar("PromptedT", bound=Prompted)


def split_pairs(pairs: list[PromptedT], eval_fraction: float, seed: int) -> tuple[list[PromptedT], list[PromptedT]]:
    """Split into (train, eval) so that no prompt is on both sides.

    A prompt goes to eval where its hash with the seed, read as a number in [0, 1), is below ``eval_fraction``: its
    side depends neither on row order nor on other rows. Where that leaves a side without a prompt, the nearest one
    moves over (a single prompt stays in train).

    Raises:
        UsageError: ``eval_fraction`` outside [0, 1).
    """
    held = held_out_prompts(np.array([place_of(pair.prompt, seed) for pair in pairs]), eval_fraction)
    sides: tuple[list[PromptedT], list[PromptedT]] = [], []
    for pair, out in zip(pairs, held, strict=True):
        sides[int(out)].append(pair)
    return sides


def held_out_prompts(places: "np.ndarray[Any, Any]", eval_fraction: float) -> "np.ndarray[Any, Any]":
    """Which rows ``split_pairs`` holds out, as a mask, by the places of their prompts (`place_of`).

    Raises:
        UsageError: ``eval_fraction`` outside [0, 1).
    """
    if not 0 <= eval_fraction < 1:
        raise UsageError(f"eval_fraction = {eval_fraction}: expected a fraction of the prompts, 0 <= fraction < 1")
    held = places < eval_fraction
    if eval_fraction > 0 and len(places):
        held = held if held.any() else places == places.min()
        held = held & (places != places.max()) if held.all() else held
    return held


def tokenize_pairs(pairs: Sequence[PreferencePair], tokenizer: Any, *, append_eos: bool = True) -> list[TokenizedPair]:
    """Token ids of every pair, read exactly as generation reads them.

    Plain completions are closed by EOS if ``append_eos``. Templated ones are never given a second ending: the template
    closed the turn, or the reader wrote EOS where it does not; what a template writes after its EOS (a newline) is cut
    off, since a policy that stops at EOS never generates it.

    Raises:
        DataError: a prompt that is empty or turns into no token.
    """
    return [_tokenize(pair, tokenizer, append_eos) for pair in pairs]


def _tokenize(pair: PreferencePair, tokenizer: Any, append_eos: bool) -> TokenizedPair:
    prompt_ids = encode_prompt(tokenizer, pair.prompt, templated=pair.prompt_templated)
    chosen_ids = _completion_ids(pair, prompt_ids, pair.chosen, tokenizer, append_eos)
    return TokenizedPair(
        prompt_ids, chosen_ids, _completion_ids(pair, prompt_ids, pair.rejected, tokenizer, append_eos)
    )


def _completion_ids(
    pair: PreferencePair, prompt_ids: list[int], completion: str, tokenizer: Any, append_eos: bool
) -> list[int]:
    templated, eos = pair.prompt_templated, tokenizer.eos_token_id
    ids = encode_completion(
        tokenizer,
        pair.prompt,
        completion,
        templated=templated,
        append_eos=append_eos and not templated,
        prompt_ids=prompt_ids,
    )
    if templated and append_eos and eos in ids:
        end = len(ids) - ids[::-1].index(eos)
        if not tokenizer.decode(ids[end:]).strip():
            return ids[:end]
    return ids


def place_of(prompt: str, seed: int) -> float:
    """A prompt's hash with the seed, as a number in [0, 1)."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@dataclass
class _Reading(RefusedRows):
    """What is known of a source of pairs so far: hashes and lengths of the kept ones, and the bad rows."""

    tokenizer: Any = None
    max_length: int | None = None
    lengths: list["array[int]"] = field(default_factory=lambda: [array("Q") for _ in range(3)])
    seen: dict[bytes, int] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)

    def check(self, line: int, row: Any) -> tuple[PreferencePair, TokenizedPair | None]:
        """Count a row among the kept ones, or raise RowProblem."""
        pair = to_pair(row, self.tokenizer)
        content = json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.prompt_templated]).encode()
        key = hashlib.sha256(content).digest()[:16]
        if key in self.seen:
            raise RowProblem(Reason.DUPLICATE, f"the same as line {self.seen[key]}")
        ids = self._tokenized(pair)
        self.seen[key] = line
        self.digest.update(content + b"\n")
        parts = (pair.prompt, pair.chosen, pair.rejected) if ids is None else ids.parts
        for lengths, part in zip(self.lengths, parts, strict=True):
            lengths.append(len(part))
        return pair, ids

    def summary(self) -> DataSummary:
        lengths = [np.frombuffer(column, np.uint64).astype(np.int64) for column in self.lengths]
        prompt, chosen, rejected = (_stats(column) for column in lengths)
        return DataSummary(
            rows=self.rows,
            kept=len(self.seen),
            rejects_by_reason=dict(self.reasons.most_common()),
            unit="characters" if self.tokenizer is None else "tokens",
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            chosen_longer=float((lengths[1] > lengths[2]).mean()),
            chosen_equal=float((lengths[1] == lengths[2]).mean()),
            chosen_shorter=float((lengths[1] < lengths[2]).mean()),
        )

    def _tokenized(self, pair: PreferencePair) -> TokenizedPair | None:
        """Token ids, where there is a tokenizer; refuses what only shows in them."""
        if self.tokenizer is None:
            return None
        try:
            ids = _tokenize(pair, self.tokenizer, append_eos=True)
        except DataError as error:
            raise RowProblem(Reason.EMPTY_PROMPT, str(error)) from error
        if ids.chosen_ids == ids.rejected_ids:
            raise RowProblem(Reason.EQUAL, "they are the same tokens")
        longest = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
        if self.max_length is not None and longest > self.max_length:
            raise RowProblem(Reason.TOO_LONG, f"{longest} tokens, at most {self.max_length} allowed")
        return ids


def _stats(lengths: "np.ndarray[Any, Any]") -> LengthStats:
    return LengthStats(
        mean=float(lengths.mean()), median=float(np.median(lengths)), p95=float(np.percentile(lengths, 95))
    )
