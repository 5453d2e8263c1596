import json
import os
import signal
import sys

import pytest
import typer
from typer.testing import CliRunner

from helpers.naive import write_head
from helpers.synthetic import write_rows
from helpers.tiny_models import tiny_reward_model, tiny_tokenizer
from rgtg.cli import audit
from rgtg.evaluation.audit import candidate_rollouts as rollouts

app = typer.Typer()
app.command()(audit.run)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}: ", "chosen": f"yes {'ab'[i % 2]}", "rejected": "no"} for i in range(6)]
    write_rows(path, rows)
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
def test_invalid_input_prints_one_message(tmp_path, scorer_folder, scorer, pairs_text, code, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(pairs_text + "\n")
    out = tmp_path / "audit"
    ran = CliRunner().invoke(app, ["--scorer", scorer or str(scorer_folder), "--pairs", str(bad), "--output", str(out)])
    assert ran.exit_code == code, ran.output
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (out / "audit.json").exists()


@pytest.mark.filterwarnings("always:.*left out 3 of 9 rows")
def test_skipped_rows_are_counted_and_written_to_the_output_folder(tmp_path, scorer_folder, pairs):
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


def test_an_output_that_cannot_be_a_folder_is_an_error_before_the_work(tmp_path, scorer_folder, pairs):
    ran = CliRunner().invoke(app, ["--scorer", str(scorer_folder), "--pairs", str(pairs), "--output", str(pairs)])
    assert ran.exit_code == 1
    assert "choose another --output" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_missing_extra_is_an_error_before_the_work(tmp_path, pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = CliRunner().invoke(app, ["--scorer", "/nowhere", "--pairs", str(pairs), "--output", str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert "pip install 'rgtg[report]'" in ran.stderr


def test_the_verdict_follows_the_table(scorer_folder, pairs):
    ran = CliRunner().invoke(app, ["--scorer", str(scorer_folder), "--pairs", str(pairs), "--set", "bootstrap=100"])
    assert ran.exit_code == 0, ran.output
    for expected in ("1 tokens", "100%", "calibration error", "completions"):
        assert expected in ran.stdout


def test_a_head_is_audited_with_its_policy_or_a_given_one(tmp_path, policy_folder, scorer_folder, pairs):
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
    assert "does not need a policy" in stray.stderr


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Say this", "Why not", "One day")))
    return path


@pytest.fixture
def reward_folder(tmp_path):
    tiny_reward_model(seed=7).save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


SMALL = ["--prefixes", "4", "--candidates", "3", "--per-candidate", "2", "--max-new-tokens", "5", "--bootstrap", "100"]


@pytest.fixture
def rolling(policy_folder, scorer_folder, prompts, reward_folder):
    """Options that make roll-outs."""
    named = {"scorer": scorer_folder, "policy": policy_folder, "prompts": prompts, "reward": reward_folder}
    return ["--rollouts", *SMALL, *(part for name, value in named.items() for part in (f"--{name}", str(value)))]


def test_roll_outs_and_their_audit_are_written(tmp_path, rolling, pairs):
    out = tmp_path / "audit"
    ran = CliRunner().invoke(app, [*rolling, "--pairs", str(pairs), "--output", str(out), "--json"])
    assert ran.exit_code == 0, ran.stderr
    printed = json.loads(ran.stdout)
    assert printed["pairs"] == json.loads((out / "audit.json").read_text())
    assert printed["rollouts"] == json.loads((out / "rollout-audit.json").read_text())
    assert (printed["rollouts"]["prefixes"], printed["rollouts"]["reward"]) == (4, "reward")
    assert len((out / "rollouts.jsonl").read_text().splitlines()) == 5
    for name in ("audit.png", "rollout-audit.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for name in ("rollout-audit.json", "rollouts.jsonl"):
        assert str(tmp_path) not in (out / name).read_text()


def test_sigterm_exits_with_75_and_the_same_command_resumes(tmp_path, rolling, monkeypatch):
    file, whole, made = tmp_path / "kept.jsonl", tmp_path / "whole.jsonl", rollouts.roll_out
    calls = []

    def stop_at_the_third(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(*arguments, **settings)

    monkeypatch.setattr(rollouts, "roll_out", stop_at_the_third)
    stopped = CliRunner().invoke(app, [*rolling, "--rollouts-file", str(file)])
    assert stopped.exit_code == 75, stopped.output
    assert f"the roll-outs are kept in {file}; the same command resumes" in stopped.stderr
    assert len(file.read_text().splitlines()) == 3
    for path, count in ((file, 2), (whole, 4)):
        calls[:] = [1] * 3
        ran = CliRunner().invoke(app, [*rolling, "--rollouts-file", str(path), "--quiet"])
        assert (ran.exit_code, len(calls) - 3) == (0, count), ran.stderr
    assert file.read_bytes() == whole.read_bytes()


def test_a_file_of_roll_outs_is_read_for_other_scorers(tmp_path, rolling, policy_folder):
    file = tmp_path / "kept.jsonl"
    made = CliRunner().invoke(app, [*rolling, "--rollouts-file", str(file), "--json"])
    assert made.exit_code == 0, made.stderr
    before = file.read_bytes()
    scorer = rolling[rolling.index("--scorer") + 1]
    flags = ["--rollouts", "--rollouts-file", str(file), "--bootstrap", "100", "--json"]
    read = CliRunner().invoke(app, ["--scorer", scorer, *flags])
    assert read.exit_code == 0, read.stderr
    assert json.loads(read.stdout)["overall"] == json.loads(made.stdout)["overall"]
    for kind in ("state", "vocab"):
        head = write_head(tmp_path / kind, policy_folder, kind)
        other = CliRunner().invoke(app, ["--scorer", str(head), *flags])
        assert other.exit_code == 0, other.stderr
        assert json.loads(other.stdout)["prefixes"] == 4
    assert file.read_bytes() == before


def test_a_head_shares_the_policy_of_the_roll_outs(tmp_path, rolling, policy_folder):
    head = write_head(tmp_path / "head", policy_folder)
    ran = CliRunner().invoke(app, [*rolling, "--scorer", str(head), "--output", str(tmp_path / "out"), "--beta", "2"])
    assert ran.exit_code == 0, ran.stderr
    for expected in ("Spearman", "< 25%", "all", "beta 2", "nats per token"):
        assert expected in ran.stdout


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "nothing to audit on"),
        (["--pairs", "P", "--prefixes", "4"], 2, "prefixes: needs --rollouts"),
        (["--rollouts"], 2, "or --rollouts-file to read them"),
        (["--rollouts", "--prompts", "P"], 2, "--prompts and --reward go together"),
        (["--rollouts", "--prompts", "P", "--reward", "R"], 2, "--policy is required"),
        (["--rollouts", "--prompts", "P", "--reward", "R", "--policy", "Q"], 2, "the roll-outs need a file"),
        (["--rollouts", "--rollouts-file", "F", "--candidates", "4"], 2, "fixed by the roll-outs file"),
        (["--rollouts", "--rollouts-file", "F", "--beta", "1", "--kl-nats", "1"], 2, "not both"),
        (["--rollouts", "--rollouts-file", "F", "--kl-nats", "0"], 2, "kl_nats = 0"),
        (["--rollouts", "--rollouts-file", "/nowhere/F"], 2, "cannot read the roll-outs"),
    ],
)
def test_options_that_contradict_print_one_message(scorer_folder, flags, code, message):
    ran = CliRunner().invoke(app, ["--scorer", str(scorer_folder), *flags])
    assert ran.exit_code == code, ran.output
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_file_of_other_roll_outs_is_an_error_and_unchanged(tmp_path, rolling):
    file = tmp_path / "kept.jsonl"
    assert CliRunner().invoke(app, [*rolling, "--rollouts-file", str(file)]).exit_code == 0
    before = file.read_bytes()
    ran = CliRunner().invoke(app, [*rolling, "--rollouts-file", str(file), "--seed", "5"])
    assert ran.exit_code == 2
    assert "seed 0 where this run has 5" in ran.stderr
    assert file.read_bytes() == before
    file.write_text("nonsense\n")
    assert CliRunner().invoke(app, [*rolling, "--rollouts-file", str(file)]).exit_code == 3
    assert file.read_text() == "nonsense\n"


def test_the_scorer_as_its_own_reward_is_an_error(tmp_path, rolling, scorer_folder):
    flags = [*rolling, "--reward", str(scorer_folder), "--output", str(tmp_path / "out")]
    ran = CliRunner().invoke(app, flags)
    assert ran.exit_code == 2
    assert "judged by itself" in ran.stderr
