"""Cached states: shared prompts are read once, models without masks read every row, saved states are continued."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from helpers.tiny_models import VOCAB, randomise, tiny_policy
from rgtg.data.pairs import TokenizedPair
from rgtg.data.rollouts import TokenizedRollout
from rgtg.training.data import state_cache
from rgtg.training.data.state_cache import cache_states

PAIRS = [
    TokenizedPair([0, 9, 4, 11, 12], [7, 30, 31, 2], [7, 8, 2]),
    TokenizedPair([0, 5], [6, 2], [40, 41, 42, 43, 2]),
    TokenizedPair([0, 5, 6, 7, 8], [20, 2], [21, 2]),
    TokenizedPair([0, 5, 6, 7, 8], [22, 2], [20, 2]),  # the prompt of its neighbour
]


@pytest.fixture
def read(monkeypatch):
    """Tokens of each forward pass, by the function that made it."""
    found = {"packed": [], "plain": []}
    packed, plain = state_cache.packed_states_of, state_cache.hidden_states_of
    monkeypatch.setattr(
        state_cache,
        "packed_states_of",
        lambda model, rows, *more: (
            found["packed"].append(sum(len(row.ids) for row in rows)) or packed(model, rows, *more)
        ),
    )
    monkeypatch.setattr(
        state_cache, "hidden_states_of",
        lambda model, ids, mask, layers: found["plain"].append(int(mask.sum())) or plain(model, ids, mask, layers),
    )  # fmt: skip
    return found


def whole(monkeypatch, model, units, layers, kind):
    """States with every completion in a row of its own."""
    with monkeypatch.context() as patched:
        patched.setattr(state_cache, "reads_packed_rows", lambda _model: False)
        patched.setattr(state_cache, "reads_shared_prefix", lambda _model: False)
        return cache_states(model, units, layers, kind)


@pytest.mark.parametrize("kind", ["state", "vocab"])
@pytest.mark.parametrize("tokens", [12, 8192])
def test_a_shared_prompt_is_read_once_and_states_stay_the_same(monkeypatch, read, kind, tokens):
    monkeypatch.setattr(state_cache, "CPU_TOKENS", tokens)
    model = tiny_policy()
    expected = whole(monkeypatch, model, PAIRS, [1, 2], kind)
    every = [(p, c) for pair in PAIRS for p, c in pair.rows]
    assert sum(read["plain"]) == sum(len(p) + len(c) for p, c in every) - 7  # two pairs share a completion
    read["plain"].clear()
    found = cache_states(model, PAIRS, [1, 2], kind)
    # the first pair's completions share their first token; the last two pairs are one row and share a completion
    assert sum(read["packed"]) == 5 + 6 + 2 + 7 + 5 + 6
    assert read["plain"] == []
    for layer in (1, 2):
        torch.testing.assert_close(found.states[layer], expected.states[layer], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.token_ids, expected.token_ids)


def test_rollouts_of_one_prompt_share_it(monkeypatch, read):
    units = [TokenizedRollout([0, 5, 6], [20 + i, 9, 2], float(i)) for i in range(6)]
    model = tiny_policy("mistral")
    found = cache_states(model, units, [2], "state")
    assert sum(read["packed"]) == 2 * 3 + 6 * 3  # four and two completions
    expected = whole(monkeypatch, model, units, [2], "state")
    torch.testing.assert_close(found.states[2], expected.states[2], atol=1e-5, rtol=1e-5)


def test_a_model_without_masks_reads_every_completion_in_a_row_of_its_own(read):
    model = randomise(
        MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)), 0
    )
    cache = cache_states(model, PAIRS, [2], "state")
    assert read["packed"] == []
    ids = torch.tensor([[*PAIRS[0].prompt_ids, *PAIRS[0].chosen_ids]])
    expected = model(ids, output_hidden_states=True).hidden_states[-1][0, 5:]
    torch.testing.assert_close(cache.completion(2, 0)[0], expected, atol=1e-5, rtol=1e-5)


SYSTEM = [0, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60]


@pytest.mark.parametrize("kind", ["state", "vocab"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_system_message_is_read_once_for_all_pairs(monkeypatch, read, kind, family):
    monkeypatch.setattr(state_cache, "CPU_TOKENS", 16)
    units = [
        TokenizedPair([*SYSTEM, *pair.prompt_ids], pair.chosen_ids, pair.rejected_ids) for pair in PAIRS
    ] + [TokenizedRollout([*SYSTEM, 0, 9], [3, 4, 2], 1.0)]  # fmt: skip
    model = tiny_policy(family)
    found = cache_states(model, units, [1, 2], kind)
    # the three rows lack token 0 too, which all prompts share; a row of one completion is read after the prefix as well
    assert sum(read["packed"]) == (5 + 6 + 2 + 7 + 5 + 6) - 3 + (1 + 3)
    assert read["plain"] == []
    expected = whole(monkeypatch, model, units, [1, 2], kind)
    for layer in (1, 2):
        torch.testing.assert_close(found.states[layer], expected.states[layer], atol=1e-5, rtol=1e-5)


def test_equal_prompts_keep_their_last_token(monkeypatch, read):
    units = [TokenizedPair(SYSTEM, [7 + i, 2], [20 + i, 9, 2]) for i in range(3)]
    model = tiny_policy()
    found = cache_states(model, units, [2], "vocab")
    assert sum(read["packed"]) == 2 * 1 + 3 * 5  # rows of four completions, each with the last token of the prompt
    expected = whole(monkeypatch, model, units, [2], "vocab")
    torch.testing.assert_close(found.states[2], expected.states[2], atol=1e-5, rtol=1e-5)


def test_states_saved_with_a_system_message_are_continued(monkeypatch, tmp_path, read):
    monkeypatch.setattr(state_cache, "CPU_TOKENS", 16)
    monkeypatch.setattr(state_cache, "SAVE_SECONDS", 0.0)
    units = [TokenizedPair([*SYSTEM, *p.prompt_ids], p.chosen_ids, p.rejected_ids) for p in PAIRS]
    model = tiny_policy()
    expected = cache_states(model, units, [2], "vocab")
    passes = len(read["packed"])
    with pytest.raises(Stopped):
        cache_states(model, units, [2], "vocab", folder=tmp_path, progress=stop_after(1))
    read["packed"].clear()
    found = cache_states(model, units, [2], "vocab", folder=tmp_path)
    assert 0 < len(read["packed"]) == passes - 1
    assert torch.equal(found.states[2], expected.states[2])


class Stopped(Exception):
    pass


def stop_after(batches):
    calls = []

    def progress(_done, _total):
        calls.append(1)
        if len(calls) == batches:
            raise Stopped

    return progress


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_states_are_continued(monkeypatch, tmp_path, read, dtype):
    monkeypatch.setattr(state_cache, "CPU_TOKENS", 12)
    monkeypatch.setattr(state_cache, "SAVE_SECONDS", 0.0)
    model = tiny_policy().to(dtype)
    expected = cache_states(model, PAIRS, [1, 2], "vocab")
    passes = len(read["packed"])
    assert passes == 3
    with pytest.raises(Stopped):
        cache_states(model, PAIRS, [1, 2], "vocab", folder=tmp_path, progress=stop_after(2))
    read["packed"].clear()
    found = cache_states(model, PAIRS, [1, 2], "vocab", folder=tmp_path)
    assert len(read["packed"]) == passes - 2
    read["packed"].clear()
    again = cache_states(model, PAIRS, [1, 2], "vocab", folder=tmp_path)
    assert read["packed"] == []
    for cache in (found, again):
        assert cache.on_disk
        for layer in (1, 2):
            assert cache.states[layer].dtype == dtype
            assert torch.equal(cache.states[layer], expected.states[layer])


def test_states_of_other_pairs_weights_or_layers_are_computed_anew(tmp_path, read):
    model = tiny_policy()
    cache_states(model, PAIRS, [2], "state", folder=tmp_path)
    for arguments in (
        (model, PAIRS[:3], [2], "state"),
        (model, PAIRS, [1], "state"),
        (model, PAIRS, [1], "vocab"),
        (tiny_policy(seed=1), PAIRS, [1], "vocab"),
    ):
        read["packed"].clear()
        found = cache_states(*arguments, folder=tmp_path)
        assert read["packed"]
        expected = cache_states(*arguments)
        assert all(torch.equal(found.states[layer], expected.states[layer]) for layer in expected.states)


def test_damaged_states_are_computed_again(tmp_path, read):
    model = tiny_policy()
    expected = cache_states(model, PAIRS, [2], "state", folder=tmp_path)
    expected = expected.states[2].clone()
    path = tmp_path / "layer-2.states"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    read["packed"].clear()
    with pytest.warns(UserWarning, match="are damaged, and are computed again"):
        found = cache_states(model, PAIRS, [2], "state", folder=tmp_path)
    assert read["packed"]
    assert torch.equal(found.states[2], expected)
