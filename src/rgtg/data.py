"""Preference pairs: read, validate with file and line, summarise, split, tokenise (formats: docs/data-formats.md)."""

import hashlib
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from rgtg.data_formats import to_pair, to_prompt
from rgtg.data_sources import RawRow, Reason, RowProblem, iter_rows, parse_row, raw_text
from rgtg.errors import DataError, OutputError, UsageError
from rgtg.models.encoding import encode_completion, encode_prompt
from rgtg.types import FORMAT_VERSION, PreferencePair, Record

_SHOWN = 5


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
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, completion) of both sides, the chosen one first."""
        return [(self.prompt_ids, self.chosen_ids), (self.prompt_ids, self.rejected_ids)]


def read_pairs(
    source: str | Path,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    rejects: Path | None = None,
) -> Pairs:
    """Read and check preference pairs from a file or a hub dataset.

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
    check_arguments(source, tokenizer, max_length, on_bad, rejects)
    reading = _Reading(str(source), tokenizer=tokenizer, max_length=max_length)
    with rejects_writer(rejects if on_bad == "skip" else None) as write:
        for line, raw in iter_rows(source):
            reading.rows += 1
            try:
                reading.add(line, parse_row(raw))
            except RowProblem as problem:
                reading.refuse(line, problem)
                write(reject_line(source, line, problem, raw))
            except UsageError as error:  # chat messages, and no template to render them with
                raise DataError(f"{source}:{line}: {error}") from error
    nothing = "Nothing is left to use: check that the file is in a format rgtg reads."
    reading.settle(len(reading.pairs), on_bad, rejects, nothing)
    return Pairs(reading.pairs, reading.digest.hexdigest()[:16], reading.summary())


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file of ``{"prompt": text}`` lines, or of plain-text or HH-style pairs; other fields are not read.

    Raises:
        DataError: any bad row, with file and line, or a file that is empty, truncated or corrupt.
        UsageError: no such file, or an unknown kind of file.
    """
    prompts: list[str] = []
    reading = _Reading(str(path))
    for line, raw in iter_rows(path):
        reading.rows += 1
        try:
            prompts.append(to_prompt(parse_row(raw)))
        except RowProblem as problem:
            reading.refuse(line, problem)
    if reading.reasons:
        raise DataError(reading.complaint('Each line must be an object with a text field: {"prompt": "..."}.'))
    return prompts


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
    if not 0 <= eval_fraction < 1:
        raise UsageError(f"eval_fraction = {eval_fraction}: expected a fraction of the prompts, 0 <= fraction < 1")
    places = {pair.prompt: _place(pair.prompt, seed) for pair in pairs}
    held_out = {prompt for prompt, place in places.items() if place < eval_fraction}
    if eval_fraction > 0 and places:
        held_out = held_out or {min(places, key=places.__getitem__)}
        if len(held_out) == len(places):
            held_out.remove(max(places, key=places.__getitem__))
    train = [pair for pair in pairs if pair.prompt not in held_out]
    return train, [pair for pair in pairs if pair.prompt in held_out]


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


def _place(prompt: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@dataclass
class RefusedRows:
    """Bad rows of a source so far: how many, of which kinds, and the first few."""

    source: str
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_bad: list[str] = field(default_factory=list)

    def refuse(self, line: int, problem: RowProblem) -> None:
        """Count a bad row, and remember the first few."""
        self.reasons[problem.reason.value] += 1
        if len(self.first_bad) < _SHOWN:
            self.first_bad.append(f"  {self.source}:{line}: {problem}")

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


@dataclass
class _Reading(RefusedRows):
    """What is known of a source of pairs so far: kept pairs, their lengths and hash, and the bad rows."""

    tokenizer: Any = None
    max_length: int | None = None
    pairs: list[PreferencePair] = field(default_factory=list)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    seen: dict[bytes, int] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, line: int, row: Any) -> None:
        """Keep a row, or raise RowProblem."""
        pair = to_pair(row, self.tokenizer)
        content = json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.prompt_templated]).encode()
        key = hashlib.sha256(content).digest()[:16]
        if key in self.seen:
            raise RowProblem(Reason.DUPLICATE, f"the same as line {self.seen[key]}")
        lengths = self._measure(pair)
        self.seen[key] = line
        self.digest.update(content + b"\n")
        self.pairs.append(pair)
        self.lengths.append(lengths)

    def summary(self) -> DataSummary:
        lengths = np.array(self.lengths)  # (rows, 3): prompt, chosen, rejected
        prompt, chosen, rejected = (_stats(column) for column in lengths.T)
        return DataSummary(
            rows=self.rows,
            kept=len(self.pairs),
            rejects_by_reason=dict(self.reasons.most_common()),
            unit="characters" if self.tokenizer is None else "tokens",
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            chosen_longer=float((lengths[:, 1] > lengths[:, 2]).mean()),
            chosen_equal=float((lengths[:, 1] == lengths[:, 2]).mean()),
            chosen_shorter=float((lengths[:, 1] < lengths[:, 2]).mean()),
        )

    def _measure(self, pair: PreferencePair) -> tuple[int, int, int]:
        """Lengths of prompt, chosen and rejected; refuses what only shows in tokens."""
        if self.tokenizer is None:
            return len(pair.prompt), len(pair.chosen), len(pair.rejected)
        try:
            ids = _tokenize(pair, self.tokenizer, append_eos=True)
        except DataError as error:
            raise RowProblem(Reason.EMPTY_PROMPT, str(error)) from error
        if ids.chosen_ids == ids.rejected_ids:
            raise RowProblem(Reason.EQUAL, "they are the same tokens")
        lengths = len(ids.prompt_ids), len(ids.chosen_ids), len(ids.rejected_ids)
        longest = lengths[0] + max(lengths[1:])
        if self.max_length is not None and longest > self.max_length:
            raise RowProblem(Reason.TOO_LONG, f"{longest} tokens, at most {self.max_length} allowed")
        return lengths


def _stats(lengths: "np.ndarray[Any, Any]") -> LengthStats:
    return LengthStats(
        mean=float(lengths.mean()), median=float(np.median(lengths)), p95=float(np.percentile(lengths, 95))
    )


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
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            partial = Path(file.name)
            yield file.write
        os.chmod(partial, 0o644)
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write the rejects {path}: {error.strerror or error}; use --rejects FILE") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
