"""The table of methods."""

from pathlib import Path

import pytest

from helpers.naive import make_guided, tiny_scorer
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.config import DecodingSettings
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS, check_settings, find_method
from rgtg.errors import UsageError
from rgtg.models.loading.policy import Policy

NAMES = [
    "policy", "pargs", "pargs-greedy", "args", "args-sample", "cd", "cd-blockwise", "rad", "farma", "genarm", "vfd",
    "cards", "best-of-n", "smc", "beam",
]  # fmt: skip


def test_the_table_lists_all_methods():
    assert list(METHODS) == NAMES
    assert all(find_method(name).name == name for name in METHODS)
    assert [m.name for m in METHODS.values() if m.rule == "greedy"] == ["pargs-greedy", "args"]
    assert [m.name for m in METHODS.values() if m.vocabulary] == ["farma", "genarm"]
    assert (METHODS["rad"].top_k, METHODS["genarm"].top_k, METHODS["cards"].top_k) == (20, None, 40)


def test_every_method_is_in_the_documentation():
    docs = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    for name, method in METHODS.items():
        assert f"`{name}`" in docs, name
        assert method.paper.rpartition(" ")[2] in docs or method.scorer is None, name


REFUSED = [
    ("policy", {"beta": 1.0}, "no scorer steers it"),
    ("policy", {"entropy_gate": 1.0}, "entropy_gate applies to pargs"),
    ("best-of-n", {"beta": 1.0}, "takes the completion of highest reward"),
    ("cd-blockwise", {"beta": 1.0}, "takes the segment of highest reward"),
    ("pargs", {"n": 3}, "n applies to cd-blockwise, best-of-n, smc, beam"),
    ("pargs", {"segment_length": 3}, "segment_length applies to cd-blockwise, cards, smc, beam"),
    ("cd-blockwise", {"retries": 3}, "retries applies to cards"),
    ("args", {"temperature": 0.5}, "has no temperature"),
    ("pargs", {"proposal": "policy"}, "proposal applies to smc"),
    ("smc", {"entropy_gate": 1.0}, "entropy_gate applies to pargs"),
    ("vfd", {"beta": 1.0}, "a token's score passes value_threshold or does not"),
    ("pargs", {"value_threshold": 1.0}, "value_threshold applies to vfd"),
    ("best-of-n", {"abstain_below": 1.0}, "abstain_below applies to pargs"),
    ("beam", {"temperature": 0.5}, "beam takes the maximum and has no temperature"),
    ("smc", {"temperature": 0.0}, "draws its completions at random"),
    ("pargs", {"min_new_tokens": 65}, "exceeds max_new_tokens"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_settings_that_would_be_ignored_are_refused(name, settings, message):
    with pytest.raises(UsageError, match=message):
        check_settings(find_method(name), DecodingSettings(**settings))


def test_cards_needs_a_reward_threshold():
    with pytest.raises(UsageError, match="needs reward_threshold"):
        make_guided("cards").generate_ids([[0, 5]], max_new_tokens=2)


def test_scorers_that_a_method_cannot_read_are_refused():
    policy = Policy(tiny_policy(), tiny_tokenizer())
    for method in ("farma", "genarm"):
        with pytest.raises(UsageError, match="one prefix at a time"):
            GuidedPolicy(policy, tiny_scorer(), method=method)
    with pytest.raises(UsageError, match="needs a scorer"):
        GuidedPolicy(policy, method="cd")
    for method in ("best-of-n", "cards", "cd-blockwise", "vfd"):
        with pytest.raises(UsageError, match="takes one"):
            GuidedPolicy(policy, [tiny_scorer(), tiny_scorer(seed=3)], method=method)


WARNED = [
    ("pargs", "full-bt", "finished completions only"),
    ("cd", "full-bt", "finished completions only"),
    ("rad", "prefix-bt", "cuts scores to"),
    ("policy", "prefix-bt", "does not use the scorer"),
]


@pytest.mark.parametrize(("method", "objective", "message"), WARNED)
def test_scorers_trained_for_something_else_are_warned_about(method, objective, message):
    with pytest.warns(UserWarning, match=message):
        GuidedPolicy(Policy(tiny_policy(), tiny_tokenizer()), tiny_scorer(objective=objective), method=method)


@pytest.mark.parametrize("objective", ["prefix-bt", "value", "tcrm", "cumulative-mse"])
def test_scorers_trained_on_prefixes_are_not_warned_about(objective):
    GuidedPolicy(Policy(tiny_policy(), tiny_tokenizer()), tiny_scorer(objective=objective))


@pytest.mark.parametrize("method", METHODS)
def test_defaults_suit_every_method(method):
    check_settings(find_method(method), DecodingSettings())
