"""A scorer with a tokenizer of its own: every score equals that of the decoded text, tokenized from scratch."""

import random
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.naive import info, reward
from helpers.other_tokenizers import CORPUS, KINDS, encoder_with, policy_with, reward_model_with, tokenizer_of
from rgtg.decoding.request import Request
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.text_scorer_runner import CachedTextScorerRunner, TextScorerRunner
from rgtg.models.loading.policy import Policy
from rgtg.models.ops.lm_head import scorer_scores
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.tokenization.encoding import decode_completion, encode_prompt

SOME = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
PROMPTS = ["Once upon a time, there was a", CORPUS[1], "中文 🙂"]


def text_scorer(kind, *, causal=True, trained=None, **more):
    tokenizer = tokenizer_of(kind)
    model = reward_model_with(tokenizer, **more) if causal else encoder_with(tokenizer, **more)
    return CrossTokenizerScorer(PrefixScorer(model, tokenizer, info=trained, name=kind))


def runner_of(scorer, policy_kind, eos=(1,), capacity=8):
    policy = Policy(policy_with(tokenizer_of(policy_kind)), tokenizer_of(policy_kind))
    if not scorer.causal:
        return TextScorerRunner(scorer, policy, set(eos))
    model_runner = TreeRunner(scorer.model, scorer_scores, capacity)  # far too small: it grows
    return CachedTextScorerRunner(scorer, policy, set(eos), runner=model_runner)


def requests_of(kind, prompts):
    tokenizer = tokenizer_of(kind)
    return [Request(text, encode_prompt(tokenizer, text), 0, [], source=text) for text in prompts]


def prefill(runner, requests):
    runner.prefill(requests, [request.prompt_ids for request in requests])


def score(runner, ids):
    """Scores of one step, counted in the requests."""
    scores = runner.score(ids)
    runner.record(range(len(runner.rows)))
    return scores


@torch.no_grad()
def naive(scorer, prompt, said, *, finished=False):
    """The stock model on the text, tokenised from scratch."""
    ids = scorer.tokenizer(prompt + (said if finished else said.rstrip("�"))).input_ids
    if not scorer.causal:
        return float(scorer.model(torch.tensor([ids])).logits[0, 0])
    if not finished and ids[-1] == scorer.tokenizer.eos_token_id:
        ids = ids[:-1]  # only finished texts end with EOS, also where the tokenizer adds it to every text
    return reward(scorer.model, ids)


def walk(runner, requests, draw, steps=5, k=3):
    """Random candidates of all rows, step by step; the scores and what they must be."""
    tokenizer = runner.policy.tokenizer
    prefill(runner, requests)
    said = [[] for _ in requests]
    for _ in range(steps):
        ids = torch.tensor([[draw.randrange(2, len(tokenizer)) for _ in range(k)] for _ in said])
        got = runner.score(ids)
        want = [
            [naive(runner.scorer, r.prompt, decode_completion(tokenizer, r.prompt_ids, [*mine, t])) for t in row]
            for r, mine, row in zip(requests, said, ids.tolist(), strict=True)
        ]
        torch.testing.assert_close(got, torch.tensor(want), atol=2e-4, rtol=2e-4)
        choice = torch.tensor([draw.randrange(k) for _ in said])
        runner.commit(ids, choice)
        for mine, row, j in zip(said, ids.tolist(), choice.tolist(), strict=True):
            mine.append(row[j])
        if draw.random() < 0.3:
            tokens = torch.tensor([[draw.randrange(2, len(tokenizer))] for _ in said])
            runner.append(tokens)
            for mine, (token,) in zip(said, tokens.tolist(), strict=True):
                mine.append(token)


@pytest.mark.thorough
@pytest.mark.parametrize("scorer_kind", KINDS)
@pytest.mark.parametrize("policy_kind", ["byte-level", "llama", "word-piece"])
@SOME
@given(seed=st.integers(0, 10**6))
def test_scores_are_those_of_the_text_from_scratch(policy_kind, scorer_kind, seed):
    requests = requests_of(policy_kind, PROMPTS)
    walk(runner_of(text_scorer(scorer_kind), policy_kind), requests, random.Random(seed))


@pytest.mark.parametrize("policy_kind", ["byte-level", "llama"])
@SOME
@given(seed=st.integers(0, 10**6))
def test_an_encoder_reads_whole_texts(policy_kind, seed):
    requests = requests_of(policy_kind, PROMPTS)
    walk(runner_of(text_scorer("word-piece", causal=False), policy_kind), requests, random.Random(seed))


