"""A job of 500 prompts killed at random moments gives the same bytes as one that was not killed."""

import json
import random
import signal
import time

import pytest

from helpers.killing import finish, in_process, kill, wait_until
from helpers.naive import info
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.models.loading.scorer_info import write_info

ROWS = 500


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of the job, and its output and duration without kills."""
    folder = tmp_path_factory.mktemp("killed")
    tiny_policy().save_pretrained(folder / "policy")
    tiny_reward_model().save_pretrained(folder / "scorer")
    write_info(folder / "scorer", info())
    for name in ("policy", "scorer"):
        tiny_tokenizer().save_pretrained(folder / name)
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdef ghij", k=draw.randint(2, 60))) + "." for _ in range(ROWS)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "id": f"p{i}"}) + "\n" for i, text in enumerate(texts)))
    arguments = [
        "generate", "--policy", folder / "policy", "--scorer", folder / "scorer", "--max-new-tokens", 4, "--prompts",
        prompts, "--batch-tokens", 512, "--set", "device=cpu", "--seed", 3,
    ]  # fmt: skip
    whole = folder / "whole.jsonl"
    in_process("--version").join()  # the process that all are forked from has imported everything
    start = time.monotonic()
    assert finish(in_process(*arguments, "--output", whole)) == 0
    return arguments, whole.read_bytes(), time.monotonic() - start


def held(output):
    """Number of rows in the journal of an output."""
    path = output.with_name(output.name + ".partial")
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0


def survives(job, output, kills, draw):
    """Kill the job up to ``kills`` times while it works, then let it finish; return how many kills hit it at work."""
    arguments, whole, seconds = job
    killed = progressed = 0
    for _ in range(kills):
        process, before = in_process(*arguments, "--output", output), held(output)
        # Half of them once rows were added, at a random moment of the next batches; half at a random moment of all.
        if draw.random() < 0.5:
            wait_until(lambda held_before=before: held(output) > held_before or output.exists(), process)
            killed += kill(process, draw.uniform(0, 0.1)) == -signal.SIGKILL
        else:
            killed += kill(process, draw.uniform(0, seconds)) == -signal.SIGKILL
        progressed += held(output) > before
        if output.exists():
            break
    assert finish(in_process(*arguments, "--output", output)) == 0
    assert output.read_bytes() == whole
    ids = [json.loads(line)["id"] for line in whole.splitlines()]
    assert ids == [f"p{i}" for i in range(ROWS)]
    assert not output.with_name(output.name + ".partial").exists()
    return killed, progressed


def killed_until(job, folder, kills, draw):
    """Start new outputs until enough kills have hit a running job and some of them left finished rows."""
    killed = progressed = 0
    for round_ in range(10 * kills):  # a job may be done before its kill comes: that is no failure, but no kill either
        hit = survives(job, folder / f"out{round_}.jsonl", max(kills - killed, 1), draw)
        killed, progressed = killed + hit[0], progressed + hit[1]
        if killed >= kills and progressed:
            return
    pytest.fail(f"{killed} kills came in time, {progressed} of them after rows were added")


def test_a_few_kills_leave_the_output_unchanged(job, tmp_path):
    killed_until(job, tmp_path, 4, random.Random(1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_leave_the_output_unchanged(job, tmp_path):
    killed_until(job, tmp_path, 20, random.Random(2))


def test_sigterm_exits_with_75_and_the_same_command_resumes(job, tmp_path):
    arguments, whole, _ = job
    output = tmp_path / "out.jsonl"
    process = in_process(*arguments, "--output", output)
    wait_until(lambda: held(output) > 10, process)
    assert kill(process, 0, signal.SIGTERM) == 75
    rows = held(output)
    assert 10 < rows < ROWS
    assert not output.exists()
    assert finish(in_process(*arguments, "--output", output)) == 0
    assert output.read_bytes() == whole
