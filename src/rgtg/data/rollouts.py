"""Rollouts: completions of the policy with a reward each. Read, check and tokenize them."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rgtg.data.completions import UNFINISHED, completion_source, completion_text, is_chat
from rgtg.data.formats import to_template_kwargs
from rgtg.data.sources import (
    BadRowCounter,
    ReadProgress,
    RejectReason,
    RowError,
    check_arguments,
    require_known_tokens,
    usable_rows,
)
from rgtg.errors import DataError, UsageError, one_line
from rgtg.tokenization.conversation import TemplateKwargs, check_template_kwargs, encode_completed, render_chat

_COLUMNS = ("prompt", "messages", "chat_template_kwargs", "text", "completion", "reward", "finish_reason")


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion and its reward.

    Attributes:
        prompt: text; of a chat, as the tokenizer's chat template writes it.
        text: of the completion.
        reward: of the completion.
        finished: false if it was cut off at a length limit.
        templated: whether the prompt is that of a chat, special tokens included.
        template_kwargs: variables of the chat template.
    """

    prompt: str
    text: str
    reward: float
    finished: bool
    templated: bool = False
    template_kwargs: TemplateKwargs | None = None


@dataclass(frozen=True, slots=True)
class TokenizedRollout:
    """Token ids of one completion, with EOS (a chat's: with the end of a turn) if it finished, and its reward."""

    prompt_ids: list[int]
    completion_ids: list[int]
    reward: float

    @property
    def rows(self) -> list[tuple[list[int], list[int]]]:
        """One (prompt, completion); a pair has two."""
        return [(self.prompt_ids, self.completion_ids)]


@dataclass
class Rollouts:
    """The usable rows of a file in order. ``fingerprint`` is a hash of their contents and order."""

    rows: list[Rollout]
    fingerprint: str


def read_rollouts(
    source: str | Path,
    *,
    tokenizer: Any,
    max_length: int | None = None,
    embeddings: int | None = None,
    labels: bool = False,
    reward_range: tuple[float, float] | None = None,
    on_bad: Literal["error", "skip"] = "error",
    rejects: Path | None = None,
    progress: ReadProgress | None = None,
    chat_template_kwargs: TemplateKwargs | None = None,
) -> Rollouts:
    """Read rows of prompt, text (or completion) and reward, as ``rgtg generate`` and then ``rgtg score`` write them.

    A row with chat messages (``messages``, or as its prompt) is read as the policy was given it: rendered by the
    tokenizer's chat template with the row's own ``chat_template_kwargs``. The same text may occur several times, since
    it can be sampled several times. A completion with ``finish_reason`` "length" or "abstained" gets no EOS.

    Args:
        source: a file of the kinds that pairs come in.
        tokenizer: counts lengths.
        max_length: longest prompt + completion in tokens.
        embeddings: number of tokens that the model which reads the rows has embeddings for; None is not checked.
        labels: rewards must lie in [0, 1], after scaling by ``reward_range``.
        reward_range: (lowest, highest) reward, scaled linearly to 0 and 1.
        on_bad: ``error`` raises an error if any row is bad; ``skip`` leaves bad rows out.
        rejects: file to which ``skip`` writes each bad row.
        progress: called now and then with how much of the source is read, and how much there is.
        chat_template_kwargs: variables of the chat template, for rows that have none of their own.

    Raises:
        DataError: bad rows (``error``), with file and line; no usable row; a file that is empty or corrupt.
        UsageError: no such file, an unknown kind of file, or rejects that would overwrite it.
        OutputError: ``rejects`` cannot be written.
    """
    check_arguments(source, tokenizer, max_length, on_bad, rejects)
    check_template_kwargs(tokenizer, chat_template_kwargs)
    rejects = rejects if on_bad == "skip" else None

    def check(line: int, row: Any) -> Rollout:
        rollout = _rollout(row, labels, reward_range, tokenizer, chat_template_kwargs)
        _check_tokens(rollout, tokenizer, max_length, embeddings)
        return rollout

    bad, digest = BadRowCounter(str(source)), hashlib.sha256()
    kept = list(usable_rows(source, _COLUMNS, check, bad, rejects=rejects, progress=progress))
    bad.finish(len(kept), on_bad, rejects, 'Nothing is left to use; expected "prompt", "text" and "reward".')
    if chat_template_kwargs and not any(rollout.templated for rollout in kept):
        raise UsageError(f"chat_template_kwargs applies to chats, and {source} holds none")
    for rollout in kept:
        content = [rollout.prompt, rollout.text, rollout.reward, rollout.finished]
        content += [True] if rollout.templated else []
        digest.update(json.dumps(content).encode() + b"\n")
    return Rollouts(kept, digest.hexdigest()[:16])


