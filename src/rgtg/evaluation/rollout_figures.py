"""The figure of an audit by roll-outs."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgtg.evaluation.plots import COLOURS, draw_band, new_figure
from rgtg.types.rollouts import CandidateFigures, RolloutAuditResult


def plot_rollout_audit(results: Mapping[str, RolloutAuditResult], path: "str | Path | Any", **options: Any) -> None:
    """Write two panels: how each scorer orders candidates by position, and what guidance with it gains."""
    figure, (left, right) = new_figure(9.6, 4.0, columns=2)
    draw_rollout_audits(left, right, results)
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=150, **options)


def draw_rollout_audits(
    left: Any, right: Any, results: Mapping[str, RolloutAuditResult], colours: Sequence[str] = COLOURS
) -> None:
    """Spearman within a prefix (left) and gain of one guided token (right), by position, with 95 % bands."""
    for colour, (label, result) in zip(itertools.cycle(colours), results.items(), strict=False):
        points = result.by_position
        draw_band(left, _places(points), [p.spearman for p in points], colour, label)
        draw_band(right, _places(points), [p.guided.gain for p in points], colour, label)
    points = next(iter(results.values())).by_position
    left.plot(_places(points), [p.ceiling for p in points], color="grey", linestyle="--", label="ceiling (noise)")
    left.axhline(0, color="grey", linestyle=":")
    right.axhline(0, color="grey", linestyle=":", label="the policy's own sampling")
    left.set(xlabel="share of the completion written (%)", ylabel="rank correlation with the roll-outs", xlim=(0, 100))
    right.set(xlabel="share of the completion written (%)", ylabel="gain of one guided token (reward)", xlim=(0, 100))


def _places(points: list[CandidateFigures]) -> list[float]:
    """Middle of each part, in per cent."""
    edges = [0.0, *(100 * (p.position or 1.0) for p in points)]
    return [(low + high) / 2 for low, high in itertools.pairwise(edges)]
