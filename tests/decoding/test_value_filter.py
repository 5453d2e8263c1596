"""Value-filtered decoding and abstention: what is kept, what is replaced, and where a completion ends."""

import math

import pytest
import torch

from helpers.naive import make_guided, next_log_probs, reward, tiny_scorer
from helpers.scorer_kinds import every_scorer
from rgtg.decoding.engine.batch import Batch
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.runners.scorer_runner import SeparateScorerRunner
from rgtg.decoding.sampling import filtered_log_probs, keep_or_draw_again
from rgtg.errors import NonFiniteError, UsageError

PROMPT = [0, 9, 14, 30]
PROMPTS = [PROMPT, [0, 44], [0, 7, 7, 30, 31, 3, 52]]


def test_by_hand_the_filter_renormalises_what_is_good():
    log_probs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.0]]).log()
    scores = torch.tensor([[0.0, 1.0, 2.0], [-3.0, -1.0, -2.0], [0.0, -1.0, 9.0]])
    found = filtered_log_probs(log_probs, scores, 1.0).exp()
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.6, 0.4]))  # at the threshold is good
    assert found[1].tolist() == [0.0, 1.0, 0.0]  # none is good: the best
    assert found[2].tolist() == [1.0, 0.0, 0.0]  # an excluded candidate is never good
    cool = filtered_log_probs(log_probs[:1], scores[:1], 1.0, temperature=0.5).exp()
    torch.testing.assert_close(cool, torch.tensor([[0.0, 9 / 13, 4 / 13]]))
    assert filtered_log_probs(log_probs[:1], scores[:1], 1.0, temperature=0).exp().tolist() == [[0.0, 1.0, 0.0]]


def test_one_uniform_number_serves_both_draws():
    """Over a fine grid of numbers, tokens have the filtered distribution, and own draws stand where they can."""
    own = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()[None]
    good = torch.tensor([[True, False, False, True]])
    filtered = torch.log_softmax(own.masked_fill(~good, -math.inf), -1)
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    choice, kept = keep_or_draw_again(own.expand(20_000, -1), filtered.expand(20_000, -1), uniforms)
    shares = torch.bincount(choice, minlength=4) / 20_000
    torch.testing.assert_close(shares.double(), filtered[0].exp(), atol=2e-3, rtol=0)
    assert float(kept.double().mean()) == pytest.approx(0.4, abs=1e-3)
    assert set(choice[~kept].tolist()) == {0, 3}


@pytest.mark.parametrize("kind", ["separate", "state", "vocab", "adapter", "text", "encoder"])
def test_the_policys_own_draw_stands_where_it_is_good(kind):
    """With a threshold that all pass, completions are the policy's; with another, until the first bad token."""
    policy, scorers = every_scorer()
    guided = GuidedPolicy(policy, {kind: scorers[kind]}, method="vfd", top_k=5)
    plain = GuidedPolicy(policy, method="policy", top_k=5)
    settings = {"max_new_tokens": 9, "seed": list(range(12))}
    own = plain.generate_ids(PROMPTS * 4, **settings)
    free = guided.generate_ids(PROMPTS * 4, value_threshold=-1e6, **settings)
    assert [c.token_ids for c in free] == [c.token_ids for c in own]
    assert {c.touched for c in free} == {0}
    scores = [score for c in guided.generate_ids(PROMPTS * 4, value_threshold=-1e6, trace=True, **settings)
              for step in c.trace for score in step.scores]  # fmt: skip
    threshold = sorted(scores)[len(scores) // 5]
    done = guided.generate_ids(PROMPTS * 4, value_threshold=threshold, trace=True, **settings)
    assert any(c.touched for c in done)
    for mine, theirs in zip(done, own, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(mine.token_ids, theirs.token_ids, strict=False)) if a != b), None)
        assert (same is None) == (mine.touched == 0)
        for step in mine.trace:
            taken = step.scores[step.candidate_ids.index(step.token_id)]
            assert taken >= threshold or taken == max(step.scores)
        if same is not None:
            step = mine.trace[same]
            assert step.scores[step.candidate_ids.index(theirs.token_ids[same])] < threshold


def test_a_threshold_is_needed_and_a_draft_is_refused():
    with pytest.raises(UsageError, match=r"vfd needs value_threshold.*rgtg calibrate"):
        make_guided("vfd").generate_ids([PROMPT])
    with pytest.raises(UsageError, match="vfd does not speculate"):
        make_guided("vfd", draft="policy").generate_ids([PROMPT], value_threshold=0.0)
    with pytest.raises(UsageError, match="abstain_below decides token by token"):
        make_guided("pargs", draft="policy").generate_ids([PROMPT], abstain_below=0.0)
    with pytest.raises(UsageError, match="takes one"):
        GuidedPolicy(make_guided("pargs").policy, [tiny_scorer(), tiny_scorer(seed=4)], method="vfd")


