"""Hidden states captured with hooks equal those of transformers."""

import pytest
import torch

from helpers.tiny_models import CONFIGS, tiny_policy
from rgtg.errors import UsageError
from rgtg.models.ops.hidden_states import (
    capture_hidden_states,
    hidden_state_module,
    hidden_states_of,
    require_hidden_states,
)

FAMILIES = sorted(CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_states_are_those_of_transformers(family):
    model, ids = tiny_policy(family), torch.tensor([[0, 9, 4, 7]])
    layers = [1, 2] if family == "opt" else [0, 1, 2]
    with capture_hidden_states(model, layers) as captured:
        expected = model(ids, output_hidden_states=True).hidden_states
    assert sorted(captured) == layers
    for layer in layers:
        assert torch.equal(captured[layer], expected[layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_hooks_are_removed(family):
    model = tiny_policy(family)
    require_hidden_states(model, [1, 2])
    hidden_states_of(model, torch.tensor([[0, 9]]), torch.ones(1, 2, dtype=torch.long), [1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_state_that_no_module_outputs_raises_an_error():
    with pytest.raises(UsageError, match="layer 0 of OPTForCausalLM cannot be observed"):
        require_hidden_states(tiny_policy("opt"), [0])
    with pytest.raises(UsageError, match=r"0 \(embeddings\) to 2"):
        hidden_state_module(tiny_policy(), 3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_padding_on_either_side_changes_nothing(family):
    model, ids = tiny_policy(family), [0, 9, 4, 7, 12, 33, 21, 8, 9]
    plain = hidden_states_of(model, torch.tensor([ids]), torch.ones(1, 9, dtype=torch.long), [2])[2][0]
    for rows in ([[*ids, 1, 1]], [[1, 1, *ids]]):
        mask = torch.tensor([[int(i != 1) for i in row] for row in rows])
        padded = hidden_states_of(model, torch.tensor(rows), mask, [2])[2][0]
        torch.testing.assert_close(padded[mask[0].bool()], plain, atol=1e-5, rtol=1e-5)