def tokenize_rollouts(rollouts: Sequence[Rollout], tokenizer: Any) -> list[TokenizedRollout]:
    """Tokenize every completion as generation does; finished ones end with EOS, or as the chat template ends a turn."""
    return [_tokenize(rollout, tokenizer) for rollout in rollouts]


def _tokenize(rollout: Rollout, tokenizer: Any) -> TokenizedRollout:
    prompt_ids, ids = encode_completed(
        tokenizer, rollout.prompt, rollout.text, finished=rollout.finished, append_eos=True,
        templated=rollout.templated, template_kwargs=rollout.template_kwargs,
    )  # fmt: skip
    return TokenizedRollout(prompt_ids, ids, rollout.reward)


def _rollout(
    row: Any,
    labels: bool,
    reward_range: tuple[float, float] | None,
    tokenizer: Any,
    template_kwargs: TemplateKwargs | None,
) -> Rollout:
    if not isinstance(row, dict):
        raise RowError(RejectReason.WRONG_TYPE, f"expected an object, got {type(row).__name__}")
    name = "text" if "text" in row else "completion"
    chat = is_chat(row)
    for field in ([] if chat else ["prompt"]) + [name, "reward"]:
        if field not in row:
            raise RowError(RejectReason.MISSING_FIELD, "text (or completion)" if field == name else field)
    for field in ([] if chat else ["prompt"]) + [name]:
        if not isinstance(row[field], str):
            raise RowError(RejectReason.WRONG_TYPE, f"{field} is not text")
    reason = row.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise RowError(RejectReason.WRONG_TYPE, "finish_reason is not text")
    reward = _reward(row["reward"], labels, reward_range)
    own = to_template_kwargs(row)
    if not chat:
        if own:
            raise RowError(RejectReason.UNSUPPORTED, "chat_template_kwargs: the prompt is plain text, not a chat")
        return Rollout(row["prompt"], completion_text(row), reward, reason not in UNFINISHED)
    kwargs = own or template_kwargs
    source = completion_source(row)
    assert not isinstance(source, str), "messages"
    try:
        prompt = render_chat(tokenizer, source, add_generation_prompt=True, template_kwargs=kwargs)
    except DataError as error:
        raise RowError(RejectReason.CHAT_TEMPLATE, one_line(error, 200)) from error
    return Rollout(
        prompt, completion_text(row), reward, reason not in UNFINISHED, templated=True, template_kwargs=kwargs
    )


def _reward(given: Any, labels: bool, reward_range: tuple[float, float] | None) -> float:
    """The row's reward, scaled if a range is given.

    >>> _reward(3, True, (-1.0, 4.0))
    0.8
    """
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise RowError(RejectReason.BAD_REWARD, f"{given!r} is not a finite number")
    low, high = reward_range or (0.0, 1.0)
    reward = (given - low) / (high - low)
    if labels and not 0 <= reward <= 1:
        advice = "" if reward_range else "; scale rewards with cumulative_mse.reward_range=[lowest, highest]"
        raise RowError(RejectReason.BAD_REWARD, f"{given} is not in [{low:g}, {high:g}]{advice}")
    return float(reward)


def _check_tokens(rollout: Rollout, tokenizer: Any, max_length: int | None, embeddings: int | None) -> None:
    try:
        ids = _tokenize(rollout, tokenizer)
    except DataError as error:
        raise RowError(RejectReason.EMPTY_PROMPT, str(error)) from error
    if not ids.completion_ids:
        raise RowError(RejectReason.EMPTY_COMPLETION, "it has no token and no EOS")
    total = len(ids.prompt_ids) + len(ids.completion_ids)
    if max_length is not None and total > max_length:
        raise RowError(RejectReason.TOO_LONG, f"{total} tokens, at most {max_length} allowed")
    for part in (ids.prompt_ids, ids.completion_ids):
        require_known_tokens(part, embeddings)
