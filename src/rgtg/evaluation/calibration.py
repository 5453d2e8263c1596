"""Score thresholds with a guarantee: all but a share α of good completions stay as the policy draws them."""

import math
from collections.abc import Sequence
from typing import Any

from rgtg.data.completions import UNFINISHED, completion_source, completion_text, is_chat
from rgtg.data.formats import to_template_kwargs
from rgtg.errors import DataError, NonFiniteError, UsageError
from rgtg.evaluation.provenance import provenance
from rgtg.models.scorers.base import CompletionScorer
from rgtg.tokenization.conversation import check_template_kwargs, encode_completed, encode_source
from rgtg.tokenization.encoding import decode_completion
from rgtg.types.calibration import CalibrationResult


def conformal_threshold(lowest: Sequence[float], alpha: float) -> float:
    """The threshold below which a new good completion falls with probability at most α.

    With S_i the lowest score of good completion i over its prefixes, c is the ⌊(m + 1)·α⌋-th smallest of S_1 … S_m. If
    the new completion is exchangeable with these, P(S < c) ≤ ⌊(m + 1)·α⌋/(m + 1) ≤ α: split conformal prediction (Vovk
    et al. 2005), as value-filtered decoding (arXiv 2605.14746) uses it.

    Args:
        lowest: S_i of m good completions.
        alpha: in (0, 1).

    Raises:
        UsageError: too few completions for this α.

    >>> conformal_threshold([0.3, 0.1, 0.2, 0.5, 0.4, 0.9, 0.8, 0.7, 0.6], alpha=0.2)
    0.2
    """
    # a share such as 0.1 of 9 + 1 must not fall short by a rounding error
    rank = math.floor((len(lowest) + 1) * alpha + 1e-9)
    if rank < 1:
        needed = math.ceil(1 / alpha - 1e-9) - 1
        raise UsageError(
            f"{len(lowest)} good completions are too few for alpha = {alpha:g}: at least {needed} are needed for any "
            "threshold. Give more completions, or a larger alpha",
            setting="alpha",
        )
    return sorted(lowest)[rank - 1]


def labels_of(rows: Sequence[dict[str, Any]], good_above: float | None) -> list[bool]:
    """Whether each completion is good: its ``good``, or whether its ``reward`` exceeds ``good_above``.

    Raises:
        DataError: a row without what says so; names the row.
    """
    found: list[bool] = []
    for i, row in enumerate(rows):
        value = row.get("good" if good_above is None else "reward")
        if good_above is None and isinstance(value, bool):
            found.append(value)
        elif good_above is not None and isinstance(value, int | float) and not isinstance(value, bool):
            found.append(value > good_above)
        else:
            expected = 'true or false in "good" (or good_above)' if good_above is None else 'a number in "reward"'
            raise DataError(f"row {i + 1}: expected {expected}, got {value!r}", row=i)
    return found


def lowest_scores(
    scorer: CompletionScorer,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 8,
    template_kwargs: dict[str, Any] | None = None,
) -> list[float]:
    """The lowest score of each completion over its prefixes, as token-wise decoding sees them.

    Args:
        scorer: of the policy's tokens.
        rows: of `rgtg.data.completions.read_completions`; ``token_ids``, if they are there, are read as they are.
        batch_size: completions per forward pass.
        template_kwargs: variables of the chat template, for rows that have none of their own.

    Raises:
        UsageError: variables of the chat template that no row or no template reads.
        DataError: a row that the scorer cannot read, or whose token ids are not this scorer's; names the row.
        NonFiniteError: NaN or infinite scores.
    """
    if template_kwargs:
        if not any(is_chat(row) for row in rows):
            raise UsageError(
                "chat_template_kwargs applies to chats, and every prompt is plain text", setting="chat_template_kwargs"
            )
        check_template_kwargs(scorer.tokenizer, template_kwargs)
    prompts, completions = [], []
    for i, row in enumerate(rows):
        try:
            prompt, ids = _tokens(scorer, row, to_template_kwargs(row) or template_kwargs)
        except DataError as error:
            raise DataError(f"row {i + 1}: {error}", row=i) from error
        prompts.append(prompt)
        completions.append(ids)
    lowest = [float(scores.min()) for scores in scorer.score_prefixes(prompts, completions, batch_size=batch_size)]
    for i, score in enumerate(lowest):
        if not math.isfinite(score):
            raise NonFiniteError(
                f"row {i + 1} has a score of {score}; try dtype=float32, or check the scorer's training"
            )
    return lowest


def calibrate(
    scorer: CompletionScorer,
    rows: Sequence[dict[str, Any]],
    *,
    alpha: float = 0.05,
    good_above: float | None = None,
    batch_size: int = 8,
    template_kwargs: dict[str, Any] | None = None,
) -> CalibrationResult:
    """Find the threshold for ``value_threshold`` and ``abstain_below`` from labelled completions of the policy.

    The guarantee needs completions that were drawn as the guided ones will be: by the same policy with the same
    ``top_k``, ``temperature`` and length, for prompts like those to come, and not used to train the scorer.

    Args:
        scorer: that will filter.
        rows: as `lowest_scores`, with labels as `labels_of`.
        alpha: largest share of good completions that may be touched.
        good_above: reward above which a completion is good.
        batch_size: completions per forward pass.
        template_kwargs: variables of the chat template, for rows that have none of their own.

    Raises:
        UsageError: too few good completions, and as `lowest_scores`.
        DataError, NonFiniteError: as `labels_of` and `lowest_scores`.
    """
    labels = labels_of(rows, good_above)
    lowest = lowest_scores(scorer, rows, batch_size=batch_size, template_kwargs=template_kwargs)
    good = [score for score, is_good in zip(lowest, labels, strict=True) if is_good]
    bad = [score for score, is_good in zip(lowest, labels, strict=True) if not is_good]
    threshold = conformal_threshold(good, alpha)
    return CalibrationResult(
        scorer=scorer.name, alpha=alpha, threshold=threshold, good=len(good), bad=len(bad),
        touched_good=_share_below(good, threshold), touched_bad=_share_below(bad, threshold) if bad else None,
        provenance=provenance(
            command="rgtg calibrate", settings={"alpha": alpha, "good_above": good_above}, seed=None,
            models={"scorer": scorer.model}, data={},
        ),
    )  # fmt: skip


def _tokens(
    scorer: CompletionScorer, row: dict[str, Any], template_kwargs: dict[str, Any] | None
) -> tuple[list[int], list[int]]:
    """Prompt and completion of a row, in tokens."""
    source, text, tokenizer = completion_source(row), completion_text(row), scorer.tokenizer
    kwargs = None if isinstance(source, str) else template_kwargs
    if row.get("token_ids") is None:
        finished = row.get("finish_reason") not in UNFINISHED
        return encode_completed(
            tokenizer, source, text, finished=finished, append_eos=scorer.append_eos, template_kwargs=kwargs
        )
    ids = [int(token) for token in row["token_ids"]]
    _, prompt = encode_source(tokenizer, source, template_kwargs=kwargs)
    # a stop text is no part of the text, but its tokens are
    if not ids or not decode_completion(tokenizer, prompt, ids).startswith(text.rstrip("�")):
        raise DataError(
            f'"token_ids" do not say "text" in the tokenizer of {scorer.name}: it must read the policy\'s tokens'
        )
    return prompt, ids


def _share_below(scores: Sequence[float], threshold: float) -> float:
    return sum(score < threshold for score in scores) / len(scores)
