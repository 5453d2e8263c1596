"""A file of prompts on a Ray cluster gives the same bytes as without it, even if workers die or it is stopped."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

import rgtg
from helpers.command import verb
from helpers.ray_workers import Buggy, DiesOnLoad, Fake, OtherModels, notes, slow_worker
from helpers.ray_world import save_models, write_prompts
from rgtg.batch.tasks import FailedTask, Task, TaskBatch
from rgtg.config import GenerateSettings
from rgtg.data.prompts import PromptRow, read_prompt_rows
from rgtg.errors import RgtgError
from rgtg.integrations import ray_pool
from rgtg.integrations.ray_batch import ray_job
from rgtg.integrations.ray_cluster import WorkerResources, connect_ray
from rgtg.types.batch import JobResult

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is absent: pip install '.[ray]'"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's processes outlive their handles
]
generate = verb("generate")
ROWS = 120


@pytest.fixture(scope="module")
def ray_cluster():
    """Start a cluster with two CPUs, for two workers with one each."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(rgtg.__file__).parents[1])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)  # so that workers of these tests can be imported there
        patch.setattr(os, "cpu_count", lambda: 2)
        with connect_ray(GenerateSettings(ray=True, actors=2, cpus_per_actor=1)) as started_here:
            assert started_here
            yield


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Settings of a job, and its output without Ray."""
    folder = save_models(tmp_path_factory.mktemp("ray"))
    write_prompts(folder / "prompts.jsonl", ROWS)
    given = {
        "policy": str(folder / "policy"), "scorer": str(folder / "scorer"), "prompts": folder / "prompts.jsonl",
        "seed": 3, "max_new_tokens": 12, "batch_tokens": 256, "on_bad": "skip", "device": "cpu",
    }  # fmt: skip
    done = generate(*arguments(given, folder / "whole.jsonl"))
    assert done.exit_code == 0, done.output
    return given, {name: (folder / f"whole.jsonl{name}").read_bytes() for name in ("", ".errors.jsonl")}


def arguments(given, output):
    flags = [("--set", f"{name}={value}") for name, value in given.items() if name != "prompts"]
    return ["--prompts", given["prompts"], "--output", output, *chain(*flags)]


def written(output):
    return {name: output.with_name(output.name + name).read_bytes() for name in ("", ".errors.jsonl")}


def at_work_on(output):
    """Processes that have begun a batch and not finished it."""
    ended = notes(output, "done")
    return [pid for pid, rows in notes(output, "given") if [pid, rows] not in ended]


def test_after_a_worker_is_killed_the_bytes_are_those_without_ray(ray_cluster, job, tmp_path, monkeypatch):
    given, whole = job
    monkeypatch.setattr(ray_pool, "Worker", slow_worker())
    settings = GenerateSettings(**given, output=tmp_path / "out.jsonl", ray=True, actors=2)
    killed = []

    def kill_one(state):
        if state.done > 20 and not killed:
            while not (at_work := at_work_on(settings.output)):
                time.sleep(0.002)
            killed.append(at_work[0])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.warns(UserWarning, match="a worker died .process .*its rows are done again"):  # noqa: SIM117
        with ray_job(settings, read_prompt_rows(settings.prompts)) as run:
            result = run(progress=kill_one)
    assert len(killed) == 1
    assert (result.rows, result.completions, result.failed) == (ROWS + 1, ROWS, 1)
    assert written(settings.output) == whole
    begun, ended = ([rows for _, rows in notes(settings.output, name)] for name in ("given", "done"))
    assert sorted(chain(*ended)) == sorted(f"p{i}" for i in range(ROWS)), "each row was done once"
    assert len(begun) == len(ended) + 1, "one batch was in flight at the worker that was killed"
    local = given["prompts"].with_name("whole.jsonl.job.json")
    assert result.made_with == JobResult.model_validate_json(local.read_bytes()).made_with
    again = generate(*arguments(given | {"temperature": 0.5}, settings.output))
    assert again.exit_code == 2
    assert "temperature" in again.output


def test_sigterm_exits_with_75_and_the_job_resumes_without_ray(ray_cluster, job, tmp_path):
    import ray

    given, whole = job
    output = tmp_path / "out.jsonl"
    partial = output.with_name("out.jsonl.partial")
    words = [*map(str, arguments(given, output)), "--ray", "--address", ray.get_runtime_context().gcs_address]
    code = "from helpers import ray_workers; from rgtg.integrations import ray_pool; "
    code += "ray_pool.Worker = ray_workers.slow_worker()"
    command = f"{code}; from rgtg.cli.main import app; app()"
    with subprocess.Popen(
        [sys.executable, "-c", command, "generate", *words], stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for _ in range(6000):
            if process.poll() is not None or (partial.exists() and partial.read_bytes().count(b"\n") > 5):
                break
            try:
                process.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "the same command resumes" in said
    assert not output.exists()
    done = generate(*arguments(given, output))
    assert done.exit_code == 0, done.output
    assert written(output) == whole


@pytest.fixture
def pool(ray_cluster, tmp_path, monkeypatch):
    """Complete batches with workers of the given class."""

    def run(kind, batches, actors=1, version=rgtg.__version__):
        monkeypatch.setattr(ray_pool, "Worker", kind)
        settings = GenerateSettings(policy=version, output=tmp_path / "out.jsonl")
        with ray_pool.WorkerPool(settings, WorkerResources(actors, 1, 0)).open() as opened:
            return list(opened.complete(batches))

    return run


def batch(*prompts):
    start = ord(prompts[0][0])
    rows = [PromptRow(number=i, id=text, prompt=text) for i, text in enumerate(prompts, start)]
    return TaskBatch(tuple(Task(row.number, row, 0, 1, 1) for row in rows))


def test_a_batch_that_kills_workers_is_split_into_rows():
    whole = batch("a", "b", "c")
    assert ray_pool._retry(whole, 1) == ([ray_pool._complete_call(whole)], [])
    again, outcomes = ray_pool._retry(whole, 2)
    assert [call.arguments[0] for call in again] == [batch("a"), batch("b"), batch("c")]
    assert len({call.name for call in again}) == 3, "each of them is counted by itself"
    assert not outcomes


@pytest.mark.filterwarnings("ignore:a worker died:UserWarning")
def test_a_row_that_kills_workers_fails_and_the_others_are_completed(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_pool, "_BATCH_DEATHS", 1)
    (failed,), rest = pool(Fake, [batch("b?"), batch("d", "e")])
    assert isinstance(failed, FailedTask)
    assert (failed.task.row.id, failed.reason) == ("b?", "worker died")
    assert rest == [100, 101]
    assert notes(tmp_path / "out.jsonl", "given") == [["b?"], ["d", "e"]]


@pytest.mark.parametrize(
    ("kind", "about", "told"),
    [
        (DiesOnLoad, {}, "a worker died 3 times while it loaded the models .process"),
        (OtherModels, {"actors": 2}, "process .* has another policy than the worker before it"),
        (Fake, {"version": "0.0.1"}, "has rgtg 0.0.1, and this is .*: install the same one"),
    ],
)
def test_workers_that_cannot_start_are_an_error(pool, kind, about, told):
    with pytest.raises(RgtgError, match=told):
        pool(kind, [batch(chr(97 + i)) for i in range(40)], **about)


def test_a_bug_in_a_worker_keeps_its_error(pool):
    with pytest.raises(KeyError, match="a fault of the program"):
        pool(Buggy, [batch("a")])


def test_a_cluster_without_room_is_an_error(pool, monkeypatch):
    monkeypatch.setattr(ray_pool, "_START_SECONDS", 0.0)
    with pytest.raises(RgtgError, match="no node of the cluster had room for a worker with 1 CPUs and 0 GPUs"):
        pool(Fake, [batch("a")])