ABSTAINING = [("pargs", {"beta": 0.0}), ("pargs", {"beta": 1.0}), ("args", {}), ("vfd", {"value_threshold": -9.0})]


@pytest.mark.parametrize(("method", "given"), ABSTAINING)
def test_completions_end_where_the_score_falls_below(method, given):
    guided = make_guided(method)
    settings = {"max_new_tokens": 8, "seed": list(range(12)), **given}
    free = guided.generate_ids(PROMPTS * 4, trace=True, **settings)
    paths = [[step.scores[step.candidate_ids.index(step.token_id)] for step in c.trace] for c in free]
    threshold = sorted(min(path) for path in paths)[6]
    done = guided.generate_ids(PROMPTS * 4, abstain_below=threshold, **settings)
    for mine, whole, path in zip(done, free, paths, strict=True):
        crossed = next((i for i, score in enumerate(path) if score < threshold), None)
        if crossed is None:
            assert (mine.token_ids, mine.finish_reason) == (whole.token_ids, whole.finish_reason)
        else:
            assert mine.finish_reason == "abstained"
            assert mine.token_ids == whole.token_ids[: crossed + 1]
            assert mine.score == pytest.approx(path[crossed])
            assert whole.text.startswith(mine.text)
    assert {c.finish_reason for c in done} > {"abstained"}


def test_the_score_that_ends_a_completion_is_that_of_its_text():
    guided = make_guided("pargs", beta=0.0)
    (done,) = guided.generate_ids([PROMPT], max_new_tokens=20, abstain_below=1e9)
    assert (len(done.token_ids), done.finish_reason) == (1, "abstained")
    assert done.score == pytest.approx(reward(guided.scorer.model, [*PROMPT, *done.token_ids]), abs=1e-4)
    assert done.policy_log_prob == pytest.approx(float(next_log_probs(guided.policy.model, PROMPT)[done.token_ids[0]]))


FAILING = [("vfd", {"value_threshold": 0.2}), ("pargs", {"abstain_below": -9.0})]


@pytest.mark.parametrize(("method", "given"), FAILING)
@pytest.mark.parametrize("kind", ["separate", "state", "vocab", "text"])
def test_nan_scores_fail_the_request_whose_text_they_are_of(kind, method, given, monkeypatch):
    """A score that is no number neither passes a threshold nor falls below it: neighbours draw what they draw alone."""
    policy, scorers = every_scorer()
    guided = GuidedPolicy(policy, {kind: scorers[kind]}, method=method, top_k=4)
    settings = {"max_new_tokens": 5, **given}
    alone = guided.generate_ids(PROMPTS, seed=[1, 2, 3], batch_size=1, **settings)
    score = Batch._score

    def broken(self, groups):
        failed = score(self, groups)
        for group in groups:
            for scores in group.scores.values():
                bad = [i for i, row in enumerate(group.rows) if self.requests[row].prompt_ids == PROMPTS[1]]
                scores[bad] = math.nan
        return failed

    monkeypatch.setattr(Batch, "_score", broken)
    requests = guided.make_requests(PROMPTS, [""] * 3, [None] * 3, [1, 2, 3], settings)
    guided.complete(requests)
    assert isinstance(requests[1].error, NonFiniteError)
    assert f"the scorer {kind} returned NaN" in str(requests[1].error)
    for i in (0, 2):
        assert requests[i].to_completion().token_ids == alone[i].token_ids


@pytest.mark.parametrize(("method", "given"), FAILING)
def test_a_scorer_that_raises_fails_its_requests_with_its_message(method, given, monkeypatch):
    guided = make_guided(method)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(SeparateScorerRunner, "score", fails)
    requests = guided.make_requests([PROMPT], [""], [None], [1], {"max_new_tokens": 3, **given})
    guided.complete(requests)
    assert "out of memory" in str(requests[0].error)
    assert requests[0].finish_reason is None


@pytest.mark.parametrize("name", ["value_threshold", "abstain_below"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_threshold_is_a_number(name, value):
    given = {"value_threshold": 0.0} | {name: value}
    with pytest.raises(UsageError, match=f"{name}.*finite"):
        make_guided("vfd").generate_ids([PROMPT], **given)
