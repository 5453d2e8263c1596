"""The engine alone: what it gives equals GuidedPolicy, whatever else is running."""

import itertools
import math
import queue
import threading
import time
from contextlib import contextmanager

import pytest

from helpers.naive import info, tiny_scorer
from helpers.other_tokenizers import byte_level, encoder_with, reward_model_with
from helpers.scorer_kinds import kinds
from rgtg.config import EngineSettings
from rgtg.decoding.engine.batch import Batch
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.request import row_seeds
from rgtg.decoding.runners.policy_runner import TorchPolicyRunner
from rgtg.errors import BusyError, DataError, DeadlineError, NonFiniteError, NotServingError, StoppedError, UsageError
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.serving.engine.engine import Engine
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.engine.request import FailedEvent, FinishedEvent, Handle, TokenEvent
from rgtg.tokenization.conversation import encode_source

PROMPTS = ["Once upon a time", "Hi", "What is it? A cat sat on a mat and looked at me", "Once upon a mat"]


def text_scorer(make=reward_model_with):
    words = byte_level()
    return CrossTokenizerScorer(PrefixScorer(make(words), words, info=info(), name="text"))


@pytest.fixture(scope="module")
def models():
    policy, scorers = kinds()
    named = {name.split()[0]: scorer for name, (scorer, _) in scorers.items()}
    named["vocabulary"] = scorers["vocabulary scorer"][0]
    more = {"kind": tiny_scorer(seed=5), "text": text_scorer(), "encoder": text_scorer(encoder_with)}
    return ServedModels(policy, named | more)


@pytest.fixture
def serving(models):
    """Makes engines, and stops them all at the end."""
    made = []

    def make(**settings):
        made.append(
            Engine(models, EngineSettings(**({"max_batch": 8, "max_queue": 64, "prefill_chunk": 5} | settings)))
        )
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def engine(serving):
    return serving()


class Heard:
    """A listener that keeps what it was told, and waits for the end."""

    def __init__(self):
        self.events, self.ends = [], queue.SimpleQueue()

    def __call__(self, event):
        self.events.append(event)
        if not isinstance(event, TokenEvent):
            self.ends.put(event)

    def ended(self, rows=1):
        return sorted((self.ends.get(timeout=60) for _ in range(rows)), key=lambda end: end.row)

    def finished(self, rows=1):
        return [end.completion for end in self.ended(rows)]

    @property
    def tokens(self):
        return [event.token_id for event in self.events if isinstance(event, TokenEvent)]


def row(method="policy", scorers=(), seed=0, trace=False, **settings):
    """One completion to make of a prompt: what ``requests_of`` prepares."""
    return method, tuple(scorers), seed, trace, settings


def requests_of(models, prompt, *rows):
    """Requests with one prompt (text, or token ids), prepared as the server does it."""
    made = []
    for method, scorers, seed, trace, settings in rows:
        guided = models.guided(method, scorers)
        if isinstance(prompt, str):
            made += guided.prepare([prompt], seed=[seed], trace=trace, **settings)
        else:
            text = models.tokenizer.decode(prompt)
            made += guided.make_requests([prompt], [text], [None], [seed], settings, trace=trace)
    return made


def submit(engine, prompt, *rows, to, deadline=None):
    """Submit completions of one prompt; the listener is ``to``."""
    return engine.submit([requests_of(engine.models, prompt, *rows)], to, deadline)


def expect(models, prompt, method, scorers, settings, seed=7):
    """What GuidedPolicy gives, and the seed of that row."""
    chosen = [models.scorers[name] for name in scorers]
    guided = GuidedPolicy(models.policy, chosen or None, method=method, beta=settings.get("beta"))
    (done,) = guided.generate([prompt], seed=seed, trace=True, **({"max_new_tokens": 12} | settings))
    return done


def require_same(done, expected):
    assert done.token_ids == expected.token_ids
    assert (done.text, done.finish_reason) == (expected.text, expected.finish_reason)
    for name in ("policy_log_prob", "guided_log_prob", "candidates_log_prob", "score", "selection_nats"):
        assert getattr(done, name) == pytest.approx(getattr(expected, name), abs=1e-4)
    for name in ("seed", "scorer_calls", "policy_calls", "candidates", "retokenised", "unscored", "method"):
        assert getattr(done, name) == getattr(expected, name), name
    for mine, theirs in zip(done.trace or [], expected.trace or [], strict=done.trace is not None):
        assert mine.candidate_ids == theirs.candidate_ids
        for name in ("policy_log_probs", "scores", "guided_log_probs"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), abs=1e-3), name
        assert (mine.scores_of_each is None) == (theirs.scores_of_each is None)


