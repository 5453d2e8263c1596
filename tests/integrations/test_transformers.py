"""``model.generate(custom_generate=...)`` against GuidedPolicy, and unsupported settings."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from helpers.naive import tiny_scorer
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg import GuidedPolicy, custom_generate
from rgtg.errors import UsageError
from rgtg.models.scorers.reward_model import PrefixScorer

IDS = torch.tensor([[1, 1, 0, 9, 14], [0, 7, 7, 30, 31]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
PROMPTS = [[0, 9, 14], [0, 7, 7, 30, 31]]


@pytest.fixture(scope="module")
def model():
    return tiny_policy()


@pytest.fixture(scope="module")
def scorer() -> PrefixScorer:
    return tiny_scorer()


def call(model, scorer, method="pargs", beta=2.0, **settings):
    guide = custom_generate(scorer, tokenizer=tiny_tokenizer(), method=method, beta=beta, top_k=5, seed=3)
    settings = {"max_new_tokens": 7, "pad_token_id": 1, "attention_mask": MASK, **settings}
    return model.generate(IDS, custom_generate=guide, **settings)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"do_sample": True}, {}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8}, {"temperature": 0.7, "top_p": 0.8}),
        ({"do_sample": False}, {"temperature": 0.0}),
        (
            {"do_sample": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
        ),
    ],
)
def test_custom_generate_equals_guided_policy(model, scorer, theirs, ours):
    out = call(model, scorer, **theirs)
    guided = GuidedPolicy.from_pretrained((model, tiny_tokenizer()), scorer, beta=2.0, top_k=5)
    done = guided.generate_ids(PROMPTS, seed=3, max_new_tokens=7, **ours)
    assert torch.equal(out[:, :5], IDS)
    for row, completion in zip(out[:, 5:].tolist(), done, strict=True):
        assert row == completion.token_ids + [1] * (len(row) - len(completion.token_ids))


def test_a_greedy_method_decodes_greedily(model, scorer):
    out = call(model, scorer, "pargs-greedy", do_sample=False)
    assert torch.equal(out, call(model, scorer, "pargs-greedy", do_sample=True))


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "typical_p": 0.5}, "typical_p=0.5"),
        ({"do_sample": True, "min_p": 0.1}, "min_p=0.1"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"suppress_tokens": [5]}, "suppress_tokens"),
        ({"bad_words_ids": [[5]]}, "bad_words_ids"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"eos_token_id": 9}, "eos_token_id"),
        ({"min_length": 8}, "min_length=8"),
        ({"logits_processor": LogitsProcessorList([Ban()])}, "does not run the logits_processor Ban"),
    ],
)
def test_unsupported_settings_are_errors(model, scorer, settings, message):
    with pytest.raises(UsageError, match=message):
        call(model, scorer, **settings)


def test_a_greedy_method_with_a_temperature_is_an_error(model, scorer):
    with pytest.raises(UsageError, match="has no temperature"):
        call(model, scorer, "pargs-greedy", do_sample=True, temperature=0.5)
