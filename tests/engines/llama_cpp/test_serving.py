"""The server over llama.cpp: requests join, leave, wait and are given up as they do over torch."""

import threading
import time

import pytest

from helpers.llama_models import require_llama_cpp, tiny_llama_policy
from helpers.naive import tiny_scorer
from helpers.served import Served, events_of
from rgtg.errors import DeadlineError, StoppedError
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.engine.request import FailedEvent
from serving.engine import test_engine as of_torch
from serving.engine.test_engine import Heard, engine, expect, require_same, row, serving, submit  # noqa: F401

from .test_guided import head_on, text_scorer, vocabulary_scorer

require_llama_cpp()

PROMPTS = of_torch.PROMPTS
# What torch's own test runs at once, without scorers that llama.cpp lacks.
CASES = [case for case in of_torch.CASES if not {"adapter", "encoder"} & set(case[1])]
LONG = of_torch.LONG
UNGUIDED = {"guidance": {"method": "policy"}}


@pytest.fixture(scope="module")
def models():
    policy = tiny_llama_policy()
    scorers = {
        "vocab": head_on(policy), "state": head_on(policy, "state"), "separate": tiny_scorer(),
        "vocabulary": vocabulary_scorer("farma"), "kind": tiny_scorer(seed=5), "text": text_scorer(),
    }  # fmt: skip
    return ServedModels(policy, scorers, "tiny")


