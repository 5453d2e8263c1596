import json

import pytest

from helpers.naive import EOS, info, next_log_probs, reward, tiny_scorer, write_head
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.config import CompareRun, CompareSettings
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.errors import NonFiniteError, UsageError
from rgtg.evaluation.compare import generate
from rgtg.evaluation.compare.comparison import assemble, compare, run_method
from rgtg.evaluation.compare.generate import reference_log_probs
from rgtg.evaluation.compare.grid import expand_runs
from rgtg.evaluation.compare.models import scorer_keys
from rgtg.evaluation.compare.rewards import model_reward, require_held_out
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.types.generation import Completion

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
    assert len({weights["head"], weights["policy"], weights["reward"]}) == 3


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_reward_model_reads_completions_as_they_ended(append_eos):
    """Finished texts get EOS if it was trained with it; cut-off and empty texts get none."""
    judge = PrefixScorer(tiny_reward_model(), tiny_tokenizer(), info=info(append_eos=append_eos))
    whole = {("ab", "stop"): [11, 5, 6], ("ab", "length"): [11, 5, 6], ("", "stop"): [11]}
    done = [
        Completion(prompt="g", text=text, finish_reason=reason, token_ids=[9], method="policy", seed=0,
                   policy_log_prob=0, guided_log_prob=0)
        for text, reason in whole
    ]  # fmt: skip
    read = [[*ids, EOS] if append_eos and reason == "stop" else ids for (_, reason), ids in whole.items()]
    assert model_reward(judge)(done) == pytest.approx([reward(judge.model, ids) for ids in read], abs=1e-5)


def by_length(done):
    return [float(len(c.text)) for c in done]


def test_seeds_are_independent_and_greedy_runs_have_one(settings):
    settings.seeds = [3, 5]
    settings.methods = [CompareRun(method="policy"), CompareRun(method="pargs-greedy", beta=1)]
    sampled, greedy = compare(settings, reward=by_length).methods
    assert (sampled.seeds, greedy.seeds) == ([3, 5], [3])
    assert [len(row) for row in sampled.rewards] == [3, 3]
    assert sampled.metrics["reward"].n == 3
    assert "self_rouge_l" in sampled.metrics
    assert "self_rouge_l" not in greedy.metrics
    alone = compare(settings.model_copy(update={"seeds": [5], "output": settings.output / "5"}), reward=by_length)
    assert alone.methods[0].rewards == [sampled.rewards[1]]
    lines = (settings.output / "completions.jsonl").read_text().splitlines()
    assert [json.loads(line)["run_seed"] for line in lines] == [3] * 3 + [5] * 3 + [3] * 3
    assert len({json.loads(line)["seed"] for line in lines[:6]}) == 6
    guided = GuidedPolicy(load_policy(settings.policy), method="policy")
    for line in map(json.loads, lines[:6]):  # what a line says is enough to make it again
        (again,) = guided.generate([line["prompt"]], seed=[line["seed"]], max_new_tokens=6)
        assert again.token_ids == line["token_ids"]


def test_best_of_n_draws_n_distinct_completions_and_pays_for_them(settings, monkeypatch):
    read = []
    score = PrefixScorer.score_prefixes

    def spy(scorer, prompts, completions, **settings):
        read.append([tuple(ids) for ids in completions])
        return score(scorer, prompts, completions, **settings)

    monkeypatch.setattr(PrefixScorer, "score_prefixes", spy)
    settings.methods = [CompareRun(method="policy"), CompareRun(method="best-of-n", n=5)]
    result = compare(settings)
    (drawn,) = [rows for rows in read if len(rows) == 15]
    for prompt in range(3):
        assert len(set(drawn[5 * prompt : 5 * prompt + 5])) == 5
    best = result.methods[1]
    assert best.policy_calls >= sum(map(len, drawn))  # a closing EOS may not have been read
    assert best.scorer_calls == 15
    cost = {b.label: b.policy_calls_per_token for b in result.budgets}
    assert cost["policy"] == 1.0
    assert cost["best-of-n"] > 3
    assert result.budget_statement.startswith("Budgets are not equal")


