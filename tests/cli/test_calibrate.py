"""``rgtg calibrate``."""

import json

import pytest

from helpers.command import verb
from helpers.naive import make_guided
from helpers.synthetic import write_rows

calibrate = verb("calibrate")


@pytest.fixture
def labelled(tmp_path):
    done = make_guided("policy").generate(["Once", "Hi", "What"] * 14, seed=3, max_new_tokens=6, batch_size=42)
    rows = [c.model_dump(mode="json") | {"good": len(set(c.token_ids)) > 5, "reward": len(c.text)} for c in done]
    path = tmp_path / "labelled.jsonl"
    write_rows(path, rows)
    return path


def test_a_threshold_is_printed_and_written(tmp_path, scorer_folder, labelled):
    out = tmp_path / "threshold.json"
    ran = calibrate("--scorer", scorer_folder, "--input", labelled, "--alpha", "0.2", "--output", out)
    assert ran.exit_code == 0, ran.stderr
    result = json.loads(out.read_text())
    assert f"threshold {result['threshold']:.6g}" in ran.stdout
    assert f"--value-threshold {result['threshold']:.6g}" in ran.stdout
    assert result["good"] + result["bad"] == 42
    assert 0 <= result["touched_good"] <= 0.2
    by_reward = calibrate(
        "--scorer", scorer_folder, "--input", labelled, "--good-above", "2", "--json", "--alpha", "0.2"
    )
    assert json.loads(by_reward.stdout)["good"] > result["good"]


def test_what_cannot_be_calibrated_is_one_message(tmp_path, scorer_folder, labelled):
    few = calibrate("--scorer", scorer_folder, "--input", labelled, "--alpha", "0.001")
    assert few.exit_code == 2
    assert "at least 999 are needed" in few.stderr
    bad = tmp_path / "bad.jsonl"
    write_rows(bad, [{"prompt": "Hi", "text": "a"}])
    unlabelled = calibrate("--scorer", "/nowhere", "--input", bad)
    assert (unlabelled.exit_code, 'expected true or false in "good"' in unlabelled.stderr) == (3, True)
    same = calibrate("--scorer", scorer_folder, "--input", labelled, "--output", labelled)
    assert same.exit_code == 2
