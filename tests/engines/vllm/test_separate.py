"""Scorers of their own beside vLLM: whatever its batch does, scores equal those of whole texts read from scratch."""

import random

import pytest
import torch

from helpers.naive import info, reward, tiny_scorer
from helpers.tiny_models import VOCAB, tiny_policy, tiny_tokenizer
from rgtg.engines.vllm import separate
from rgtg.engines.vllm.separate import SeparateOnRows, SeparateScorer
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.token_reward import VocabularyScorer


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return tiny_scorer(request.param)


@pytest.fixture
def vocabulary_scorer():
    return VocabularyScorer(Policy(tiny_policy(seed=9), tiny_tokenizer()), info=info("farma"), name="tiny")


def scores_from_scratch(scorer, texts, candidates):
    """One whole text at a time, by stock models."""
    if isinstance(scorer, VocabularyScorer):
        logits = [scorer.model(input_ids=torch.tensor([list(text)])).logits[0, -1] for text in texts]
        return torch.stack(logits).gather(1, candidates)
    return torch.tensor(
        [[reward(scorer.model, [*text, v]) for v in row] for text, row in zip(texts, candidates.tolist(), strict=True)]
    )


def check(scorer, cached, texts, generator, k=3):
    candidates = torch.randint(0, VOCAB, (len(texts), k), generator=generator)
    found = cached.score(texts, candidates)
    torch.testing.assert_close(found, scores_from_scratch(scorer, texts, candidates), atol=1e-4, rtol=1e-4)
    assert found.dtype == torch.float32


@torch.inference_mode()
def follow(scorer, steps, seed):
    """A batch in which requests enter, grow, move, stand still, leave, and come back."""
    numbers, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cached, running, away = SeparateScorer(scorer, VOCAB), [], []

    def some(n):
        return [numbers.randrange(3, VOCAB) for _ in range(n)]

    for _ in range(steps):
        event = numbers.random()
        if len(running) < 5 and (event < 0.5 or not running):
            running.append(some(numbers.randrange(1, 12)))
        if event < 0.15 and len(running) > 1:  # preempted
            away.append(running.pop(numbers.randrange(len(running))))
        elif event < 0.3 and away:  # and back, with all its tokens
            running.append(away.pop())
        elif event < 0.4 and len(running) > 1:
            running.pop(numbers.randrange(len(running)))
        elif event < 0.5 and running:  # two samples of one text
            running.append(list(running[0]))
        numbers.shuffle(running)
        if running:
            check(scorer, cached, running, generator)
        for text in running:
            if numbers.random() < 0.85:  # else its prompt is still being read
                text += some(1)


def test_a_reward_model_follows_the_batch(model):
    follow(model, 40, seed=0)


def test_a_vocabulary_scorer_follows_the_batch(vocabulary_scorer):
    follow(vocabulary_scorer, 40, seed=1)


def test_long_prompts_are_read_in_batches(model, monkeypatch):
    monkeypatch.setattr(separate, "PREFILL_TOKENS", 20)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (3, 19, 8, 30, 4)]
    check(model, SeparateScorer(model, VOCAB), texts, generator)


def test_one_pass_reads_what_is_new(model):
    """Rows that go on cost their newest token and the candidates, not their text."""
    cached, generator = SeparateScorer(model, VOCAB), torch.Generator().manual_seed(0)
    texts = [[5, 6, 7, 8], [9, 10]]
    check(model, cached, texts, generator)
    runner = cached._runner
    for token in (11, 12, 13):
        texts = [[*text, token] for text in reversed(texts)]
        before = runner.calls
        check(model, cached, texts, generator)
        assert cached._runner is runner
        assert runner.calls - before <= 2


def test_after_an_error_the_texts_are_read_again(model, monkeypatch):
    cached, generator = SeparateScorer(model, VOCAB), torch.Generator().manual_seed(0)
    texts = [[5, 6, 7], [8, 9]]
    check(model, cached, texts, generator)

    def fails(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(type(cached._runner), "score", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            cached.score([[*text, 4] for text in texts], torch.tensor([[1, 2], [3, 4]]))
    assert cached.texts == []
    check(model, cached, [[*text, 4] for text in texts], generator)


def test_a_scorer_that_fails_leaves_the_rows_to_the_policy(model, monkeypatch, caplog):
    cached = SeparateScorer(model, VOCAB)

    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(cached, "_score", fails)
    (found,) = SeparateOnRows(cached, {0: [5, 6]}).score([([0], torch.tensor([[1, 2]]))])
    assert found.isnan().all()
    assert "no memory" in caplog.text


def test_items_of_different_widths_are_scored_together(vocabulary_scorer):
    texts = {0: [5, 6], 2: None, 3: [7, 8, 9], 4: [10]}
    on_rows = SeparateOnRows(SeparateScorer(vocabulary_scorer, VOCAB), texts)
    narrow, unknown, whole = torch.tensor([[3, 4], [5, 6]]), torch.tensor([[1]]), None
    found = on_rows.score([([3, 0], narrow), ([2], unknown), ([4], whole)])
    wanted = scores_from_scratch(vocabulary_scorer, [texts[3], texts[0]], narrow)
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=1e-4)
    assert found[1].isnan().all()
    every = torch.arange(VOCAB)[None]
    torch.testing.assert_close(
        found[2], scores_from_scratch(vocabulary_scorer, [texts[4]], every), atol=1e-4, rtol=1e-4
    )
    assert on_rows.score([]) == []
