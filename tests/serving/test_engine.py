"""The engine alone: what it gives equals GuidedPolicy, whatever else is running."""

import queue

import pytest

from conftest import tiny_tokenizer
from naive import info, tiny_scorer
from other_tokenizers import byte_level, encoder_with, reward_model_with
from rgtg.config import DecodingSettings, EngineSettings
from rgtg.decoding.guided import GuidedPolicy
from rgtg.models.encoding import encode_source
from rgtg.models.prefix_scorer import PrefixScorer
from rgtg.models.text_scorer import TextScorer
from rgtg.serving.engine import Engine
from rgtg.serving.jobs import Job, Row, Step
from rgtg.serving.models import ServedModels
from scorer_kinds import kinds

PROMPTS = ["Once upon a time", "Hi", "What is it? A cat sat on a mat and looked at me", "Once upon a mat"]


def text_scorer(make=reward_model_with):
    words = byte_level()
    return TextScorer(PrefixScorer(make(words), words, info=info(), name="text"))


@pytest.fixture(scope="module")
def models():
    policy, scorers = kinds()
    named = {name.split()[0]: scorer for name, (scorer, _) in scorers.items()}
    named["vocabulary"] = scorers["vocabulary scorer"][0]
    more = {"kind": tiny_scorer(seed=5), "text": text_scorer(), "encoder": text_scorer(encoder_with)}
    return ServedModels(policy, named | more)


def serving(models, **settings):
    made = Engine(models, EngineSettings(**({"max_batch": 8, "max_queue": 64, "prefill_chunk": 5} | settings)))
    made.start()
    return made


@pytest.fixture
def engine(models):
    made = serving(models)
    yield made
    made.stop()


class Heard:
    """A listener that keeps what it was told, and waits for the end."""

    def __init__(self):
        self.events, self.ends = [], queue.SimpleQueue()

    def __call__(self, event):
        self.events.append(event)
        if not isinstance(event, Step):
            self.ends.put(event)

    def ended(self, rows=1):
        return sorted((self.ends.get(timeout=60) for _ in range(rows)), key=lambda end: end.row)

    def finished(self, rows=1):
        return [end.completion for end in self.ended(rows)]

    @property
    def tokens(self):
        return [event.token_id for event in self.events if isinstance(event, Step)]


def row(method="policy", scorers=(), seed=0, trace=False, **settings):
    return Row(DecodingSettings(method=method, **settings), tuple(scorers), seed, trace)


def job(prompt, *rows, **more):
    text, ids = encode_source(tiny_tokenizer(), prompt)
    return Job(text, tuple(ids), rows, prompt, **more)


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
    ("best-of-n", ("kind",), {"n": 4}),
    ("cd-blockwise", ("separate",), {"n": 3, "segment_length": 3}),
    ("cards", ("separate",), {"reward_threshold": 0.5}),
]


@pytest.mark.filterwarnings("ignore:.*unknown objective", "ignore:.*finished completions only")
def test_everything_at_once_equals_each_alone(models, engine):
    expected, heard = [], []
    for i, (method, scorers, settings) in enumerate(CASES * 2):
        prompt = PROMPTS[i % len(PROMPTS)]
        expected.append(expect(models, prompt, method, scorers, settings, seed=i))
        listener = Heard()
        heard.append(
            (
                listener,
                job(prompt, row(method, scorers, expected[-1].seed, i % 2 == 0, **{"max_new_tokens": 12} | settings)),
            )
        )
    for listener, asked in heard:
        engine.submit(asked, listener)
    for (listener, asked), alone in zip(heard, expected, strict=True):
        (done,) = listener.finished()
        require_same(done, alone)
        assert listener.tokens == ([] if done.method == "best-of-n" else done.token_ids)
        assert all(
            (step.trace is not None) == asked.rows[0].trace for step in listener.events if isinstance(step, Step)
        )
