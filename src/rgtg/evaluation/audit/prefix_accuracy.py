"""``audit_prefixes``: a scorer's pairwise accuracy and margin by prefix length, with bootstrap intervals."""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgtg.data.pairs import read_pairs, tokenize_pairs
from rgtg.errors import DataError, UsageError
from rgtg.evaluation.metrics import expected_calibration_error, interval_or_empty, pair_correlation
from rgtg.evaluation.provenance import provenance
from rgtg.models.scorers.base import CompletionScorer, load_scorer, weights_of
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.tokenization.conversation import TemplateKwargs
from rgtg.tokenization.encoding import embedding_rows
from rgtg.types.audit import AuditPoint, AuditResult
from rgtg.types.base import Interval
from rgtg.types.generation import PreferencePair

# A token position is reported if at least this many pairs reach it.
MIN_PAIRS = 20
# A scorer is called fit if its accuracy over the first half of completions is at least this share of the way from
# chance to its own accuracy on whole completions.
FIT_SHARE = 0.5


@dataclass(frozen=True)
class _Margins:
    """Margins of one pair for i = 1 … T, where T is the length of the longer completion."""

    values: Float[Tensor, " length"]  # r(y^w_{1:i}) − r(y^l_{1:i})
    differs: Bool[Tensor, " length"]  # whether the two prefixes differ
    longer: int  # tokens of the chosen completion minus those of the rejected one


