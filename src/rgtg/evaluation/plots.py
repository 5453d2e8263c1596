"""Plots of audits, and the helpers for all plots. Matplotlib is imported only here, when a figure is made."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgtg.errors import MissingExtraError
from rgtg.types.audit import AuditResult
from rgtg.types.base import Interval
from rgtg.types.rollouts import CandidateFigures, RolloutAuditResult

# Okabe and Ito's palette, which is safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(width: float = 6.4, height: float = 4.0, *, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (an array if there are several), without matplotlib's global state.

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
    """Draw points, joined in the order given, with their intervals as bars; ends that are not finite are left out."""
    below = [max(0.0, value.mean - value.low) if math.isfinite(value.low) else 0.0 for value in y]
    above = [max(0.0, value.high - value.mean) if math.isfinite(value.high) else 0.0 for value in y]
    axes.errorbar(x, [value.mean for value in y], yerr=[below, above], **{"marker": "o", "capsize": 2} | style)


def draw_band(axes: Any, x: Sequence[float], y: Sequence[Interval], colour: str, label: str) -> None:
    """Draw a curve with its intervals as a band."""
    axes.plot(x, [value.mean for value in y], color=colour, marker="o", markersize=3, label=label)
    axes.fill_between(x, [v.low for v in y], [v.high for v in y], color=colour, alpha=0.15, linewidth=0)


def plot_audit(results: Mapping[str, AuditResult], path: "str | Path | Any", **options: Any) -> None:
    """Write the plot of ``draw_audits`` to a file."""
    figure, axes = new_figure()
    draw_audits(axes, results)
    axes.set_ylabel("pairs ordered as the humans did")
    axes.legend()
    figure.savefig(path, dpi=150, **options)


def draw_audits(axes: Any, results: Mapping[str, AuditResult], colours: Sequence[str] = COLOURS) -> None:
    """Draw pairwise accuracy by fraction of the completion, one curve with its 95 % band for each scorer."""
    for colour, (label, result) in zip(itertools.cycle(colours), results.items(), strict=False):
        points = [p for p in result.by_fraction if p.accuracy.n]
        draw_band(axes, [100 * p.position for p in points], [p.accuracy for p in points], colour, label)
    axes.axhline(0.5, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="share of the completion read (%)", xlim=(0, 102))


def plot_rollout_audit(results: Mapping[str, RolloutAuditResult], path: "str | Path | Any", **options: Any) -> None:
    """Write two panels by position: how each scorer ranks candidates, and what guidance with it gains."""
    figure, (left, right) = new_figure(9.6, 4.0, columns=2)
    draw_rollout_audits(left, right, results)
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=150, **options)


def draw_rollout_audits(
    left: Any, right: Any, results: Mapping[str, RolloutAuditResult], colours: Sequence[str] = COLOURS
) -> None:
    """Draw Spearman within a prefix (left) and the gain of one guided token (right) by position, with 95 % bands."""
    for colour, (label, result) in zip(itertools.cycle(colours), results.items(), strict=False):
        points = result.by_position
        draw_band(left, _middles(points), [p.spearman for p in points], colour, label)
        draw_band(right, _middles(points), [p.guided.gain for p in points], colour, label)
    points = next(iter(results.values())).by_position
    left.plot(_middles(points), [p.ceiling for p in points], color="grey", linestyle="--", label="ceiling (noise)")
    left.axhline(0, color="grey", linestyle=":")
    right.axhline(0, color="grey", linestyle=":", label="the policy's own sampling")
    left.set(xlabel="share of the completion written (%)", ylabel="rank correlation with the roll-outs", xlim=(0, 100))
    right.set(xlabel="share of the completion written (%)", ylabel="gain of one guided token (reward)", xlim=(0, 100))


def _middles(points: list[CandidateFigures]) -> list[float]:
    """The middle of each part of the completion, in percent."""
    edges = [0.0, *(100 * (p.position or 1.0) for p in points)]
    return [(low + high) / 2 for low, high in itertools.pairwise(edges)]
