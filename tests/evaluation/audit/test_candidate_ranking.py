import math
from types import SimpleNamespace

import pytest
import torch

from helpers.naive import info, reward, tiny_scorer, write_head
from helpers.tiny_models import VOCAB, tiny_policy, tiny_tokenizer
from rgtg.errors import DataError, NonFiniteError, UsageError
from rgtg.evaluation.audit.candidate_ranking import audit_rollouts, candidate_scores, verdict
from rgtg.evaluation.audit.candidate_rollouts import CandidateRollouts, make_rollouts, write_rollouts
from rgtg.evaluation.plots import plot_rollout_audit
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.heads import StateHead, VocabularyHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.types.base import Interval

PROMPTS = ["Say this: ", "Why not?", "One day, ", "And then"]


def letters(text):
    return float(text.count("a") + 2 * text.count("e") - text.count("o"))


def policy():
    return Policy(tiny_policy(), tiny_tokenizer())


@pytest.fixture(scope="module")
def rollouts():
    return make_rollouts(
        policy(), PROMPTS, letters, prefixes=12, candidates=4, per_candidate=24, max_new_tokens=8, seed=3
    )


class Given:
    """A scorer with given scores, by prefix and candidate."""

    name, info, model = "given", None, tiny_policy()
    tokenizer = tiny_tokenizer()

    def __init__(self, rollouts, scores):
        self.scores = {
            (*row.prompt_ids, *row.written_ids, token): float(score)
            for row, mine in zip(rollouts.rows, scores, strict=True)
            for token, score in zip(row.candidate_ids, mine, strict=True)
        }

    def score_prefixes(self, prompt_ids, completion_ids, *, batch_size=8):
        return [torch.tensor([self.scores[*p, *c]]) for p, c in zip(prompt_ids, completion_ids, strict=True)]


def values(rollouts):
    return torch.tensor([row.rewards for row in rollouts.rows]).double().mean(-1)


def by_hand(rows):
    """Two prefixes of two prompts with given probabilities and rewards (K = 2, m = 2)."""
    made = make_rollouts(policy(), PROMPTS[:2], letters, prefixes=2, candidates=2, per_candidate=2, max_new_tokens=4)
    changed = [
        row.model_copy(update={"policy_log_probs": [math.log(p) for p in probabilities], "rewards": rewards})
        for row, (probabilities, rewards) in zip(made.rows, rows, strict=True)
    ]
    return CandidateRollouts(made.header, changed)


def test_scores_equal_to_the_values_rank_perfectly_without_regret(rollouts):
    found = audit_rollouts(Given(rollouts, values(rollouts)), rollouts).overall
    assert found.spearman.mean == found.kendall.mean == 1.0
    assert found.scorer.regret.mean == pytest.approx(0, abs=1e-12)
    assert found.scorer.normalised_regret.high == pytest.approx(0, abs=1e-12)
    assert found.guided.gain.mean > 0
    backwards = audit_rollouts(Given(rollouts, -values(rollouts)), rollouts).overall
    assert backwards.spearman.mean == -1.0
    assert backwards.scorer.normalised_regret.mean > 1
    assert backwards.guided.gain.mean < 0


def test_a_constant_scorer_leaves_the_choice_to_the_policy(rollouts):
    result = audit_rollouts(Given(rollouts, torch.ones_like(values(rollouts))), rollouts)
    found = result.overall
    assert result.beta == 0.0
    assert result.kl_nats == pytest.approx(0, abs=1e-7)
    assert found.spearman.mean == found.kendall.mean == 0.0
    assert found.scorer.model_dump() == found.policy.model_dump()
    assert found.guided.gain.mean == pytest.approx(0, abs=1e-6)
    assert found.policy.gain.mean == 0
    assert found.policy.normalised_regret.mean == 1
    assert found.policy.regret.mean > 0
    assert result.verdict.startswith("No evidence")


