"""The prefix cache: the longest common prefix is found, the budget holds, copies are exact."""

import torch

from helpers.tiny_models import tiny_policy
from rgtg.decoding.engine.chunked_prefill import PrefillTask
from rgtg.decoding.engine.prefix_cache import PrefixCache
from rgtg.decoding.runners.model_runner import TreeRunner, append_tokens
from rgtg.models.ops.lm_head import policy_logits

KEY, OTHER = ("policy", None), ("scorer", "other")
TEXT = [0, 5, 9, 12, 33, 40, 8, 21, 17, 60, 11, 4, 30]


def read(tokens):
    runner = TreeRunner(tiny_policy(), policy_logits, len(tokens))
    task = PrefillTask(KEY, runner, [tokens])
    task.start(None)
    task.read(len(tokens))
    return runner


@torch.inference_mode()
def test_the_longest_common_prefix_is_found():
    prefixes = PrefixCache(2**20)
    prefixes.add(KEY, TEXT[:9], read(TEXT[:9]).cache)
    prefixes.add(KEY, [*TEXT[:10], 3, 3], read([*TEXT[:10], 3, 3]).cache)
    prefixes.add(OTHER, TEXT, read(TEXT).cache)
    held, shared = prefixes.find(KEY, TEXT)
    assert shared == 10
    assert held.lengths == [12]
    assert prefixes.find(KEY, [*TEXT[:10], 3, 3])[1] == 11, "one token is left to read"
    assert prefixes.find(KEY, [9, *TEXT]) is None
    assert prefixes.find(KEY, TEXT[:7]) is None, "too little to be worth a copy"
    assert (prefixes.queried, prefixes.hits) == (13 + 12 + 14 + 7, 10 + 11)


@torch.inference_mode()
def test_a_text_is_dropped_for_one_that_continues_it():
    prefixes = PrefixCache(2**20)
    prefixes.add(KEY, TEXT[:9], read(TEXT[:9]).cache)
    alone = prefixes.nbytes
    prefixes.add(KEY, TEXT, read(TEXT).cache)
    assert prefixes.nbytes == alone * 13 // 9
    prefixes.add(KEY, TEXT[:9], read(TEXT[:9]).cache)
    assert prefixes.nbytes == alone * 13 // 9


@torch.inference_mode()
def test_the_least_recently_used_are_evicted_when_the_budget_is_full():
    texts = [[0, first, *TEXT] for first in (50, 51, 52)]
    size = read(texts[0]).cache.nbytes
    prefixes = PrefixCache(2 * size)
    for text in texts[:2]:
        prefixes.add(KEY, text, read(text).cache)
    prefixes.find(KEY, texts[0])
    prefixes.add(KEY, texts[2], read(texts[2]).cache)
    assert prefixes.nbytes == 2 * size
    assert [prefixes.find(KEY, text) is not None for text in texts] == [True, False, True]
    tiny = PrefixCache(size - 1)
    tiny.add(KEY, texts[0], read(texts[0]).cache)
    assert tiny.nbytes == 0


@torch.inference_mode()
def test_decoding_from_a_copied_prefix_equals_reading_everything():
    prefixes = PrefixCache(2**20)
    whole = read([*TEXT, 7, 8])
    prefixes.add_rows(KEY, whole, [*TEXT, 7, 8], [0])
    runner = TreeRunner(tiny_policy(), policy_logits, len(TEXT) + 2)
    task = PrefillTask(KEY, runner, [[*TEXT, 9, 10]])
    assert task.start(prefixes) == len(TEXT)
    task.read(1)
    assert task.left == 1
    task.read(5)
    whole = TreeRunner(tiny_policy(), policy_logits, len(TEXT) + 2)
    whole.reset(1)
    states = append_tokens(whole, torch.tensor([[*TEXT, 9, 10]]))
    torch.testing.assert_close(task.states.final, states.final, atol=1e-5, rtol=1e-5)
    assert runner.cache.lengths == [15]