CASES = [
    ("policy", (), {}),
    ("policy", (), {"temperature": 0.0, "stop": ["e"]}),
    ("policy", (), {"top_k": None, "repetition_penalty": 1.3}),
    ("pargs", ("separate",), {"beta": 2.0, "temperature": 0.8}),
    ("pargs", ("separate",), {"beta": 0.5, "top_k": 4}),
    ("args", ("kind",), {"beta": 1.5, "top_k": 7}),
    ("pargs", ("kind",), {"beta": 1.5, "entropy_gate": 3.3}),
    ("pargs", ("separate", "kind"), {"beta": [1.0, -2.0], "top_p": 0.8}),
    ("pargs", ("state",), {"beta": 1.0}),
    ("pargs", ("state",), {"beta": 2.0, "top_k": 3, "entropy_gate": 3.3}),
    ("pargs", ("state", "kind"), {"beta": [0.5, 0.5]}),
    ("pargs", ("vocab",), {"beta": 1.0}),
    ("pargs", ("vocab", "separate"), {"beta": [1.0, 0.7]}),
    ("pargs", ("vocab", "state"), {"beta": [1.0, 0.7]}),
    ("pargs", ("adapter",), {"beta": 1.0}),
    ("args-sample", ("adapter", "kind"), {"beta": [0.3, 0.3], "top_k": 5}),
    ("farma", ("vocabulary",), {"beta": 0.7}),
    ("genarm", ("vocabulary",), {"beta": 0.7}),
    ("pargs", ("text",), {"beta": 1.0}),
    ("pargs", ("encoder",), {"beta": 1.0, "top_k": 4}),
    ("pargs", ("text", "separate"), {"beta": [1.0, 0.5], "top_k": 5}),
    ("pargs", ("vocab", "kind"), {"beta": [1.0, 2.0], "kl_budget": 30.0, "top_k": 20}),
    ("args-sample", ("kind",), {"kl_budget": 25.0, "entropy_gate": 3.3}),
    ("best-of-n", ("kind",), {"n": 4}),
    ("cd-blockwise", ("separate",), {"n": 3, "segment_length": 3}),
    ("cards", ("separate",), {"reward_threshold": 0.5}),
    ("smc", ("kind",), {"n": 3}),
    ("beam", ("kind",), {"n": 3, "beta": 2.0}),
    ("beam", ("state", "text"), {"n": 2, "beta": [1.0, 0.5], "segment_length": 4}),
    ("vfd", ("kind",), {"value_threshold": 0.3}),
    ("pargs", ("kind",), {"beta": 0.0, "abstain_below": 0.0}),
    ("smc", ("vocab", "text"), {"n": 2, "beta": [1.0, 0.5], "proposal": "policy", "segment_length": 3}),
]


@pytest.mark.filterwarnings("ignore:.*unknown objective", "ignore:.*finished completions only")
def test_everything_at_once_equals_each_alone(models, engine):
    expected, heard = [], []
    for i, (method, scorers, settings) in enumerate(CASES * 2):
        prompt = PROMPTS[i % len(PROMPTS)]
        expected.append(expect(models, prompt, method, scorers, settings, seed=i))
        listener = Heard()
        asked = row(method, scorers, expected[-1].seed, i % 2 == 0, **{"max_new_tokens": 12} | settings)
        heard.append((listener, prompt, asked))
    for listener, prompt, asked in heard:
        submit(engine, prompt, asked, to=listener)
    for (listener, _, asked), alone in zip(heard, expected, strict=True):
        (done,) = listener.finished()
        require_same(done, alone)
        assert listener.tokens == ([] if done.method in ("best-of-n", "smc", "beam") else done.token_ids)
        assert all((step.trace is not None) == asked[3] for step in listener.events if isinstance(step, TokenEvent))


