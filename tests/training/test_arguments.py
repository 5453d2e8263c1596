"""Values of train. settings: impossible ones raise a one-line error before anything is loaded."""

import pytest

from helpers.command import verb
from rgtg.config import TrainSettings
from rgtg.errors import UsageError
from rgtg.training.arguments import DEFAULTS, HEAD_DEFAULTS, as_number, require_values, reward_config
from rgtg.training.trainers.resumable import ResumableTrainer
from training.checkpoint.test_resume import settings, train_scorer, world  # noqa: F401  # a fixture

WRONG = {
    "learning_rate": (["nan", "-1", "0", ".inf", "null", "true", "1e-3x"], "a number"),
    "adam_beta1": (["1", "2", "-0.1"], "at least 0 and below 1"),
    "adam_beta2": (["2"], "at least 0 and below 1"),
    "adam_epsilon": (["-1"], "at least 0"),
    "weight_decay": (["-0.1", ".nan"], "at least 0"),
    "max_grad_norm": (["-1"], "at least 0"),
    "per_device_train_batch_size": (["0", "-8", "1.5"], "a whole number of at least 1"),
    "per_device_eval_batch_size": (["0"], "a whole number of at least 1"),
    "gradient_accumulation_steps": (["0"], "a whole number of at least 1"),
    "save_steps": (["0", "-5", "2.5"], "a whole number of at least 1, or a share of all steps"),
    "save_total_limit": (["0"], "a whole number of at least 1"),
    "num_train_epochs": (["0", "-1", ".inf"], "a number above 0"),
    "max_steps": (["0", "-2"], "at least 1, or -1: train.num_train_epochs decides"),
    "logging_steps": (["0", "-3"], "at least 1"),
    "dataloader_num_workers": (["-1"], "at least 0"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (values, _) in WRONG.items() for value in values])
def test_impossible_values_raise_an_error_before_anything_is_read(tmp_path, name, value):
    given = ["--pairs", tmp_path / "none.jsonl", "--base", tmp_path / "none", "--output", tmp_path / "out"]
    result = verb("train")(*given, "--set", f"train.{name}={value}")
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith(f"error: train.{name} = ")
    assert WRONG[name][1] in line or "expected a number" in line
    assert not (tmp_path / "out").exists()


def test_possible_values_are_accepted():
    for values in (DEFAULTS, HEAD_DEFAULTS):
        require_values(values)
    require_values(
        {
            "learning_rate": "5e-5", "save_steps": 0.25, "save_total_limit": None, "max_grad_norm": 0, "max_steps": -1,
            "num_train_epochs": 0.5, "weight_decay": 0, "adam_beta1": 0, "adam_epsilon": 0, "warmup_steps": 0.1,
        }
    )  # fmt: skip
    require_values({"max_steps": 3, "num_train_epochs": 0})  # epochs are not used
    with pytest.raises(UsageError, match="num_train_epochs = 0"):
        require_values({"max_steps": -1, "num_train_epochs": 0})


def test_whole_numbers_become_integers_for_trl(tmp_path):
    train = {"max_steps": "1e2", "per_device_train_batch_size": 4.0, "learning_rate": "1e-3", "use_cpu": True}
    config = reward_config(TrainSettings(pairs="p", base="b", output=tmp_path, train=train), None)
    assert [type(value) for value in (config.max_steps, config.per_device_train_batch_size)] == [int, int]
    assert (config.max_steps, config.per_device_train_batch_size, config.learning_rate) == (100, 4, 1e-3)
    assert as_number("save_steps", 0.5) == 0.5


KINDS = pytest.mark.parametrize("about", [{}, {"trunk": "own", "head": "state", "layer": 1, "width": 8}])


@KINDS
def test_less_data_than_a_batch_raises_an_error_if_incomplete_batches_are_dropped(world, about):  # noqa: F811
    train = {"dataloader_drop_last": True, "per_device_train_batch_size": 33}
    with pytest.raises(UsageError, match="nothing to train on: 31 rows are less than a batch of 33"):
        train_scorer(settings(**about, train=train))
    train["per_device_train_batch_size"] = 31
    assert train_scorer(settings(**about, train=train)).steps == 3


@KINDS
def test_a_run_that_ends_without_a_step_saves_nothing(world, monkeypatch, about):  # noqa: F811
    def end(self, **_):
        self.control.should_training_stop = True

    monkeypatch.setattr(ResumableTrainer, "_run_epoch", end)
    with pytest.raises(UsageError, match="ended before its first step, and nothing is saved"):
        train_scorer(settings(**about))
    assert not list((world / "out").glob("*.safetensors"))
    assert not (world / "out" / "rgtg.json").exists()
    assert not list((world / "out").rglob("rgtg-checkpoint.json"))
