import json

import pytest

from conftest import tiny_reward_model, tiny_tokenizer
from naive import EOS, info, reward, write_head
from rgtg.config import CompareRun, CompareSettings
from rgtg.errors import UsageError
from rgtg.evaluation.compare import _reward_of, compare, expand_runs
from rgtg.models.prefix_scorer import PrefixScorer
from rgtg.types import Completion

pytestmark = pytest.mark.filterwarnings("ignore:.*trained on an unknown objective:UserWarning")


@pytest.fixture
def settings(tmp_path, policy_folder, scorer_folder):
    judge = tmp_path / "judge"
    tiny_reward_model(seed=7).save_pretrained(judge)
    tiny_tokenizer().save_pretrained(judge)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("Hello", "A day", "What now?")))
    return CompareSettings(
        policy=str(policy_folder), scorer=str(scorer_folder), reward=str(judge), prompts=prompts, max_new_tokens=6,
        methods=[CompareRun(method="policy"), CompareRun(method="pargs", beta=[1, 4]),
                 CompareRun(method="best-of-n", n=3)],
        output=tmp_path / "out", bootstrap=100,
    )  # fmt: skip


def test_every_method_is_measured_on_every_prompt(settings):
    result = compare(settings)
    assert [row.label for row in result.methods] == ["policy", "pargs β=1", "pargs β=4", "best-of-n"]
    for row in result.methods:
        assert row.metrics["reward"].n == 3
        assert len(row.samples) == 3
    policy, weak, strong, best = result.methods
    assert policy.scorer_calls == 0
    assert best.scorer_calls == 9
    assert strong.metrics["kl_nats"].mean > weak.metrics["kl_nats"].mean


@pytest.mark.parametrize("kind", ["state", "vocab"])
def test_heads_on_the_policys_states_are_compared_too(settings, tmp_path, policy_folder, kind):
    head = str(write_head(tmp_path / "head", policy_folder, kind))
    runs = [CompareRun(method="policy"), CompareRun(method="pargs", beta=4, scorer=head),
            CompareRun(method="best-of-n", n=2, scorer=head)]  # fmt: skip
    result = compare(settings.model_copy(update={"methods": runs}))
    policy, guided, best = result.methods
    assert guided.metrics["reward"] != policy.metrics["reward"]
    assert (guided.scorer_calls, best.scorer_calls) == (guided.policy_calls, 6)
    weights = result.provenance.models
    assert len({weights[head], weights["policy"], weights["reward"]}) == 3


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_judge_reads_what_was_written(append_eos):
    """Ended texts closed if it was trained so, cut-off ones left open, an empty one as it is."""
    judge = PrefixScorer(tiny_reward_model(), tiny_tokenizer(), info=info(append_eos=append_eos))
    whole = {("ab", "stop"): [11, 5, 6], ("ab", "length"): [11, 5, 6], ("", "stop"): [11]}
    done = [
        Completion(prompt="g", text=text, finish_reason=reason, token_ids=[9], method="policy", seed=0,
                   policy_log_prob=0, guided_log_prob=0)
        for text, reason in whole
    ]  # fmt: skip
    read = [[*ids, EOS] if append_eos and reason == "stop" else ids for (_, reason), ids in whole.items()]
    assert _reward_of(judge)(done) == pytest.approx([reward(judge.model, ids) for ids in read], abs=1e-5)


def test_same_seed_same_results(settings):
    first, second = compare(settings), compare(settings)
    assert [row.metrics for row in first.methods] == [row.metrics for row in second.methods]


def test_a_reward_that_guides_is_refused(settings):
    settings.reward = settings.scorer
    with pytest.raises(UsageError, match="measured by what it maximises"):
        compare(settings)


def test_a_method_without_its_scorer_is_refused(settings):
    settings.scorer = None
    with pytest.raises(UsageError, match="needs a scorer"):
        compare(settings)


def test_one_run_per_beta():
    labels = [
        run.label for run in expand_runs([CompareRun(method="pargs", beta=[0.5, 2]), CompareRun(method="policy")])
    ]
    assert labels == ["pargs β=0.5", "pargs β=2", "policy"]


def test_zero_is_a_value(settings):
    """Of beta: the unguided policy, named so. Of temperature: greedy."""
    settings.methods = [
        CompareRun(method="policy"), CompareRun(method="pargs", beta=[0, 1]), CompareRun(method="pargs", beta=0),
        CompareRun(method="policy", temperature=0),
    ]  # fmt: skip
    result = compare(settings)
    assert [(row.label, row.beta) for row in result.methods] == [
        ("policy", None), ("pargs β=0", 0), ("pargs β=1", 1), ("pargs β=0", 0), ("policy", None),
    ]  # fmt: skip
    texts = [[sample["text"] for sample in row.samples] for row in result.methods]
    assert texts[0] == texts[1] == texts[3]
    assert texts[0] != texts[4]
    greedy = settings.model_copy(update={"temperature": 0.0, "seed": 5, "methods": [CompareRun(method="policy")]})
    assert [sample["text"] for sample in compare(greedy).methods[0].samples] == texts[4]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"method": "pargs", "beta": []}, "empty list"),
        ({"method": "policy", "beta": 0}, "policy has no beta"),
        ({"method": "best-of-n", "beta": 1}, "best-of-n has no beta"),
        ({"method": "pargs", "n": 3}, "n applies to cd-blockwise, best-of-n"),
        ({"method": "args", "temperature": 0.5}, "args takes the maximum and has no temperature"),
        ({"method": "prags"}, "unknown method 'prags'"),
    ],
)
def test_what_a_method_would_ignore_is_refused_before_anything_is_loaded(settings, run, message):
    settings.policy = settings.reward = "./absent"
    settings.methods = [CompareRun(**run)]
    with pytest.raises(UsageError, match=message):
        compare(settings)
