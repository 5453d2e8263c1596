import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rgtg.types.audit import AuditResult
from rgtg.types.base import Interval, Provenance
from rgtg.types.comparison import ComparisonResult, MethodResult

TINY = ["corpus=120", "pairs=32", "audit_pairs=24", "policy_steps=6", "betas=[1.0]"]


def _demo(*arguments: str):
    from rgtg.cli.main import app

    sizes = [part for size in TINY for part in ("--set", size)]
    return CliRunner().invoke(app, ["demo", *sizes, "--prompts", "4", *arguments])


def test_a_tiny_demo_writes_all_files_and_the_report_last(tmp_path):
    folder = tmp_path / "out"
    done = _demo("--output", str(folder), "--seed", "3", "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.endswith("</html>\n")
    assert page.count("<svg") == 3  # reward against KL and against cost, audits
    result = ComparisonResult.model_validate_json((folder / "results.json").read_bytes())
    assert [row.method for row in result.methods] == [
        "policy", "policy", "args", "args-sample", "pargs", "pargs-greedy", "best-of-n",
    ]  # fmt: skip
    assert result.prompts == 4
    assert result.provenance.seed == 3
    assert printed["result"] == result.model_dump(mode="json")
    for name in ("full-bt", "prefix-bt"):
        audit = AuditResult.model_validate_json((folder / f"audit-{name}" / "audit.json").read_bytes())
        assert audit.objective == name
        assert (folder / name / "rgtg.json").is_file()
    rows = [json.loads(line) for line in (folder / "completions" / "pargs-beta1.jsonl").read_text().splitlines()]
    reward = result.methods[4].metrics["reward"].mean
    assert reward == pytest.approx(sum(row["gold"] for row in rows) / 4)
    assert json.loads((folder / "settings.json").read_text())["policy_steps"] == 6
    assert str(tmp_path) not in page


def test_the_table_fits_a_terminal_of_80_columns():
    from rgtg.cli.demo import _show
    from rgtg.demo.run import DemoOutput

    worst = Interval(mean=-8.25, low=-9.5, high=-7.01, n=100)
    rows = [
        MethodResult(label=label, method="m", beta=4.0, metrics={"reward": worst, "kl_nats": worst.model_copy()},
                     seconds=1, tokens_per_second=12345, policy_calls=1, scorer_calls=99999)
        for label in ("policy (greedy)", "args-sample β=4")
    ]  # fmt: skip
    result = ComparisonResult(reward="g", prompts=1, methods=rows, provenance=Provenance(version="0", command=""))
    app = typer.Typer()
    app.command()(lambda: _show(DemoOutput(result, {}), Path("report.html"), 80.0))
    shown = CliRunner().invoke(app, env={"COLUMNS": "80"}).stdout
    assert "-8.25 -9.50 to -7.01" in shown
    assert "args-sample β=4" in shown


def test_invalid_settings_print_one_message(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = _demo("--output", str(tmp_path), "--quiet")
    assert done.exit_code == 2
    assert "not an earlier demo" in done.stderr
    assert _demo("--set", "promts=3").exit_code == 2
    assert _demo("--prompts", "0").exit_code == 2


def test_a_missing_extra_is_an_error_before_the_work(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    done = _demo("--output", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert "rgtg[train,report]" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_removes_the_report_of_an_earlier_run(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("settings.json", "report.html", "results.json"):
        (folder / name).write_text("{}")
    monkeypatch.setattr("rgtg.demo.run.train_policy", lambda *a, **k: 1 / 0)
    assert _demo("--output", str(folder), "--quiet").exit_code == 1
    assert not (folder / "report.html").exists()
    assert not (folder / "results.json").exists()