@pytest.fixture
def served(models):
    made = []

    def make(**settings):
        made.append(Served(models, **({"max_batch": 8} | settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()


test_choices_of_one_prompt = of_torch.test_choices_of_one_prompt_are_those_of_a_repeated_prompt
test_cancelled_rows_leave = of_torch.test_cancelled_rows_leave_and_the_others_do_not_notice
test_time_that_is_over = of_torch.test_time_that_is_over_ends_a_request_wherever_it_is
test_a_full_queue_refuses = of_torch.test_a_full_queue_refuses
test_prompts_of_one_request = of_torch.test_prompts_of_one_request_are_taken_in_together_or_not_at_all
test_draining = of_torch.test_draining_finishes_what_was_taken_in_and_takes_nothing_more
test_stopping = of_torch.test_stopping_fails_what_is_left
test_a_prompt_that_does_not_fit = of_torch.test_a_prompt_that_does_not_fit_is_refused


@pytest.mark.filterwarnings("ignore:.*unknown objective", "ignore:.*finished completions only")
def test_everything_at_once_equals_each_alone(models, engine):  # noqa: F811
    expected = [
        expect(models, PROMPTS[i % len(PROMPTS)], method, scorers, settings, seed=i)
        for i, (method, scorers, settings) in enumerate(CASES)
    ]
    heard = []
    for alone, (method, scorers, settings) in zip(expected, CASES, strict=True):
        heard.append(Heard())
        asked = row(method, scorers, alone.seed, True, **{"max_new_tokens": 12} | settings)
        submit(engine, alone.prompt, asked, to=heard[-1])
    for listener, alone in zip(heard, expected, strict=True):
        require_same(listener.finished()[0], alone)


@pytest.mark.parametrize("scorers", [(), ("vocab",), ("state",), ("separate",)])
def test_a_prompt_that_begins_like_an_earlier_text_is_not_read_again(models, serving, scorers):  # noqa: F811
    running = serving(prefill_chunk=4)
    settings = {"max_new_tokens": 6, **({"beta": 1.0} if scorers else {})}
    method = "pargs" if scorers else "policy"
    cached = []
    for prompt in (LONG, LONG, LONG[:40] + "? No"):
        alone = expect(models, prompt, method, scorers, settings)
        heard = Heard()
        submit(running, prompt, row(method, scorers, alone.seed, **settings), to=heard)
        (end,) = heard.ended()
        require_same(end.completion, alone)
        cached.append(end.cached_tokens)
    assert cached == [0, len(LONG) - 1, 40]
    assert running.snapshot().prefix_bytes > 0


def test_sequences_are_given_back_whatever_ends_a_request(models, serving):  # noqa: F811
    context = models.policy.model.context
    running = serving(max_batch=4, prefill_chunk=5)
    heard = [Heard() for _ in range(6)]
    handles = [
        submit(running, LONG, row("pargs", ["state"], i, beta=1.0, max_new_tokens=38), to=listener)
        for i, listener in enumerate(heard)
    ]
    submit(running, "Hi", row(max_new_tokens=90), to=(late := Heard()), deadline=time.monotonic() + 0.05)
    for handle in handles[::2]:
        running.cancel(handle)
    ends = [listener.ended()[0] for listener in heard]
    stopped = [end.error for end in ends[::2] if isinstance(end, FailedEvent)]
    assert stopped, "one may have ended before it was cancelled, not all"
    assert all(isinstance(error, StoppedError) for error in stopped)
    assert isinstance(late.ended()[0].error, DeadlineError)
    assert running.drain(30)
    running.stop()
    assert context.free_sequences == context.max_sequences


def test_an_engine_that_fails_harms_its_requests_alone(models, serving, monkeypatch):  # noqa: F811
    running, context = serving(), models.policy.model.context
    decode = type(context)._decode

    def fails(self):
        if 57 in self._batch.tokens[: self._batch.struct.n_tokens]:
            raise RuntimeError("llama.cpp could not read 1 tokens")
        decode(self)

    alone = [expect(models, prompt, "policy", (), {"temperature": 0.0}) for prompt in PROMPTS]
    monkeypatch.setattr(type(context), "_decode", fails)
    bad = Heard()
    heard = [Heard() for _ in alone]
    submit(running, list(range(50, 60)), row(), to=bad)
    for one, listener in zip(alone, heard, strict=True):
        submit(running, one.prompt, row(seed=one.seed, max_new_tokens=12, temperature=0.0), to=listener)
    assert isinstance(bad.ended()[0], FailedEvent)
    for one, listener in zip(alone, heard, strict=True):
        (end,) = listener.ended()
        if 57 not in one.token_ids:
            require_same(end.completion, one)
    monkeypatch.undo()
    submit(running, "Hi", row(max_new_tokens=2), to=(again := Heard()))
    assert again.finished()


# -- over HTTP ------------------------------------------------------------------------------------------------------


def test_the_api_answers_with_guidance_traces_and_streams(served):
    server = served()
    body = {
        "model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0,
        "guidance": {"scorers": {"vocab": 2.0}, "trace": True},
    }  # fmt: skip
    whole = server.post("/v1/completions", **body)
    assert whole.status_code == 200, whole.text
    choice = whole.json()["choices"][0]
    assert len(choice["guidance"]["trace"]) == 8
    events, ended = events_of(server.post("/v1/completions", **body, stream=True))
    assert ended
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == choice["text"]
    both = server.post("/v1/compare", **body | {"guidance": {"scorers": ["vocab"], "trace": True}})
    assert both.status_code == 200, both.text
    assert {len(both.json()[side]["guidance"]["trace"]) for side in ("guided", "unguided")} == {8}


def test_a_flood_of_requests_gets_429_and_the_server_goes_on(served):
    server = served(max_batch=2, max_queue=2)
    codes, lock = [], threading.Lock()

    def ask(i):
        answer = server.post("/v1/completions", model="tiny", prompt=LONG[: i + 3], max_tokens=40, **UNGUIDED)
        with lock:
            codes.append(answer.status_code)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) == {200, 429}
    assert server.idle()
    assert server.post("/v1/completions", model="tiny", prompt="Hi", max_tokens=2, **UNGUIDED).status_code == 200
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "bad",
    [
        {"guidance": {"scorers": {"vocab": "strong"}}},
        {"guidance": {"scorers": {"nobody": 1.0}}},
        {"guidance": {"method": "cards", "scorers": {"vocab": 1.0}, "reward_threshold": "high"}},
        {"prompt": [1, 2, 99999]},
        {"prompt": "x" * 400},
        {"max_tokens": -1},
    ],
)
def test_bad_arguments_get_400(served, bad):
    server = served()
    answer = server.post("/v1/completions", **{"model": "tiny", "prompt": "Hi", "max_tokens": 4, **UNGUIDED} | bad)
    assert 400 <= answer.status_code < 500, answer.text
    assert server.post("/v1/completions", model="tiny", prompt="Hi", max_tokens=2, **UNGUIDED).status_code == 200