def test_every_baseline_that_samples_gives_other_completions_with_other_seeds(settings):
    settings.seeds = [0, 1, 2]
    # of those that the fixture's scorer can serve
    objectives = (None, "prefix-bt", "full-bt", "value")
    sampled = [m for m in METHODS.values() if m.rule in ("sample", "best") and m.scorer in objectives]
    assert len(sampled) > 3
    settings.methods = [CompareRun(method=m.name) for m in sampled]
    compare(settings, reward=by_length)
    lines = [json.loads(line) for line in (settings.output / "completions.jsonl").read_text().splitlines()]
    for method in sampled:
        for prompt in range(3):
            mine = [tuple(c["token_ids"]) for c in lines if (c["row"], c["prompt_index"]) == (method.name, prompt)]
            assert len(set(mine)) == 3, method.name


def test_finished_shards_are_reused_and_a_new_proxy_only_scores_them(settings, tmp_path, monkeypatch):
    first = compare(settings)
    monkeypatch.setattr(generate, "complete", lambda *_, **__: pytest.fail("completed again"))
    assert compare(settings).methods == first.methods  # to the digit, and in the time it took then
    other = tmp_path / "other"
    tiny_reward_model(seed=9).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    more = compare(settings.model_copy(update={"proxies": {"other": str(other)}}))
    assert more.proxies == ["other", "scorer"]
    assert [row.rewards for row in more.methods] == [row.rewards for row in first.methods]
    assert more.methods[0].proxy_rewards["other"] != more.methods[0].rewards
    with pytest.raises(UsageError, match="made with another max_new_tokens"):
        compare(settings.model_copy(update={"max_new_tokens": 7}))


def test_the_guiding_scorer_is_a_proxy_of_every_run(settings):
    result = compare(settings)
    plain, _, strong, _ = result.methods
    scorer = PrefixScorer.from_pretrained(settings.scorer)
    sample = strong.samples[0]
    expected = scorer.score([sample["prompt"]], [sample["text"]], finished=sample["finish_reason"] == "stop")
    assert strong.proxy_rewards["scorer"][0][0] == pytest.approx(expected[0], abs=1e-4)
    assert (plain.guided_by, strong.guided_by) == ([], ["scorer"])
    assert strong.metrics["proxy:scorer"].mean > plain.metrics["proxy:scorer"].mean


def test_a_run_may_have_its_own_policy(settings, tmp_path):
    tuned = tmp_path / "tuned"
    tiny_policy(seed=4).save_pretrained(tuned)
    tiny_tokenizer().save_pretrained(tuned)
    settings.methods = [CompareRun(method="policy", label="dpo", policy=str(tuned)), CompareRun(method="policy")]
    result = compare(settings)
    row, plain = result.methods
    assert result.baseline == "policy"
    assert row.settings["policy"] == "tuned"
    totals = []
    for sample in row.samples:
        ids, total = tiny_tokenizer()(sample["prompt"]).input_ids, 0.0
        for token in sample["token_ids"]:
            total += float(next_log_probs(tiny_policy(), ids)[token])
            ids.append(token)
        totals.append(sample["guided_log_prob"] - total)
    assert row.metrics["kl_nats"].mean == pytest.approx(sum(totals) / 3, abs=1e-3)
    assert "kl_cut_nats" not in row.metrics
    assert "kl_cut_nats" in plain.metrics


def test_reference_log_probs_equal_those_of_generation(policy_folder):
    policy = load_policy(str(policy_folder))
    (row,) = expand_runs([CompareRun(method="policy", max_new_tokens=7)])
    prompts = ["Hello", "A much longer prompt", "So"]
    done, _ = generate.complete(generate.make_guided_policy(policy, [], row), row, prompts, seed=1, batch_size=2)
    assert reference_log_probs(policy, policy, done, 2) == pytest.approx([c.policy_log_prob for c in done], abs=1e-3)


