"""The plug-in on a real model, SmolLM2-135M-Instruct: greedy tokens in fp32 equal those of the torch engine."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.random_heads import write_random_head
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.models.loading.policy import load_policy

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:.*was trained on")]
PROMPTS = ["The capital of France is", "Once upon a time, there was a", "def fibonacci(n):", "How do I boil an egg?"]
TOKENS = 16


@pytest.fixture(scope="module")
def folder():
    """Where `make test-vllm` has put the model (rgtg model smollm2-135m)."""
    given = os.environ.get("RGTG_SMOLLM2", "")
    if not (Path(given) / "model.safetensors").is_file():
        pytest.skip("the real model is absent: make test-vllm brings it where it can be downloaded")
    return Path(given)


def test_greedy_tokens_guided_and_not_in_one_batch(run_vllm, folder, tmp_path):
    policy = load_policy(str(folder), dtype="float32", device="cpu")
    write_random_head(tmp_path / "head", folder, policy=policy, scale=0.5)
    (tmp_path / "scorers.json").write_text(json.dumps({"head": "head"}))
    ids = [policy.tokenizer(text).input_ids for text in PROMPTS]
    params = {"temperature": 0.0, "max_tokens": TOKENS}
    guides = [{"scorers": "head", "betas": 2.0}, None]
    requests = [{"join": 0, "prompt": prompt, "params": params, "guide": guide} for guide in guides for prompt in ids]
    world = SimpleNamespace(policy=folder, file=tmp_path / "scorers.json")
    found, _ = run_vllm(requests, world, max_model_len=128, max_num_seqs=8)
    wanted = []
    for given in ((str(tmp_path / "head"), {"beta": 2.0}), (None, {"method": "policy"})):
        guided = GuidedPolicy.from_pretrained(policy, given[0], **given[1])
        done = guided.generate_ids(ids, temperature=0.0, max_new_tokens=TOKENS)
        wanted += [[one.token_ids] for one in done]
    assert found == wanted
    assert wanted[: len(PROMPTS)] != wanted[len(PROMPTS) :]