def test_figures_by_hand():
    # values 1, 3 under π = ¾, ¼ (1.5 drawn), and 2, 0 under ½, ½ (1 drawn)
    made = by_hand([([0.6, 0.2], [[1.0, 1.0], [2.0, 4.0]]), ([0.3, 0.3], [[2.0, 2.0], [0.0, 0.0]])])
    result = audit_rollouts(Given(made, [[0.0, 1.0], [0.0, 1.0]]), made, beta=math.log(3), bootstrap=100)
    found = result.overall
    assert found.spearman.mean == found.kendall.mean == 0.0  # +1 and −1
    # argmax takes 3 and 0; guidance by 3 makes ½, ½ (2) and ¼, ¾ (0.5)
    assert found.scorer.gain.mean == pytest.approx(((3 - 1.5) + (0 - 1)) / 2)
    assert found.guided.gain.mean == pytest.approx(((2 - 1.5) + (0.5 - 1)) / 2, abs=1e-7)
    assert found.scorer.regret.mean == pytest.approx((0 + 2) / 2)
    assert found.policy.regret.mean == pytest.approx((1.5 + 1) / 2)
    assert found.scorer.normalised_regret.mean == pytest.approx(1 / 1.25)
    assert found.best_gain.mean == found.best_gain_low.mean == pytest.approx(1.25)
    # the policy's likeliest is worth 1; in the second prefix both are as likely
    assert found.policy_greedy.gain.mean == pytest.approx(((1 - 1.5) + 0) / 2)
    # covariances 3/16 · 2 and −½; Var s = 3/16 and ¼; Var Q = 3/16 · 4 − 3/16 · 1 (errors 0, 1) and 1
    expected = (3 / 8 - 1 / 2) / math.sqrt((3 / 16 + 1 / 4) * (3 / 4 - 3 / 16 + 1))
    assert found.steering.mean == pytest.approx(expected)
    moved = [0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2), 0.25 * math.log(0.5) + 0.75 * math.log(1.5)]
    assert result.kl_nats == pytest.approx(sum(moved) / 2)
    assert result.standard_error == pytest.approx(math.sqrt(1 / 4))


def test_scale_and_functions_of_the_prefix_drop_out(rollouts):
    scores = values(rollouts) + torch.randn(values(rollouts).shape, generator=torch.Generator().manual_seed(0))
    shift = torch.arange(len(scores))[:, None].double()
    plain, moved = (audit_rollouts(Given(rollouts, s), rollouts) for s in (scores, 8 * scores + shift))
    assert moved.beta == pytest.approx(plain.beta / 8, rel=1e-4)
    for name in ("spearman", "steering", "best_gain"):
        before, after = (getattr(result.overall, name).mean for result in (plain, moved))
        assert after == pytest.approx(before, abs=1e-5)
    assert moved.overall.guided.gain.mean == pytest.approx(plain.overall.guided.gain.mean, abs=1e-5)
    assert plain.kl_nats == pytest.approx(0.1, abs=1e-4)


def test_prefixes_whose_candidates_all_tie_have_no_order():
    made = by_hand([([0.6, 0.2], [[1.0, 1.0], [2.0, 4.0]]), ([0.3, 0.3], [[1.0, 1.0], [1.0, 1.0]])])
    found = audit_rollouts(Given(made, [[0.0, 1.0], [0.0, 1.0]]), made).overall
    assert (found.tied, found.spearman.n, found.spearman.mean) == (1, 1, 1.0)
    same = by_hand([([0.6, 0.2], [[1.0, 1.0], [1.0, 1.0]])] * 2)
    result = audit_rollouts(Given(same, [[0.0, 1.0], [0.0, 1.0]]), same)
    assert result.verdict.startswith("No verdict")
    assert math.isnan(result.overall.scorer.normalised_regret.mean)


