"""The order of syncs, renames and deletions, so that a power failure loses nothing; and files in place of folders."""

import os
from pathlib import Path

import pytest

from helpers.command import verb
from rgtg.errors import OutputError, UsageError
from rgtg.models.loading.scorer_info import INFO_FILE
from rgtg.training.checkpoint.manager import MARKER
from rgtg.training.checkpoint.save import finish_saving
from rgtg.training.train import train_scorer
from rgtg.training.trainers import resumable
from training.checkpoint.test_resume import reward_trainer, settings, world  # noqa: F401  # a fixture

on_linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")
HEAD = {"trunk": "own", "head": "state", "layer": 1, "width": 8}


@pytest.fixture
def events(monkeypatch):
    """The syncs, renames and deletions, in order."""
    seen = []
    fsync, replace, rotate = os.fsync, Path.replace, resumable.rotate_checkpoints

    def synced(file):
        seen.append(("kept", os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    def renamed(path, target):
        seen.append(("renamed", str(Path(target).resolve())))
        return replace(path, target)

    def rotated(folder, *rest, **named):
        seen.append(("rotated", str(Path(folder).resolve())))
        return rotate(folder, *rest, **named)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(resumable, "rotate_checkpoints", rotated)
    return seen


@on_linux
def test_a_checkpoint_is_synced_before_it_is_sealed_and_sealed_before_older_ones_are_deleted(world, events):  # noqa: F811
    reward_trainer("run", save_total_limit=1).train()
    run = world / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    last = run / "checkpoint-4"
    files = {str(path) for path in last.rglob("*") if path.name != MARKER}
    assert len(files) > 5
    sealed = events.index(("renamed", str(last / MARKER)))
    kept = {path for what, path in events[:sealed] if what == "kept"}
    assert files | {str(last), str(last / f"{MARKER}.tmp")} <= kept
    rest = events[sealed + 1 :]
    assert rest.index(("rotated", str(run))) > rest.index(("kept", str(last)))
    assert rest.index(("rotated", str(run))) > rest.index(("kept", str(run)))


@on_linux
@pytest.mark.parametrize("about", [{}, HEAD])
def test_a_scorer_is_synced_before_its_rgtg_json_is_written(world, events, about):  # noqa: F811
    out = world / "out"
    train_scorer(settings(**about, resume=False, train={"max_steps": 1}))
    files = {path.name for path in out.iterdir() if path.is_file()} - {INFO_FILE, "train-log.jsonl"}
    (stage,) = {Path(path).parent for what, path in events if what == "renamed" and ".unfinished" in path}
    staged = events.index(("renamed", str(stage / INFO_FILE)))
    kept = {path for what, path in events[:staged] if what == "kept"}
    assert {str(stage / name) for name in files} | {str(stage), str(stage / f"{INFO_FILE}.tmp")} <= kept
    ready = events.index(("renamed", str(out / INFO_FILE)))
    moved = max(events.index(("renamed", str(out / name))) for name in files)
    assert ("kept", str(out)) in events[moved:ready]
    assert ("kept", str(out)) in events[ready:]


@on_linux
def test_a_save_that_a_power_failure_interrupted_is_finished_in_the_same_order(tmp_path, events):
    stage = tmp_path / ".unfinished-x"
    stage.mkdir()
    for name in (INFO_FILE, "model.safetensors"):
        (stage / name).write_text("{}")
    finish_saving(tmp_path)
    folder, weights, info = (str(path) for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / INFO_FILE))
    assert events == [("renamed", weights), ("kept", folder), ("renamed", info), ("kept", folder)]


@pytest.mark.parametrize(
    "where", ["checkpoints", "checkpoints/checkpoint-5", "checkpoints/layer-1-width-8/checkpoint-3"]
)
@pytest.mark.parametrize("resume", [True, False])
def test_a_file_in_place_of_a_checkpoint_folder_raises_an_error_before_training(world, where, resume):  # noqa: F811
    path = world / "out" / where
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    given = ["--pairs", "pairs.jsonl", "--base", "policy", "--output", "out", *(["--resume"] if resume else [])]
    result = verb("train")(*given)
    assert result.exit_code == 2
    assert f"out/{where} is a file, but a folder of checkpoints is needed there: move it away" in result.stderr
    assert path.read_text() == "mine"


def test_a_file_that_takes_the_place_of_a_checkpoint_during_training_raises_an_error(world):  # noqa: F811
    trainer = reward_trainer("run")
    (world / "run").mkdir(exist_ok=True)
    (world / "run" / "checkpoint-2").write_text("mine")
    with pytest.raises(OutputError, match=r"checkpoint: run/checkpoint-2 is a file, not a folder; move it away"):
        trainer.train()
    assert (world / "run" / "checkpoint-2").read_text() == "mine"


def test_a_file_in_place_of_the_checkpoints_of_a_head_raises_an_error(world):  # noqa: F811
    (world / "out" / "checkpoints").mkdir(parents=True)
    (world / "out" / "checkpoints" / "layer-1-width-8").write_text("mine")
    with pytest.raises(UsageError, match="layer-1-width-8 is a file"):
        train_scorer(settings(**HEAD))
