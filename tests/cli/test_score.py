"""``rgtg score``."""

import json

import pytest

from helpers.command import verb
from helpers.tiny_models import tiny_reward_model

run = verb("score")


def test_both_names_of_the_completion_and_an_empty_one_are_scored(scorer_folder, tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"prompt": "a", "text": "b"}\n{"prompt": "a", "completion": "b"}\n{"prompt": "a", "text": ""}\n')
    result = run("--scorer", scorer_folder, "--input", rows, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("3 rewards in ")
    rewards = [json.loads(line)["reward"] for line in output.read_text().splitlines()]
    assert rewards[0] == pytest.approx(rewards[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "rows.jsonl:1: not JSON"),
        ('["a"]', "rows.jsonl:1:"),
        ('{"prompt": "a"}', '"completion" must be a non-empty text'),
        ('{"prompt": "a", "completion": ""}', '"completion" must be a non-empty text'),
        ('{"prompt": "", "text": "b"}', '"prompt" must be a non-empty text'),
        ('{"prompt": "a", "text": "' + "b" * 200 + '"}', "exceeds the scorer's context"),
    ],
)
def test_a_bad_row_is_an_error_with_its_line(scorer_folder, tmp_path, line, message):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(line + "\n")
    result = run("--scorer", scorer_folder, "--input", rows, "--output", output)
    assert result.exit_code == 3, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not [p for p in tmp_path.iterdir() if "out.jsonl" in p.name]


def test_a_missing_scorer_is_not_reported_as_an_output_error(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "text": "b"}\n')
    result = run("--scorer", "./absent", "--input", rows, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 2
    assert "no model folder ./absent" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_nan_rewards_and_missing_settings_are_errors(scorer_folder, tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"prompt": "a", "text": "b"}\n')
    assert "input is required (--input)" in run("--scorer", scorer_folder, "--output", output).stderr
    model = tiny_reward_model()
    model.score.weight.fill_(float("nan"))
    model.save_pretrained(scorer_folder)
    result = run("--scorer", scorer_folder, "--input", rows, "--output", output)
    assert result.exit_code == 1
    assert "the reward of row 1 is nan" in result.stderr
    assert not output.exists()
