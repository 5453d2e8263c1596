"""The loop over a policy that is no torch model: `PolicyRunner` is all that an engine must implement."""

import copy

import pytest
import torch

from rgtg.decoding.engine.batch import Batch
from rgtg.decoding.engine.chunked_prefill import Prefilled
from rgtg.decoding.request import Request
from rgtg.decoding.runners.base import PolicyState
from rgtg.decoding.sampling import SamplingParams

TABLE = torch.randn(11, 11, generator=torch.Generator().manual_seed(3))
VALUES = torch.randn(11, 11, generator=torch.Generator().manual_seed(4))


class TableRunner:
    """Logits of the next token by the newest one; the rows are lists of tokens."""

    def __init__(self):
        self.rows = []

    def fresh(self, longest, width):
        return TableRunner()

    def prefill(self, prompts):
        self.rows = [list(prompt) for prompt in prompts]
        return self._state()

    def step(self, tokens):
        self.rows = [[*row, int(token)] for row, token in zip(self.rows, tokens[:, 0], strict=True)]
        return self._state()

    def tree(self, candidate_ids):
        raise NotImplementedError("a table has no states at the candidates")

    commit = predict = tree

    def select_rows(self, rows):
        self.rows = [list(self.rows[row]) for row in rows]

    def copy_rows(self, rows):
        copied = TableRunner()
        copied.rows = [list(self.rows[row]) for row in rows]
        return copied

    def add(self, other):
        self.rows += copy.deepcopy(other.rows)

    def _state(self):
        newest = torch.tensor([row[-1] for row in self.rows])
        return PolicyState(TABLE[newest], torch.nn.functional.one_hot(newest, 11).float())


class TableHead:
    """A vocabulary head: scores of the next token from the state, a one-hot vector of the newest token."""

    def score(self, hidden, candidate_ids):
        return (hidden @ VALUES).gather(1, candidate_ids)


class TableStopping:
    """Every request takes six tokens."""

    def update(self, request):
        if len(request.token_ids) == 6:
            request.finish_reason = "length"


def make_request(prompt, beta=None, **params):
    steered = {} if beta is None else {"scorers": ("values",), "betas": (beta,), "method": "pargs"}
    chosen = SamplingParams(top_k=4, greedy=True, **params)
    return Request("", list(prompt), 0, params=chosen, stopping=TableStopping(), **steered)


def prefill(prompts):
    runner = TableRunner().fresh(20, 1)
    return Prefilled(runner, runner.prefill(prompts))


def by_hand(prompt, beta=0.0):
    """Six tokens that maximise log π + β·r among the four likeliest."""
    text = list(prompt)
    for _ in range(6):
        log_probs = torch.log_softmax(TABLE[text[-1]], -1)
        ids = log_probs.topk(4).indices
        text.append(int(ids[(log_probs[ids] + beta * VALUES[text[-1], ids]).argmax()]))
    return text[len(prompt) :]


def test_an_engine_without_torch_models_decodes_and_is_guided():
    batch = Batch(heads={"values": TableHead()})
    requests = [make_request([1, 2, 3]), make_request([4], beta=2.0)]
    batch.add(requests, prefill([[1, 2, 3], [4]]))
    batch.step()
    late = make_request([9, 5], beta=0.5)
    batch.add([late], prefill([[9, 5]]))
    while batch.requests:
        batch.step()
    assert [request.error for request in (*requests, late)] == [None] * 3
    assert requests[0].token_ids == by_hand([1, 2, 3])
    assert requests[1].token_ids == by_hand([4], 2.0)
    assert late.token_ids == by_hand([9, 5], 0.5)
    assert by_hand([4], 2.0) != by_hand([4]), "guidance changes something"


def test_a_call_that_an_engine_cannot_make_fails_the_request_with_the_reason():
    batch = Batch(fused=("values", TableHead()))
    request = make_request([4], beta=1.0)
    batch.add([request], prefill([[4]]))
    batch.step()
    assert not batch.requests
    with pytest.raises(NotImplementedError, match="a table has no states at the candidates"):
        raise request.error
