"""Models that vLLM's CPU kernels can run, scorers of them, and the environment of its processes."""

import json
import os
from types import SimpleNamespace

from transformers import AutoModelForCausalLM, LlamaConfig

from helpers.naive import info
from helpers.random_heads import write_random_head
from helpers.tiny_models import VOCAB, randomise, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.models.loading.scorer_info import write_info
from rgtg.tokenization.encoding import tokenizer_hash


def build(world):
    """Save a random Llama whose attention heads have 64 dimensions (the kernels need them), and scorers of it."""
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96,
        head_dim=64, vocab_size=VOCAB, pad_token_id=1, bos_token_id=0, eos_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    randomise(AutoModelForCausalLM.from_config(config), 0).save_pretrained(world / "policy")
    tiny_tokenizer().save_pretrained(world / "policy")
    write_random_head(world / "kind", world / "policy", seed=3)
    write_random_head(world / "short", world / "policy", seed=4)
    _write_separate(world / "reward", tiny_reward_model(seed=1), head="scalar", objective="prefix-bt")
    _write_separate(world / "values", tiny_policy(seed=9), head="vocab", objective="farma")
    names = ["kind", "short", "reward", "values"]
    (world / "scorers.json").write_text(json.dumps({name: name for name in names}))
    (world / "heads.json").write_text(json.dumps({"kind": "kind", "short": "short"}))
    return SimpleNamespace(
        folder=world, policy=world / "policy", scorers={name: world / name for name in names},
        file=world / "scorers.json",
    )  # fmt: skip


def _write_separate(folder, model, head, objective):
    """A scorer that is a model of its own, with room for all that vLLM writes."""
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_info(
        folder, info(objective).model_copy(update={"head": head, "tokenizer_hash": tokenizer_hash(tiny_tokenizer())})
    )


def vllm_environment(scorers):
    """Environment variables of a process of vLLM; this package comes from its own environment, not from PYTHONPATH."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    return inherited | {"RGTG_VLLM_SCORERS": str(scorers), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