def test_the_ceiling_is_low_if_values_are_noise():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 2, 2, generator=draw).tolist()
    noisy = by_hand([([0.5, 0.4], noise[0]), ([0.5, 0.4], noise[1])])
    exact = by_hand([([0.5, 0.4], [[1.0, 1.0], [2.0, 2.0]])] * 2)
    scores = [[0.0, 1.0]] * 2
    assert audit_rollouts(Given(exact, scores), exact).overall.ceiling == 1.0
    found = audit_rollouts(Given(noisy, scores), noisy).overall
    assert found.reliability < 1


def test_positions_are_parts_of_the_completion(rollouts):
    result = audit_rollouts(Given(rollouts, values(rollouts)), rollouts)
    assert sum(p.prefixes for p in result.by_position) == 12
    assert [p.position for p in result.by_position] == sorted(p.position for p in result.by_position)
    for point in result.by_position:
        inside = [r for r in rollouts.rows if point.position - 0.25 <= r.fraction < point.position]
        assert point.prefixes == len(inside)
        assert point.tokens == pytest.approx(sum(len(r.written_ids) for r in inside) / len(inside))


def test_a_separate_scorer_gives_the_scores_that_guidance_uses(rollouts):
    scorer = tiny_scorer()
    found = candidate_scores(scorer, rollouts, batch_size=3)
    for row, mine in zip(rollouts.rows, found.tolist(), strict=True):
        expected = [reward(scorer.model, [*row.prompt_ids, *row.written_ids, token]) for token in row.candidate_ids]
        assert mine == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("objective", ["farma", "autoregressive"])
def test_a_vocabulary_scorer_gives_the_scores_that_guidance_uses(rollouts, objective):
    scorer = VocabularyScorer(Policy(tiny_policy(seed=4), tiny_tokenizer()), objective=objective)
    row, found = rollouts.rows[0], candidate_scores(scorer, rollouts)[0]
    logits = scorer.model(torch.tensor([[*row.prompt_ids, *row.written_ids]])).logits[0, -1]
    expected = logits if objective == "farma" else logits.log_softmax(-1)
    assert found.tolist() == pytest.approx(expected[row.candidate_ids].tolist(), abs=1e-4)


def test_a_fused_adapter_cannot_score_on_its_own(rollouts):
    with pytest.raises(UsageError, match="load it by its folder"):
        audit_rollouts(object(), rollouts)


def test_opposite_halves_do_not_divide_by_zero():
    made = by_hand([([0.5, 0.4], [[1.0, 0.0], [0.0, 1.0]])] * 2)
    found = audit_rollouts(Given(made, [[0.0, 1.0]] * 2), made, bootstrap=100).overall
    assert found.reliability == -math.inf
    assert math.isnan(found.ceiling)


@pytest.mark.parametrize("kind", ["state", "vocab"])
def test_heads_are_audited(tmp_path, policy_folder, rollouts, kind):
    folder = write_head(tmp_path / "head", policy_folder, kind)
    result = audit_rollouts(str(folder), rollouts, bootstrap=100)
    assert (result.scorer, result.objective, result.prefixes) == ("head", "prefix-bt", 12)
    assert len(set(result.provenance.data)) == 3


def test_a_scorer_with_another_tokenizer_reads_texts(rollouts):
    class Longer(Given):
        tokenizer = tiny_tokenizer()

        def score(self, prompts, completions, *, finished, batch_size=8):
            return [len(p + c) + 0.5 * end for p, c, end in zip(prompts, completions, finished, strict=True)]

    scorer = Longer(rollouts, values(rollouts))
    scorer.tokenizer.add_tokens(["another"])
    found = candidate_scores(scorer, rollouts)
    row = rollouts.rows[0]
    ended = [end and ways[0] for end, ways in zip(row.ended, row.finished, strict=True)]
    expected = [len(row.prompt + t) + 0.5 * end for t, end in zip(row.candidate_texts, ended, strict=True)]
    assert found[0].tolist() == expected
    only = SimpleNamespace(
        tokenizer=tiny_tokenizer(), score=scorer.score
    )  # no score_prefixes: texts, whatever it reads
    assert torch.equal(candidate_scores(only, rollouts), found)