def test_functions_as_rewards(settings):
    settings.reward, settings.methods = None, [CompareRun(method="policy"), CompareRun(method="pargs", beta=3)]
    result = compare(settings, reward=by_length, proxies={"a's": lambda done: [float(c.text.count("a")) for c in done]})
    assert result.reward == "by_length"
    assert set(result.proxies) == {"a's", "scorer"}
    assert "reward" not in result.provenance.models
    assert [d.a for d in result.differences if d.metric == "reward"] == ["pargs β=3", "policy"]
    with pytest.raises(NonFiniteError, match="gave nan"):
        compare(settings, reward=lambda done: [float("nan")] * len(done))
    with pytest.raises(ValueError, match="gave 1 numbers for 3"):
        compare(settings, reward=lambda done: [1.0])


def test_run_method_and_assemble_give_the_result_of_compare(settings):
    settings.seeds = [0, 1]
    settings.methods = [CompareRun(method="policy"), CompareRun(method="pargs", beta=[1, 4])]
    whole = compare(settings, reward=by_length)
    policy, scorer = load_policy(settings.policy), PrefixScorer.from_pretrained(settings.scorer)
    prompts = ["Hello", "A day", "What now?"]
    rows = [
        run_method(policy, scorer if row.method == "pargs" else None, row, prompts, settings, by_length)
        for row in expand_runs(settings.methods)
    ]
    made = provenance(command="", settings={}, seed=0, models={}, data={})
    joined = assemble(rows, reward="length", prompts=3, made=made)
    assert [row.rewards for row in joined.methods] == [row.rewards for row in whole.methods]
    assert joined.recommended == whole.recommended
    assert joined.baseline == "policy"


def test_an_unknown_baseline_is_an_error(settings):
    settings.baseline = "polcy"
    with pytest.raises(UsageError, match="rows: policy, pargs β=1"):
        compare(settings)


def test_same_seed_same_results(settings):
    first = compare(settings)
    second = compare(settings.model_copy(update={"output": settings.output / "again"}))
    assert [row.metrics for row in first.methods] == [row.metrics for row in second.methods]


def test_a_reward_that_guides_is_an_error(settings):
    settings.reward = settings.scorer
    with pytest.raises(UsageError, match="measured by what it maximises"):
        compare(settings)


def test_a_reward_that_is_a_proxy_or_trained_a_policy_is_an_error(settings, policy_folder):
    with pytest.raises(UsageError, match="is also the proxy p"):
        compare(settings.model_copy(update={"proxies": {"p": settings.reward}}))
    tuned = CompareRun(method="policy", label="rl", policy=str(policy_folder), trained_with=[settings.reward])
    with pytest.raises(UsageError, match="which a compared method was trained with"):
        compare(settings.model_copy(update={"methods": [tuned]}))


def test_a_reward_that_a_scorer_was_trained_with_is_an_error():
    judge, scorer = PrefixScorer(tiny_reward_model(seed=7), tiny_tokenizer(), name="judge"), tiny_scorer()
    require_held_out(judge, {"s": scorer})
    mine = fingerprint_weights(judge.model)
    scorer.info = info().model_copy(update={"base_fingerprint": mine})
    with pytest.raises(UsageError, match="judge was used to train the scorer s"):
        require_held_out(judge, {"s": scorer})
    scorer.info = info().model_copy(update={"base_fingerprint": "x", "base_casts": {"bfloat16": mine}})
    with pytest.raises(UsageError, match="was used to train"):
        require_held_out(judge, {"s": scorer})
    scorer.info = info().model_copy(update={"reference_fingerprint": mine, "trunk": "own"})
    with pytest.raises(UsageError, match="was used to train"):
        require_held_out(judge, {"s": scorer})
    judge.info = scorer.info = info().model_copy(update={"data_fingerprint": "pairs"})
    with pytest.warns(UserWarning, match="same pairs as the scorer s"):
        require_held_out(judge, {"s": scorer})


def test_a_method_without_its_scorer_is_an_error(settings):
    settings.scorer = None
    with pytest.raises(UsageError, match="needs a scorer"):
        compare(settings)


