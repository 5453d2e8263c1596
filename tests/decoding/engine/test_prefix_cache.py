"""What is kept of texts that were read: the longest common beginning is found, the budget holds, copies are exact."""

import torch

from helpers.tiny_models import tiny_policy
from rgtg.decoding.engine.chunked_prefill import Feed
from rgtg.decoding.engine.prefix_cache import PrefixStore
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.scorer_runner import read_chain
from rgtg.models.ops.lm_head import policy_logits

TEXT = [0, 5, 9, 12, 33, 40, 8, 21, 17, 60, 11, 4, 30]


def read(tokens, copies=1):
    runner = TreeRunner(tiny_policy(), policy_logits, len(tokens))
    feed = Feed("", runner, tokens, copies)
    feed.start(None)
    feed.read(len(tokens))
    return runner


@torch.inference_mode()
def test_the_longest_common_beginning_is_found():
    store = PrefixStore(2**20)
    store.add("", TEXT[:9], read(TEXT[:9]).cache)
    store.add("", [*TEXT[:10], 3, 3], read([*TEXT[:10], 3, 3]).cache)
    store.add("other", TEXT, read(TEXT).cache)
    cache, shared = store.find("", TEXT)
    assert shared == 10
    assert cache.lengths == [12]
    assert store.find("", [*TEXT[:10], 3, 3])[1] == 11, "one token is left to read"
    assert store.find("", [9, *TEXT]) is None
    assert store.find("", TEXT[:7]) is None, "too little to be worth a copy"
    assert (store.asked, store.found) == (13 + 12 + 14 + 7, 10 + 11)


@torch.inference_mode()
def test_a_text_goes_into_the_one_that_continues_it():
    store = PrefixStore(2**20)
    store.add("", TEXT[:9], read(TEXT[:9]).cache)
    alone = store.nbytes
    store.add("", TEXT, read(TEXT).cache)
    assert store.nbytes == alone * 13 // 9
    store.add("", TEXT[:9], read(TEXT[:9]).cache)
    assert store.nbytes == alone * 13 // 9


@torch.inference_mode()
def test_the_budget_holds_and_the_oldest_go_first():
    texts = [[0, first, *TEXT] for first in (50, 51, 52)]
    size = read(texts[0]).cache.nbytes
    store = PrefixStore(2 * size)
    for text in texts[:2]:
        store.add("", text, read(text).cache)
    store.find("", texts[0])
    store.add("", texts[2], read(texts[2]).cache)
    assert store.nbytes == 2 * size
    assert [store.find("", text) is not None for text in texts] == [True, False, True]
    tiny = PrefixStore(size - 1)
    tiny.add("", texts[0], read(texts[0]).cache)
    assert tiny.nbytes == 0


@torch.inference_mode()
def test_going_on_from_a_copy_equals_reading_everything():
    store = PrefixStore(2**20)
    whole = read([*TEXT, 7, 8])
    store.keep_rows("", whole, [*TEXT, 7, 8], [0])
    runner = TreeRunner(tiny_policy(), policy_logits, len(TEXT) + 2)
    feed = Feed("", runner, [*TEXT, 9, 10])
    assert feed.start(store) == len(TEXT)
    feed.read(1)
    assert feed.left == 1
    feed.read(5)
    torch.testing.assert_close(feed.states, read_chain_of([*TEXT, 9, 10]), atol=1e-5, rtol=1e-5)
    assert runner.cache.lengths == [15]


def read_chain_of(tokens):
    runner = TreeRunner(tiny_policy(), policy_logits, len(tokens))
    runner.start(1)
    return read_chain(runner, torch.tensor([tokens]))[:, -1]
