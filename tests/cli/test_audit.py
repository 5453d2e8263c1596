import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from naive import write_head
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


@pytest.mark.filterwarnings("always:.*left out 3 of 9 rows")
def test_rows_left_out_are_counted_and_listed_beside_the_audit(tmp_path, scorer_folder, pairs):
    lines = pairs.read_text() + 'nonsense\n{"prompt": "a", "chosen": "b"}\n'
    pairs.write_text(lines + json.dumps({"prompt": "a", "chosen": "b" * 200, "rejected": "c"}) + "\n")
    out = tmp_path / "audit"
    arguments = ["--scorer", str(scorer_folder), "--pairs", str(pairs), "--on-bad", "skip", "--set", "bootstrap=100"]
    ran = CliRunner().invoke(app, [*arguments, "--output", str(out), "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["pairs"] == 6
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejects] == [7, 8, 9]
    assert "too long" in rejects[2]["reason"]
    assert "left out 3 of 9 rows (not JSON: 1, missing field: 1, too long: 1)" in ran.stderr
    assert str(out / "rejects.jsonl") in ran.stderr
    assert not (pairs.parent / "rejects.jsonl").exists()
    assert "left out 3 of 9 rows" in CliRunner().invoke(app, arguments).stderr


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


def test_a_head_is_audited_with_the_policy_it_names_or_one_that_is_given(tmp_path, policy_folder, scorer_folder, pairs):
    head = write_head(tmp_path / "head", policy_folder)
    flags = ["--pairs", str(pairs), "--json", "--set", "bootstrap=100"]
    named = CliRunner().invoke(app, ["--scorer", str(head), *flags])
    assert named.exit_code == 0, named.stderr
    moved = policy_folder.rename(tmp_path / "moved")
    gone = CliRunner().invoke(app, ["--scorer", str(head), *flags])
    assert gone.exit_code == 2
    assert "--policy" in gone.stderr
    given = CliRunner().invoke(app, ["--scorer", str(head), "--policy", str(moved), *flags])
    assert given.exit_code == 0, given.stderr
    first, second = (json.loads(ran.stdout)["by_fraction"] for ran in (named, given))
    assert first == second
    stray = CliRunner().invoke(app, ["--scorer", str(scorer_folder), "--policy", str(moved), *flags])
    assert stray.exit_code == 2
    assert "reads no policy" in stray.stderr
