"""Is a scorer fit for token-wise guidance? Pairwise accuracy and margin by prefix length, with intervals."""

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rgtg.data.pairs import read_pairs, tokenize_pairs
from rgtg.errors import DataError, UsageError
from rgtg.evaluation.metrics import bootstrap_interval, expected_calibration_error
from rgtg.evaluation.provenance import provenance
from rgtg.models.scorers.base import ReadableScorer, load_scorer, weights_of
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.types.audit import AuditPoint, AuditResult
from rgtg.types.base import Interval
from rgtg.types.generation import PreferencePair

# A token position is reported while at least this many pairs reach it.
MIN_PAIRS = 20
# A scorer is called fit where its accuracy over the first half of completions is at least this share of the way from
# chance to its own accuracy on whole completions.
FIT_SHARE = 0.5


@dataclass(frozen=True)
class _Margins:
    """r(y^w_{1:i}) − r(y^l_{1:i}) of one pair for i = 1 … T, and where the prefixes differ at all."""

    values: Tensor
    differs: Tensor


def audit_prefixes(
    scorer: "ReadableScorer | str | tuple[Any, Any]",
    pairs: "Sequence[PreferencePair] | str | Path",
    *,
    batch_size: int = 8,
    bootstrap: int = 1000,
    fractions: int = 10,
    seed: int = 0,
    on_bad: Literal["error", "skip"] = "error",
    rejects: Path | None = None,
) -> AuditResult:
    """Measure a scorer on partial sequences.

    For every pair and every length i the margin is m_i = r(y^w_{1:i}) − r(y^l_{1:i}); the shorter completion is held at
    its last score. Lengths at which both prefixes are still the same are left out. Accuracy is the share of m_i > 0
    among pairs with m_i ≠ 0; ties are counted apart. Any Hugging Face reward model with one label will do.

    Args:
        scorer: a loaded scorer, a folder or hub id, or a (model, tokenizer) pair.
        pairs: preference pairs, or a file of them.
        batch_size: completions per forward.
        bootstrap: resamples of the pairs for the 95 % intervals.
        fractions: equal parts of the completion at which it is read.
        seed: of the bootstrap.
        on_bad: what to do with bad rows of a file, and with pairs over the scorer's context.
        rejects: where ``skip`` writes each bad row of a file with its line, reason and raw text, as JSONL.

    Raises:
        DataError: unusable pairs, or none left.
        UsageError: ``rejects`` without ``skip``, or for pairs that come from no file.
        OutputError: ``rejects`` cannot be written.
    """
    model = load_scorer(scorer)
    assert not isinstance(model, SharedTrunkScorer), "without a policy nothing is joined with one"
    kept, fingerprint = _usable_pairs(model, pairs, on_bad, rejects)
    margins = _all_margins(model, kept, batch_size)
    if not any(m.differs.any() for m in margins):
        raise DataError("chosen and rejected are the same tokens in every pair: there is nothing to tell apart")
    options = {"seed": seed, "resamples": bootstrap}
    by_fraction = [
        _point(q / fractions, margins, [_at_fraction(m, q / fractions) for m in margins], options)
        for q in range(1, fractions + 1)
    ]
    full = by_fraction[-1].accuracy
    early = _accuracy_until(margins, 0.5, options)
    return AuditResult(
        scorer=Path(model.name).name,
        objective=model.info.objective if model.info else "unknown",
        pairs=len(kept),
        by_tokens=_by_tokens(margins, options),
        by_fraction=by_fraction,
        full_accuracy=full,
        calibration_error=_calibration_error(margins),
        verdict=verdict(early, full),
        provenance=provenance(
            command="rgtg audit",
            settings={"batch_size": batch_size, "bootstrap": bootstrap, "fractions": fractions, "on_bad": on_bad},
            seed=seed,
            models={"scorer": weights_of(model)},
            data={"pairs": fingerprint},
        ),
    )


def verdict(early: Interval, full: Interval) -> str:
    """In words: is the scorer's accuracy over the first half of completions above chance, and near its full one?

    "Fit" needs an interval above 0.5 and at least half of the full accuracy's lead over chance.
    """
    if not early.n or not full.n:
        return (
            "No verdict: over the first half of completions, or on whole ones, the two sides of every pair got the "
            "same score (ties) or were the same text."
        )
    figures = (
        f"over the first half of completions it orders {early.mean:.1%} of prefixes rightly "
        f"({early.low:.1%} to {early.high:.1%}), on whole ones {full.mean:.1%}"
    )
    if full.low <= 0.5 and early.low <= 0.5:
        return f"No evidence of skill: {figures}; no better than chance on these pairs."
    if early.low <= 0.5:
        return f"Unfit for token-wise guidance: {figures}. Use it for best-of-n, or train with prefix-bt."
    if early.mean - 0.5 >= FIT_SHARE * (full.mean - 0.5):
        return f"Fit for token-wise guidance by this measure: {figures}."
    return f"Weak on prefixes: {figures}. It steers early tokens poorly; train with prefix-bt."