def test_requests_that_can_share_the_policys_pass_share_a_batch(models):
    key = models.factory.key
    shared = {key(names) for names in ((), ("separate",), ("vocab", "kind"), ("text", "encoder"))}
    assert len(shared) == 1
    assert key(("state",)) == key(("kind", "state"))
    assert key(("state",)) not in shared
    assert key(("vocab", "state")) in shared, "the second scorer on the policy's states makes a pass of its own"


def test_choices_of_one_prompt_are_those_of_a_repeated_prompt(models, engine):
    guided = GuidedPolicy(models.policy, [models.scorers["text"]], beta=1.0)
    expected = guided.generate([PROMPTS[2]] * 3, seed=5, max_new_tokens=10)
    ids = encode_source(models.tokenizer, PROMPTS[2])[1]
    rows = [row("pargs", ["text"], seed, beta=1.0, max_new_tokens=10) for seed in row_seeds(5, [ids] * 3)]
    heard = Heard()
    submit(engine, PROMPTS[2], *rows, to=heard)
    done = heard.finished(3)
    for mine, theirs in zip(done, expected, strict=True):
        require_same(mine, theirs)
    assert len({mine.text for mine in done}) == 3


@pytest.mark.parametrize("scorers", [(), ("separate",), ("adapter",), ("state", "kind"), ("text",)])
def test_a_prompt_that_begins_like_an_earlier_text_is_not_read_again(models, scorers, serving):
    engine = serving(prefill_chunk=4)
    first = "It was a dark and stormy night, and the rain fell"
    settings = {"max_new_tokens": 8, **({"beta": [0.5] * len(scorers)} if scorers else {})}
    method = "pargs" if scorers else "policy"
    heard = Heard()
    submit(engine, first, row(method, scorers, 3, **settings), to=heard)
    (event,) = heard.ended()
    assert event.cached_tokens == 0
    ids = encode_source(models.tokenizer, first)[1]
    said = [*ids, *event.completion.token_ids[:-1]]  # the last one was never read
    chosen = [models.scorers[name] for name in scorers] or None
    guided = GuidedPolicy(models.policy, chosen, method=method, beta=settings.get("beta"))
    for prompt_ids, shared in (
        (ids, len(ids) - 1),
        ([*said[:-3], 40, 41], len(said) - 3),
        (ids[:20], 19),
        ([0, 44], 0),
    ):
        (expected,) = guided.generate_ids([prompt_ids], seed=[9], **settings)
        heard = Heard()
        submit(engine, list(prompt_ids), row(method, scorers, 9, **settings), to=heard)
        (event,) = heard.ended()
        require_same(event.completion, expected)
        assert event.cached_tokens == shared
    assert engine.snapshot().prefix_bytes > 0
    assert 0 < engine.snapshot().cached_tokens < engine.snapshot().prompt_tokens


def test_without_memory_for_them_nothing_is_kept(models, serving):
    engine = serving(prefix_cache_mib=0)
    for _ in range(2):
        heard = Heard()
        submit(engine, PROMPTS[2], row(seed=1, max_new_tokens=4), to=heard)
        assert heard.ended()[0].cached_tokens == 0
    assert engine.snapshot().prefix_bytes == 0


APART = [
    ("best-of-n", ("kind",), {"n": 3}),
    ("best-of-n", ("encoder",), {"n": 2}),
    ("cd-blockwise", ("separate",), {"n": 3, "segment_length": 3}),
    ("cd-blockwise", ("text",), {"n": 2, "segment_length": 4}),
    ("cards", ("separate",), {"reward_threshold": 0.5}),
    ("smc", ("kind",), {"n": 3, "beta": 2.0}),
    ("beam", ("kind",), {"n": 3}),
    ("beam", ("adapter",), {"n": 2}),
    ("smc", ("adapter",), {"n": 2, "proposal": "policy", "segment_length": 2}),
    ("pargs", ("vocab", "state"), {"beta": [1.0, 0.7]}),
    ("pargs", ("state", "adapter", "text"), {"beta": [0.5, 0.3, 0.2], "top_k": 4}),
]
LONG = "It was a dark and stormy night, and the rain fell on the town until the sun came up again"


