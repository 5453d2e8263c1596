"""Tree attention: masks by hand, and states that equal those of rows of their own, over several families."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from helpers.tiny_models import CONFIGS, VOCAB, randomise, tiny_policy, tiny_reward_model
from rgtg.models.ops.hidden_states import hidden_states_of
from rgtg.models.ops.lm_head import final_states, trunk
from rgtg.models.ops.tree_attention import (
    pack_row,
    packed_inputs,
    packed_states_of,
    read_prefix,
    reads_packed_rows,
    reads_shared_prefix,
    visible_tokens,
)
from rgtg.tokenization.padding import pad_right

TEXTS = [
    ([0, 9, 4, 5, 6, 7, 8, 9], [[7, 30, 31, 2], [7, 30, 8, 2, 9, 10, 11, 12, 13, 14]]),
    ([0, 5], [[6, 2], [40, 41, 42, 43, 2], [40, 41, 2]]),
    ([0, 5, 6], [[20, 2], [20, 2, 21]]),  # one completion begins with the other
]


def gemma2():
    """Layers with and without a sliding window, soft-capped attention."""
    return randomise(
        Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, sliding_window=6, attn_implementation="eager",
            )
        ),
        0,
    )  # fmt: skip


def mamba():
    return randomise(
        MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)), 0
    )


def bloom():
    return randomise(
        BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=1)), 0
    )


PREFIX = [3, 60, 61, 5, 9, 1, 2, 33, 34]


def require_equal_states(model, layers, prefix=()):
    rows = [pack_row(*text) for text in TEXTS]
    before = read_prefix(model, prefix) if prefix else None
    for _ in range(2):  # a pass leaves the prefix as it was
        packed = packed_states_of(model, rows, layers, before)
    for b, (prompt, completions) in enumerate(TEXTS):
        for c, completion in enumerate(completions):
            ids = torch.tensor([[*prefix, *prompt, *completion]])
            plain = hidden_states_of(model, ids, torch.ones_like(ids), layers)
            for layer in layers:
                found = packed[layer][b, rows[b].columns[c]]
                torch.testing.assert_close(found, plain[layer][0, len(prefix) :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_states_equal_those_of_rows_of_their_own(family):
    model = tiny_policy(family)
    assert reads_packed_rows(model)
    require_equal_states(model, [1, 2])
    assert reads_shared_prefix(model)
    require_equal_states(model, [1, 2], PREFIX)


def test_layers_with_and_without_a_window_have_masks_of_their_own():
    model = gemma2()
    assert reads_packed_rows(model)
    assert set(packed_inputs(model, [pack_row(*TEXTS[0])])["attention_mask"]) == {"sliding_attention", "full_attention"}
    require_equal_states(model, [2, 4])
    require_equal_states(model, [2, 4], PREFIX)


@pytest.mark.parametrize("build", [mamba, bloom])
def test_models_that_take_no_mask_are_found(build):
    model = build()
    assert not reads_packed_rows(model)
    assert not reads_shared_prefix(model)


def test_embeddings_that_depend_on_the_length_read_every_prompt_whole():
    model = tiny_policy()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert reads_packed_rows(model)
    assert not reads_shared_prefix(model)


def test_a_probe_leaves_a_model_in_training_mode():
    model = tiny_reward_model().train()
    assert reads_packed_rows(model)
    assert model.training


def test_a_model_in_bfloat16_reads_packed_rows():
    assert reads_packed_rows(tiny_policy().to(torch.bfloat16))


def test_gradients_equal_those_of_rows_of_their_own():
    model = tiny_policy().requires_grad_(True)
    rows = [pack_row(*text) for text in TEXTS]
    final = trunk(model)(**packed_inputs(model, rows)).last_hidden_state
    loss = sum(final[b, columns].square().sum() for b, row in enumerate(rows) for columns in row.columns)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    whole = [[*prompt, *completion] for prompt, completions in TEXTS for completion in completions]
    ids, mask = pad_right(whole, 0, "cpu")
    (final_states(model, ids, mask)[mask.bool()].square().sum()).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


def test_each_token_attends_to_what_is_shared_and_to_its_own_completion():
    row = pack_row([5], [[7, 8], [9]])
    positions, parts = row.positions[None], torch.tensor([[0, 1, 1, 2]])
    assert row.parts.tolist() == parts[0].tolist()
    full = visible_tokens(positions, parts, None)[0].int().tolist()
    assert full == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    windowed = visible_tokens(positions, parts, 2)[0].int().tolist()
    assert windowed == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    later = visible_tokens(positions, parts, 3, 2)[0].int().tolist()  # after a prefix of two tokens
    assert later == [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 1]]
    padded = visible_tokens(torch.tensor([[0, 0]]), torch.tensor([[0, -1]]), 1)[0].int().tolist()
    assert padded == [[1, 0], [1, 1]]  # padding attends to itself too: no row of the mask is empty
