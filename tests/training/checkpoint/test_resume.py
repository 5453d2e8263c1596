"""A run that is stopped, killed or damaged, and then resumed, gives the result of an uninterrupted run, to the bit."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from trl import RewardConfig

from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.config import TrainSettings
from rgtg.errors import NonFiniteError, OutputError, StoppedError, UsageError
from rgtg.training.checkpoint.manager import MARKER, newest_valid, seal, verify
from rgtg.training.checkpoint.save import finish_saving
from rgtg.training.report import TrainLog
from rgtg.training.train import train_scorer
from rgtg.training.trainers import resumable
from rgtg.training.trainers.resumable import StopRequest
from rgtg.training.trainers.reward import PrefixRewardTrainer

TRAIN = {"learning_rate": 3e-3, "num_train_epochs": 3, "logging_steps": 4, "save_steps": 5, "use_cpu": True}
HEADS = TRAIN | {"per_device_train_batch_size": 8}
TIMES = ("runtime", "_per_second")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A policy, pairs and rollouts in the working folder."""
    torch.set_num_threads(1)
    tiny_policy().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    rows = synthetic_rows(40)
    write_rows(tmp_path / "pairs.jsonl", rows)
    both = [(row["prompt"], row[side], r) for row in rows for side, r in (("chosen", 3.0), ("rejected", -1.0))]
    write_rows(tmp_path / "rollouts.jsonl", [{"prompt": p, "text": t, "reward": r} for p, t, r in both])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(output="out", **changes):
    train = TRAIN | changes.pop("train", {})
    kind = {"rollouts": "rollouts.jsonl"} if changes.pop("rollouts", False) else {"pairs": "pairs.jsonl"}
    values = {"base": "policy", "output": output, "eval_fraction": 0.2, "resume": True, "train": train}
    return TrainSettings(**(values | kind | changes))


def die_at(monkeypatch, step, how):
    """Call ``how`` at a step, after its figures are logged."""
    real, done = TrainLog.on_log, []

    def on_log(self, args, state, *rest, **named):
        real(self, args, state, *rest, **named)
        if state.global_step == step and not done:
            done.append(step)
            how()

    monkeypatch.setattr(TrainLog, "on_log", on_log)


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def written(output):
    """What a run has written, except for its checkpoints and timings."""
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    files.pop("train-report.json")
    lines = [json.loads(line) for line in files.pop("train-log.jsonl").splitlines()]
    files["log"] = [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]
    return files


def require_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name], name