@contextmanager
def widths(*models):
    """Tokens of the widest row of each pass of some models."""
    seen = []

    def note(module, args, kwargs):
        seen.append((args[0] if args else kwargs["input_ids"]).shape[1])

    trunks = {id(model): model.base_model for model in models}
    handles = [trunk.register_forward_pre_hook(note, with_kwargs=True) for trunk in trunks.values()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def put(engine, prompt, *rows, to):
    """As ``submit``, for an engine whose thread does not run."""
    group = requests_of(engine.models, prompt, *rows)
    handle = Handle([group], to, rows={request: row for row, request in enumerate(group)})
    engine._waiting.append((handle, group))
    return handle


@pytest.mark.parametrize(("method", "scorers", "settings"), APART)
def test_a_long_prompt_of_a_row_that_decodes_apart_is_read_between_the_steps_of_others(
    models, method, scorers, settings
):
    """No thread: every turn is taken here."""
    engine = Engine(models, EngineSettings(max_batch=8, max_queue=8, prefill_chunk=5))
    alone, short = expect(models, LONG, method, scorers, settings), expect(models, "Hi", "policy", (), {})
    slow, quick = Heard(), Heard()
    asked = row(method, scorers, alone.seed, **{"max_new_tokens": 12} | settings)
    put(engine, LONG, asked, to=slow)
    engine._turn()
    put(engine, "Hi", row(seed=short.seed, max_new_tokens=12), to=quick)
    turns = 0
    with widths(models.policy.model, *(models.scorers[name].model for name in scorers)) as seen:
        while engine._prefilling:
            engine._turn()
            turns += 1
            assert len(quick.tokens) >= min(turns - 2, len(short.token_ids))  # a turn or two to read its own prompt
    assert turns >= 16  # of 88 tokens, 5 in each
    assert max(seen) <= 5
    require_same(quick.finished()[0], short)
    assert not slow.events
    turns = 0
    with widths(models.policy.model, *(models.scorers[name].model for name in scorers)) as seen:
        while engine._num_running():
            engine._turn()
            turns += 1
    (end,) = slow.ended()
    require_same(end.completion, alone)
    assert end.cached_tokens == 0
    assert turns >= len(alone.token_ids)  # of segments too, one token in each
    if not {"text", "encoder"} & {*scorers}:  # a scorer without a cache reads every text from its beginning
        assert max(seen) <= (30 if method in ("smc", "beam") else 12)  # 10 candidates of each of three


@pytest.mark.parametrize(("method", "scorers", "settings"), APART)
def test_rows_that_decode_apart_take_and_leave_beginnings(models, serving, method, scorers, settings):
    engine, ids = serving(), encode_source(models.tokenizer, LONG)[1]
    asked = row(method, scorers, 3, **{"max_new_tokens": 6} | settings)
    alone = expect(models, LONG, method, scorers, settings | {"max_new_tokens": 6}, seed=[3])
    found = []
    for each in (row(seed=1, max_new_tokens=2), asked, asked, row(seed=1, max_new_tokens=2)):
        listener = Heard()
        submit(engine, LONG, each, to=listener)
        (end,) = listener.ended()
        found.append(end.cached_tokens)
        if each is asked:
            require_same(end.completion, alone)
    # a batch with a fused LoRA scorer has entries of its own: its rows are doubled
    fused = models.factory.key(scorers).fused if method in ("pargs", "smc", "beam") else None
    first = 0 if fused is not None and isinstance(models.scorers[fused], SharedTrunkScorer) else len(ids) - 1
    assert found == [0, first, len(ids) - 1, len(ids) - 1]


def test_a_row_that_decodes_apart_can_be_given_up_while_its_prompt_is_read(models):
    engine, heard, both = Engine(models, EngineSettings(prefill_chunk=5)), Heard(), {"n": 2, "max_new_tokens": 9}
    rows = [row(method, ["kind"], **both) for method in ("best-of-n", "cd-blockwise", "smc", "beam")]
    handle = put(engine, LONG, *rows, to=heard)
    engine._turn()
    assert engine.snapshot().running == 8
    handle.cancelled = True
    engine._turn()
    assert [type(end.error) for end in heard.ended(4)] == [StoppedError] * 4
    assert engine.snapshot().running == 0


class Spoilt:
    """Makes a scorer's model return NaN for texts that hold a certain token."""

    def __init__(self, scorer, token):
        embedding = scorer.model.get_input_embeddings()
        self.handle = embedding.register_forward_hook(
            lambda module, inputs, out: out.masked_fill((inputs[0] == token)[..., None], float("nan"))
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("on_nan", ["fail", "unguided"])
def test_nan_of_a_scorer_harms_one_request_alone(models, on_nan, serving):
    engine = serving(on_nan=on_nan, max_batch=4)
    settings = {"beta": 1.0, "max_new_tokens": 10, "top_k": 4}
    plain = [(prompt, expect(models, prompt, "pargs", ["kind"], settings, i)) for i, prompt in enumerate(PROMPTS * 3)]
    seen = {token for _, alone in plain for step in alone.trace for token in step.candidate_ids}
    seen |= {token for prompt in PROMPTS for token in models.tokenizer(prompt).input_ids}
    bad = next(token for token in range(4, 60) if token not in seen and models.tokenizer.decode([token]).isalpha())
    marked = [(models.tokenizer.decode([bad] * 2) + prompt, alone) for prompt, alone in plain[:6]]
    asked = [pair for pairs in itertools.zip_longest(plain, marked) for pair in pairs if pair]
    heard = [Heard() for _ in asked]
    with Spoilt(models.scorers["kind"], bad):
        for (prompt, alone), listener in zip(asked, heard, strict=True):
            submit(engine, prompt, row("pargs", ["kind"], alone.seed, **settings), to=listener)
        for (prompt, alone), listener in zip(asked, heard, strict=True):
            (end,) = listener.ended()
            if prompt == alone.prompt:
                require_same(end.completion, alone)
                assert end.scores_not_finite == 0
            elif on_nan == "fail":
                assert isinstance(end.error, NonFiniteError)
                assert "kind" in str(end.error)
            else:
                assert end.scores_not_finite == len(end.completion.token_ids)
                assert end.completion.scorer_calls == 0
    assert engine.snapshot().nan > 0


def test_cancelled_rows_leave_and_the_others_do_not_notice(models, engine):
    expected = [expect(models, PROMPTS[0], "pargs", ["kind"], {"beta": 1.0, "max_new_tokens": 60}, i) for i in range(6)]
    heard = [Heard() for _ in range(6)]
    tickets = [
        submit(engine, PROMPTS[0], row("pargs", ["kind"], e.seed, beta=1.0, max_new_tokens=60), to=listener)
        for e, listener in zip(expected, heard, strict=True)
    ]
    while len(heard[0].tokens) < 5:
        time.sleep(0.001)
    for i in (0, 3):
        engine.cancel(tickets[i])
    for i, listener in enumerate(heard):
        (end,) = listener.ended()
        if i in (0, 3):
            assert isinstance(end, FailedEvent)
            assert isinstance(end.error, StoppedError)
            assert len(listener.tokens) < 60
        else:
            require_same(end.completion, expected[i])
    assert engine.drain(10)
    assert engine.snapshot().running == engine.snapshot().waiting == 0


def test_particles_that_are_cancelled_while_they_grow_leave_nothing(models, serving):
    engine = serving(max_batch=9)
    heard, other = Heard(), Heard()
    expected = expect(models, "Hi", "smc", ["kind"], {"n": 4, "max_new_tokens": 20}, 5)
    handle = submit(engine, "Once", row("smc", ["kind"], n=4, max_new_tokens=100), to=heard)
    submit(engine, "Hi", row("smc", ["kind"], expected.seed, n=4, max_new_tokens=20), to=other)
    while not any(run.requests[0].policy_calls for run in list(engine._unbatched)):
        time.sleep(0.001)
    engine.cancel(handle)
    (end,) = heard.ended()
    assert isinstance(end.error, StoppedError)
    require_same(other.finished()[0], expected)
    assert engine.drain(30)
    assert engine.snapshot().running == 0


def test_time_that_is_over_ends_a_request_wherever_it_is(models, serving):
    engine = serving(max_batch=1)
    slow, late = Heard(), Heard()
    submit(engine, "Hi", row(max_new_tokens=100), to=slow, deadline=time.monotonic() + 0.01)
    submit(engine, "Hi", row(max_new_tokens=100), to=late, deadline=time.monotonic() + 0.005)
    for listener in (slow, late):
        (end,) = listener.ended()
        assert isinstance(end.error, DeadlineError)


def test_a_full_queue_refuses(models, serving):
    engine = serving(max_batch=1, max_queue=2)
    heard, refused = [], 0
    for _ in range(12):
        listener = Heard()
        try:
            submit(engine, "Hi", row(max_new_tokens=50), to=listener)
            heard.append(listener)
        except BusyError:
            refused += 1
    assert 7 <= refused <= 9  # one decodes and two wait; one more or less while the first is let in
    assert all(isinstance(listener.ended()[0], FinishedEvent) for listener in heard)
    listener = Heard()
    submit(engine, "Hi", row(max_new_tokens=2), to=listener)
    assert listener.finished()


def test_prompts_of_one_request_are_taken_in_together_or_not_at_all(models, serving):
    engine = serving(max_batch=1, max_queue=2)
    heard = Heard()

    def groups(many):
        return [requests_of(models, "Hi", row(max_new_tokens=40)) for _ in range(many)]

    engine.submit(groups(3), heard)
    with pytest.raises(BusyError):
        engine.submit(groups(3), Heard())
    assert [end.row for end in heard.ended(3)] == [0, 1, 2]
    with pytest.raises(UsageError, match="4 prompts in one request; this server takes at most 3"):
        engine.submit(groups(4), Heard())
    assert engine.snapshot().waiting == 0


def test_draining_finishes_what_was_taken_in_and_takes_nothing_more(models, serving):
    engine = serving(max_batch=2)
    heard = [Heard() for _ in range(6)]
    for listener in heard:
        submit(engine, "Hi", row(max_new_tokens=30), to=listener)
    assert engine.drain(60)
    with pytest.raises(NotServingError):
        submit(engine, "Hi", row(), to=Heard())
    assert all(isinstance(listener.ended()[0], FinishedEvent) for listener in heard)
    engine.stop()
    with pytest.raises(NotServingError):
        engine.run(lambda: 1)


def test_draining_waits_for_what_is_between_the_queue_and_its_place(models, serving, monkeypatch):
    engine, begun = serving(), threading.Event()

    def slowly(*args):
        begun.set()
        time.sleep(0.3)
        return start(*args)

    start = engine._start
    monkeypatch.setattr(engine, "_start", slowly)
    listener = Heard()
    submit(engine, "Hi", row(max_new_tokens=2), to=listener)
    assert begun.wait(30)
    assert engine.drain(30)
    assert isinstance(listener.events[-1], FinishedEvent)


def test_stopping_fails_what_is_left(models, serving):
    engine = serving(max_batch=2)
    heard = [Heard() for _ in range(5)]
    for listener in heard:
        submit(engine, "Hi", row(max_new_tokens=100), to=listener)
    assert not engine.drain(0.01)
    engine.stop()
    assert all(isinstance(listener.ended()[0].error, StoppedError) for listener in heard)


def test_a_token_is_told_before_the_models_read_it(models, serving, monkeypatch):
    engine, order = serving(), []
    step = TorchPolicyRunner.step
    monkeypatch.setattr(TorchPolicyRunner, "step", lambda *args: (order.append("read"), step(*args))[1])
    submit(engine, "Hi", row(max_new_tokens=3), to=lambda event: order.append(type(event).__name__))
    assert engine.drain(30)
    assert order == ["TokenEvent", "read", "TokenEvent", "read", "TokenEvent", "FinishedEvent"]


def test_work_between_steps(models, engine):
    listener = Heard()
    submit(engine, "Hi", row(max_new_tokens=40), to=listener)
    assert engine.run(lambda: 6 * 7).result(30) == 42
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: 1 / 0).result(30)
    assert listener.finished()


def test_works_of_one_request_are_taken_in_together_and_done_in_turn(models, serving):
    engine, order, gate = serving(max_queue=0, max_batch=1), [], threading.Event()
    first = engine.run_all([gate.wait, *(lambda i=i: order.append(("a", i)) for i in range(3))])
    with pytest.raises(BusyError):
        engine.run_all([lambda: None] * 2)  # the four count as one
    gate.set()
    assert [future.result(30) for future in first[1:]] == [None] * 3
    assert order == [("a", 0), ("a", 1), ("a", 2)]
    assert engine.run_all([]) == []


def test_requests_that_score_take_turns_with_each_other_and_with_steps(models, serving):
    engine, order, gate = serving(), [], threading.Event()
    blocked = engine.run(gate.wait)
    mine = engine.run_all([lambda i=i: order.append(("a", i)) for i in range(3)])
    theirs = engine.run_all([lambda i=i: order.append(("b", i)) for i in range(2)])
    listener = Heard()
    submit(engine, "Hi", row(max_new_tokens=6), to=lambda event: (order.append("step"), listener(event)))
    gate.set()
    assert blocked.result(30)
    assert engine.drain(30)
    assert [one for one in order if one != "step"] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert "step" in order[: order.index(("a", 2))]
    assert all(future.done() for future in (*mine, *theirs))
    assert listener.finished()


def test_stopping_fails_calls_that_wait(models, serving):
    engine, begun, gate = serving(), threading.Event(), threading.Event()
    running, left, cancelled = engine.run_all([lambda: (begun.set(), gate.wait(30)), lambda: 1, lambda: 2])
    assert begun.wait(30)
    cancelled.cancel()
    threading.Timer(0.1, gate.set).start()
    engine.stop()
    assert running.result(30)
    assert isinstance(left.exception(30), StoppedError)
    assert cancelled.cancelled()


def test_a_listener_that_raises_harms_nobody(models, engine, caplog):
    def broken(event):
        raise RuntimeError("no")

    submit(engine, "Hi", row(max_new_tokens=4), to=broken)
    listener = Heard()
    submit(engine, "Hi", row(max_new_tokens=4), to=listener)
    assert listener.finished()
    assert "a listener failed" in caplog.text


@pytest.mark.parametrize("broken", ["kind", "policy"])
def test_a_model_that_raises_ends_its_requests_and_no_more(models, broken, monkeypatch, serving):
    engine = serving()
    model = models.policy.model if broken == "policy" else models.scorers["kind"].model
    inner = model.base_model
    with monkeypatch.context() as patch:
        patch.setattr(inner, "forward", lambda **_: 1 / 0)
        listener = Heard()
        submit(engine, "Hello", row("pargs", ["kind"]), to=listener)
        (end,) = listener.ended()
        assert str(end.error) == "the request failed inside the server"
    listener = Heard()
    submit(engine, "Hello", row("pargs", ["kind"], max_new_tokens=3), to=listener)
    assert listener.finished()


def test_a_closed_gate_is_closed_among_steered_neighbours_too(models, serving):
    """Rows with two scorers that steer nowhere, beside rows that one of them steers."""
    engine, gated = serving(), {"entropy_gate": 50.0, "beta": [1.0, 1.0]}
    asked = [row("pargs", ["kind", "text"], seed=1, max_new_tokens=12, **gated)]
    asked += [row("pargs", ["kind"], seed=2, max_new_tokens=12), row("pargs", ["text"], seed=3, max_new_tokens=12)]
    alone = []
    for each in asked:
        listener = Heard()
        submit(engine, "Hello", each, to=listener)
        alone.append(listener.finished()[0])
    heard = [Heard() for _ in asked]
    for each, listener in zip(asked, heard, strict=True):
        submit(engine, "Hello", each, to=listener)
    assert [listener.finished()[0].token_ids for listener in heard] == [done.token_ids for done in alone]


def test_a_scorer_without_figures_harms_no_row_whose_gate_is_closed(models, serving, monkeypatch):
    engine, scorer = serving(), models.scorers["kind"]
    head = scorer.model.score
    monkeypatch.setattr(head, "forward", lambda states: states[..., :1] * math.nan)
    shut, open_ = Heard(), Heard()
    submit(engine, "Hello", row("pargs", ["kind"], max_new_tokens=12), to=open_)
    submit(engine, "Hello", row("pargs", ["kind"], max_new_tokens=12, entropy_gate=50.0), to=shut)
    assert isinstance(open_.ended()[0].error, NonFiniteError)
    assert len(shut.finished()[0].token_ids) > 0


def test_requests_that_cannot_join_a_batch_fail_and_those_in_it_go_on(models, serving, monkeypatch):
    engine, add, times = serving(), Batch._add_row, itertools.count()
    alone = expect(models, "Once", "policy", (), {"max_new_tokens": 60})
    neighbour = Heard()
    submit(engine, "Once", row(seed=alone.seed, max_new_tokens=60), to=neighbour)
    while not neighbour.tokens:
        time.sleep(0.001)

    def failing(*args, **kwargs):
        if next(times) == 1:
            raise RuntimeError("out of memory")
        return add(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "_add_row", failing)
        listener = Heard()
        submit(engine, "Hello", row(seed=1), row(seed=2), to=listener)
        assert [str(end.error) for end in listener.ended(2)] == ["the request failed inside the server"] * 2
    require_same(neighbour.finished()[0], alone)
    listener = Heard()
    submit(engine, "Hello", row(max_new_tokens=3), to=listener)
    assert listener.finished()


@pytest.mark.parametrize(
    "place", ["serving.engine.engine.BatchPrefill", "decoding.guided_policy.GuidedPolicy.start_segments"]
)
def test_a_job_that_cannot_begin_fails_alone(models, serving, place, monkeypatch):
    engine = serving()
    method = row("best-of-n", ["kind"], n=2) if "segments" in place else row()
    with monkeypatch.context() as patch:
        patch.setattr(f"rgtg.{place}", lambda *args, **kwargs: 1 / 0)
        listener = Heard()
        submit(engine, "Hello", method, to=listener)
        assert str(listener.ended()[0].error) == "the request failed inside the server"
    listener = Heard()
    submit(engine, "Hello", row(max_new_tokens=3), to=listener)
    assert listener.finished()


def test_a_defect_of_the_engine_leaves_nobody_waiting(models, serving, monkeypatch):
    engine, listener = serving(), Heard()
    monkeypatch.setattr(engine, "_admit", lambda: 1 / 0)
    assert engine.alive
    submit(engine, "Hello", row(), to=listener)
    assert str(listener.ended()[0].error) == "the request failed inside the server"
    with pytest.raises(NotServingError):
        submit(engine, "Hello", row(), to=Heard())
    assert not engine.alive


@pytest.mark.parametrize("method", [row(name, ["kind"], n=2) for name in ("best-of-n", "cd-blockwise", "smc", "beam")])
def test_segments_and_whole_texts_without_figures_are_counted(models, serving, method, monkeypatch):
    engine, listener = serving(on_nan="unguided"), Heard()
    monkeypatch.setattr(models.scorers["kind"].model.score, "forward", lambda states: states[..., :1] * math.nan)
    submit(engine, "Hello", method, to=listener)
    assert isinstance(listener.ended()[0].error, NonFiniteError)
    assert engine.drain(30)
    assert engine.snapshot().nan == 1


REFUSED = [
    (row("none"), "unknown method"),
    (row("pargs"), "needs a scorer"),
    (row("pargs", ["nobody"]), "no scorer 'nobody' is loaded"),
    (row("pargs", ["kind", "kind"]), "named twice"),
    (row("policy", ["kind"]), "leave the scorers out"),
    (row("pargs", ["kind", "text"], beta=1.0), "1 betas for 2 scorers"),
    (row("pargs", ["kind"], top_k=None), "at most 128"),
    (row("farma", ["kind"]), "asks for the scores of all next tokens"),
    (row("cards", ["kind"]), "needs reward_threshold"),
    (row("best-of-n", ["kind"], n=9), "at most 8"),
    (row("cd-blockwise", ["kind"], n=9), "at most 8"),
    (row("smc", ["kind"], n=9), "at most 8"),
    (row("smc", ["kind"], top_k=None), "at most 128"),
    (row("cards", ["kind"], reward_threshold=1.0, segment_length=10**9), "segment_length = 1000000000"),
    (row("pargs", ["kind"], draft_length=3), "draft_length"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_what_cannot_be_done_is_refused(engine, asked, message):
    with pytest.raises(UsageError, match=message):
        submit(engine, "Hi", asked, to=Heard())


def test_more_tokens_than_the_server_makes_are_refused(serving):
    with pytest.raises(UsageError, match="max_new_tokens = 9; this server makes at most 8"):
        submit(serving(max_tokens=8), "Hi", row(max_new_tokens=9), to=Heard())


def test_a_prompt_that_does_not_fit_is_refused(engine):
    with pytest.raises(DataError, match="context of 128"):
        submit(engine, "a" * 100, row(max_new_tokens=40), to=Heard())