def _usable_pairs(
    model: ReadableScorer,
    pairs: "Sequence[PreferencePair] | str | Path",
    on_bad: Literal["error", "skip"],
    rejects: Path | None,
) -> tuple[list[PreferencePair], str]:
    if rejects is not None and (on_bad != "skip" or not isinstance(pairs, str | Path)):
        raise UsageError("rejects is where on_bad='skip' puts the bad rows of a file; here it would have no use")
    if isinstance(pairs, str | Path):
        read = read_pairs(pairs, tokenizer=model.tokenizer, max_length=model.max_length, on_bad=on_bad, rejects=rejects)
        if rejects is not None and (reasons := read.summary.rejects_by_reason):
            counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
            left_out = f"left out {sum(reasons.values())} of {read.summary.rows} rows ({counts})"
            warnings.warn(f"{pairs}: {left_out}; they are in {rejects}", stacklevel=3)
        kept, fingerprint = list(read.pairs), read.fingerprint
    else:
        kept = _fitting(model, pairs) if on_bad == "skip" else list(pairs)
        fingerprint = _fingerprint(kept)
    if not kept:
        raise DataError("there are no pairs to audit with")
    return kept, fingerprint


def _fitting(model: ReadableScorer, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs that fit the scorer's context; a warning counts the others."""
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
    """Hash of contents and order: for the same pairs, the one that `read_pairs` gives a file."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.prompt_templated]).encode() + b"\n")
    return digest.hexdigest()[:16]


def _all_margins(model: ReadableScorer, pairs: Sequence[PreferencePair], batch_size: int) -> list[_Margins]:
    tokenized = tokenize_pairs(pairs, model.tokenizer, append_eos=model.append_eos)
    prompts = [pair.prompt_ids for pair in tokenized]
    chosen = [pair.chosen_ids for pair in tokenized]
    rejected = [pair.rejected_ids for pair in tokenized]
    scores = model.score_prefixes(prompts * 2, chosen + rejected, batch_size=batch_size)
    half = len(pairs)
    return [_margins(scores[i], scores[half + i], chosen[i], rejected[i]) for i in range(half)]


def _margins(won: Tensor, lost: Tensor, chosen: Sequence[int], rejected: Sequence[int]) -> _Margins:
    longest = max(len(won), len(lost))
    values = _hold(won, longest) - _hold(lost, longest)
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    return _Margins(values.double(), torch.arange(longest) >= same)


def _hold(scores: Tensor, length: int) -> Tensor:
    return torch.cat([scores, scores[-1:].expand(length - len(scores))])


def _at_fraction(margins: _Margins, fraction: float) -> int:
    """Index of the prefix that holds this fraction of the longer completion."""
    return max(1, math.ceil(fraction * len(margins.values) - 1e-9)) - 1


def _point(position: float, margins: Sequence[_Margins], indices: Sequence[int], options: dict[str, Any]) -> AuditPoint:
    """Accuracy and margin of the pairs at one index each; pairs that do not differ there are left out."""
    read = [float(m.values[i]) for m, i in zip(margins, indices, strict=True) if m.differs[i]]
    decided = [float(value > 0) for value in read if value != 0]
    nothing = Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    return AuditPoint(
        position=position,
        accuracy=bootstrap_interval(decided, **options) if decided else nothing,
        margin=bootstrap_interval(read, **options) if read else nothing,
        ties=len(read) - len(decided),
        pairs=len(read),
    )


def _by_tokens(margins: Sequence[_Margins], options: dict[str, Any]) -> list[AuditPoint]:
    """Token positions 1, 2, 4, 8 … while enough pairs reach them and differ there."""
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
    if not values:
        return Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    return bootstrap_interval(values, clusters=units, **options)


def _calibration_error(margins: Sequence[_Margins]) -> float:
    """ECE of σ(m) as the probability that the chosen side wins, over all prefixes that differ.

    The label is always "chosen wins", so each margin also enters with its sign turned: a reader who does not know the
    sides sees both.
    """
    pooled = torch.cat([m.values[m.differs] for m in margins])
    if not len(pooled):
        return math.nan
    both = torch.cat([pooled, -pooled]).sigmoid()
    outcomes = torch.cat([torch.ones_like(pooled), torch.zeros_like(pooled)])
    return expected_calibration_error(both.tolist(), outcomes.tolist())
