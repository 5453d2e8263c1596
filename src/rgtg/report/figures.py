"""Draws the report's figures: curves through the strengths of each method, with intervals, marks and a legend."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rgtg.evaluation.plots import COLOURS, draw_audits, draw_intervals, draw_rollout_audits, new_figure
from rgtg.report.document import Figure
from rgtg.types.audit import AuditResult
from rgtg.types.comparison import MethodResult
from rgtg.types.rollouts import RolloutAuditResult

# Matplotlib needs a real colour. In the page's SVG it is replaced by the text colour, which follows light and dark.
INK = "#010203"
PALETTE = (*COLOURS[:-1], INK)  # instead of black, which is invisible on a dark page
_WARNING = "#c1121f"
_MARKERS, _LINES = "os^Dv*P", ("-", "--", ":")
_WIDTH = 10.0
_LEGEND_COLUMNS = 4
_RANGE = 15  # an axis with a larger ratio of values is logarithmic

CurveOf = Callable[[MethodResult], str]
Marks = Mapping[str, set[str]]


def legend_height(entries: int) -> float:
    """Height in inches of a legend with so many entries."""
    return 0.24 * math.ceil(entries / _LEGEND_COLUMNS)


def as_svg(of: Figure) -> str:
    """The figure as SVG without an XML declaration, drawn in the text colour of the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _drawn(of)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace(_WARNING, "var(--bad)")


def write_png(of: Figure, path: Path) -> None:
    """Write the figure as a picture on a white background.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    _drawn(of).savefig(path, format="png", dpi=130, facecolor="white", metadata={"Software": ""})


def draw_frontier(
    figure: Any, axes: Any, runs: Sequence[MethodResult], reward: str, curve_of: CurveOf, marks: Marks
) -> None:
    """Draw reward against KL to the policy and, if measured, to the policy renormalised over the candidates."""
    panels = {"kl_nats": "KL to the policy (nats)", "kl_cut_nats": "KL over the same candidates (nats)"}
    for panel, (metric, label) in zip(_flat(axes), panels.items(), strict=False):
        some = [run for run in runs if metric in run.metrics and math.isfinite(run.metrics[metric].mean)]
        at = {run.label: run.metrics[metric].mean for run in some}
        _curves(panel, runs, some, curve_of, at)
        _mark(panel, some, at, marks)
        _scale(panel, list(at.values()), label)
    _finish(figure, axes, reward)


def draw_costs(
    figure: Any, axes: Any, runs: Sequence[MethodResult], reward: str, curve_of: CurveOf, calls: Mapping[str, float]
) -> None:
    """Draw reward against calls of policy and scorer per token, and against milliseconds per token."""
    times = {run.label: 1000 / run.tokens_per_second for run in runs}
    labels = ("policy and scorer calls per token", "milliseconds per token")
    for panel, at, label in zip(_flat(axes), (calls, times), labels, strict=True):
        _curves(panel, runs, runs, curve_of, at)
        _scale(panel, list(at.values()), label)
    _finish(figure, axes, reward)


def draw_prefix_audits(figure: Any, axes: Any, audits: Mapping[str, AuditResult]) -> None:
    """Draw pairwise accuracy by share of the completion read."""
    draw_audits(axes, audits, PALETTE)
    _finish(figure, axes, "pairs ordered correctly")


def draw_candidate_audits(figure: Any, axes: Any, audits: Mapping[str, RolloutAuditResult]) -> None:
    """Draw the two panels of an audit by roll-outs."""
    left, right = _flat(axes)
    draw_rollout_audits(left, right, audits, PALETTE)
    _finish(figure, axes, left.get_ylabel())


def _drawn(of: Figure) -> Any:
    figure, axes = new_figure(_WIDTH if of.columns > 1 else 0.72 * _WIDTH, of.height, columns=of.columns)
    of.draw(figure, axes)
    return figure


def _curves(
    axes: Any,
    everyone: Sequence[MethodResult],
    runs: Sequence[MethodResult],
    curve_of: CurveOf,
    at: Mapping[str, float],
) -> None:
    """Draw one curve for each method through its strengths. A method has the same look in every panel."""
    names = dict.fromkeys(map(curve_of, everyone))
    for i, name in enumerate(names):
        colour, marker = PALETTE[i % len(PALETTE)], _MARKERS[(i + i // len(PALETTE)) % len(_MARKERS)]
        line = _LINES[i // len(PALETTE) % len(_LINES)]
        mine = sorted((run for run in runs if curve_of(run) == name), key=lambda r: (r.strength or 0.0, at[r.label]))
        draw_intervals(
            axes, [at[run.label] for run in mine], [run.metrics["reward"] for run in mine], label=_shown(name),
            color=colour, marker=marker, linestyle=line, linewidth=1.4, markersize=5,
        )  # fmt: skip


def _mark(axes: Any, runs: Sequence[MethodResult], at: Mapping[str, float], marks: Marks) -> None:
    """Draw rings and crosses on the marked runs."""
    ring = {"marker": "o", "markersize": 13, "fillstyle": "none", "color": INK}
    cross = {"marker": "x", "markersize": 11, "markeredgewidth": 2, "color": _WARNING}
    for (name, labels), look in zip(marks.items(), (ring, cross), strict=True):
        some = [run for run in runs if run.label in labels]
        if some:
            x, y = [at[run.label] for run in some], [run.metrics["reward"].mean for run in some]
            axes.plot(x, y, label=name, linestyle="", zorder=5, **look)


def _scale(axes: Any, values: Sequence[float], label: str) -> None:
    """Use a logarithmic axis if the values span decades (a strong beta can cost hundreds of nats)."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > _RANGE * max(min(positive), 1.0):
        axes.set_xscale("symlog", linthresh=1)
        ticks = [0.0, *(step * 10.0**power for power in range(6) for step in (1, 2, 5))]
        low, high = min(values), 1.2 * max(values)
        axes.set_xticks([tick for tick in ticks if low <= 1.5 * tick <= 1.5 * high or (tick == 0 and low < 0.5)])
        axes.set_xticks([], minor=True)
        label += ", logarithmic"
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(label)


def _finish(figure: Any, axes: Any, ylabel: str) -> None:
    """Add one legend for all panels and a light grid, in the text colour."""
    panels = _flat(axes)
    panels[0].set_ylabel(_plain(ylabel))
    found = [panel.get_legend_handles_labels() for panel in panels]
    entries = {_plain(label): handle for panel in found for handle, label in zip(*panel, strict=True)}
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=min(_LEGEND_COLUMNS, len(entries)),
        frameon=False, fontsize="small", labelcolor=INK,
    )  # fmt: skip
    for panel in panels:
        _use_ink(panel)


def _use_ink(axes: Any) -> None:
    axes.tick_params(colors=INK, which="both")
    axes.grid(visible=True, color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))


def _flat(axes: Any) -> list[Any]:
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


def _plain(text: str) -> str:
    """Escape dollar signs, which start mathematics."""
    return text.replace("$", r"\$")


def _shown(label: str) -> str:
    """Hide a leading underscore, which would keep a curve out of the legend."""
    return f"\u200b{label}" if label.startswith("_") else label
