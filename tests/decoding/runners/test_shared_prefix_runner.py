"""Completions that share one prompt's cache, against the stock model on each text."""

import pytest
import torch

from helpers.naive import make_guided, next_log_probs
from helpers.tiny_models import CONFIGS, VOCAB, tiny_policy
from rgtg.decoding.runners.model_runner import RecomputeRunner, TreeRunner, outputs
from rgtg.decoding.runners.shared_prefix_runner import SharedPrefixRunner, fork
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.models.ops.lm_head import policy_logits

PROMPTS = [[0, 5, 9, 12, 33, 40, 8, 21, 17, 60], [0, 44], [0, 7, 7, 30, 31, 3, 52]]


@torch.inference_mode()
@pytest.mark.parametrize("kind", [TreeRunner, RecomputeRunner])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_branch_equals_the_stock_model_on_its_own_text(family, kind):
    model = tiny_policy(family)
    runner = kind(model, policy_logits, 40)
    runner.prefill(PROMPTS)
    shared = fork(runner, 3)
    texts = [list(p) for p in PROMPTS for _ in range(3)]
    dropped = {2: [0, 2, 3, 4, 5, 6, 8], 4: [0, 1, 5, 6], 5: [2]}  # uneven, and prompts that lose all their branches
    for step in range(8):
        if step in dropped:
            shared.select_rows(dropped[step])
            texts = [texts[i] for i in dropped[step]]
        tokens = torch.randint(3, VOCAB, (len(texts), 1), generator=torch.Generator().manual_seed(step))
        logits = outputs(shared, TokenTree.chain(tokens))[:, 0]
        shared.commit(torch.zeros(len(texts), 1, dtype=torch.long))
        for text, token, mine in zip(texts, tokens[:, 0].tolist(), logits, strict=True):
            text.append(token)
            torch.testing.assert_close(mine.double().log_softmax(-1), next_log_probs(model, text), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_prompt_is_stored_once():
    runner = TreeRunner(tiny_policy(), policy_logits, 100)
    runner.prefill([PROMPTS[0]])
    before = runner.cache.nbytes
    shared = fork(runner, 8)
    for _ in range(4):
        shared.read(TokenTree.chain(torch.full((8, 1), 9)))
        shared.commit(torch.zeros(8, 1, dtype=torch.long))
    assert runner.cache.nbytes == before
    assert runner.cache.lengths == [len(PROMPTS[0]) + 4 * 8]


@torch.inference_mode()
def test_more_than_one_token_at_once_is_refused():
    runner = TreeRunner(tiny_policy(), policy_logits, 40)
    runner.prefill(PROMPTS)
    with pytest.raises(ValueError, match="one token"):
        SharedPrefixRunner(runner, 2).read(TokenTree.chain(torch.ones(6, 2, dtype=torch.long)))


def test_a_long_best_of_n_fits_its_cache():
    guided = make_guided("best-of-n", n=4, token_tree=True)
    done = guided.generate_ids(PROMPTS, max_new_tokens=40, min_new_tokens=40)
    assert all(len(c.token_ids) == 40 for c in done)