def test_auditing_the_reward_itself_is_an_error():
    scorer = tiny_scorer()
    made = make_rollouts(policy(), PROMPTS, scorer, prefixes=2, candidates=2, per_candidate=1, max_new_tokens=4)
    with pytest.raises(UsageError, match="judged by itself"):
        audit_rollouts(scorer, made)
    assert audit_rollouts(tiny_scorer(seed=5), made, bootstrap=100).prefixes == 2


def test_one_roll_out_gives_no_ceiling_but_a_gain(rollouts):
    made = make_rollouts(policy(), PROMPTS, letters, prefixes=4, candidates=3, per_candidate=1, max_new_tokens=8)
    found = audit_rollouts(Given(made, values(made)), made, bootstrap=100).overall
    assert math.isnan(found.ceiling)
    assert math.isnan(found.steering.mean)
    assert math.isnan(found.scorer.regret_low.mean)
    assert found.scorer.regret.mean == 0


def test_a_head_on_another_policy_is_an_error(rollouts):
    other = Policy(tiny_policy(seed=9), tiny_tokenizer())
    about = info().model_copy(update={"trunk": "own", "head": "state", "layer": 2, "base_model": "other"})
    head = OwnStateScorer(other, StateHead(32, 8), about)
    with pytest.raises(UsageError, match="another policy"):
        audit_rollouts(head, rollouts)
    vocabulary = about.model_copy(update={"head": "vocab"})
    mine = OwnStateScorer(policy(), VocabularyHead(32, 8, 4, VOCAB), vocabulary)
    assert audit_rollouts(mine, rollouts, bootstrap=100).prefixes == 12


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"beta": 1.0, "kl_nats": 0.1}, UsageError, "not both"),
        ({"kl_nats": 0.0}, UsageError, "positive number"),
        ({"kl_nats": math.nan}, UsageError, "positive number"),
    ],
)
def test_unusable_settings_are_errors(rollouts, options, error, text):
    with pytest.raises(error, match=text):
        audit_rollouts(Given(rollouts, values(rollouts)), rollouts, **options)


def test_no_rollouts_and_nan_scores_are_errors(tmp_path, rollouts):
    path = tmp_path / "empty.jsonl"
    write_rollouts(CandidateRollouts(rollouts.header, []), path)
    with pytest.raises(DataError, match="holds no prefix"):
        audit_rollouts(tiny_scorer(), path)
    with pytest.raises(NonFiniteError, match="scorer returned NaN"):
        audit_rollouts(Given(rollouts, values(rollouts) * math.nan), rollouts)


def test_the_plot_is_written(tmp_path, rollouts):
    result = audit_rollouts(Given(rollouts, values(rollouts)), rollouts, bootstrap=100)
    plot_rollout_audit({"one": result, "two": result}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def _figures(rollouts, gain, share):
    found = audit_rollouts(Given(rollouts, values(rollouts)), rollouts, bootstrap=100).overall
    low, mean, high = gain
    guided = found.guided.model_copy(update={"gain": Interval(low=low, mean=mean, high=high, n=9)})
    low, mean, high = share
    steering = Interval(low=low, mean=mean, high=high, n=9)
    return found.model_copy(update={"guided": guided, "steering": steering})


@pytest.mark.parametrize(
    ("gain", "share", "words"),
    [
        ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "Steers well"),
        ((0.1, 0.2, 0.3), (0.1, 0.3, 0.5), "Steers weakly"),
        ((0.1, 0.2, 0.3), (-1.0, 0.6, 2.0), "Steers, but the noise"),
        ((0.1, 0.2, 0.3), (math.nan, math.nan, math.nan), "Steers, but the noise"),
        ((-0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "No evidence"),
        ((-0.3, -0.2, -0.1), (-0.5, -0.4, -0.3), "Steers away"),
    ],
)
def test_verdicts(rollouts, gain, share, words):
    assert verdict(_figures(rollouts, gain, share), 0.1).startswith(words)
