"""``torchrun --no-python rgtg train``: two processes, one scorer, one result on stdout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.synthetic import synthetic_rows, write_rows
from rgtg.models.scorers.reward_model import PrefixScorer

RGTG = Path(sys.executable).with_name("rgtg")


def torchrun(*arguments):
    """Run both processes on the CPU, with gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    return subprocess.run(
        [*command, str(RGTG), *map(str, arguments)], capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


@pytest.mark.skipif(not RGTG.is_file(), reason="rgtg is not installed beside this Python")
def test_two_processes_train_one_scorer_and_rank_0_prints(policy_folder, tmp_path):
    pairs, output = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(40)), tmp_path / "scorer"
    settings = ["--set", "train.max_steps=2", "--set", "train.per_device_train_batch_size=2"]
    ran = torchrun("train", "--base", policy_folder, "--pairs", pairs, "--output", output, *settings, "--json")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert (report["processes"], report["steps"], report["device"].partition(":")[0]) == (2, 2, "cpu")
    assert "error" not in ran.stderr.lower()
    assert "warning" not in ran.stderr.lower()
    assert len(PrefixScorer.from_pretrained(str(output), device="cpu").score(["mno? "], ["so abc"])) == 1