def test_a_beta_of_zero_is_kept(settings):
    """A beta of 0 is the unguided policy, and a temperature of 0 is greedy."""
    settings.methods = [
        CompareRun(method="policy"), CompareRun(method="pargs", beta=[0, 1]),
        CompareRun(method="pargs", beta=0, label="off"), CompareRun(method="policy", temperature=0, label="greedy"),
    ]  # fmt: skip
    result = compare(settings)
    assert [(row.label, row.beta) for row in result.methods] == [
        ("policy", None), ("pargs β=0", 0), ("pargs β=1", 1), ("off β=0", 0), ("greedy", None),
    ]  # fmt: skip
    texts = [[sample["text"] for sample in row.samples] for row in result.methods]
    assert texts[0] == texts[1] == texts[3]
    assert texts[0] != texts[4]
    greedy = settings.model_copy(update={"temperature": 0.0, "seed": 5, "methods": [CompareRun(method="policy")]})
    assert [sample["text"] for sample in compare(greedy).methods[0].samples] == texts[4]


def test_completions_are_kept_if_the_reward_fails(settings, monkeypatch):
    settings.methods = [CompareRun(method="policy")]
    with pytest.raises(NonFiniteError):
        compare(settings, reward=lambda done: [float("inf")] * len(done))
    monkeypatch.setattr(generate, "complete", lambda *_, **__: pytest.fail("completed again"))
    assert len(compare(settings, reward=by_length).methods[0].rewards[0]) == 3


def test_a_scorer_named_reward_is_not_the_held_out_reward(settings, tmp_path):
    named = tmp_path / "elsewhere" / "reward"
    tiny_reward_model().save_pretrained(named)
    tiny_tokenizer().save_pretrained(named)
    settings.methods = [CompareRun(method="pargs", scorer=str(named), beta=2)]
    (row,) = compare(settings, reward=by_length).methods
    assert row.rewards == [[float(len(sample["text"])) for sample in row.samples]]
    assert row.proxy_rewards["reward"] != row.rewards
    assert row.settings["scorers"] == ["reward"]


def test_a_scorer_is_loaded_once_for_all_runs_that_share_it(settings, policy_folder):
    settings.reward = None
    alone = CompareRun(method="genarm", scorer=str(policy_folder))
    rows = expand_runs([CompareRun(method="pargs"), CompareRun(method="best-of-n"), alone], settings)
    first, second, third = (scorer_keys(row)[0] for row in rows)
    assert first == second
    assert (third.name, third.language_model) == (str(policy_folder), True)


def test_compare_supports_several_scorers_and_language_models(settings, policy_folder):
    other = str(policy_folder)
    mixed = {"method": "pargs", "label": "mix", "scorers": [{"scorer": settings.scorer, "beta": [1, 2]},
                                                           {"scorer": settings.scorer, "beta": 0.5}]}  # fmt: skip
    runs = [CompareRun(method="policy"), CompareRun.model_validate(mixed), CompareRun(method="pargs", beta=1.5),
            CompareRun(method="genarm", scorer=other, beta=1.0), CompareRun(method="pargs", label="gated", beta=3,
                                                                            entropy_gate=99.0)]  # fmt: skip
    plain, mix, _, alone, lm, gated = compare(settings.model_copy(update={"methods": runs})).methods
    assert (mix.label, mix.beta, mix.guided_by) == ("mix β=1+0.5", [1, 0.5], ["scorer"])
    assert [s["text"] for s in mix.samples] == [s["text"] for s in alone.samples]  # β·r twice is (β + β')·r
    assert lm.metrics["kl_cut_nats"].mean > 0
    assert gated.scorer_calls == 0  # never unsure enough
    assert gated.rewards == plain.rewards


def test_a_reference_without_an_embedding_for_some_token_is_refused():
    policy, small = Policy(tiny_policy(), tiny_tokenizer()), tiny_policy(seed=3)
    small.resize_token_embeddings(60)
    with pytest.raises(UsageError, match="the policy of the KL has embeddings for 60 tokens, and the policy writes 64"):
        reference_log_probs(Policy(small, tiny_tokenizer()), policy, [])
