"""Ended completions read in parts over a cache are worth what their whole texts are, and leave the cache as it was."""

import pytest
import torch
from rgtg.decoding.runners.ended import InParts, read_ended, rewards_of

from helpers.naive import EOS, make_guided, tiny_scorer
from helpers.tiny_models import tiny_tokenizer
from rgtg.config import DecodingSettings
from rgtg.decoding.request import Request, Stopping
from rgtg.decoding.runners.model_runner import TreeRunner, read
from rgtg.decoding.runners.scorer_runner import read_chain
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.errors import DataError, NonFiniteError
from rgtg.models.ops.lm_head import scorer_scores

PROMPT = [0, 9, 14, 30, 31, 7, 52, 44, 12]
TEXT = tiny_tokenizer().decode(PROMPT)
KEPT = [33, 20]
METHODS = [
    ("best-of-n", {"n": 4}),
    ("cd-blockwise", {"n": 3, "segment_length": 4}),
    ("cards", {"reward_threshold": 1.0, "entropy_threshold": 3.0, "segment_length": 5}),
]


def in_parts(guided, seed, settings):
    """What ``generate_ids`` does for one row, every text read three tokens at a time; how often it gave way."""
    resolved = guided.resolve(settings, complete=True)
    (request,) = guided.requests([PROMPT], [TEXT], [None], [seed], resolved)
    run = guided.begin(request, resolved, trace=False, chunk=3)
    parts = 0
    while run.prompt.left:
        run.prompt.advance(3, None)
        parts += 1
    assert parts == 2 * 3  # policy and scorer, nine tokens each
    return request, sum(1 for _ in run.steps)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("method", "own"), METHODS)
def test_rows_read_in_parts_end_as_those_that_are_read_at_once(method, own, family):
    guided, settings = make_guided(method, family), own | {"max_new_tokens": 16, "stop": [*"aeinost"]}
    ends = set()
    for seed in range(6):
        request, turns = in_parts(guided, seed, settings)
        (whole,) = guided.generate_ids([PROMPT], seed=[seed], **settings)
        assert (request.token_ids, request.text) == (whole.token_ids, whole.text)
        assert request.score == pytest.approx(whole.score, abs=1e-4)
        assert turns >= len(whole.token_ids)
        ends.add(whole.finish_reason)
    assert "stop" in ends


@pytest.fixture
def parts():
    """A scorer that has read the prompt and the beginning of a completion."""
    scorer = tiny_scorer()
    runner = TreeRunner(scorer.model, scorer_scores, 40)
    with torch.inference_mode():
        runner.prefill([PROMPT])
        read_chain(runner, torch.tensor([KEPT]))
    return InParts(scorer, runner, 4)


def read_all(parts, drawn, stopping):
    """The rewards, and how often the reading gave way."""
    row = Request(TEXT, PROMPT, 0, [], token_ids=list(KEPT))
    reading = read_ended(parts.scorer, drawn, stopping, [row], parts)
    turns = 0
    while True:
        try:
            assert next(reading) == [row]
            turns += 1
        except StopIteration as end:
            return end.value, turns


def ended(stopping, *token_ids):
    row = Request(TEXT, PROMPT, 0, [], token_ids=list(token_ids))
    stopping.update(row)
    assert row.finish_reason
    return row


def test_every_kind_of_end(parts):
    """Cut off, closed by EOS, by a stop text in the segment, before it, and at the very beginning."""
    tokenizer = parts.scorer.tokenizer
    first, second = (tokenizer.decode([token]) for token in KEPT)

    def stops(*texts, limit=11):
        return Stopping(tokenizer, {EOS}, DecodingSettings(max_new_tokens=limit, stop=list(texts)))

    before = parts.runner.cache.lengths
    with torch.inference_mode():
        leaf = TokenTree.leaves(torch.tensor([[5]]))
        here = read(parts.runner, leaf)
        for stopping, tokens in (
            (stops(), [*KEPT, *range(20, 29)]),
            (stops(), [*KEPT, 21, EOS]),
            (stops(), [*KEPT, EOS]),
            (stops(tokenizer.decode([22])), [*KEPT, 21, 22]),
            (stops(second + tokenizer.decode([21])), [*KEPT, 21]),
            (stops(first + second), [*KEPT, 21]),
        ):
            row = ended(stopping, *tokens)
            (whole,) = rewards_of(parts.scorer, [row], stopping)
            assert read_all(parts, [row, row], stopping)[0] == pytest.approx([whole] * 2, abs=1e-5)
            assert parts.runner.cache.lengths == before
            assert torch.allclose(read(parts.runner, leaf), here, atol=1e-5)


def test_a_part_is_no_longer_than_it_may_be(parts):
    stopping = Stopping(parts.scorer.tokenizer, {EOS}, DecodingSettings(max_new_tokens=11))
    calls = parts.runner.calls
    assert read_all(parts, [ended(stopping, *KEPT, *range(20, 29))] * 2, stopping)[1] == 2 * 3  # nine new tokens each
    assert parts.runner.calls - calls == 2 * 3


def test_what_cannot_be_read_is_refused(parts):
    stopping = Stopping(parts.scorer.tokenizer, {EOS}, DecodingSettings(max_new_tokens=3))
    row = ended(stopping, *KEPT, 20)
    parts.scorer.max_length = 10
    with pytest.raises(DataError, match="exceeds the scorer's context of 10"):
        read_all(parts, [row], stopping)
    parts.scorer.max_length = None
    with torch.inference_mode():
        parts.scorer.model.score.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        read_all(parts, [row], stopping)
