"""Plots use no global state of matplotlib, and say what to install if it is missing."""

import ast
import math
import sys
from pathlib import Path

import pytest

import rgtg
from rgtg.errors import MissingExtraError
from rgtg.evaluation.plots import draw_intervals, new_figure, plot_audit
from rgtg.types.audit import AuditPoint, AuditResult
from rgtg.types.base import Interval, Provenance


def result(accuracies):
    points = [
        AuditPoint(
            position=(i + 1) / len(accuracies),
            accuracy=Interval(mean=a, low=a, high=a, n=0 if math.isnan(a) else 9),
            margin=Interval(mean=0, low=0, high=0, n=9),
            ties=0,
            pairs=9,
        )
        for i, a in enumerate(accuracies)
    ]
    return AuditResult(
        scorer="s", objective="prefix-bt", pairs=9, by_tokens=[], by_fraction=points,
        full_accuracy=points[-1].accuracy, calibration_error=0.1, verdict="",
        provenance=Provenance(version="0", command=""),
    )  # fmt: skip


def test_points_without_an_accuracy_are_not_drawn(tmp_path):
    plot_audit({"a": result([math.nan, 0.5, 0.7]), "b": result([0.6, 0.6, 0.6])}, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_intervals_are_bars_and_infinite_ends_are_not_drawn():
    _, axes = new_figure()
    values = [Interval(mean=1, low=0.5, high=2, n=9), Interval(mean=3, low=math.nan, high=math.inf, n=1)]
    draw_intervals(axes, [10, 20], values, label="m", color="red")
    (bars,) = axes.collections
    assert [path.vertices[:, 1].tolist() for path in bars.get_paths()] == [[0.5, 2.0], [3.0, 3.0]]
    assert axes.lines[0].get_xydata().tolist() == [[10, 1], [20, 3]]
    assert axes.get_legend_handles_labels()[1] == ["m"]


def test_several_panels_are_an_array_of_axes():
    _, axes = new_figure(8, 4, rows=2, columns=2)
    assert axes.shape == (2, 2)


def test_plots_do_not_change_global_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    new_figure()
    assert dict(matplotlib.rcParams) == before


def test_no_other_module_imports_matplotlib():
    src = Path(rgtg.__file__).parent
    found = {
        path.relative_to(src).as_posix()
        for path in src.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom | ast.Import) and "matplotlib" in ast.unparse(node)
    }
    assert found == {"evaluation/plots.py"}


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"rgtg\[report\]"):
        new_figure()
