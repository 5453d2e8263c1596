"""Figures are drawn without matplotlib's global state, and say what to install where it is missing."""

import ast
import math
import sys
from pathlib import Path

import pytest

import rgtg
from rgtg.errors import MissingExtraError
from rgtg.evaluation.figures import new_figure, plot_audit
from rgtg.types import AuditPoint, AuditResult, Interval, Provenance


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


def test_an_audit_is_drawn_with_its_undecided_points_left_out(tmp_path):
    plot_audit({"a": result([math.nan, 0.5, 0.7]), "b": result([0.6, 0.6, 0.6])}, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_no_global_state_is_touched():
    import matplotlib

    before = dict(matplotlib.rcParams)
    new_figure()
    assert dict(matplotlib.rcParams) == before


def test_no_other_file_loads_matplotlib():
    src = Path(rgtg.__file__).parent
    found = {
        path.relative_to(src).as_posix()
        for path in src.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom | ast.Import) and "matplotlib" in ast.unparse(node)
    }
    assert found == {"evaluation/figures.py"}


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"rgtg\[report\]"):
        new_figure()
