"""Best-of-n: n different completions, each scored once, the best one kept."""

import pytest

from helpers.naive import EOS, info, make_guided, reward
from rgtg.decoding import guided_policy
from rgtg.decoding.request import derive_seed
from rgtg.errors import NonFiniteError

PROMPTS = [[0, 9, 14, 30], [0, 44], [0, 7, 7, 30, 31, 3, 52]]


@pytest.fixture
def drawn(monkeypatch):
    """Everything the scorer is shown."""
    seen = []

    def spy(guided):
        score = guided.scorer.score_prefixes

        def record(prompts, completions, **more):
            scores = score(prompts, completions, **more)
            seen.append((list(prompts), list(completions), [float(s[-1]) for s in scores]))
            return scores

        monkeypatch.setattr(guided.scorer, "score_prefixes", record)
        return seen

    return spy


def test_the_best_of_n_distinct_completions_is_taken(drawn):
    guided = make_guided("best-of-n", n=10)
    seen = drawn(guided)
    done = guided.generate_ids(PROMPTS, max_new_tokens=12)
    ((prompts, completions, rewards),) = seen
    for i, completion in enumerate(done):
        group = slice(10 * i, 10 * i + 10)
        assert prompts[group] == [PROMPTS[i]] * 10
        assert len(set(map(tuple, completions[group]))) == 10
        best = max(range(10), key=rewards[group].__getitem__)
        assert completion.token_ids == completions[group][best]
        naive = reward(guided.scorer.model, [*PROMPTS[i], *completion.token_ids])
        assert completion.score == pytest.approx(naive, abs=1e-5, rel=1e-5)
        assert completion.policy_calls == sum(map(len, completions[group]))
        assert completion.scorer_calls == 10


def test_n_of_one_is_the_policy_with_the_seed_of_that_completion():
    best = make_guided("best-of-n", n=1).generate_ids(PROMPTS, seed=[1, 2, 3], max_new_tokens=8)
    seeds = [derive_seed(s, 0) for s in (1, 2, 3)]
    policy = make_guided("policy").generate_ids(PROMPTS, seed=seeds, max_new_tokens=8)
    assert [c.token_ids for c in best] == [c.token_ids for c in policy]


def test_the_trace_is_that_of_the_best_completion():
    done = make_guided("best-of-n", n=4).generate_ids(PROMPTS, max_new_tokens=6, trace=True)
    assert [[s.token_id for s in c.trace] for c in done] == [c.token_ids for c in done]


def test_the_prompt_is_read_once_whatever_n(monkeypatch):
    calls, make = [], guided_policy.make_runner

    def counting(*args, **more):
        calls.append(make(*args, **more))
        return calls[-1]

    monkeypatch.setattr(guided_policy, "make_runner", counting)
    make_guided("best-of-n", n=5, token_tree=True).generate_ids([PROMPTS[0]], max_new_tokens=6, min_new_tokens=6)
    assert [runner.calls for runner in calls] == [6]  # the prompt, and each token but the last


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("stop", [[], ["e", "to"]])
def test_the_reward_that_chooses_is_the_one_that_score_gives_the_text(append_eos, stop):
    """Whether a draw ended (at EOS or a stop text) or was cut off, and whatever the scorer was trained on."""
    guided = make_guided("best-of-n", n=2)
    guided.scorer.info = info(append_eos=append_eos)
    guided.scorer.append_eos = append_eos
    done = guided.generate(["Once", "Hi you", "What", "A", "No"] * 4, seed=0, max_new_tokens=6, stop=stop)
    assert any(c.token_ids[-1] == EOS for c in done)
    done = [c for c in done if not {0, 1, 3} & set(c.token_ids)]  # a text does not show <s>, <pad> and <unk>
    assert {c.finish_reason for c in done} == {"stop", "length"}
    scores = guided.scorer.score(
        [c.prompt for c in done], [c.text for c in done], finished=[c.finish_reason == "stop" for c in done]
    )
    assert [c.score for c in done] == pytest.approx(scores, abs=1e-5)


def test_an_ended_text_is_read_without_eos_by_a_stock_scorer(drawn):
    guided = make_guided("best-of-n", n=8)
    guided.scorer.info = None
    seen = drawn(guided)
    done = guided.generate_ids(PROMPTS, max_new_tokens=6)
    ((_, completions, rewards),) = seen
    assert not any(EOS in completion for completion in completions)
    for i, completion in enumerate(done):
        spoken = [token for token in completion.token_ids if token != EOS]
        assert completion.score == max(rewards[8 * i : 8 * i + 8])
        naive = reward(guided.scorer.model, [*PROMPTS[i], *spoken])
        assert completion.score == pytest.approx(naive, abs=1e-5, rel=1e-5)


def test_nan_rewards_are_refused():
    guided = make_guided("best-of-n", n=2)
    guided.scorer.model.score.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="scorer returned NaN"):
        guided.generate_ids(PROMPTS, max_new_tokens=2)
