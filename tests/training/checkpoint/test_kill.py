"""kill -9 at random moments of a training run: after a restart, every file equals that of an uninterrupted run."""

import random
import shutil
import signal

import pytest

from helpers.forked_runs import ForkedRuns
from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.config import TrainSettings
from training.checkpoint.test_resume import require_same, written

TRAIN = {"learning_rate": 3e-3, "logging_steps": 3, "use_cpu": True}
KINDS = {
    "scorer": {
        "lora": {"r": 4, "lora_dropout": 0.1}, "prefix_bt": {"prefixes": 2},
        "train": TRAIN | {"num_train_epochs": 2, "save_steps": 2, "save_total_limit": 2, "eval_strategy": "epoch"},
    },
    "heads": {
        "trunk": "own", "head": "vocab", "width": 8,
        "train": TRAIN | {"num_train_epochs": 4, "per_device_train_batch_size": 8, "save_steps": 3},
    },
}  # fmt: skip


@pytest.fixture
def runs(tmp_path, monkeypatch):
    tiny_policy().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    write_rows(tmp_path / "pairs.jsonl", synthetic_rows(60))
    monkeypatch.chdir(tmp_path)
    with ForkedRuns() as forked:
        yield forked


def settings(kind, epochs=None):
    """More epochs, so that a run is more likely killed during training than during start-up."""
    values = {"base": "policy", "pairs": "pairs.jsonl", "output": "out", "eval_fraction": 0.2, "resume": True}
    settings = TrainSettings(**(values | KINDS[kind]))
    return settings.model_copy(update={"train": settings.train | ({"num_train_epochs": epochs} if epochs else {})})


def undisturbed(runs, folder, run):
    shutil.rmtree("out", ignore_errors=True)
    code, seconds = runs.run(run)
    assert code == 0
    return written(folder / "out"), seconds


def kill_and_rerun(runs, folder, run, whole, seconds, kills, seed):
    """Runs that are killed, some of them twice, and restarted until they end."""
    draw, done, resumed = random.Random(seed), 0, 0
    while done < kills:
        shutil.rmtree("out")
        for _ in range(draw.choice((1, 1, 2))):
            code, _ = runs.run(run, after=draw.uniform(0, seconds))
            assert code in (0, -signal.SIGKILL)
            done += code != 0
        resumed += any((folder / "out").glob("checkpoints/**/rgtg-checkpoint.json"))
        code, _ = runs.run(run)
        assert code == 0
        require_same(written(folder / "out"), whole)
        assert not list((folder / "out").glob(".unfinished*"))
    return done, resumed


def stop_and_rerun(runs, folder, run, whole, after):
    code = 0
    while code != 75:  # a run that was faster this time is stopped earlier
        shutil.rmtree("out", ignore_errors=True)
        code, _ = runs.run(run, after=after, number=signal.SIGTERM)
        assert code in (0, 75)
        after *= 0.8
    assert runs.run(run)[0] == 0
    require_same(written(folder / "out"), whole)


def test_a_killed_or_stopped_run_resumes_to_the_same_result(runs, tmp_path):
    """One test for all, because it needs an interpreter that has imported everything."""
    scorer, heads = settings("scorer"), settings("heads")
    whole, seconds = undisturbed(runs, tmp_path, scorer)
    kill_and_rerun(runs, tmp_path, scorer, whole, seconds, 2, seed=1)
    stop_and_rerun(runs, tmp_path, scorer, whole, seconds / 2)
    whole, seconds = undisturbed(runs, tmp_path, heads)
    kill_and_rerun(runs, tmp_path, heads, whole, seconds, 1, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "epochs"), [("scorer", 6), ("heads", 40)])
def test_a_run_killed_twenty_times_gives_the_same_result(runs, tmp_path, kind, epochs):
    run = settings(kind, epochs)
    whole, seconds = undisturbed(runs, tmp_path, run)
    done, resumed = kill_and_rerun(runs, tmp_path, run, whole, seconds, 20, seed=2)
    assert done >= 20
    assert resumed >= 5  # enough of them had a checkpoint to resume from
