"""A tiny policy that vLLM can run, heads on it, and vLLM's own environment (``make test-vllm`` builds it)."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from helpers.vllm_world import build, vllm_environment

DRIVER = Path(__file__).parents[2] / "helpers" / "vllm_driver.py"


@pytest.fixture(scope="session")
def vllm_python():
    """The interpreter of an environment with vLLM and this package; `make test-vllm` names it."""
    python = os.environ.get("RGTG_VLLM_PYTHON")
    if not python:
        pytest.skip("vLLM has an environment of its own: run these tests by make test-vllm")
    return python


@pytest.fixture(scope="session")
def vllm_world(tmp_path_factory):
    """Folders of a random Llama with heads of 64 dimensions (vLLM's CPU kernels need them), and of heads on it."""
    return build(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="session")
def run_vllm(vllm_python, vllm_world, tmp_path_factory):
    """Run requests in a vLLM engine; returns completions by number, and the engine's counters."""

    def run(requests, world=vllm_world, second_runner=False, **engine):
        work = tmp_path_factory.mktemp("job")
        job = {"model": str(world.policy), "engine": engine, "requests": requests}
        (work / "job.json").write_text(json.dumps(job))
        environment = vllm_environment(world.file) | ({"RGTG_SECOND_RUNNER": "1"} if second_runner else {})
        done = subprocess.run(
            [vllm_python, str(DRIVER), str(work / "job.json"), str(work / "result.json")],
            env=environment, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        assert (work / "result.json").exists(), done.stdout[-2000:] + done.stderr[-6000:]
        result = json.loads((work / "result.json").read_text())
        return [result["tokens"][str(i)] for i in range(len(requests))], result["counters"]

    return run
