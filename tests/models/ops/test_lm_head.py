"""Logits computed from final hidden states equal those of the model's own forward."""

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from helpers.tiny_models import CONFIGS, VOCAB, tiny_policy
from rgtg.models.ops.lm_head import policy_logits, trunk

IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "pad_token_id": 1,
}  # fmt: skip


def capped():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)).eval()


def scaled():
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)).eval()


@torch.no_grad()
@pytest.mark.parametrize("model", [*sorted(CONFIGS), capped, scaled])
def test_logits_equal_the_models_own(model):
    model = model() if callable(model) else tiny_policy(model)
    states = trunk(model)(input_ids=IDS).last_hidden_state
    expected = model(input_ids=IDS).logits
    torch.testing.assert_close(policy_logits(model, states), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(policy_logits(model, states[:, -1]), expected[:, -1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)  # the model has not changed
