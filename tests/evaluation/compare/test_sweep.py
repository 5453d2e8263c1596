"""The search for a beta, on known curves and on a tiny policy."""

import json
import math

import pytest

from helpers.naive import tiny_scorer
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.config import SweepSettings, validate
from rgtg.errors import UsageError
from rgtg.evaluation.compare.sweep import search, sweep
from rgtg.models.loading.policy import Policy
from rgtg.types.base import Interval
from rgtg.types.comparison import SweepTry


def on(curve):
    def measure(factor):
        value = Interval(mean=curve(factor), low=0, high=0, n=1)
        return SweepTry(factor=factor, beta=factor, value=value, metrics={})

    return measure


@pytest.mark.parametrize("target", [0.2, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_target_on_a_rising_curve_is_found_in_few_tries(power, target):
    found = search(on(lambda b: b**power), target, 0.05 * target, 0.001, 10000, 12)
    assert found.reached
    assert found.best.value.mean == pytest.approx(target, rel=0.05)
    assert len(found.tries) <= 10
    assert len({one.factor for one in found.tries}) == len(found.tries)


def test_the_first_crossing_of_a_reward_that_falls_again_is_found():
    found = search(on(lambda b: 3 - abs(math.log(b / 4))), 2.5, 0.05, 0.01, 100, 12)
    assert found.reached
    assert found.best.factor < 4


@pytest.mark.parametrize(
    ("curve", "target", "message"),
    [
        (lambda b: min(b, 2.0), 5.0, "not reached at the largest beta allowed; the highest seen is 2"),
        (lambda b: b + 7, 5.0, "already passed at the smallest beta"),
        (lambda b: float(b > 1.7), 0.5, "not within the tolerance after 6 tries"),
    ],
)
def test_an_unreachable_target_is_reported(curve, target, message):
    found = search(on(curve), target, 0.01, 0.1, 10, 6)
    assert not found.reached
    assert message in found.verdict
    assert len(found.tries) <= 6


@pytest.fixture
def settings(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("Hello", "A day", "What now?", "So")))
    return SweepSettings(
        prompts=prompts, output=tmp_path / "sweep", scorer="s", target_kl=1.0, kl_to="candidates", max_new_tokens=5,
        bootstrap=100, batch_size=4, seeds=[0, 1], tolerance=0.3,
    )  # fmt: skip


def run(settings, **more):
    asked = []
    scorer = tiny_scorer()
    found = sweep(
        settings, lambda label, *_: asked.append(label), policy=Policy(tiny_policy(), tiny_tokenizer()),
        scorers={"s": scorer, "t": scorer}, **more,
    )  # fmt: skip
    return found, asked


def test_a_kl_target_needs_no_reward_and_a_stopped_sweep_resumes(settings):
    found, _ = run(settings)
    assert found.reached
    assert found.value.mean == pytest.approx(1.0, abs=0.3)
    assert found.metric == "kl_cut_nats"
    assert "reward" not in found.tries[0].metrics
    assert "proxy:s" in found.tries[0].metrics
    parts = {path: path.stat().st_mtime_ns for path in (settings.output / "parts").iterdir()}
    assert len(parts) == 2 * len(found.tries)
    again, _ = run(settings)
    assert again.tries == found.tries


def test_a_reward_target_uses_the_reward_function(settings):
    target = settings.model_copy(update={"target_kl": None, "target_reward": 3.5, "tolerance": 0.6})
    found, _ = run(target, reward=lambda done: [float(len(c.text)) for c in done])
    assert found.metric == "reward"
    assert found.tries[0].value == found.tries[0].metrics["reward"]


def test_several_scorers_share_the_factor(settings):
    both = validate(
        SweepSettings,
        settings.model_dump(exclude={"scorer"}) | {"scorers": [{"scorer": "s", "beta": 1}, {"scorer": "t", "beta": 2}]},
    )
    assert [one.beta for one in both.scorers] == [1, 2]
    found, _ = run(both)
    assert found.tries
    assert all(tried.beta == pytest.approx([tried.factor, 2 * tried.factor]) for tried in found.tries)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_kl": None}, "give one target"),
        ({"target_reward": 1.0}, "give one target"),
        ({"scorer": None}, "a sweep needs a scorer"),
        ({"scorers": [{"scorer": "s"}]}, "not both"),
        ({"scorer": None, "scorers": [{"scorer": "s", "beta": [1, 2]}]}, "one beta"),
        ({"min_beta": 5.0, "max_beta": 2.0}, "must be below"),
    ],
)
def test_unusable_settings_are_errors(settings, changed, message):
    with pytest.raises(UsageError, match=message):
        validate(SweepSettings, settings.model_dump() | changed)


def test_a_method_without_beta_and_a_missing_reward_are_errors(settings):
    with pytest.raises(UsageError, match="policy has no beta to find"):
        run(settings.model_copy(update={"method": "policy"}))
    with pytest.raises(UsageError, match="reward is required"):
        run(settings.model_copy(update={"target_kl": None, "target_reward": 1.0}))
