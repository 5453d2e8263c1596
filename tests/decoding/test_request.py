"""Seeds, processors and endings of single requests."""

import pytest
import torch

from helpers.tiny_models import tiny_tokenizer
from rgtg.config import DecodingSettings, validate
from rgtg.decoding.request import Request, StoppingCriteria, derive_seed, make_processors, require_room, row_seeds
from rgtg.errors import DataError, PromptTooLongError, UsageError


def test_seeds_depend_on_the_prompt_and_not_on_its_place():
    a, b = [0, 1], [0, 2]
    there, back = row_seeds(3, [a, b, a]), row_seeds(3, [b, a, a])
    assert there == [back[1], back[0], back[2]]
    assert len(set(there)) == 3
    assert row_seeds([5, 6], [a, b]) == [5, 6]
    with pytest.raises(UsageError, match="1 seeds for 2 prompts"):
        row_seeds([5], [a, b])


def test_derived_seeds_are_stable_and_fit():
    assert derive_seed(0, (1, 2), 0) == derive_seed(0, (1, 2), 0) < 2**63
    assert derive_seed(0, (1, 2), 0) != derive_seed(1, (1, 2), 0)


def test_processors_see_the_tokens_of_their_request():
    settings = DecodingSettings(repetition_penalty=2.0, no_repeat_ngram_size=2, min_new_tokens=3)
    row = Request("", [0, 5, 6], 0, make_processors(settings, 3, {2}, "cpu"), token_ids=[5])
    logits = row.process(torch.ones(8))
    assert logits.tolist() == [0.5, 1, -torch.inf, 1, 1, 0.5, -torch.inf, 1]
    assert not make_processors(DecodingSettings(), 3, {2}, "cpu")


def test_a_bias_is_added_to_the_logits_of_its_tokens():
    settings = DecodingSettings(logit_bias={1: 2.5, "4": -100})  # the keys of JSON are texts
    row = Request("", [0, 5, 6], 0, make_processors(settings, 3, {2}, "cpu"))
    assert row.process(torch.ones(6)).tolist() == [1, 3.5, 1, 1, -99, 1]


@pytest.mark.parametrize("bias", [{1: 100.5}, {1: -101}, {1: float("nan")}, {-1: 1}, {"a": 1}, {1: None}])
def test_a_bias_is_a_number_from_minus_100_to_100_for_a_token_id(bias):
    with pytest.raises(UsageError, match="logit_bias"):
        validate(DecodingSettings, {"logit_bias": bias})


def test_an_eos_token_a_stop_text_or_the_limit_ends_a_request():
    tokenizer = tiny_tokenizer()
    stopping = StoppingCriteria(tokenizer, {2}, DecodingSettings(max_new_tokens=6, stop=["lo"]))

    def end(text, *more):
        row = Request("", [0, 4], 0, None, token_ids=[*tokenizer(text, add_special_tokens=False).input_ids, *more])
        stopping.update(row)
        return row.finish_reason, row.text

    assert end("hel") == (None, "")
    assert end("hello") == ("stop", "hel")
    assert end("hey", 2) == ("stop", "hey")
    assert end("heyhey") == ("length", "heyhey")


def test_prompts_that_do_not_fit_a_context_are_refused():
    require_room([1] * 4, 4, 8, "policy")
    require_room([1] * 4, 4, None, "policy")
    with pytest.raises(
        PromptTooLongError, match="a prompt of 5 tokens and 4 new ones exceed the policy's context of 8"
    ):
        require_room([1] * 5, 4, 8, "policy")
    with pytest.raises(DataError, match="no tokens"):
        require_room([], 4, 8, "policy")


def test_numbers_that_are_drawn_together_are_those_of_the_stream():
    request, generator = Request("", [1], seed=5), torch.Generator().manual_seed(5)
    expected = [float(torch.rand((), generator=generator, dtype=torch.float64)) for _ in range(150)]
    assert [request.uniform() for _ in range(150)] == expected


def test_a_restarted_request_draws_the_same_numbers_again():
    request = Request("a", [0, 5], 3, keep_trace=True)
    first = [request.uniform() for _ in range(3)]
    request.token_ids.append(4)
    request.finish_reason, request.policy_calls, request.error = "stop", 2, ValueError()
    request.restart()
    assert [request.uniform() for _ in range(3)] == first
    assert (request.prompt, request.prompt_ids, request.seed, request.keep_trace) == ("a", [0, 5], 3, True)
    assert (request.token_ids, request.policy_calls, request.error, request.ended) == ([], 0, None, False)
