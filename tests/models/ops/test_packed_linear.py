"""Packed and grouped linear layers equal the stock model; a LoRA on half of the batch equals merged weights."""

import copy

import pytest
import torch

from helpers.tiny_models import CONFIGS, VOCAB, tiny_policy, tiny_reward_model
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.ops import packed_linear as packed
from rgtg.models.ops.packed_linear import (
    GroupedLinear,
    LinearGroup,
    group_linears,
    grouped_linears,
    pack_linears,
    structural_copy,
)

IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
HAS_MKLDNN = torch.backends.mkldnn.is_available()
PACK = [pytest.param(True, marks=pytest.mark.skipif(not HAS_MKLDNN, reason="this torch has no oneDNN")), False]
GROUPS = {"llama": 2 * 4 + 1, "gpt2": 2 * 4 + 1, "gpt_neox": 2 * 4 + 1, "opt": 2 * 4 + 1}


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_copy_gives_the_logits_of_the_model(family, pack):
    for model in (tiny_policy(family), tiny_reward_model(family)):
        copied = group_linears(model, pack=pack)
        assert grouped_linears(copied)
        assert not grouped_linears(model), "the model must not change"
        torch.testing.assert_close(copied(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(GROUPS))
def test_layers_with_one_input_share_one_product(family):
    copied = group_linears(tiny_policy(family), pack=False)
    assert len({id(layer.group) for layer in grouped_linears(copied).values()}) == GROUPS[family]


@pytest.mark.skipif(not HAS_MKLDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("rows", [1, 2, 10, 20, 80])
def test_bfloat16_products_agree(rows):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no AVX-512: bf16 weights are not packed on it")
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(96, 64, generator=generator).bfloat16()
    x = torch.randn(1, rows, 64, generator=generator).bfloat16()
    group = LinearGroup([weight[:32], weight[32:]], [None, None], pack=True)
    got = torch.cat([group.output(0, x), group.output(1, x)], -1)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight), atol=0.03, rtol=0.01)


def test_outputs_do_not_depend_on_the_order_of_calls():
    weights = [torch.randn(3, 5), torch.randn(4, 5)]
    group = LinearGroup(weights, [torch.ones(3), None], pack=False)
    x, y = torch.randn(2, 5), torch.randn(2, 5)
    for index, value in ((1, x), (1, y), (0, y), (0, x), (0, x), (1, x)):
        bias = 1.0 if index == 0 else 0.0
        torch.testing.assert_close(group.output(index, value), value @ weights[index].t() + bias)


@pytest.mark.parametrize("pack", PACK)
def test_a_lora_applies_to_the_second_half_of_the_batch(pack):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(n, 8, generator=generator) for n in (6, 4, 4)]
    downs = [torch.randn(2, 8, generator=generator), None, torch.randn(3, 8, generator=generator)]
    ups = [torch.randn(6, 2, generator=generator), None, torch.randn(4, 3, generator=generator)]
    group = LinearGroup(weights, [None] * 3, pack=pack)
    group.adapt(downs, ups)
    x = torch.randn(4, 5, 8, generator=generator)
    for i, (weight, down, up) in enumerate(zip(weights, downs, ups, strict=True)):
        adapted = weight if down is None else weight + up @ down
        expected = torch.cat([x[:2] @ weight.t(), x[2:] @ adapted.t()])
        torch.testing.assert_close(group.output(i, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pack", PACK)
def test_the_policy_and_its_adapted_copy_share_their_weights(pack):
    weight, down, up = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    plain = LinearGroup([weight], [torch.ones(6)], pack=pack)
    adapted = copy.deepcopy(plain)
    adapted.adapt([down], [up])
    assert adapted.weights is plain.weights
    x = torch.randn(2, 3, 8)
    base = x @ weight.t() + 1
    torch.testing.assert_close(plain.output(0, x), base, atol=1e-5, rtol=1e-5)
    expected = torch.cat([base[:1], base[1:] + x[1:] @ down.t() @ up.t()])
    torch.testing.assert_close(adapted.output(0, x), expected, atol=1e-5, rtol=1e-5)


def test_the_copy_shares_every_tensor():
    model = tiny_policy()
    copied = structural_copy(model)
    assert copied is not model
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        assert mine is theirs
    copied.model.layers[0].mlp.gate_proj = torch.nn.Identity()
    assert not isinstance(model.model.layers[0].mlp.gate_proj, torch.nn.Identity)


def test_the_copy_keeps_the_fingerprint():
    model = tiny_policy()
    assert fingerprint_weights(group_linears(model, pack=False)) == fingerprint_weights(model)


def test_small_models_are_not_packed(monkeypatch):
    model = tiny_policy()
    assert pack_linears(model) is model
    if HAS_MKLDNN:
        monkeypatch.setattr(packed, "MIN_WEIGHT_BYTES", 0)
        assert isinstance(pack_linears(model).model.layers[0].self_attn.q_proj, GroupedLinear)


def test_a_copy_with_other_outputs_is_discarded(monkeypatch):
    model = tiny_policy()
    monkeypatch.setattr(
        packed.LinearGroup, "_product", lambda self, x: x.new_zeros(*x.shape[:-1], self.slices[-1].stop)
    )
    assert group_linears(model, pack=False) is model
