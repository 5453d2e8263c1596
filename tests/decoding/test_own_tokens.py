"""A scorer with a tokenizer of its own beside the policy: every score is that of the decoded text from scratch."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from naive import info, reward
from other_tokenizers import CORPUS, KINDS, encoder_with, policy_with, reward_model_with, tokenizer_of
from rgtg.decoding.own_tokens import BranchReader, TextReader
from rgtg.decoding.requests import Request
from rgtg.decoding.runner import TreeRunner
from rgtg.models.encoding import decode_completion, encode_prompt
from rgtg.models.policy import Policy
from rgtg.models.prefix_scorer import PrefixScorer
from rgtg.models.readout import scorer_scores
from rgtg.models.text_scorer import TextScorer

SOME = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
PROMPTS = ["Once upon a time, there was a", CORPUS[1], "中文 🙂"]


def text_scorer(kind, *, causal=True, trained=None, **more):
    tokenizer = tokenizer_of(kind)
    model = reward_model_with(tokenizer, **more) if causal else encoder_with(tokenizer, **more)
    return TextScorer(PrefixScorer(model, tokenizer, info=trained, name=kind))


def reader_of(scorer, policy_kind, requests=(), eos=(1,), capacity=8):
    policy = Policy(policy_with(tokenizer_of(policy_kind)), tokenizer_of(policy_kind))
    if not scorer.causal:
        return TextReader(scorer, policy, set(eos), requests)
    runner = TreeRunner(scorer.model, scorer_scores, capacity)  # far too small: it grows
    return BranchReader(scorer, policy, set(eos), requests, runner=runner)


def requests_of(kind, prompts):
    tokenizer = tokenizer_of(kind)
    return [Request(text, encode_prompt(tokenizer, text), 0, [], source=text) for text in prompts]


@torch.no_grad()
def naive(scorer, prompt, said, *, finished=False):
    """The stock model on the text, tokenised from scratch."""
    ids = scorer.tokenizer(prompt + (said if finished else said.rstrip("�"))).input_ids
    if not scorer.causal:
        return float(scorer.model(torch.tensor([ids])).logits[0, 0])
    return reward(scorer.model, ids)


def walk(reader, requests, draw, steps=6, k=4, close=()):
    """Random candidates of all rows, step by step; the scores and what they must be."""
    tokenizer = reader.policy_tokenizer
    reader.prefill([request.prompt_ids for request in requests])
    said = [[] for _ in requests]
    for _ in range(steps):
        ids = torch.tensor([[draw.randrange(2, len(tokenizer)) for _ in range(k)] for _ in said])
        got = reader.score(ids)
        want = [
            [naive(reader.scorer, r.prompt, decode_completion(tokenizer, r.prompt_ids, [*mine, t])) for t in row]
            for r, mine, row in zip(requests, said, ids.tolist(), strict=True)
        ]
        torch.testing.assert_close(got, torch.tensor(want), atol=2e-4, rtol=2e-4)
        choice = torch.tensor([draw.randrange(k) for _ in said])
        reader.keep(ids, choice)
        for mine, row, j in zip(said, ids.tolist(), choice.tolist(), strict=True):
            mine.append(row[j])
        if draw.random() < 0.3:
            tokens = torch.tensor([[draw.randrange(2, len(tokenizer))] for _ in said])
            reader.skip(tokens)
            for mine, (token,) in zip(said, tokens.tolist(), strict=True):
                mine.append(token)


@pytest.mark.parametrize("scorer_kind", KINDS)
@pytest.mark.parametrize("policy_kind", ["byte-level", "llama", "word-piece"])
@SOME
@given(seed=st.integers(0, 10**6))
def test_scores_are_those_of_the_text_from_scratch(policy_kind, scorer_kind, seed):
    requests = requests_of(policy_kind, PROMPTS)
    walk(reader_of(text_scorer(scorer_kind), policy_kind, requests), requests, random.Random(seed))


@pytest.mark.parametrize("policy_kind", ["byte-level", "llama"])
@SOME
@given(seed=st.integers(0, 10**6))
def test_an_encoder_reads_whole_texts(policy_kind, seed):
    requests = requests_of(policy_kind, PROMPTS)
    walk(reader_of(text_scorer("word-piece", causal=False), policy_kind, requests), requests, random.Random(seed))
