"""``rgtg data check``: its output, files and exit codes."""

import json

import pytest
from typer.testing import CliRunner

from rgtg.cli.data import app

GOOD = {"prompt": "Say hi", "chosen": " hello there", "rejected": " no"}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({**GOOD, "prompt": f"Say {word}"}) for word in ("hi", "ho", "hey")))
    return path


@pytest.fixture
def bad_pairs(pairs):
    pairs.write_text(pairs.read_text() + "\nnonsense\n" + json.dumps({**GOOD, "chosen": None}) + "\n")
    return pairs


def check(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_a_good_file_is_summarised(pairs):
    result = check(pairs)
    assert result.exit_code == 0
    assert "3 pairs" in result.stdout
    assert "chosen is longer in 100.0%" in result.stdout
    assert check(pairs, "--quiet").stdout == ""


def test_json_has_counts_and_the_fingerprint(pairs):
    plain = json.loads(check(pairs, "--json").stdout)
    assert (plain["rows"], plain["kept"], plain["rejects_by_reason"], plain["unit"]) == (3, 3, {}, "characters")
    assert len(plain["fingerprint"]) == 16


def test_bad_rows_exit_with_3_and_the_reasons(bad_pairs):
    result = check(bad_pairs)
    assert result.exit_code == 3
    assert "cannot use 2 of 5 rows (not JSON: 1, null field: 1)" in result.stderr
    assert "pairs.jsonl:4: not JSON" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in bad_pairs.parent.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize("named", [False, True])
def test_skip_writes_rejects_to_output_or_the_current_folder_and_nothing_beside_the_data(
    bad_pairs, tmp_path, monkeypatch, named
):
    here = tmp_path / "here"
    if not named:
        here.mkdir()
        monkeypatch.chdir(here)
    result = check(bad_pairs, "--on-bad", "skip", *(["--output", here] if named else []))
    assert result.exit_code == 0, result.stderr
    assert "left out: not JSON" in result.stdout
    assert [json.loads(line)["line"] for line in (here / "rejects.jsonl").read_text().splitlines()] == [4, 5]
    assert json.loads((here / "rejects.jsonl.settings.json").read_text())["on_bad"] == "skip"
    assert sorted(path.name for path in bad_pairs.parent.iterdir()) == ["here", "pairs.jsonl"]


def test_lengths_and_the_limit_are_in_tokens(pairs, policy_folder):
    plain = json.loads(check(pairs, "--tokenizer", policy_folder, "--json").stdout)
    assert (plain["unit"], plain["chosen"]["median"]) == ("tokens", 13)
    result = check(pairs, "--tokenizer", policy_folder, "--max-length", 10)
    assert result.exit_code == 3
    assert "too long: 19 tokens, at most 10 allowed" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "absent.jsonl: no such file"),
        (["FILE", "--max-length", "10"], "max_length counts tokens"),
        (["FILE", "--on-bad", "ignore"], "on_bad = 'ignore'"),
        (["FILE", "--rejects", "r.jsonl"], "it has no use with --on-bad error"),
        (["FILE", "--output", "folder"], "it has no use with --on-bad error"),
        (["FILE", "--on-bad", "skip", "--rejects", "FILE"], "would overwrite the data"),
        (["FILE", "--set", "on_bda=skip"], "did you mean on_bad?"),
        (["FILE", "--tokenizer", "./absent"], "no model folder ./absent"),
    ],
)
def test_invalid_use_exits_with_2_and_one_message(pairs, arguments, message):
    result = check(*(pairs if argument == "FILE" else argument for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_settings_are_read_from_a_config_file(bad_pairs, tmp_path):
    config = tmp_path / "check.yaml"
    config.write_text("on_bad: skip\nrejects: " + str(tmp_path / "out" / "bad.jsonl") + "\n")
    assert check(bad_pairs, "--config", config).exit_code == 0
    assert (tmp_path / "out" / "bad.jsonl").is_file()


def test_pairs_that_run_together_are_reported_with_an_example(tmp_path):
    rows = [
        GOOD | {"prompt": "Say hi now, and say it in a long and friendly way?", "chosen": "hello [there]"},
        GOOD | {"prompt": "Say ho"},
        GOOD | {"prompt": "Say hey\n", "chosen": "hey"},
        GOOD | {"prompt": "\n\nHuman: Hi\n\nAssistant:"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    plain = json.loads(check(path, "--json").stdout)
    assert plain["run_together"] == 0.25
    assert plain["run_together_example"] == "line 1: 'it in a long and friendly way?hello [there]'"
    result = check(path)
    assert result.exit_code == 0
    assert "run together without a space in 25.0% of the pairs, for example line 1:" in result.stdout
    assert "friendly way?hello [there]'; end the prompts" in result.stdout


def test_pairs_with_spaces_and_chats_are_not_reported(pairs, tmp_path):
    plain = json.loads(check(pairs, "--json").stdout)
    assert (plain["run_together"], plain["run_together_example"]) == (0, None)
    assert "run together" not in check(pairs).stdout
