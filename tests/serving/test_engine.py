"""The engine alone: what it gives equals GuidedPolicy, whatever else is running."""

import queue

import pytest

from conftest import tiny_policy, tiny_reward_model, tiny_tokenizer
from naive import info
from rgtg.config import DecodingSettings, EngineSettings
from rgtg.decoding.guided import GuidedPolicy
from rgtg.decoding.requests import row_seeds
from rgtg.models.encoding import encode_source
from rgtg.models.policy import Policy
from rgtg.models.prefix_scorer import PrefixScorer
from rgtg.serving.engine import Engine
from rgtg.serving.jobs import Job, Row, Step
from rgtg.serving.models import ServedModels

PROMPTS = ["Once upon a time", "Hi", "What is it? A cat sat on a mat and looked at me"]


def scorer(seed=1, objective="prefix-bt"):
    return PrefixScorer(tiny_reward_model(seed=seed), tiny_tokenizer(), info=info(objective), name=f"scorer {seed}")


@pytest.fixture(scope="module")
def models():
    return ServedModels(Policy(tiny_policy(), tiny_tokenizer()), {"kind": scorer(1), "brief": scorer(2)})


@pytest.fixture
def engine(models):
    made = Engine(models, EngineSettings(max_batch=8, max_queue=32))
    made.start()
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

    def finished(self, rows=1):
        ends = [self.ends.get(timeout=60) for _ in range(rows)]
        return [end.completion for end in sorted(ends, key=lambda end: end.row)]


def row(method="policy", scorers=(), seed=0, trace=False, **settings):
    return Row(DecodingSettings(method=method, **settings), tuple(scorers), seed, trace)


def job(prompt, *rows, **more):
    text, ids = encode_source(tiny_tokenizer(), prompt)
    return Job(text, tuple(ids), rows, prompt, **more)


CASES = [
    ("policy", (), {}),
    ("pargs", ("kind",), {"beta": 2.0, "temperature": 0.8}),
    ("args", ("kind",), {"beta": 1.5}),
    ("pargs", ("kind", "brief"), {"beta": [1.0, -2.0], "top_p": 0.8}),
    ("best-of-n", ("brief",), {"n": 4}),
    ("cd-blockwise", ("kind",), {"n": 3, "segment_length": 3}),
]


@pytest.mark.parametrize(("method", "scorers", "settings"), CASES)
def test_equals_guided_policy(engine, models, method, scorers, settings):
    chosen = [models.scorers[name] for name in scorers]
    guided = GuidedPolicy(models.policy, chosen or None, method=method, beta=settings.get("beta"))
    for prompt in PROMPTS:
        (expected,) = guided.generate([prompt], seed=7, max_new_tokens=12, trace=True, **settings)
        (seed,) = row_seeds(7, [encode_source(models.tokenizer, prompt)[1]])
        heard = Heard()
        engine.submit(job(prompt, row(method, scorers, seed, True, max_new_tokens=12, **settings)), heard)
        (done,) = heard.finished()
        assert done.token_ids == expected.token_ids
        assert done.text == expected.text
        assert done.guided_log_prob == pytest.approx(expected.guided_log_prob, abs=1e-4)
        steps = [event for event in heard.events if isinstance(event, Step)]
        assert [step.token_id for step in steps] == ([] if method == "best-of-n" else expected.token_ids)
