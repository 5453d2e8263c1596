"""A full disk: one message, exit code 1, and no output that looks complete."""

import json
import os
import subprocess
import sys

import pytest
import torch

from helpers.command import verb
from helpers.naive import info
from helpers.synthetic import synthetic_rows, write_rows
from rgtg.batch import output as place
from rgtg.errors import ModelNotFoundError
from rgtg.models.loading.scorer_info import write_info
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.training.checkpoint.manager import seal

resource = pytest.importorskip("resource", reason="this system has no limit on the size of a file")
run = verb()


@pytest.fixture
def no_room():
    """Limit files to 8 KiB: writing more fails as on a full disk (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    torch.set_num_threads(1)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(ran, message="File too large"):
    assert ran.exit_code == 1, ran.output
    assert message in ran.stderr
    assert [line.partition(":")[0] for line in ran.stderr.splitlines()] in (["error"], ["warning", "error"])
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


@pytest.mark.parametrize("before", ["", "an earlier output\n"])
def test_generate_prints_one_message(policy_folder, scorer_folder, tmp_path, no_room, before):
    write_info(scorer_folder, info())
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out" / "done.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": c}) + "\n" for c in "abcdefgh"))
    output.parent.mkdir()
    if before:
        output.write_text(before)
    models = ["--policy", policy_folder, "--scorer", scorer_folder, "--max-new-tokens", 8, "--trace", "--quiet"]
    no_room()
    refused(run("generate", *models, "--prompts", prompts, "--output", output, "--force"))
    left = {path.name: path.read_text() for path in output.parent.iterdir()}
    assert left == ({"done.jsonl": before} if before else {})


def test_generate_keeps_the_finished_rows(policy_folder, scorer_folder, tmp_path, no_room):
    write_info(scorer_folder, info())
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "done.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": c}) + "\n" for c in "abcdefghijklmnopqrst"))
    models = ["generate", "--policy", policy_folder, "--scorer", scorer_folder, "--max-new-tokens", 3, "--quiet"]
    models += ["--prompts", prompts, "--batch-size", 2]
    assert run(*models, "--output", tmp_path / "whole.jsonl").exit_code == 0
    no_room()
    refused(run(*models, "--output", output), "rows it holds are kept, and the same command resumes from them")
    kept = (tmp_path / "done.jsonl.partial").read_bytes()
    assert kept.endswith(b"\n")
    assert not output.exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert run(*models, "--output", output).exit_code == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_generate_says_how_to_resume_if_only_the_final_output_does_not_fit(
    policy_folder, scorer_folder, tmp_path, no_room, monkeypatch
):
    write_info(scorer_folder, info())
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "done.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": c * 100}) + "\n" for c in "abcdefghijkl"))
    models = ["generate", "--policy", policy_folder, "--scorer", scorer_folder, "--max-new-tokens", 16, "--quiet"]
    models += ["--prompts", prompts, "--trace"]
    assert run(*models, "--output", tmp_path / "whole.jsonl").exit_code == 0
    assert (tmp_path / "whole.jsonl").stat().st_size > 8192
    write = place._write_lines

    def write_without_room(*arguments):
        no_room()
        return write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(place, "_write_lines", write_without_room)
        told = f"all 12 finished rows are kept in {output}.partial, and the same command resumes from them once there"
        refused(run(*models, "--output", output), told)
    assert not output.exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    monkeypatch.setattr("rgtg.batch.tasks.complete_batch", lambda *_, **__: pytest.fail("all rows are finished"))
    assert run(*models, "--output", output).exit_code == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not output.with_name("done.jsonl.partial").exists()


def test_audit_prints_one_message(scorer_folder, tmp_path, no_room):
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(6))
    pytest.importorskip("matplotlib.font_manager")  # it keeps a large file of its own, made on the first import
    no_room()
    refused(run("audit", "--scorer", scorer_folder, "--pairs", pairs, "--output", tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_train_prints_one_message(policy_folder, tmp_path, no_room):
    pairs, output = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(20)), tmp_path / "out"
    arguments = ["--pairs", pairs, "--base", policy_folder, "--output", output, "--set", "train.max_steps=1", "--quiet"]
    no_room()
    refused(run("train", *arguments))
    assert not [path for path in output.iterdir() if path.name in ("rgtg.json", "model.safetensors", "config.json")]
    assert not list(output.glob(".unfinished*"))
    with pytest.raises(ModelNotFoundError):
        PrefixScorer.from_pretrained(str(output))


def test_an_unwritable_checkpoint_prints_one_message(policy_folder, tmp_path, no_room):
    """First the weights do not fit; then they do, and the files that torch writes do not."""
    pairs, output = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(20)), tmp_path / "out"
    arguments = ["--pairs", pairs, "--base", policy_folder, "--output", output, "--resume", "--quiet"]
    arguments += ["--set", "train.max_steps=2", "--set", "train.save_steps=1"]
    no_room()
    refused(run("train", *arguments), "checkpoint-1: File too large")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # weights of 70 kB, an optimiser's state of 140 kB
    refused(run("train", *arguments), "checkpoint-1: the disk may be full. Earlier checkpoints")
    assert not list((output / "checkpoints").glob("checkpoint-*"))  # what was half there makes room
    assert not (output / "rgtg.json").exists()


def test_an_earlier_checkpoint_survives_a_full_disk_and_a_read_only_folder(
    policy_folder, tmp_path, no_room, unprivileged
):
    """The first checkpoint fits, the second does not; then the folder is read-only; then the run resumes."""
    pairs, output = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(20)), tmp_path / "out"
    arguments = ["--pairs", pairs, "--base", policy_folder, "--quiet", "--resume", "--set", "train.save_steps=1"]
    arguments += ["--set", "train.per_device_train_batch_size=4", "--set", "train.max_steps=3"]
    assert run("train", *arguments, "--output", tmp_path / "whole").exit_code == 0

    def seal_the_last(folder, **about):
        seal(folder, **about)
        no_room()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("rgtg.training.trainers.resumable.seal", seal_the_last)
        refused(run("train", *arguments, "--output", output), "Earlier checkpoints are untouched: make room, then")
    assert [path.name for path in (output / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    output.chmod(0o555)
    for file in policy_folder.iterdir():
        file.chmod(0o644)
    with unprivileged():
        refused(run("train", *arguments, "--output", output), f"cannot write to {output}: Permission denied")
    output.chmod(0o755)
    ran = run("train", *arguments, "--output", output, "--json")
    assert ran.exit_code == 0, ran.stderr
    assert json.loads(ran.stdout)["resumed_from"].endswith("checkpoint-1")
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_exits_with_1(tmp_path, unbuffered):
    """Buffered output would fail only when the interpreter exits, too late for an exit code."""
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(6))
    code = "from rgtg.__main__ import main; main()"
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-c", code, "data", "check", str(pairs), "--json"],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=120,
        )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (1, "error: cannot write: No space left on device\n")


def test_a_closed_pipe_prints_no_error(tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(6))
    code = "from rgtg.__main__ import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, "-c", code, "data", "check", str(pairs), "--json"],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (1, "")
