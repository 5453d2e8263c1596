"""``rgtg sweep``."""

import json

import pytest

from helpers.command import verb
from helpers.naive import info
from rgtg.cli import sweep
from rgtg.models.loading.scorer_info import write_info
from rgtg.types.comparison import SweepResult

run = verb("sweep")


@pytest.fixture
def base(tmp_path, policy_folder, scorer_folder):
    write_info(scorer_folder, info())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("Hello", "A day", "What now?")))
    return [
        "--policy", policy_folder, "--scorer", scorer_folder, "--prompts", prompts, "--output", tmp_path / "sweep",
        "--max-new-tokens", 4, "--set", "bootstrap=100", "--set", "device=cpu", "--kl-to", "candidates",
    ]  # fmt: skip


def test_the_target_is_met_and_every_try_is_kept(base, tmp_path):
    ran = run(*base, "--target-kl", 1, "--tolerance", 0.4, "--json")
    assert ran.exit_code == 0, ran.output
    result = SweepResult.model_validate_json((tmp_path / "sweep" / "sweep.json").read_bytes())
    assert SweepResult.model_validate_json(ran.stdout) == result
    assert result.reached
    assert abs(result.value.mean - 1) <= 0.4
    assert len(list((tmp_path / "sweep" / "parts").iterdir())) == len(result.tries)
    shown = run(*base, "--target-kl", 1, "--tolerance", 0.4)
    assert "within the tolerance" in shown.stdout


def test_an_unreachable_target_is_reported_with_all_tries(base, tmp_path):
    ran = run(*base, "--target-kl", 900, "--set", "max_beta=8")
    assert ran.exit_code == 1, ran.output
    assert "not reached at the largest beta allowed" in ran.stdout
    result = SweepResult.model_validate_json((tmp_path / "sweep" / "sweep.json").read_bytes())
    assert (result.reached, result.beta) == (False, 8)


def test_scorers_are_paired_with_betas():
    assert sweep._pair_scorers({"scorer": ["a"], "limit": 3}) == {"scorer": "a", "limit": 3}
    assert sweep._pair_scorers({"scorer": ["a", "b"], "beta": [2, 0.5]}) == {
        "scorers": [{"scorer": "a", "beta": 2}, {"scorer": "b", "beta": 0.5}]
    }
    assert sweep._pair_scorers({}) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one target"),
        (["--target-kl", "1", "--target-reward", "1"], "give one target"),
        (["--target-kl", "1", "--beta", "1", "--beta", "2"], "give one --beta for each --scorer"),
        (["--target-kl", "1", "--kl-to", "reference"], "kl_to"),
        (["--target-kl", "1", "--method", "best-of-n"], "best-of-n has no beta to find"),
        (["--target-reward", "1"], "reward is required"),
    ],
)
def test_invalid_use_prints_one_message(base, arguments, message):
    ran = run(*base, *arguments)
    assert ran.exit_code == 2, ran.output
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