RUNS = {
    "sampled prefixes": {"prefix_bt": {"prefixes": 1}, "train": {"eval_strategy": "epoch"}},
    "accumulated": {
        "objective": "full-bt", "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    },
    "farma": {"objective": "farma", "farma": {"output_scale": 0.5}},
    "rollouts": {"objective": "value", "rollouts": True, "value": {"target": "q"}},
    "adapter": {"trunk": "shared", "lora": {"r": 4, "lora_dropout": 0.2}},
    "state heads": {"trunk": "own", "head": "state", "width": 8, "train": HEADS | {"eval_strategy": "epoch"}},
    "vocabulary head": {
        "trunk": "own", "head": "vocab", "objective": "value", "rollouts": True, "layer": 2, "width": 8, "train": HEADS,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_resumes_to_the_same_result(world, monkeypatch, name):
    train_scorer(settings(**RUNS[name]))
    whole = written(world / "out")
    shutil.move("out", "whole")
    with monkeypatch.context() as patch:
        die_at(patch, 8, ask_to_stop)  # in the next epoch, when no checkpoint is due and figures are pending
        with pytest.raises(StoppedError, match=r"stopped after step 9 of \d+; a checkpoint is in") as stopped:
            train_scorer(settings(**RUNS[name]))
    assert stopped.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    evaluated = [line for line in (world / "out" / "train-log.jsonl").read_text().splitlines() if "eval_loss" in line]
    assert not evaluated or json.loads(evaluated[-1])["step"] == 8  # a stop evaluates nothing
    report = train_scorer(settings(**RUNS[name]))
    assert "checkpoint-9" in report.resumed_from
    require_same(written(world / "out"), whole)


class Killed(BaseException):
    """Not an Exception, so that nothing catches it, like SIGKILL."""


@pytest.mark.parametrize("step", [4, 10])
def test_a_run_killed_right_after_a_checkpoint_resumes_to_the_same_result(world, monkeypatch, step):
    """At the end of an epoch, before whose evaluation transformers would save; and after the last step."""
    run = settings(train={"save_steps": 4, "max_steps": 10, "eval_strategy": "epoch"}, prefix_bt={"prefixes": 1})
    train_scorer(run)
    whole = written(world / "out")
    shutil.move("out", "whole")

    def kill(folder, *_, **__):
        if folder.endswith(f"-{step}") or (newest_valid(world / "out" / "checkpoints")[1].step == step):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "rotate_checkpoints", kill)
        with pytest.raises(Killed):
            train_scorer(run)
    assert train_scorer(run).resumed_from.endswith(f"checkpoint-{step}")
    require_same(written(world / "out"), whole)


def test_a_run_killed_while_it_saves_the_scorer_is_finished_by_resume(world, monkeypatch):
    from rgtg.training.checkpoint import save

    run = settings(train={"max_steps": 2})
    train_scorer(run)
    whole = written(world / "out")
    shutil.move("out", "whole")
    real = save._move_out

    def some(stage, folder):
        (stage / "config.json").replace(folder / "config.json")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(save, "_move_out", some)
        patch.setattr(save.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            train_scorer(run)
    with pytest.raises(UsageError, match="was interrupted: --resume finishes it"):
        train_scorer(run.model_copy(update={"resume": False}))
    assert save._move_out is real
    assert train_scorer(run).steps == 2  # nothing is trained again
    require_same(written(world / "out"), whole)
    assert not list((world / "out").glob(".unfinished*"))


def test_a_finished_run_has_nothing_to_do(world):
    run = settings(train={"max_steps": 2})
    report = train_scorer(run)
    before = (world / "out" / "model.safetensors").stat().st_mtime_ns
    assert train_scorer(run) == report
    assert (world / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"finished scorer, and base, seed \(was 0, is 1\) changed since"):
        train_scorer(run.model_copy(update={"seed": 1}))
    with pytest.raises(UsageError, match="already holds a model"):
        train_scorer(run.model_copy(update={"resume": False}))
    with pytest.raises(UsageError, match="already holds a model"):  # not a scorer of rgtg train
        train_scorer(run.model_copy(update={"output": world / "policy"}))


@pytest.fixture
def unfinished(world):
    """A run of two checkpoints, as if it had been killed before the scorer was saved."""
    run = settings(train={"max_steps": 4, "save_steps": 2})
    train_scorer(run)
    whole = written(world / "out")
    shutil.copytree("out", "whole")
    for path in (world / "out").iterdir():
        if path.is_file() and path.name != "train-log.jsonl":
            path.unlink()
    return run, whole


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = [
    ("model.safetensors", truncate, "model.safetensors is truncated or was changed: 1,000 bytes, of"),
    ("model.safetensors", flip, "model.safetensors is damaged: its SHA-256"),
    ("optimizer.pt", lambda path: path.unlink(), "optimizer.pt is missing"),
    (MARKER, lambda path: path.unlink(), "saving it was interrupted"),
    (MARKER, truncate, f"its {MARKER} is damaged"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_newest_valid_one(world, unfinished, name, damage, reason):
    run, whole = unfinished
    damage(world / "out" / "checkpoints" / "checkpoint-4" / name)
    with pytest.warns(UserWarning, match=rf"checkpoint-4 is skipped: {reason}"):
        assert train_scorer(run).resumed_from.endswith("checkpoint-2")
    require_same(written(world / "out"), whole)


def test_without_a_valid_checkpoint_the_run_starts_anew(world, unfinished):
    run, whole = unfinished
    for step in (2, 4):
        (world / "out" / "checkpoints" / f"checkpoint-{step}" / MARKER).unlink()
    with pytest.warns(UserWarning, match="is skipped"):
        assert train_scorer(run).resumed_from is None
    require_same(written(world / "out"), whole)


def test_changed_data_or_settings_raise_an_error_unless_forced(world, unfinished):
    run, _ = unfinished
    write_rows(world / "other.jsonl", synthetic_rows(40, seed=9))
    changed = {
        "data changed": {"pairs": "other.jsonl"},
        r"train.learning_rate \(was 0.003, is 0.1\)": {"train": run.train | {"learning_rate": 0.1}},
        r"objective \(was prefix-bt, is full-bt\), options\.position_weights .*changed": {"objective": "full-bt"},
        "lora changed": {"lora": {"r": 4}},
        r"eval_fraction \(was 0.2, is 0.3\)": {"eval_fraction": 0.3},
    }
    for message, change in changed.items():
        with pytest.raises(UsageError, match=rf"cannot resume from checkpoint-4: .*{message}.*--force"):
            train_scorer(TrainSettings.model_validate(run.model_dump() | change))
    aside = run.train | {"logging_steps": 1, "save_total_limit": 1}  # the result does not depend on these
    assert train_scorer(run.model_copy(update={"train": aside})).resumed_from.endswith("checkpoint-4")


def test_force_resumes_in_any_case_and_warns(world, unfinished):
    run, _ = unfinished
    more = run.model_copy(update={"force": True, "train": run.train | {"max_steps": 6}})
    with pytest.warns(UserWarning, match=r"in any case \(--force\): train.max_steps \(was 4, is 6\) changed"):
        report = train_scorer(more)
    assert (report.steps, report.resumed_from[-12:]) == (6, "checkpoint-4")


@pytest.mark.parametrize(("name", "missing"), [("optimizer.pt", "optimizer state"), ("rng_state.pth", "random state")])
def test_a_checkpoint_that_lacks_a_state_raises_an_error_unless_forced(world, unfinished, name, missing):
    run, _ = unfinished
    folder = world / "out" / "checkpoints" / "checkpoint-4"
    (folder / name).unlink()
    marker = json.loads((folder / MARKER).read_text())
    del marker["files"][name]  # it was saved without (train.save_only_model)
    (folder / MARKER).write_text(json.dumps(marker))
    with pytest.raises(UsageError, match=f"cannot resume from checkpoint-4: .*has no {missing}"):
        train_scorer(run)
    with pytest.warns(UserWarning, match=f"has no {missing}"):
        assert train_scorer(run.model_copy(update={"force": True})).resumed_from.endswith("checkpoint-4")


def test_checkpoints_without_resume_are_not_overwritten(world, unfinished):
    run, _ = unfinished
    with pytest.raises(UsageError, match="unfinished run; add --resume"):
        train_scorer(run.model_copy(update={"resume": False}))
    with pytest.raises(ValueError, match="add --resume"):
        TrainSettings.model_validate(run.model_dump() | {"resume": False, "force": True})


def test_a_run_without_checkpoints_saves_one_when_it_is_stopped(world, monkeypatch):
    run = settings(resume=False, train={"max_steps": 10})
    with monkeypatch.context() as patch:
        die_at(patch, 4, ask_to_stop)
        with pytest.raises(StoppedError, match="with --resume resumes from"):
            train_scorer(run)
    assert train_scorer(run.model_copy(update={"resume": True})).resumed_from.endswith("checkpoint-5")


def test_heads_trained_before_a_stop_are_kept(world, monkeypatch):
    about = {"trunk": "own", "head": "state", "width": 8, "train": HEADS}  # two layers are tried
    seen = []

    def stop_in_second():
        ask_to_stop()
        seen.append(len(list((world / "out" / "checkpoints").rglob("fitted.json"))))

    real = TrainLog.on_log

    def on_log(self, args, state, *rest, logs=None, **named):
        real(self, args, state, *rest, logs=logs, **named)
        if logs.get("layer") == 1 and state.global_step == 4 and not seen:
            stop_in_second()

    with monkeypatch.context() as patch:
        patch.setattr(TrainLog, "on_log", on_log)
        with pytest.raises(StoppedError, match="layer-1-width-8"):
            train_scorer(settings(resume=False, **about))
    assert seen == [0]  # without --resume, heads are saved only when the run stops
    trained = world / "out" / "checkpoints" / "layer-2-width-8" / "finished"
    assert verify(trained).step == 12
    when = (trained / "head.safetensors").stat().st_mtime_ns
    report = train_scorer(settings(**about))
    assert report.resumed_from.endswith("checkpoint-5")
    assert [choice.layer for choice in report.choices] == [2, 1]
    assert (trained / "head.safetensors").stat().st_mtime_ns == when
    shutil.move("out", "resumed")
    train_scorer(settings(**about))
    require_same(written(world / "out"), written(world / "resumed"))


def test_a_damaged_trained_head_is_trained_again_and_one_of_another_run_raises_an_error(world):
    about = {"trunk": "own", "head": "state", "width": 8, "layer": 1, "train": HEADS | {"max_steps": 3}}
    train_scorer(settings(**about))
    whole = written(world / "out")
    for name in ("rgtg.json", "head.safetensors", "train-report.json"):
        (world / "out" / name).unlink()
    with pytest.raises(UsageError, match=r"cannot resume from finished: train.learning_rate"):
        train_scorer(settings(**about | {"train": about["train"] | {"learning_rate": 0.1}}))
    flip(world / "out" / "checkpoints" / "layer-1-width-8" / "finished" / "head.safetensors")
    with pytest.warns(UserWarning, match="trained again: head.safetensors is damaged"):
        train_scorer(settings(**about))
    require_same(written(world / "out"), whole)


def test_a_full_disk_leaves_earlier_checkpoints_untouched(world, monkeypatch):
    run = settings(train={"max_steps": 6, "save_steps": 2, "save_total_limit": 1})
    train_scorer(run)
    whole = written(world / "out")
    shutil.move("out", "whole")
    real = torch.save

    def full(what, where, *rest, **named):
        if "checkpoint-4" in str(where):
            raise OSError(28, "No space left on device")
        return real(what, where, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match=r"checkpoint-4: No space left on device. Earlier checkpoints are untou"):
            train_scorer(run)
    assert [path.name for path in (world / "out" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert train_scorer(run).resumed_from.endswith("checkpoint-2")
    require_same(written(world / "out"), whole)
    assert [path.name for path in (world / "out" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-6"]


def test_an_unwritable_output_raises_an_error_before_training(world):
    with pytest.raises(OutputError, match="cannot write to /proc/rgtg-out"):
        train_scorer(settings("/proc/rgtg-out"))


def reward_trainer(folder, **changes):
    plain = {"gradient_checkpointing": None, "activation_checkpointing": False, "bf16": False, "use_cpu": True}
    plain |= {"disable_tqdm": True, "dataloader_pin_memory": False, "max_steps": 4, "save_steps": 2}
    model = tiny_reward_model().requires_grad_(True)
    from datasets import Dataset

    data = Dataset.from_list(synthetic_rows(16))
    return PrefixRewardTrainer(
        model, RewardConfig(str(folder), **(plain | changes)), train_dataset=data, processing_class=tiny_tokenizer()
    )


def test_a_trainer_in_a_script_resumes_from_the_newest_valid_checkpoint(world):
    reward_trainer("run").train()
    flip(world / "run" / "checkpoint-4" / "model.safetensors")
    again = reward_trainer("run")
    with pytest.warns(UserWarning, match="checkpoint-4 is skipped"):
        again.train(resume_from_checkpoint=True)
    assert again._checkpoint.name == "checkpoint-2"
    one, other = (load_file(world / "run" / name / "model.safetensors") for name in ("checkpoint-2", "checkpoint-4"))
    assert not torch.equal(one["score.weight"], other["score.weight"])
    assert not list((world / "run").rglob("training_args.bin"))


def test_an_infinite_gradient_stops_before_the_weights_are_lost(world, monkeypatch):
    trainer = reward_trainer("run", max_grad_norm=0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.score.weight.register_hook(lambda grad: grad / 0)
    with pytest.raises(NonFiniteError, match=r"gradient's norm is (inf|nan) at step 1"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_non_finite_weights_are_not_saved(world):
    trainer = reward_trainer("run")
    with torch.no_grad():
        trainer.model.score.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"not finite \(score.weight\)"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list((world / "run").glob("checkpoint-*"))


def test_a_second_ctrl_c_interrupts_a_deferred_block(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def impatient():
        with StopRequest("go on") as request, request.defer():
            for number in (
                signal.SIGINT,
                signal.SIGINT,
                signal.SIGTERM,
            ):  # the first again, passed on
                os.kill(os.getpid(), number)
            assert request.asked
            now[0] += 2
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")

    with pytest.raises(StoppedError, match="stopped; go on"):
        impatient()


def test_an_incomplete_stage_is_removed(tmp_path):
    (tmp_path / ".unfinished-x").mkdir()
    (tmp_path / ".unfinished-x" / "config.json").write_text("{}")
    finish_saving(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_checkpoint_whose_marker_names_an_impossible_file_is_skipped(tmp_path, name):
    (tmp_path / "weights").write_bytes(b"1")
    seal(tmp_path, step=1, processes=1, run={})
    marker = json.loads((tmp_path / MARKER).read_text())
    marker["files"][name] = marker["files"]["weights"]
    (tmp_path / MARKER).write_text(json.dumps(marker))
    assert "cannot be read" in verify(tmp_path)
