"""Rollouts: the policy's completions with a reward each, read and checked by line, tokenised once."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rgtg.data.completions import completion_text
from rgtg.data.rejects import RefusedRows, check_arguments, reject_line, rejects_writer
from rgtg.data.sources import Progress, Reason, RowProblem, iter_rows, parse_row
from rgtg.errors import DataError
from rgtg.tokenization.encoding import encode_completion, encode_prompt

_COLUMNS = ("prompt", "text", "completion", "reward", "finish_reason")


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion and its reward; ``finished`` is false where it was cut off at a length limit."""

    prompt: str
    text: str
    reward: float
    finished: bool


@dataclass(frozen=True, slots=True)
class TokenizedRollout:
    """Token ids of one completion, closed by EOS if it ended, and its reward."""

    prompt_ids: list[int]
    completion_ids: list[int]
    reward: float

    @property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, completion), as a pair has two of them."""
        return [(self.prompt_ids, self.completion_ids)]


@dataclass
class Rollouts:
    """The usable rows of a file, in its order; ``fingerprint`` is the hash of their contents and order."""

    rows: list[Rollout]
    fingerprint: str


def read_rollouts(
    source: str | Path,
    *,
    tokenizer: Any,
    max_length: int | None = None,
    labels: bool = False,
    reward_range: tuple[float, float] | None = None,
    on_bad: Literal["error", "skip"] = "error",
    rejects: Path | None = None,
    progress: Progress | None = None,
) -> Rollouts:
    """Read what ``rgtg generate`` and then ``rgtg score`` write: rows of prompt, text (or completion) and reward.

    The same text may come several times: it was drawn several times. ``finish_reason`` "length" says that a completion
    was cut off; it gets no EOS.

    Args:
        source: a file of the kinds that pairs come in.
        tokenizer: counts lengths.
        max_length: longest prompt + completion in tokens.
        labels: rewards must lie in [0, 1], after ``reward_range`` where it is given.
        reward_range: (lowest, highest) reward, which become 0 and 1; what lies between is scaled linearly.
        on_bad: ``error`` refuses the file if any row is bad; ``skip`` leaves bad rows out.
        rejects: where ``skip`` writes each bad row.
        progress: told now and then how much of the source is read, and how much there is.

    Raises:
        DataError: bad rows (``error``), with file and line; no usable row; a file that is empty or corrupt.
        UsageError: no such file, an unknown kind of file, or rejects that would overwrite it.
        OutputError: ``rejects`` cannot be written.
    """
    check_arguments(source, tokenizer, max_length, on_bad, rejects)
    refused, kept, digest = RefusedRows(str(source)), [], hashlib.sha256()
    with rejects_writer(rejects if on_bad == "skip" else None) as write:
        for line, raw in iter_rows(source, _COLUMNS, progress=progress):
            refused.rows += 1
            try:
                rollout = _rollout(parse_row(raw), labels, reward_range)
                _require_length(rollout, tokenizer, max_length)
            except RowProblem as problem:
                refused.refuse(line, problem)
                write(reject_line(source, line, problem, raw))
                continue
            kept.append(rollout)
            content = [rollout.prompt, rollout.text, rollout.reward, rollout.finished]
            digest.update(json.dumps(content).encode() + b"\n")
    refused.settle(len(kept), on_bad, rejects, 'Nothing is left to use; expected "prompt", "text" and "reward".')
    return Rollouts(kept, digest.hexdigest()[:16])


def tokenize_rollouts(rollouts: Sequence[Rollout], tokenizer: Any) -> list[TokenizedRollout]:
    """Token ids of every completion as generation and ``rgtg score`` read them; those that ended are closed by EOS."""
    return [_tokenize(rollout, tokenizer) for rollout in rollouts]


def _tokenize(rollout: Rollout, tokenizer: Any) -> TokenizedRollout:
    prompt_ids = encode_prompt(tokenizer, rollout.prompt)
    ids = encode_completion(tokenizer, rollout.prompt, rollout.text, append_eos=rollout.finished, prompt_ids=prompt_ids)
    return TokenizedRollout(prompt_ids, ids, rollout.reward)


def _rollout(row: Any, labels: bool, reward_range: tuple[float, float] | None) -> Rollout:
    if not isinstance(row, dict):
        raise RowProblem(Reason.WRONG_TYPE, f"expected an object, got {type(row).__name__}")
    name = "text" if "text" in row else "completion"
    for field in ("prompt", name, "reward"):
        if field not in row:
            raise RowProblem(Reason.MISSING_FIELD, "text (or completion)" if field == name else field)
    for field in ("prompt", name):
        if not isinstance(row[field], str):
            raise RowProblem(Reason.WRONG_TYPE, f"{field} is no text")
    reason = row.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise RowProblem(Reason.WRONG_TYPE, "finish_reason is no text")
    reward = _reward(row["reward"], labels, reward_range)
    return Rollout(row["prompt"], completion_text(row), reward, reason != "length")


def _reward(given: Any, labels: bool, reward_range: tuple[float, float] | None) -> float:
    """The row's reward, scaled where a range is given.

    >>> _reward(3, True, (-1.0, 4.0))
    0.8
    """
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise RowProblem(Reason.BAD_REWARD, f"{given!r} is no finite number")
    low, high = reward_range or (0.0, 1.0)
    reward = (given - low) / (high - low)
    if labels and not 0 <= reward <= 1:
        advice = "" if reward_range else "; scale rewards with cumulative_mse.reward_range=[lowest, highest]"
        raise RowProblem(Reason.BAD_REWARD, f"{given} is not in [{low:g}, {high:g}]{advice}")
    return float(reward)


def _require_length(rollout: Rollout, tokenizer: Any, max_length: int | None) -> None:
    try:
        ids = _tokenize(rollout, tokenizer)
    except DataError as error:
        raise RowProblem(Reason.EMPTY_PROMPT, str(error)) from error
    if not ids.completion_ids:
        raise RowProblem(Reason.EMPTY_COMPLETION, "no token, and no EOS that would close it")
    total = len(ids.prompt_ids) + len(ids.completion_ids)
    if max_length is not None and total > max_length:
        raise RowProblem(Reason.TOO_LONG, f"{total} tokens, at most {max_length} allowed")
