import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from rgtg.cli import audit

app = typer.Typer()
app.command()(audit.command)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}: ", "chosen": f"yes {'ab'[i % 2]}", "rejected": "no"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_audit_writes_json_figure_and_settings(tmp_path, scorer_folder, pairs):
    out = tmp_path / "audit"
    ran = CliRunner().invoke(
        app, ["--scorer", str(scorer_folder), "--pairs", str(pairs), "--output", str(out), "--json"]
    )
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["pairs"] == 6
    assert json.loads((out / "audit.json").read_text())["verdict"]
    assert (out / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "settings.json").read_text())["pairs"] == str(pairs)
    assert str(tmp_path) not in (out / "audit.json").read_text()


@pytest.mark.parametrize(
    ("scorer", "pairs_text", "code", "message"),
    [
        ("/nowhere", '{"prompt": "a", "chosen": "b", "rejected": "c"}', 2, "no model folder"),
        (None, '{"prompt": "a", "chosen": "b"}', 3, "bad.jsonl:1"),
        (None, '{"prompt": "a", "chosen": "b", "rejected": "b"}', 3, "bad.jsonl:1"),
    ],
)
def test_wrong_input_is_one_message(tmp_path, scorer_folder, scorer, pairs_text, code, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(pairs_text + "\n")
    out = tmp_path / "audit"
    ran = CliRunner().invoke(app, ["--scorer", scorer or str(scorer_folder), "--pairs", str(bad), "--output", str(out)])
    assert ran.exit_code == code, ran.output
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (out / "audit.json").exists()


def test_an_output_that_cannot_be_a_folder_is_refused_before_the_work(tmp_path, scorer_folder, pairs):
    ran = CliRunner().invoke(app, ["--scorer", str(scorer_folder), "--pairs", str(pairs), "--output", str(pairs)])
    assert ran.exit_code == 1
    assert "choose another --output" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_missing_extra_is_told_before_the_work(tmp_path, pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = CliRunner().invoke(app, ["--scorer", "/nowhere", "--pairs", str(pairs), "--output", str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert "pip install 'rgtg[report]'" in ran.stderr


def test_the_table_ends_in_the_verdict(scorer_folder, pairs):
    ran = CliRunner().invoke(app, ["--scorer", str(scorer_folder), "--pairs", str(pairs), "--set", "bootstrap=100"])
    assert ran.exit_code == 0, ran.output
    for expected in ("1 tokens", "100%", "calibration error", "completions"):
        assert expected in ran.stdout
