"""Two processes give what one gives: DDP, FSDP2 and manual sharding, with gloo on CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from helpers.two_processes import ROWS, reward_loss, settings
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.training.train import train_scorer

TESTS = Path(__file__).parents[1]
# On a machine without GPUs, --multi_gpu starts processes that communicate through gloo.
LAUNCH = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
    "no", "--dynamo_backend", "no",
]  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    tiny_policy().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    write_rows(tmp_path / "pairs.jsonl", synthetic_rows(41))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*parts):
    paths = [*sys.path, str(TESTS)]
    ran = subprocess.run(
        [sys.executable, "-m", *LAUNCH, str(TESTS / "helpers" / "two_processes.py"), *parts],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert all(Path(f"{part}.done").exists() for part in parts), ran.stderr
    assert "Warning" not in ran.stderr


def require_close(one, other):
    """Compare weights and loss curves; another order of summation changes the last digits."""
    first, second = (load_file(next(Path(name).glob("*model.safetensors"))) for name in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)
    logs = [Path(name, "train-log.jsonl").read_text().splitlines() for name in (one, other)]
    assert len(logs[0]) == len(logs[1]) > 2
    for lines in zip(*(map(json.loads, log) for log in logs), strict=True):
        for key in ("loss", "accuracy_100", "margin", "eval_loss", "eval_accuracy_100", "train_loss"):
            assert lines[0].get(key) == pytest.approx(lines[1].get(key), abs=1e-4), (key, *lines)


def test_two_processes_give_what_one_gives_at_the_same_global_batch(world):
    """One test for all, because starting two processes takes longer than what they do."""
    launch("replicated", "sharded", "sharded_by_hand")
    for objective in ("prefix-bt", "farma"):
        train_scorer(settings(f"one-{objective}", 8, objective=objective))
        require_close(f"one-{objective}", f"two-{objective}")
    require_close("two-whole", "two-stopped")
    assert Path("two-whole/model.safetensors").read_bytes() == Path("two-stopped/model.safetensors").read_bytes()
    for name in ("sharded", "sharded-stopped"):
        require_close("one-prefix-bt", name)
    train_scorer(settings("one-lora", 8, lora={"r": 4}))
    require_close("one-lora", "sharded-lora")
    assert len(PrefixScorer.from_pretrained("sharded-lora", device="cpu").score(["mno? "], ["so abc"])) == 1
    require_same_gradients(torch.load("by-hand.pt", weights_only=True))


def require_same_gradients(found):
    model = tiny_reward_model().requires_grad_(True)
    loss = reward_loss(model, ROWS)
    loss.backward()
    assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    parameters = dict(model.named_parameters())
    assert found["gradients"].keys() == parameters.keys()
    for name, gradient in found["gradients"].items():
        torch.testing.assert_close(gradient, parameters[name].grad, atol=1e-6, rtol=1e-5)
    saved = AutoModelForSequenceClassification.from_pretrained("by-hand").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
