"""One pass over a tree equals the stock model on every whole text; the fallback, and when it is used."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    BloomForSequenceClassification,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
)

from helpers.naive import info, next_log_probs, reward, step_distribution
from helpers.tiny_models import CONFIGS, VOCAB, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.runners.model_runner import (
    RecomputeRunner,
    TreeRunner,
    make_runner,
    mask_windows,
    outputs,
    supports_token_tree,
    visible_columns,
)
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.models.ops.lm_head import policy_logits, scorer_scores
from rgtg.models.scorers.reward_model import PrefixScorer

FAMILIES = sorted(CONFIGS)
# Ragged, and longer than Mistral's window of 6.
PROMPTS = [[0, 5, 9, 12, 33, 40, 8, 21, 17, 60], [0, 44], [0, 7, 7, 30, 31, 3, 52]]


def candidates(step: int, rows: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, 4), generator=torch.Generator().manual_seed(step))


def walk(runner, prompts, steps=4):
    """Grow every row a few tokens; row 1 is dropped after the second step. Yields (prefixes, tree, outputs)."""
    rows = [list(p) for p in prompts]
    runner.prefill(rows)
    for step in range(steps):
        tree = TokenTree.leaves(candidates(step, len(rows)))
        yield [list(r) for r in rows], tree, outputs(runner, tree)
        nodes = torch.tensor([(step + i) % 4 for i in range(len(rows))])
        runner.commit(nodes[:, None])
        for row, tokens, node in zip(rows, tree.tokens.tolist(), nodes.tolist(), strict=True):
            row.append(tokens[node])
        if step == 1:
            runner.select_rows([0, 2])
            rows = [rows[0], rows[2]]


@pytest.mark.parametrize("kind", [TreeRunner, RecomputeRunner])
@pytest.mark.parametrize("family", FAMILIES)
def test_candidate_scores_equal_the_stock_reward_of_each_whole_text(family, kind):
    model = tiny_reward_model(family)
    for rows, tree, scores in walk(kind(model, scorer_scores, 32), PROMPTS):
        naive = [[reward(model, [*row, t]) for t in mine] for row, mine in zip(rows, tree.tokens.tolist(), strict=True)]
        torch.testing.assert_close(scores, torch.tensor(naive), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [TreeRunner, RecomputeRunner])
@pytest.mark.parametrize("family", FAMILIES)
def test_policy_log_probs_equal_the_stock_model(family, kind):
    model = tiny_policy(family)
    runner = kind(model, policy_logits, 32)
    first = runner.head(runner.prefill(PROMPTS).final)
    for row, logits in zip(PROMPTS, first, strict=True):
        torch.testing.assert_close(logits.double().log_softmax(-1), next_log_probs(model, row), atol=1e-5, rtol=1e-5)
    for rows, tree, logits in walk(kind(model, policy_logits, 32), PROMPTS, steps=3):
        for b, row in enumerate(rows):
            for j, token in enumerate(tree.tokens[b].tolist()):
                naive = next_log_probs(model, [*row, token])
                torch.testing.assert_close(logits[b, j].double().log_softmax(-1), naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_a_branching_tree_are_those_of_each_path(family):
    model = tiny_reward_model(family)
    runner = TreeRunner(model, scorer_scores, 64)
    runner.prefill(PROMPTS)
    # two chains that share their first node, one of them longer than Mistral's window
    parents = (-1, 0, 1, 0, 3, 4, 5, 6, 7, 8)
    tokens = torch.randint(3, VOCAB, (3, len(parents)), generator=torch.Generator().manual_seed(5))
    tree = TokenTree(tokens, parents)
    scores = outputs(runner, tree)
    for b, prompt in enumerate(PROMPTS):
        naive = [reward(model, [*prompt, *(int(tokens[b, i]) for i in tree.path(n))]) for n in range(tree.width)]
        torch.testing.assert_close(scores[b], torch.tensor(naive), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [TreeRunner, RecomputeRunner])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_commit_paths_of_different_lengths(family, kind):
    model = tiny_reward_model(family)
    runner = kind(model, scorer_scores, 64)
    runner.prefill(PROMPTS)
    rows = [list(p) for p in PROMPTS]
    tokens = torch.randint(3, VOCAB, (2, 3, 6), generator=torch.Generator().manual_seed(8))
    paths = [[[0, 2, 3, 0], [1, 0, 0, 0], [0, 2, 4, 5]], [[1, 0, 0, 0], [0, 2, 4, 5], [0, 2, 0, 0]]]
    for ids, nodes, counts in zip(tokens, paths, [[3, 1, 4], [1, 4, 2]], strict=True):
        tree = TokenTree(ids, (-1, -1, 0, 2, 2, 4))
        scores = outputs(runner, tree)
        for b, row in enumerate(rows):
            naive = [reward(model, [*row, *(int(ids[b, i]) for i in tree.path(n))]) for n in range(6)]
            torch.testing.assert_close(scores[b], torch.tensor(naive), atol=1e-5, rtol=1e-5)
        runner.commit(torch.tensor(nodes), counts)
        for row, path, n, mine in zip(rows, nodes, counts, ids.tolist(), strict=True):
            row.extend(mine[node] for node in path[:n])


def test_each_node_attends_to_its_prefix_its_ancestors_and_itself():
    tree = TokenTree(torch.zeros(2, 3, dtype=torch.long), (-1, 0, -1))
    visible = visible_columns(tree, [1, 3], None).int().tolist()
    assert visible[0] == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]
    assert visible[1] == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]
    windowed = visible_columns(tree, [1, 3], 2).int().tolist()
    assert windowed[0] == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]
    assert windowed[1] == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_listed_family_reads_trees(family):
    assert supports_token_tree(tiny_policy(family), policy_logits)
    assert isinstance(make_runner(tiny_reward_model(family), scorer_scores, 16), TreeRunner)


def test_rows_can_be_repeated():
    model = tiny_policy()
    runner = TreeRunner(model, policy_logits, 24)
    runner.prefill(PROMPTS)
    runner.select_rows([1, 1, 0])
    logits = outputs(runner, TokenTree.leaves(torch.tensor([[4], [5], [6]])))[:, 0]
    texts = [[*PROMPTS[1], 4], [*PROMPTS[1], 5], [*PROMPTS[0], 6]]
    naive = torch.stack([next_log_probs(model, text) for text in texts])
    torch.testing.assert_close(logits.double().log_softmax(-1), naive, atol=1e-5, rtol=1e-5)


def test_models_in_bfloat16_read_trees():
    model = tiny_reward_model().to(torch.bfloat16)
    assert supports_token_tree(model, scorer_scores)


# Models that cannot: no attention at all, and biases built from a 2-D mask


def scaled(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=generator)
    return model.eval().requires_grad_(False)


def mamba():
    return scaled(MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)))


def bloom(kind=BloomForCausalLM, **extra):
    return scaled(kind(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=1, **extra)))


@pytest.mark.parametrize("build", [mamba, bloom])
def test_a_policy_that_cannot_read_a_tree_is_warned_about_and_exact(build):
    model = build()
    assert not supports_token_tree(model, policy_logits)
    scorer = PrefixScorer(tiny_reward_model(), tiny_tokenizer(), info=info(), name="tiny")
    guided = GuidedPolicy.from_pretrained((model, tiny_tokenizer()), scorer, beta=1.5, top_k=4)
    with pytest.warns(UserWarning, match="cannot read a token tree"):
        done = guided.generate_ids(PROMPTS, max_new_tokens=3, seed=4, trace=True)
    require_naive_traces(guided, done, beta=1.5, top_k=4)


def test_a_scorer_that_cannot_read_a_tree_is_warned_about_and_exact():
    model = bloom(BloomForSequenceClassification, num_labels=1)
    assert not supports_token_tree(model, scorer_scores)
    scorer = PrefixScorer(model, tiny_tokenizer(), info=info(), name="bloom")
    guided = GuidedPolicy.from_pretrained((tiny_policy(), tiny_tokenizer()), scorer, beta=1.5, top_k=4)
    with pytest.warns(UserWarning, match="BloomForSequenceClassification cannot read a token tree"):
        done = guided.generate_ids(PROMPTS, max_new_tokens=3, seed=4, trace=True)
    require_naive_traces(guided, done, beta=1.5, top_k=4)


def require_naive_traces(guided, done, **settings):
    for prompt, completion in zip(PROMPTS, done, strict=True):
        ids = list(prompt)
        for step in completion.trace:
            exact = step_distribution(guided, ids, **settings)
            assert set(step.candidate_ids) == set(exact)
            naive = [exact[t] for t in step.candidate_ids]
            assert step.guided_log_probs == pytest.approx(naive, abs=1e-5, rel=1e-5)
            ids.append(step.token_id)


def test_windows_of_attention_are_those_of_the_config():
    assert mask_windows(CONFIGS["mistral"]()) == {"full_attention": 6}
    assert mask_windows(CONFIGS["llama"]()) == {"full_attention": None}
    assert mask_windows(Qwen2Config(use_sliding_window=False, num_hidden_layers=2)) == {"full_attention": None}
    mixed = Gemma3TextConfig(num_hidden_layers=6, sliding_window=8)
    assert mask_windows(mixed) == {"sliding_attention": 8, "full_attention": None}
