"""Figures of audits and comparisons; matplotlib is loaded here and nowhere else at run time."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgtg.errors import MissingExtraError
from rgtg.types.audit import AuditResult
from rgtg.types.base import Interval
from rgtg.types.rollouts import CandidateFigures, RolloutAuditResult

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(width: float = 6.4, height: float = 4.0, *, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (an array of them where there are several), without touching matplotlib's global state.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib: pip install 'rgtg[report]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def draw_intervals(axes: Any, x: Sequence[float], y: Sequence[Interval], **style: Any) -> None:
    """Points, joined in the order given, with their intervals as bars; an end that is no number draws none."""
    below = [max(0.0, value.mean - value.low) if math.isfinite(value.low) else 0.0 for value in y]
    above = [max(0.0, value.high - value.mean) if math.isfinite(value.high) else 0.0 for value in y]
    axes.errorbar(x, [value.mean for value in y], yerr=[below, above], **{"marker": "o", "capsize": 2} | style)


def draw_band(axes: Any, x: Sequence[float], y: Sequence[Interval], colour: str, label: str) -> None:
    """A curve with its intervals as a band."""
    axes.plot(x, [value.mean for value in y], color=colour, marker="o", markersize=3, label=label)
    axes.fill_between(x, [v.low for v in y], [v.high for v in y], color=colour, alpha=0.15, linewidth=0)


def plot_audit(results: Mapping[str, AuditResult], path: "str | Path | Any", **options: Any) -> None:
    """Write the curves of ``draw_audits`` as a picture."""
    figure, axes = new_figure()
    draw_audits(axes, results)
    axes.set_ylabel("pairs ordered as the humans did")
    axes.legend()
    figure.savefig(path, dpi=150, **options)


def draw_audits(axes: Any, results: Mapping[str, AuditResult], colours: Sequence[str] = COLOURS) -> None:
    """Pairwise accuracy by fraction of the completion, one curve with its 95 % band per scorer."""
    for colour, (label, result) in zip(itertools.cycle(colours), results.items(), strict=False):
        points = [p for p in result.by_fraction if p.accuracy.n]
        draw_band(axes, [100 * p.position for p in points], [p.accuracy for p in points], colour, label)
    axes.axhline(0.5, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="share of the completion read (%)", xlim=(0, 102))


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
