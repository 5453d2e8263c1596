"""Quantised checkpoints that transformers loads without a GPU: torchao's int8 and int4 weights."""

import pytest
import torch

pytest.importorskip("torchao.quantization", reason="quantised checkpoints need torchao: pip install torchao")

from torchao import quantization
from transformers import AutoModelForCausalLM, LlamaConfig, TorchAoConfig

from helpers.command import verb
from helpers.synthetic import synthetic_rows, write_rows
from helpers.tiny_models import VOCAB, randomise, tiny_tokenizer
from rgtg import GuidedPolicy
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.scorer_info import cast_fingerprints, fingerprint_weights
from rgtg.models.ops import packed_linear

KINDS = {
    "int8": lambda: quantization.Int8WeightOnlyConfig(version=2),
    "int8 activations": lambda: quantization.Int8DynamicActivationInt8WeightConfig(version=2),
    "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(params=KINDS)
def quantised(request, tmp_path):
    """The folder of a quantised policy."""
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
        vocab_size=VOCAB, pad_token_id=1, bos_token_id=0, eos_token_id=2, max_position_embeddings=128,
    )  # fmt: skip
    randomise(AutoModelForCausalLM.from_config(config), 0).save_pretrained(tmp_path / "dense")
    settings = TorchAoConfig(KINDS[request.param]())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantised")
    tiny_tokenizer().save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


def test_decodes_as_transformers_and_is_not_packed(quantised, monkeypatch):
    monkeypatch.setattr(packed_linear, "MIN_WEIGHT_BYTES", 0)
    stock = AutoModelForCausalLM.from_pretrained(quantised).eval()
    guided = GuidedPolicy.from_pretrained(str(quantised), method="policy")
    (done,) = guided.generate_ids([[5, 6, 7, 8]], max_new_tokens=12, temperature=0)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = stock.generate(ids, max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    assert done.token_ids == expected[: len(done.token_ids)]
    assert guided.policy.model.model.layers[0].mlp.up_proj.weight.__class__.__module__.startswith("torchao")


def test_fingerprints_tell_weights_apart(quantised):
    one, again = (load_policy(str(quantised)).model for _ in range(2))
    assert fingerprint_weights(one) == fingerprint_weights(again)
    assert len(cast_fingerprints(one)) == 2
    dense = load_policy(str(quantised.parent / "quantised")).model
    scale = dense.model.layers[0].mlp.up_proj.weight.__tensor_flatten__()[0]
    part = getattr(dense.model.layers[0].mlp.up_proj.weight, scale[0])
    with torch.no_grad():
        part.view(-1)[0] += 1
    assert fingerprint_weights(dense) != fingerprint_weights(one)


def test_heads_are_trained_on_it_and_other_training_is_refused(quantised, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", synthetic_rows(8))
    where = ("--base", quantised, "--pairs", pairs, "--set", "train.max_steps=1")
    for more in ((), ("--objective", "farma")):
        ran = verb("train")(*where, *more, "--output", tmp_path / "no")
        assert ran.exit_code == 2, (ran.output, ran.exception)
        assert "is quantised (torchao), and the base model has to be trained" in ran.stderr
    head = ("--trunk", "own", "--head", "vocab", "--set", "layer=1", "--set", "width=8", "--output", tmp_path / "head")
    ran = verb("train")(*where, *head)
    assert ran.exit_code == 0, (ran.output, ran.exception)
    guided = GuidedPolicy.from_pretrained(str(quantised), str(tmp_path / "head"), beta=2.0)
    assert guided.generate("Hi", max_new_tokens=3)