def audit_prefixes(
    scorer: "CompletionScorer | str | tuple[Any, Any]",
    pairs: "Sequence[PreferencePair] | str | Path",
    *,
    batch_size: int = 8,
    bootstrap: int = 1000,
    fractions: int = 10,
    seed: int = 0,
    on_bad: Literal["error", "skip"] = "error",
    rejects: Path | None = None,
    chat_template_kwargs: TemplateKwargs | None = None,
) -> AuditResult:
    """Measure a scorer on partial sequences.

    For every pair and every length i the margin is m_i = r(y^w_{1:i}) − r(y^l_{1:i}). The shorter completion keeps its
    last score. Lengths at which both prefixes are still the same are left out. Accuracy is the share of m_i > 0 among
    pairs with m_i ≠ 0; ties are counted separately. Any Hugging Face reward model with one label can be audited.

    Args:
        scorer: a loaded scorer, a folder or hub id, or a (model, tokenizer) pair.
        pairs: preference pairs, or a file of them.
        batch_size: completions per forward pass.
        bootstrap: resamples of the pairs for the 95 % intervals.
        fractions: number of equal parts of the completion; the scorer is read at the end of each.
        seed: of the bootstrap.
        on_bad: whether bad rows of a file, and pairs longer than the scorer's context, are errors or are skipped.
        rejects: where ``skip`` writes each bad row of a file with its line, reason and raw text, as JSONL.
        chat_template_kwargs: variables of the scorer's chat template, for the rows of a file.

    Raises:
        DataError: unusable pairs, or no pairs left.
        UsageError: ``rejects`` without ``skip``, or for pairs that do not come from a file.
        OutputError: ``rejects`` cannot be written.
    """
    model = load_scorer(scorer)
    assert not isinstance(model, SharedTrunkScorer), "a LoRA scorer is fused only when a policy is given"
    kept, fingerprint = _usable_pairs(model, pairs, on_bad, rejects, chat_template_kwargs)
    margins = _all_margins(model, kept, batch_size)
    if not any(m.differs.any() for m in margins):
        raise DataError("chosen and rejected are the same tokens in every pair: there is nothing to distinguish")
    options = {"seed": seed, "resamples": bootstrap}
    by_fraction = [
        _point(q / fractions, margins, [_at_fraction(m, q / fractions) for m in margins], options)
        for q in range(1, fractions + 1)
    ]
    full, early = by_fraction[-1].accuracy, _accuracy_until(margins, 0.5, options)
    objective = model.info.objective if model.info else "unknown"
    lengths = [float(m.longer) for m in margins]
    return AuditResult(
        scorer=Path(model.name).name, objective=objective, pairs=len(kept), by_tokens=_by_tokens(margins, options),
        by_fraction=by_fraction, full_accuracy=full, calibration_error=_calibration_error(margins),
        length_correlation=pair_correlation([float(m.values[-1]) for m in margins], lengths, **options),
        label_length_correlation=pair_correlation([1.0] * len(margins), lengths, **options),
        verdict=verdict(early, full, objective),
        provenance=provenance(
            command="rgtg audit",
            settings={"batch_size": batch_size, "bootstrap": bootstrap, "fractions": fractions, "on_bad": on_bad,
                      **({"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {})},
            seed=seed, models={"scorer": weights_of(model)}, data={"pairs": fingerprint},
        ),
    )  # fmt: skip


def verdict(early: Interval, full: Interval, objective: str) -> str:
    """Say whether accuracy over the first half of completions is above chance and near the full one, and what helps.

    "Fit" needs an interval above 0.5 and at least half of the full accuracy's lead over chance.

    Args:
        early: accuracy over the first half of completions.
        full: accuracy on whole completions.
        objective: what the scorer was trained with; ``unknown`` for other reward models.
    """
    if not early.n or not full.n:
        return (
            "No verdict: over the first half of completions, or on whole ones, the two sides of every pair got the "
            "same score (ties) or were the same text."
        )
    figures = (
        f"over the first half of completions it orders {early.mean:.1%} of prefixes correctly "
        f"({early.low:.1%} to {early.high:.1%}), on whole ones {full.mean:.1%}"
    )
    if full.low <= 0.5 and early.low <= 0.5:
        return f"No evidence of skill: {figures}; no better than chance on these pairs."
    if early.low <= 0.5:
        return f"Unfit for token-wise guidance: {figures}. Use it for best-of-n. {_advice(objective)}"
    if early.mean - 0.5 >= FIT_SHARE * (full.mean - 0.5):
        return f"Fit for token-wise guidance by this measure: {figures}."
    return f"Weak on prefixes: {figures}. It steers early tokens poorly. {_advice(objective)}"


def _advice(objective: str) -> str:
    """What may improve accuracy on prefixes, which depends on whether the scorer was trained on prefixes already."""
    match objective:
        case "prefix-bt" | "tcrm" | "farma" | "autoregressive":
            return f"It is already trained on prefixes ({objective}): try more pairs, or a stronger base model."
        case "value" | "cumulative-mse":
            return (
                f"It is already trained on prefixes ({objective}): try more training data, and check that the rewards "
                "in it agree with these pairs."
            )
    return "For token-wise guidance, train a scorer on prefixes (rgtg train --objective prefix-bt)."


def _usable_pairs(
    model: CompletionScorer,
    pairs: "Sequence[PreferencePair] | str | Path",
    on_bad: Literal["error", "skip"],
    rejects: Path | None,
    kwargs: TemplateKwargs | None,
) -> tuple[list[PreferencePair], str]:
    """The pairs to audit with, and their fingerprint."""
    if rejects is not None and (on_bad != "skip" or not isinstance(pairs, str | Path)):
        raise UsageError("rejects holds the bad rows of a file that on_bad='skip' skips; here it would stay empty")
    if kwargs and not isinstance(pairs, str | Path):
        raise UsageError("chat_template_kwargs applies to the chats of a file; these pairs are rendered already")
    if isinstance(pairs, str | Path):
        read = read_pairs(
            pairs, tokenizer=model.tokenizer, max_length=model.max_length, embeddings=embedding_rows(model.model),
            on_bad=on_bad, rejects=rejects,
            chat_template_kwargs=kwargs,
        )  # fmt: skip
        kept, fingerprint = list(read.pairs), read.fingerprint
    else:
        kept = _within_context(model, pairs) if on_bad == "skip" else list(pairs)
        fingerprint = _fingerprint(kept)
    if not kept:
        raise DataError("there are no pairs to audit with")
    return kept, fingerprint


def _within_context(model: CompletionScorer, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs that fit into the scorer's context; a warning counts the others."""
    limit = model.max_length or math.inf
    tokenized = tokenize_pairs(pairs, model.tokenizer, append_eos=model.append_eos)
    kept = [
        pair
        for pair, ids in zip(pairs, tokenized, strict=True)
        if len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids)) <= limit
    ]
    if len(kept) < len(pairs):
        warnings.warn(f"left out {len(pairs) - len(kept)} of {len(pairs)} pairs (too long: {limit})", stacklevel=4)
    return kept


def _fingerprint(pairs: Sequence[PreferencePair]) -> str:
    """Hash of contents and order. For the same pairs it equals the fingerprint that `read_pairs` gives a file."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.prompt_templated]).encode() + b"\n")
    return digest.hexdigest()[:16]


def _all_margins(model: CompletionScorer, pairs: Sequence[PreferencePair], batch_size: int) -> list[_Margins]:
    tokenized = tokenize_pairs(pairs, model.tokenizer, append_eos=model.append_eos)
    prompts = [pair.prompt_ids for pair in tokenized]
    chosen = [pair.chosen_ids for pair in tokenized]
    rejected = [pair.rejected_ids for pair in tokenized]
    scores = model.score_prefixes(prompts * 2, chosen + rejected, batch_size=batch_size)
    half = len(pairs)
    return [_margins(scores[i], scores[half + i], chosen[i], rejected[i]) for i in range(half)]


def _margins(
    won: Float[Tensor, " chosen"], lost: Float[Tensor, " rejected"], chosen: Sequence[int], rejected: Sequence[int]
) -> _Margins:
    longest = max(len(won), len(lost))
    values = _extend(won, longest) - _extend(lost, longest)
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    return _Margins(values.double(), torch.arange(longest) >= same, len(won) - len(lost))


def _extend(scores: Float[Tensor, " tokens"], length: int) -> Float[Tensor, " length"]:
    """The scores, with the last one repeated up to ``length``."""
    return torch.cat([scores, scores[-1:].expand(length - len(scores))])


def _at_fraction(margins: _Margins, fraction: float) -> int:
    """Index of the prefix that holds this fraction of the longer completion."""
    return max(1, math.ceil(fraction * len(margins.values) - 1e-9)) - 1


def _point(position: float, margins: Sequence[_Margins], indices: Sequence[int], options: dict[str, Any]) -> AuditPoint:
    """Accuracy and margin of the pairs, each at its own index; pairs whose prefixes are the same there are left out."""
    values = [float(m.values[i]) for m, i in zip(margins, indices, strict=True) if m.differs[i]]
    decided = [float(value > 0) for value in values if value != 0]
    accuracy, margin = interval_or_empty(decided, **options), interval_or_empty(values, **options)
    return AuditPoint(
        position=position, accuracy=accuracy, margin=margin, ties=len(values) - len(decided), pairs=len(values)
    )


def _by_tokens(margins: Sequence[_Margins], options: dict[str, Any]) -> list[AuditPoint]:
    """Token positions 1, 2, 4, 8 … that enough pairs reach."""
    points: list[AuditPoint] = []
    position = 1
    while True:
        reach = [m for m in margins if len(m.values) >= position]
        if len(reach) < min(MIN_PAIRS, len(margins)):
            return points
        points.append(_point(position, reach, [position - 1] * len(reach), options))
        position *= 2


def _accuracy_until(margins: Sequence[_Margins], fraction: float, options: dict[str, Any]) -> Interval:
    """Accuracy over all prefixes up to a fraction of the completion; whole pairs are resampled."""
    values, units = [], []
    for unit, m in enumerate(margins):
        last = _at_fraction(m, fraction) + 1
        decided = m.values[:last][m.differs[:last] & (m.values[:last] != 0)]
        values += (decided > 0).double().tolist()
        units += [unit] * len(decided)
    return interval_or_empty(values, clusters=units, **options)


def _calibration_error(margins: Sequence[_Margins]) -> float:
    """ECE of σ(m) as the probability that the chosen side wins, over all prefixes that differ.

    The label is always "chosen wins", so each margin is also counted with the opposite sign, as if the sides were
    unknown.
    """
    pooled = torch.cat([m.values[m.differs] for m in margins])
    if not len(pooled):
        return math.nan
    both = torch.cat([pooled, -pooled]).sigmoid()
    outcomes = torch.cat([torch.ones_like(pooled), torch.zeros_like(pooled)])
    return expected_calibration_error(both.tolist(), outcomes.tolist())
