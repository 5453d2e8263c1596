"""An error of one request fails that request alone: its neighbours draw what they draw alone."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from helpers import faults
from helpers.batches import make_request, prefill_chunked, run, start
from helpers.faults import BOOM, PLACES
from helpers.scorer_kinds import every_scorer
from rgtg.decoding.engine.prefix_cache import PrefixCache
from rgtg.decoding.request import prompt_source
from rgtg.decoding.runners.factory import RunnerFactory
from rgtg.errors import NonFiniteError
from rgtg.tokenization.encoding import decode_completion

PROMPTS = [[0, 5, 9, 12, 33], [0, 44], [0, 7, 7, 30, 31], [0, 11, 25]]
LENGTH = 8


def requests_of(policy, names):
    """Four requests; the last one has other sampling parameters."""
    requests = [
        make_request(policy, prompt, names, [1.5] * len(names), seed=i, top_k=4, max_new_tokens=LENGTH)
        for i, prompt in enumerate(PROMPTS)
    ]
    requests[3].params = replace(requests[3].params, temperature=0.7, top_k=3)
    for request in requests:
        request.stopping.eos_ids = set()  # all of them draw as many tokens
    return requests


class Setup:
    """A policy and scorers with a fault, and what each request draws alone, with what the faulty function reads."""

    def __init__(self, place):
        self.policy, every = every_scorer()
        self.names, fault, owner = PLACES[place]
        self.scorers = {name: every[name] for name in self.names}
        self.fault = fault(self.scorers.get(owner, self.policy))
        self.options = {"overlap": place.startswith("overlapped")}
        self.alone, self.seen = [], []
        for request in requests_of(self.policy, self.names):
            (done,) = self.complete([request])
            assert done.error is None
            self.alone.append(done.token_ids)
            self.seen.append(self.last)

    def complete(self, requests, mode=None, bad=None, **options):
        """Complete requests in one batch, whose function fails in some way once the prompts have been read."""
        batch = start(self.policy, self.scorers, requests, **self.options | options)
        self.fault.start(mode, bad)
        run(batch)
        self.last, self.failed = self.fault.seen, self.fault.failed
        self.fault.start(None)
        return requests

    def victim(self):
        """A request, and a value that only it reads after its prompt."""
        prompts = {token for prompt in PROMPTS for token in prompt}
        return faults.victim(self.seen, lambda i, value: value not in prompts)


setup_of = cache(Setup)


@pytest.mark.parametrize("keep_order", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_of_one_request_fails_it_alone(place, keep_order):
    setup = setup_of(place)
    victim, bad = setup.victim()
    requests = setup.complete(requests_of(setup.policy, setup.names), "row", bad, keep_order=keep_order)
    for i, request in enumerate(requests):
        if i == victim:
            assert request.error is BOOM
            assert request.finish_reason is None
            assert 0 < len(request.token_ids) < LENGTH
            assert request.token_ids == setup.alone[i][: len(request.token_ids)]
        else:
            assert request.error is None
            assert request.token_ids == setup.alone[i]


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_that_is_raised_once_fails_nobody(place):
    setup = setup_of(place)
    requests = setup.complete(requests_of(setup.policy, setup.names), "once")
    assert [request.error for request in requests] == [None] * 4
    assert [request.token_ids for request in requests] == setup.alone


@pytest.mark.parametrize("place", PLACES)
def test_an_exception_that_is_raised_for_all_fails_all(place):
    setup = setup_of(place)
    requests = setup.complete(requests_of(setup.policy, setup.names), "always")
    assert [request.error for request in requests] == [BOOM] * 4
    assert all(request.token_ids == tokens[: len(request.token_ids)] for request, tokens in
               zip(requests, setup.alone, strict=True))  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_request_alone_fails_only_if_the_exception_is_raised_again(place):
    setup = setup_of(place)
    (once,) = setup.complete(requests_of(setup.policy, setup.names)[:1], "once")
    assert (once.error, once.token_ids) == (None, setup.alone[0])
    (always,) = setup.complete(requests_of(setup.policy, setup.names)[:1], "always")
    assert always.error is BOOM


def raising(steps):
    """A logits processor that raises in these calls."""
    calls = []

    def processor(ids, logits):
        calls.append(ids)
        if len(calls) in steps:
            raise BOOM
        return logits

    return processor


@pytest.mark.parametrize("names", [("separate",), ("state",)])
def test_a_processor_that_raises_fails_its_request_alone(names):
    setup = setup_of("separate scorer" if names == ("separate",) else "state head")
    requests = requests_of(setup.policy, names)
    requests[1].processors = raising(range(3, 99))
    requests[2].processors = raising([5])  # once: it is called again, and nobody is harmed
    setup.complete(requests)
    assert [request.error for request in requests] == [None, BOOM, None, None]
    assert [request.token_ids for i, request in enumerate(requests) if i != 1] == [
        tokens for i, tokens in enumerate(setup.alone) if i != 1
    ]


class Raising:
    """Stopping criteria that raise at the third token."""

    def __init__(self, stopping):
        self.stopping, self.limit = stopping, stopping.limit

    def update(self, request):
        if len(request.token_ids) == 3:
            raise BOOM
        self.stopping.update(request)

    def ends_at(self, request, token):
        return self.stopping.ends_at(request, token)


@pytest.mark.parametrize("place", ["separate scorer", "state head", "text"])
def test_stopping_criteria_that_raise_fail_their_request_alone(place):
    setup = setup_of(place)
    requests = requests_of(setup.policy, setup.names)
    requests[2].stopping = Raising(requests[2].stopping)
    setup.complete(requests)
    assert [request.error for request in requests] == [None, None, BOOM, None]
    assert [request.token_ids for request in requests] == [
        tokens[:3] if i == 2 else tokens for i, tokens in enumerate(setup.alone)
    ]
    assert requests[2].finish_reason is None


def test_an_error_in_a_request_that_is_complete_does_not_matter():
    """The text scorer fails to take over a last token, after which nothing is scored any more."""
    setup = setup_of("committed text")
    requests, tokenizer = requests_of(setup.policy, setup.names), setup.policy.tokenizer
    requests[1].stopping.limit = 3
    said = decode_completion(tokenizer, PROMPTS[1], setup.alone[1][:3])
    setup.complete(requests, "row", prompt_source(requests[1], tokenizer) + said)
    assert setup.failed
    assert [request.error for request in requests] == [None] * 4
    assert requests[1].finish_reason == "length"
    assert [request.token_ids for request in requests] == [
        tokens[:3] if i == 1 else tokens for i, tokens in enumerate(setup.alone)
    ]


ADDING = [
    (("separate", "text"), lambda batch: (batch.policy.runner, "add")),
    (("separate", "text"), lambda batch: (batch.separate["separate"].runner.runner, "add")),
    (("separate", "text"), lambda batch: (batch.separate["text"].runner.runner, "add")),
    (("adapter",), lambda batch: (batch.policy.runner, "select_rows")),
    (("state", "adapter"), lambda batch: (batch.separate["adapter"].runner.runner, "add")),
]


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(("names", "find"), ADDING)
def test_requests_that_cannot_be_added_leave_the_batch_as_it_was(names, find, call, monkeypatch):
    policy, scorers = every_scorer()
    scorers = {name: scorers[name] for name in names}
    alone = requests_of(policy, names)
    for request in alone:
        run(start(policy, scorers, [request]))
    requests = requests_of(policy, names)
    batch = start(policy, scorers, requests[:2])
    batch.step()
    prefilled = prefill_chunked(RunnerFactory(policy, scorers).token_runners(names), requests[2])
    second = requests_of(policy, names)[2]
    owner, name = find(batch)
    whole, calls = getattr(owner, name), []

    def failing(*args):
        calls.append(args)
        if len(calls) == call:
            raise BOOM
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(RuntimeError, match="boom"):
            batch.add([requests[2], second], prefilled)
    assert batch.requests == requests[:2]
    batch.step()
    batch.add([requests[2], second], prefilled)
    run(batch)
    assert [request.token_ids for request in requests[:3]] == [request.token_ids for request in alone[:3]]
    assert second.token_ids == alone[2].token_ids


def test_a_text_that_the_prefix_cache_cannot_hold_fails_nobody(monkeypatch):
    policy, scorers = every_scorer()
    names = ("separate",)
    requests = requests_of(policy, names)
    alone = requests_of(policy, names)
    for request in alone:
        run(start(policy, {"separate": scorers["separate"]}, [request]))
    requests[1].stopping.limit = 3
    cache = PrefixCache(2**20)

    def full(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(cache, "add_rows", full)
    run(start(policy, {"separate": scorers["separate"]}, requests, prefix_cache=cache))
    assert [request.error for request in requests] == [None] * 4
    assert [request.token_ids for request in requests] == [
        request.token_ids[:3] if i == 1 else request.token_ids for i, request in enumerate(alone)
    ]


# NaN


SOUND = ["policy", "separate scorer", "second separate scorer", "token reward", "state head", "vocabulary head",
         "text scorer's model", "overlapped scorer"]  # fmt: skip


@pytest.mark.parametrize("place", SOUND)
def test_nan_of_one_request_fails_it_alone(place):
    setup = setup_of(place)
    victim, bad = setup.victim()
    requests = setup.complete(requests_of(setup.policy, setup.names), "nan", bad)
    for i, request in enumerate(requests):
        if i == victim:
            assert isinstance(request.error, NonFiniteError)
            whose = "policy gives no finite" if place == "policy" else f"scorer {setup.names[-1]} returned NaN"
            assert whose in str(request.error)
            assert request.token_ids[:-1] == setup.alone[i][: len(request.token_ids) - 1]
        else:
            assert request.error is None
            assert request.token_ids == setup.alone[i]


@pytest.mark.parametrize("place", [place for place in SOUND if place != "policy"])
def test_nan_of_one_request_can_be_left_to_the_policy(place):
    setup = setup_of(place)
    victim, bad = setup.victim()
    requests = setup.complete(requests_of(setup.policy, setup.names), "nan", bad, on_nan="unguided")
    (alone,) = setup.complete(
        requests_of(setup.policy, setup.names)[victim : victim + 1], "nan", bad, on_nan="unguided"
    )
    for i, request in enumerate(requests):
        assert request.error is None
        assert (request.scores_not_finite > 0) == (i == victim)
        assert request.token_ids == (alone.token_ids if i == victim else setup.alone[i])
        assert torch.tensor(request.guided_log_prob).isfinite()
    assert requests[victim].scorer_calls == LENGTH - requests[victim].scores_not_finite


JOINED = ["separate scorer", "second separate scorer", "token reward", "second pass", "text scorer's model", "encoder"]


@pytest.mark.parametrize("joining", [True, False])
@pytest.mark.parametrize("place", JOINED)
def test_reading_what_waits_before_others_join_fails_its_request_alone(place, joining):
    """A newcomer's scorer rows join those that run, whose newest tokens are read first."""
    setup = setup_of(place)
    victim, bad = setup.victim()
    requests = requests_of(setup.policy, setup.names)
    late = (victim + 1) % len(requests)
    batch = start(setup.policy, setup.scorers, [one for i, one in enumerate(requests) if i != late or not joining],
                  keep_order=False)  # fmt: skip
    runners = RunnerFactory(setup.policy, setup.scorers).token_runners(setup.names)
    newcomer = prefill_chunked(runners, requests[late])
    setup.fault.start("row", bad)
    failed, steps = [], 0
    while batch.requests:
        steps += 1
        failed += batch.read_pending()
        if joining and (failed or steps == LENGTH - 1):
            batch.add([requests[late]], newcomer)
            joining = False
        failed += [request for request in batch.step() if request.error is not None]
    setup.fault.start(None)
    assert failed == [requests[victim]]
    assert requests[victim].error is BOOM
    for i, request in enumerate(requests):
        if i != victim:
            assert (request.error, request.token_ids) == (None, setup.alone[i])
