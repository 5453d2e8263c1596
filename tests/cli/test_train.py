"""``rgtg train`` on the command line."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers.command import verb
from helpers.synthetic import synthetic_rows, write_rows
from rgtg.models.scorers.base import load_scorer
from rgtg.models.scorers.reward_model import PrefixScorer

run = verb("train")
SETTINGS = ["--set", "train.learning_rate=3e-3", "--set", "train.num_train_epochs=3", "--set", "eval_fraction=0.25"]


@pytest.fixture
def pairs(tmp_path):
    torch.set_num_threads(1)
    return write_rows(tmp_path / "pairs.jsonl", synthetic_rows(40))


def test_pairs_give_a_scorer(policy_folder, pairs, tmp_path):
    output = tmp_path / "scorer"
    result = run("--pairs", pairs, "--base", policy_folder, "--objective", "prefix-bt", "--output", output, *SETTINGS)
    assert result.exit_code == 0, result.stderr
    assert "accuracy at 50 % of the completion" in result.stdout
    assert "step 10/" in result.stderr
    assert "warning" not in result.stderr.lower()
    assert json.loads((output / "settings.json").read_text())["train"]["num_train_epochs"] == 3
    stock = AutoModelForSequenceClassification.from_pretrained(output).eval()
    ids = [0, 5, 6, 30, 31, 2]
    ours = PrefixScorer.from_pretrained(str(output), device="cpu").score_prefixes([ids[:3]], [ids[3:]])[0]
    naive = [stock(torch.tensor([ids[:end]])).logits.item() for end in (4, 5, 6)]
    torch.testing.assert_close(ours, torch.tensor(naive), atol=1e-5, rtol=1e-5)


def test_json_prints_nothing_else_on_stdout(policy_folder, pairs, tmp_path):
    result = run("--pairs", pairs, "--base", policy_folder, "--output", tmp_path / "s", "--json", *SETTINGS)
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["evaluation"]["accuracy_100"] > 0.8
    assert report["pairs"] + report["eval_pairs"] == 40


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--set", "train.learning_rats=1"], 2, "did you mean train.learning_rate"),
        (["--set", "objektive=full-bt"], 2, "did you mean objective"),
        (["--objective", "dpo"], 2, "objective"),
        (["--base", "./nowhere"], 2, "no model folder"),
        (["--pairs", "./nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["--max-length", "9"], 3, "9"),
        (["--set", "train.learning_rate=1e30", "--set", "train.max_grad_norm=0"], 1, "at step"),
    ],
)
def test_invalid_input_prints_one_message(policy_folder, pairs, tmp_path, change, code, message):
    given = ["--pairs", pairs, "--base", policy_folder, "--output", tmp_path / "s", "--set", "train.max_steps=4"]
    result = run(*given, *change)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "s" / "rgtg.json").exists()


def test_an_output_that_is_a_file_is_an_error_before_training(policy_folder, pairs, tmp_path):
    result = run("--pairs", pairs, "--base", policy_folder, "--output", pairs)
    assert result.exit_code == 2
    assert "is a file" in result.stderr


@pytest.mark.parametrize("head", ["state", "vocab"])
def test_a_head_on_the_policys_hidden_states_is_trained(policy_folder, tmp_path, head):
    pairs, output = write_rows(tmp_path / "many.jsonl", synthetic_rows(64)), tmp_path / "head"
    given = ["--pairs", pairs, "--base", policy_folder, "--trunk", "own", "--head", head, "--output", output]
    result = run(*given, "--set", "train.per_device_train_batch_size=8", "--set", "eval_fraction=0.25")
    assert result.exit_code == 0, result.stderr
    assert "heads tried" in result.stdout
    assert "prefix accuracy" in result.stdout
    assert "states of 128/128" not in result.stderr  # the held-out part is read apart
    assert "held-out completions" in result.stderr
    assert "warning" not in result.stderr.lower()
    again = run("--config", output / "settings.json", "--output", tmp_path / "again", "--json")
    assert again.exit_code == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["evaluation"]["prefix_accuracy"] > 0.6
    assert len(report["choices"]) == 4
    assert report["rank"] == (16 if head == "vocab" else None)
    scorer = load_scorer(str(output), device="cpu")
    assert scorer.kind == head
    same = load_scorer(str(tmp_path / "again"), device="cpu")
    assert scorer.score(["mnop? "], ["so abc"]) == same.score(["mnop? "], ["so abc"])


def test_layer_and_width_can_be_set(policy_folder, pairs, tmp_path):
    given = ["--pairs", pairs, "--base", policy_folder, "--trunk", "own", "--head", "state", "--output", tmp_path / "h"]
    result = run(*given, "--set", "layer=1", "--set", "width=8", "--set", "eval_fraction=0.25")
    assert result.exit_code == 0, result.stderr
    assert "heads tried" not in result.stdout
    assert "1, 8" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--trunk", "own"], "--head state"),
        (["--head", "state"], "add --trunk own"),
        (["--force"], "add --resume"),
        (["--trunk", "own", "--head", "vocab", "--set", "lora.r=4"], "lora"),
        (["--trunk", "own", "--head", "value"], "head"),
        (["--trunk", "own", "--head", "state", "--set", "layer=deep"], "layer"),
        (["--trunk", "mine"], "trunk"),
    ],
)
def test_invalid_head_options_print_one_message(policy_folder, pairs, tmp_path, change, message):
    result = run("--pairs", pairs, "--base", policy_folder, "--output", tmp_path / "s", *change)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_rollouts_give_a_value_function(policy_folder, tmp_path):
    rows = [
        {"prompt": row["prompt"], "text": row[side], "reward": reward, "finish_reason": "stop"}
        for row in synthetic_rows(40)
        for side, reward in (("chosen", 2.0), ("rejected", -1.0))
    ]
    rollouts, output = write_rows(tmp_path / "rollouts.jsonl", rows), tmp_path / "value"
    given = ["--rollouts", rollouts, "--base", policy_folder, "--objective", "value", "--output", output, *SETTINGS]
    result = run(*given)
    assert result.exit_code == 0, result.stderr
    assert "share of variance explained at 50 % of" in result.stdout
    assert "rollouts trained on, held out" in result.stdout
    assert "squared error at 50 %" in result.stderr
    again = run(
        "--config", output / "settings.json", "--output", tmp_path / "again", "--json", "--set", "value.target=q"
    )
    assert again.exit_code == 0, again.stderr
    report = json.loads(again.stdout)
    assert (report["pairs"], report["rollouts"] + report["eval_rollouts"]) == (0, 80)
    assert report["evaluation"]["explained_100"] > 0


def test_an_objectives_options_are_set_by_name(policy_folder, pairs, tmp_path):
    given = ["--pairs", pairs, "--base", policy_folder, "--set", "train.max_steps=2"]
    first = run(*given, "--output", tmp_path / "full", "--objective", "full-bt")
    assert first.exit_code == 0, first.stderr
    options = ["--set", "prefix_bt.position_weights=linear", "--set", "prefix_bt.consistency=prefix"]
    done = run(*given, "--output", tmp_path / "s", "--reference-scorer", tmp_path / "full", *options)
    assert done.exit_code == 0, done.stderr
    kept = json.loads((tmp_path / "s" / "settings.json").read_text())
    assert kept["reference_scorer"] == str(tmp_path / "full")
    given = {"position_weights": "linear", "prefixes": None, "consistency": "prefix"}
    assert kept["prefix_bt"] == given | {"length_control": False, "length_offset": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--objective", "value"], "which pairs do not have"),
        (["--objective", "tcrm", "--set", "prefix_bt.prefixes=2"], "prefix_bt belongs to another objective than tcrm"),
        (["--set", "prefix_bt.position_weight=linear"], "position_weight"),
        (["--objective", "autoregressive", "--set", "autoregressive.beta_r=0"], "greater than 0"),
        (["--objective", "autoregressive", "--trunk", "shared"], "lora.r=16"),
        (["--objective", "cumulative-mse", "--set", "cumulative_mse.reward_range=[1, 1]"], "must not be empty"),
    ],
)
def test_invalid_objective_options_print_one_message(policy_folder, pairs, tmp_path, change, message):
    result = run("--pairs", pairs, "--base", policy_folder, "--output", tmp_path / "s", *change)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
