"""Completions that share one prompt's cache, against the stock model on each text."""

import pytest
import torch

from helpers.naive import make_guided, next_log_probs
from helpers.tiny_models import CONFIGS, VOCAB, tiny_policy
from rgtg.decoding.runners.model_runner import RecomputeRunner, TreeRunner, outputs
from rgtg.decoding.runners.shared_prefix_runner import fork
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
@pytest.mark.parametrize("kind", [TreeRunner, RecomputeRunner])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_copied_branches_and_trees_after_them_equal_the_stock_model(family, kind):
    """Rows are copied, exchanged and dropped between two passes; each pass reads a chain and leaves after every row."""
    model = tiny_policy(family)
    runner = kind(model, policy_logits, 4)  # too small: it grows
    runner.prefill(PROMPTS[1:])
    shared = fork(runner, 3)
    texts = [list(p) for p in PROMPTS[1:] for _ in range(3)]
    chosen = {1: [0, 0, 2, 5, 4, 3], 2: [5, 5, 5, 0, 1], 4: [0, 1, 1, 2], 5: [0, 1]}  # then without the first prompt
    for step in range(7):
        if step in chosen:
            shared.select_rows(chosen[step])
            texts = [list(texts[i]) for i in chosen[step]]
        tokens = torch.randint(3, VOCAB, (len(texts), 4), generator=torch.Generator().manual_seed(step))
        logits = outputs(shared, TokenTree(tokens, (-1, 0, 0, -1)))
        for text, mine, row in zip(texts, tokens.tolist(), logits, strict=True):
            for node, path in enumerate(([0], [0, 1], [0, 2], [3])):
                expected = next_log_probs(model, [*text, *(mine[j] for j in path)])
                torch.testing.assert_close(row[node].double().log_softmax(-1), expected, atol=1e-5, rtol=1e-5)
        shared.commit(torch.tensor([[0, 1 + step % 2]] * len(texts)))
        for text, mine in zip(texts, tokens.tolist(), strict=True):
            text += [mine[0], mine[1 + step % 2]]
    assert shared.rows == 2


@torch.inference_mode()
def test_a_copied_row_takes_no_column():
    runner = TreeRunner(tiny_policy(), policy_logits, 100)
    runner.prefill([PROMPTS[0]])
    shared = fork(runner, 4)
    shared.read(TokenTree.leaves(torch.arange(3, 19).reshape(4, 4)))
    shared.commit(torch.tensor([[2], [0], [1], [3]]))
    shared.select_rows([3, 3, 0, 3])
    assert runner.cache.lengths == [len(PROMPTS[0]) + 4]
    assert [bool(torch.equal(shared.seen[0], row)) for row in shared.seen] == [True, True, False, True]


@torch.inference_mode()
@pytest.mark.parametrize("kind", [TreeRunner, RecomputeRunner])
def test_rows_that_are_copied_between_reading_and_committing_keep_what_they_chose(kind):
    """Two continuations of one branch, of which each commits a candidate of its own (a beam)."""
    model = tiny_policy()
    runner = kind(model, policy_logits, 60)
    runner.prefill(PROMPTS[:2])
    shared = fork(runner, 2)
    ids = torch.arange(3, 19).reshape(4, 4)
    shared.read(TokenTree.leaves(ids))
    rows, nodes = [1, 1, 3, 2], [3, 0, 2, 2]
    shared.select_rows(rows)
    shared.commit(torch.tensor(nodes)[:, None])
    texts = [[*PROMPTS[row // 2], int(ids[row, node])] for row, node in zip(rows, nodes, strict=True)]
    logits = outputs(shared, TokenTree.chain(torch.full((4, 1), 9)))[:, 0]
    for text, mine in zip(texts, logits, strict=True):
        expected = next_log_probs(model, [*text, 9])
        torch.testing.assert_close(mine.double().log_softmax(-1), expected, atol=1e-5, rtol=1e-5)


def test_a_long_best_of_n_fits_its_cache():
    guided = make_guided("best-of-n", n=4, token_tree=True)
    done = guided.generate_ids(PROMPTS, max_new_tokens=40, min_new_tokens=40)
    assert all(len(c.token_ids) == 40 for c in done)