def test_rows_do_not_depend_on_their_neighbours():
    scorer, kind = text_scorer("llama"), "byte-level"
    requests = requests_of(kind, PROMPTS)
    draw = torch.Generator().manual_seed(0)
    size = len(tokenizer_of(kind))
    steps = [torch.randint(2, size, (3, 4), generator=draw) for _ in range(5)]
    together = runner_of(scorer, kind)
    alone = [runner_of(scorer, kind) for _ in requests]
    prefill(together, requests)
    for runner, request in zip(alone, requests_of(kind, PROMPTS), strict=True):
        prefill(runner, [request])
    for ids in steps:
        scores = score(together, ids)
        for i, runner in enumerate(alone):
            torch.testing.assert_close(scores[i : i + 1], score(runner, ids[i : i + 1]), atol=1e-4, rtol=1e-4)
            runner.commit(ids[i : i + 1], torch.tensor([i]))
        together.commit(ids, torch.arange(3))
    for row, runner in zip(together.rows, alone, strict=True):
        assert row.request.retokenised == runner.rows[0].request.retokenised > 0


def test_rows_leave_the_batch():
    requests = requests_of("byte-level", PROMPTS)
    runner = runner_of(text_scorer("byte-level-cl100k"), "byte-level")
    prefill(runner, requests)
    ids = torch.tensor([[70, 300], [80, 310], [90, 320]])
    runner.score(ids)
    runner.commit(ids, torch.tensor([1, 0, 1]))
    runner.select_rows([2, 0])
    tokenizer = tokenizer_of("byte-level")
    for i, (request, first) in enumerate([(requests[2], 320), (requests[0], 300)]):
        said = decode_completion(tokenizer, request.prompt_ids, [first, 75])
        got = runner.score(torch.tensor([[75], [75]]))[i, 0]
        assert float(got) == pytest.approx(naive(runner.scorer, request.prompt, said), abs=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_join_and_leave_before_the_next_step(causal):
    scorer, tokenizer = text_scorer("word-piece", causal=causal), tokenizer_of("byte-level")
    requests = requests_of("byte-level", PROMPTS)
    runner, joining = runner_of(scorer, "byte-level"), runner_of(scorer, "byte-level")
    prefill(runner, requests[:2])
    ids = torch.tensor([[70, 300], [80, 310]])
    runner.score(ids)
    runner.commit(ids, torch.tensor([1, 0]))
    prefill(joining, requests[2:])
    runner.add(joining)
    runner.select_rows([2, 0])
    for got, request, said in zip(
        runner.score(torch.tensor([[75], [75]])), (requests[2], requests[0]), ([75], [300, 75]), strict=True
    ):
        text = decode_completion(tokenizer, request.prompt_ids, said)
        assert float(got[0]) == pytest.approx(naive(scorer, request.prompt, text), abs=1e-4)


@pytest.mark.parametrize("scorer_kind", ["llama", "unigram"])
def test_more_candidates_than_one_pass_takes_are_read_in_several(scorer_kind):
    """The whole vocabulary: several passes, and what is chosen is read again with the next candidates."""
    requests = requests_of("byte-level", PROMPTS[:2])
    runner = runner_of(text_scorer(scorer_kind), "byte-level")
    prefill(runner, requests)
    tokenizer = tokenizer_of("byte-level")
    ids = torch.arange(2, len(tokenizer)).repeat(2, 1)
    calls = runner.calls
    for step in range(2):
        scores = runner.score(ids)
        assert runner.calls > calls + 1
        for j in (5, 111, 400):
            said = decode_completion(tokenizer, requests[1].prompt_ids, [*[30] * step, int(ids[1, j])])
            assert float(scores[1, j]) == pytest.approx(naive(runner.scorer, PROMPTS[1], said), abs=1e-4)
        runner.commit(ids, torch.tensor([28, 28]))  # token 30


def test_many_appended_tokens_are_read_in_a_pass_of_their_own():
    requests = requests_of("byte-level", PROMPTS[:2])
    runner = runner_of(text_scorer("llama"), "byte-level")
    prefill(runner, requests)
    tokenizer = tokenizer_of("byte-level")
    said = tokenizer(" slower than the then lowest and any old thing in the woods", add_special_tokens=False).input_ids
    for token in said:
        runner.append(torch.tensor([[token], [token]]))
    calls = runner.calls
    scores = runner.score(torch.tensor([[70, 71], [72, 73]]))
    assert runner.calls == calls + 2
    for i, request in enumerate(requests):
        text = decode_completion(tokenizer, request.prompt_ids, [*said, 70 + 2 * i])
        assert float(scores[i, 0]) == pytest.approx(naive(runner.scorer, request.prompt, text), abs=1e-4)
    runner.commit(torch.tensor([[70, 71], [72, 73]]), torch.tensor([0, 0]))
    calls = runner.calls
    runner.score(torch.tensor([[70, 71], [72, 73]]))
    assert runner.calls == calls + 1


def test_candidates_that_are_not_one_more_token_are_counted():
    """By hand: the scorer has ' the' and ' them', so the policy's 'm' behind ' the' replaces a token."""
    scorer = text_scorer("byte-level")
    (request,) = requests_of("llama", ["so"])
    runner = runner_of(scorer, "llama")
    prefill(runner, [request])
    vocabulary = tokenizer_of("llama").get_vocab()
    theirs = tokenizer_of("byte-level").get_vocab()
    assert {"Ġthe", "Ġthem"} <= theirs.keys()
    score(runner, torch.tensor([[vocabulary["▁the"], vocabulary["</s>"]]]))
    assert (request.candidates, request.retokenised) == (1 if 1 in runner.eos_ids else 2, 0)
    runner.commit(torch.tensor([[vocabulary["▁the"], vocabulary["</s>"]]]), torch.tensor([0]))
    score(runner, torch.tensor([[vocabulary["m"], vocabulary["▁a"]]]))
    assert (request.candidates, request.retokenised) == (3, 1)


def test_half_a_character_is_scored_as_the_text_before_it():
    (request,) = requests_of("byte-level", ["so"])
    runner = runner_of(text_scorer("llama"), "byte-level")
    prefill(runner, [request])
    first, second = (tokenizer_of("byte-level").get_vocab()[mark] for mark in ("Ã", "©"))
    (half,) = runner.score(torch.tensor([[first]])).tolist()
    assert half[0] == pytest.approx(naive(runner.scorer, "so", ""), abs=1e-4)
    runner.commit(torch.tensor([[first]]), torch.tensor([0]))
    (whole,) = runner.score(torch.tensor([[second]])).tolist()
    assert whole[0] == pytest.approx(naive(runner.scorer, "so", "é"), abs=1e-4)


@pytest.mark.parametrize("trained", [None, info(), info(append_eos=False)])
@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_a_finished_candidate_is_closed_as_the_scorer_was_trained(kind, trained):
    """The unigram tokenizer puts EOS behind every text: a stock model reads it behind finished ones."""
    (request,) = requests_of("byte-level", ["so it goes"])
    scorer = text_scorer(kind, trained=trained)
    runner = runner_of(scorer, "byte-level")
    prefill(runner, [request])
    finished, going = runner.score(torch.tensor([[1, 70]]))[0].tolist()
    said = decode_completion(tokenizer_of("byte-level"), request.prompt_ids, [70])
    bare = [scorer.tokenizer(text).input_ids for text in ("so it goes", "so it goes" + said)]
    bare = [[t for t in ids if t != 1] for ids in bare]
    closing = [1] if (trained.append_eos if trained else kind == "unigram") else []
    assert finished == pytest.approx(reward(scorer.model, bare[0] + closing), abs=1e-4)
    assert going == pytest.approx(reward(scorer.model, bare[1]), abs=1e-4)
    assert finished == pytest.approx(scorer.score(["so it goes"], [""])[0], abs=1e-4)
    assert going == pytest.approx(scorer.score(["so it goes"], [said], finished=False)[0], abs=1e-4)


def test_a_full_context_leaves_the_rest_unsteered():
    (request,) = requests_of("byte-level", ["the dog"])
    scorer = text_scorer("llama", positions=12)
    runner = runner_of(scorer, "byte-level")
    prefill(runner, [request])
    word = tokenizer_of("byte-level").get_vocab()["Ġthe"]
    ids = torch.tensor([[word, 70, 71]])
    seen = []
    for _ in range(4):
        seen.append(score(runner, ids))
        runner.commit(ids, torch.tensor([0]))
    assert request.unscored == 0
    while len(runner.rows[0].cached) < 12:
        seen.append(score(runner, ids))
        runner.commit(ids, torch.tensor([0]))
    with pytest.warns(UserWarning, match=r"context of 12 of its own tokens, .*Completion.unscored counts"):
        seen.append(score(runner, ids))
    runner.commit(ids, torch.tensor([0]))
    assert (seen[-1] == seen[-2][0, 0]).all(), "no candidate is preferred any more"
    calls = runner.calls
    score(runner, ids)
    assert (request.unscored, runner.calls) == (2, calls)


def test_a_full_row_does_not_disturb_others():
    requests = requests_of("byte-level", ["the", "the dog is the dog and the dog" * 2 + " in it is old"])
    runner = runner_of(text_scorer("llama", positions=30), "byte-level")
    prefill(runner, requests)
    ids = torch.tensor([[70, 71], [70, 71]])
    said = []
    for _ in range(24):
        with warnings.catch_warnings(action="ignore"):
            got = score(runner, ids)
        text = decode_completion(tokenizer_of("byte-level"), requests[0].prompt_ids, [*said, 71])
        assert float(got[0, 1]) == pytest.approx(naive(runner.scorer, "the", text), abs=1e-4)
        runner.commit(ids, torch.tensor([0, 0]))
        said.append(70)
    assert requests[1].unscored > 17 > 0 == requests[0].unscored
