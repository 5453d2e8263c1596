"""Figures of audits and comparisons; matplotlib is loaded here and nowhere else at run time."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rgtg.errors import MissingExtraError
from rgtg.types.audit import AuditResult
from rgtg.types.base import Interval

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
