"""Ended completions that are read in chunks get the rewards of their whole texts, and leave the cache as it was."""

import pytest
import torch

from helpers.naive import EOS, make_guided, tiny_scorer
from helpers.tiny_models import tiny_tokenizer
from rgtg.config import DecodingSettings
from rgtg.decoding.request import Request, StoppingCriteria
from rgtg.decoding.runners.model_runner import TreeRunner, append_tokens, outputs
from rgtg.decoding.runners.segment_scorer import ChunkedRewards, rewards_of
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


def complete_in_chunks(guided, seed, settings):
    """What ``generate_ids`` does for one request, every text read three tokens at a time; the number of turns."""
    (request,) = guided.make_requests([PROMPT], [TEXT], [None], [seed], settings)
    run = guided.start_segments([request], chunk=3)
    chunks = 0
    while run.prefill.left:
        run.prefill.advance(3, None)
        chunks += 1
    assert chunks == 2 * 3  # policy and scorer, nine tokens each
    return request, sum(1 for _ in run.steps)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("method", "own"), METHODS)
def test_requests_read_in_chunks_end_like_those_read_at_once(method, own, family):
    guided, settings = make_guided(method, family), own | {"max_new_tokens": 16, "stop": [*"aeinost"]}
    ends = set()
    for seed in range(6):
        request, turns = complete_in_chunks(guided, seed, settings)
        (whole,) = guided.generate_ids([PROMPT], seed=[seed], **settings)
        assert (request.token_ids, request.text) == (whole.token_ids, whole.text)
        assert request.score == pytest.approx(whole.score, abs=1e-4)
        assert turns >= len(whole.token_ids)
        ends.add(whole.finish_reason)
    assert "stop" in ends


@pytest.fixture
def chunked():
    """A scorer that has read the prompt and the beginning of a completion."""
    scorer = tiny_scorer()
    runner = TreeRunner(scorer.model, scorer_scores, 40)
    with torch.inference_mode():
        runner.prefill([PROMPT])
        append_tokens(runner, torch.tensor([KEPT]))
    return ChunkedRewards(scorer, runner, 4)


def read_all(chunked, drawn, stopping):
    """The rewards, and the number of chunks."""
    chunks = sum(1 for _ in chunked.read(Request(TEXT, PROMPT, 0, token_ids=list(KEPT)), drawn, stopping))
    return chunked.rewards, chunks


def ended(stopping, *token_ids):
    row = Request(TEXT, PROMPT, 0, token_ids=list(token_ids))
    stopping.update(row)
    assert row.finish_reason
    return row


def test_every_kind_of_end_is_rewarded_like_the_whole_text(chunked):
    """Cut off, closed by EOS, by a stop text in the segment, before it, and at the very beginning."""
    tokenizer = chunked.scorer.tokenizer
    first, second = (tokenizer.decode([token]) for token in KEPT)

    def stops(*texts, limit=11):
        return StoppingCriteria(tokenizer, {EOS}, DecodingSettings(max_new_tokens=limit, stop=list(texts)))

    before = chunked.runner.cache.lengths
    with torch.inference_mode():
        leaf = TokenTree.leaves(torch.tensor([[5]]))
        here = outputs(chunked.runner, leaf)
        for stopping, tokens in (
            (stops(), [*KEPT, *range(20, 29)]),
            (stops(), [*KEPT, 21, EOS]),
            (stops(), [*KEPT, EOS]),
            (stops(tokenizer.decode([22])), [*KEPT, 21, 22]),
            (stops(second + tokenizer.decode([21])), [*KEPT, 21]),
            (stops(first + second), [*KEPT, 21]),
        ):
            row = ended(stopping, *tokens)
            (whole,) = rewards_of(chunked.scorer, [row], stopping)
            assert read_all(chunked, [row, row], stopping)[0] == pytest.approx([whole] * 2, abs=1e-5)
            assert chunked.runner.cache.lengths == before
            assert torch.allclose(outputs(chunked.runner, leaf), here, atol=1e-5)


def test_no_chunk_is_longer_than_asked_for(chunked):
    stopping = StoppingCriteria(chunked.scorer.tokenizer, {EOS}, DecodingSettings(max_new_tokens=11))
    calls = chunked.runner.calls
    assert read_all(chunked, [ended(stopping, *KEPT, *range(20, 29))] * 2, stopping)[1] == 2 * 3  # nine new tokens each
    assert chunked.runner.calls - calls == 2 * 3


def test_texts_over_the_context_and_nan_rewards_are_refused(chunked):
    stopping = StoppingCriteria(chunked.scorer.tokenizer, {EOS}, DecodingSettings(max_new_tokens=3))
    row = ended(stopping, *KEPT, 20)
    chunked.scorer.max_length = 10
    with pytest.raises(DataError, match="exceeds the scorer's context of 10"):
        read_all(chunked, [row], stopping)
    chunked.scorer.max_length = None
    with torch.inference_mode():
        chunked.scorer.model.score.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        read_all(chunked, [row], stopping)
