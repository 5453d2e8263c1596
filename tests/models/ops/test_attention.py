"""Attention of a single bf16 query with keys and values in fp32 equals transformers' own."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.tiny_models import CONFIGS, tiny_policy
from rgtg.models.ops import attention
from rgtg.models.ops.packed_linear import group_linears, structural_copy


class Layer(torch.nn.Module):
    """The attributes of an attention layer that the function uses."""

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def inputs(queries, heads=4, key_heads=4, rows=3, keys=9, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(rows, heads, queries, 8, generator=generator)
    key, value = torch.randn(2, rows, key_heads, keys, 8, generator=generator)
    mask = torch.zeros(rows, 1, queries, keys)
    mask[1, ..., -3:] = torch.finfo(dtype).min
    return [tensor.to(dtype) for tensor in (query, key, value, mask)]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("queries", "key_heads"), [(1, 4), (1, 2), (3, 4)])
@pytest.mark.parametrize("cache", [1, 2 * 9 * 8 * 4 * 3, 2**23])  # one head, three heads, everything at once
def test_the_output_is_that_of_transformers(queries, key_heads, dtype, masked, cache, monkeypatch):
    monkeypatch.setattr(attention, "_CACHE_BYTES", cache)
    query, key, value, mask = inputs(queries, key_heads=key_heads, dtype=dtype)
    given = (Layer(4 // key_heads), query, key, value, mask if masked else None)
    got, _ = attention.single_query_attention(*given, scaling=8**-0.5)
    expected, _ = sdpa_attention_forward(*given, scaling=8**-0.5)
    assert got.shape == expected.shape == (3, queries, 4, 8)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


@pytest.mark.parametrize(("cache", "parts"), [(1, 12), (2 * 9 * 8 * 4 * 3, 6), (2 * 9 * 8 * 4 * 4 * 2, 2), (2**23, 1)])
def test_only_a_single_bf16_query_is_converted_to_fp32(cache, parts, monkeypatch):
    asked = []

    def counting(module, query, *args, **kwargs):
        asked.append((query.dtype, query.shape[2]))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", counting)
    monkeypatch.setattr(attention, "_CACHE_BYTES", cache)
    attention.single_query_attention(Layer(1), *inputs(1), scaling=0.3)
    assert asked == [(torch.float32, 1)] * parts
    asked.clear()
    for case in ({"queries": 1, "dtype": torch.float32}, {"queries": 2}, {"queries": 1, "key_heads": 2}):
        attention.single_query_attention(Layer(4 // case.get("key_heads", 4)), *inputs(**case), scaling=0.3)
    assert asked == [(torch.float32, 1), (torch.bfloat16, 2), (torch.bfloat16, 1)]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_copy_uses_the_attention_and_the_model_does_not_change(family):
    model = tiny_policy(family)
    copied = structural_copy(model)
    attention.use_single_query_attention(copied)
    assert {m.config._attn_implementation for m in copied.modules() if hasattr(m, "config")} == {
        attention.SINGLE_QUERY_ATTENTION
    }
    assert model.config._attn_implementation == "sdpa"
    ids = torch.tensor([[0, 5, 9, 12], [0, 7, 8, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])  # transformers builds the 4-D mask from it
    got = copied(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, model(input_ids=ids, attention_mask=mask).logits)


def test_another_attention_implementation_does_not_change():
    model = tiny_policy()
    model.set_attn_implementation("eager")
    copied = group_linears(model, pack=True)
    assert copied is not model
    assert copied.config._attn_implementation == "eager"
