"""Thresholds with a guarantee: by hand, by simulation, and with a policy and its scorer."""

import math
import random

import pytest

from helpers.chats import THINKING, chat_reward, chat_tokenizer, save
from helpers.naive import make_guided, reward
from rgtg.errors import DataError, NonFiniteError, UsageError
from rgtg.evaluation.calibration import calibrate, conformal_threshold, labels_of, lowest_scores
from rgtg.models.scorers.base import load_scorer


def test_by_hand_the_threshold_is_an_order_statistic():
    scores = [0.3, 0.1, 0.2, 0.5, 0.4, 0.9, 0.8, 0.7, 0.6]  # m = 9
    assert conformal_threshold(scores, 0.1) == 0.1  # the first, of (9 + 1) · 0.1
    assert conformal_threshold(scores, 0.19) == 0.1
    assert conformal_threshold(scores, 0.2) == 0.2
    assert conformal_threshold(scores, 0.95) == 0.9
    # in terms of badness, the ⌈(m + 1)(1 − α)⌉-th smallest
    for alpha in (0.1, 0.2, 0.5):
        bad = sorted(-score for score in scores)
        assert conformal_threshold(scores, alpha) == -bad[math.ceil(10 * (1 - alpha) - 1e-9) - 1]
    with pytest.raises(UsageError, match=r"9 good completions are too few for alpha = 0\.05: at least 19"):
        conformal_threshold(scores, 0.05)
    assert conformal_threshold([0.5] * 19, 0.05) == 0.5


@pytest.mark.parametrize(("m", "alpha"), [(19, 0.05), (50, 0.1), (200, 0.05), (33, 0.25)])
def test_over_many_calibrations_at_most_alpha_of_good_completions_are_touched(m, alpha):
    """200 calibrations, each on m good random walks and tested on 200 new ones; the mean share within three errors."""
    numbers = random.Random(m)

    def lowest():
        """Of a walk of random length: scores have ties, since they are rounded."""
        place, least = 0.0, math.inf
        for _ in range(numbers.randint(1, 30)):
            place += numbers.gauss(0.05, 1)
            least = min(least, place)
        return round(least, 1)

    shares = []
    for _ in range(200):
        threshold = conformal_threshold([lowest() for _ in range(m)], alpha)
        shares.append(sum(lowest() < threshold for _ in range(200)) / 200)
    mean = sum(shares) / 200
    error = math.sqrt(sum((share - mean) ** 2 for share in shares) / 199 / 200)
    assert mean <= alpha + 3 * error
    assert mean > alpha / 3, "the threshold is not merely cautious"


@pytest.mark.thorough
@pytest.mark.parametrize("alpha", [0.1, 0.25])
def test_filtered_decoding_touches_at_most_alpha_of_the_policys_good_completions(alpha):
    """End to end: calibrated on the policy's completions, and tested on new seeds that give the policy's own draws."""
    guided, plain = make_guided("vfd"), make_guided("policy")
    prompts = ["Once", "Hi you", "What", "A", "No"]

    def drawn(first):
        done = plain.generate(prompts * 16, seed=list(range(first, first + 80)), max_new_tokens=6, batch_size=80)
        rows = [completion.model_dump() for completion in done]
        for row in rows:  # the label is another model's opinion
            row["good"] = reward(make_scorer, [0, *row["token_ids"]]) > -0.5
        return rows

    make_scorer = make_guided("args").scorer.model
    shares = []
    for trial in range(6):
        rows = drawn(1000 * trial)
        result = calibrate(guided.scorer, rows, alpha=alpha)
        assert result.good + result.bad == 80
        new = drawn(1000 * trial + 500)
        seeds = [row["seed"] for row in new]
        filtered = guided.generate(
            prompts * 16, seed=seeds, max_new_tokens=6, batch_size=80, value_threshold=result.threshold
        )
        for row, one in zip(new, filtered, strict=True):
            assert (one.touched == 0) == (one.token_ids == row["token_ids"])
        good = [one.touched > 0 for row, one in zip(new, filtered, strict=True) if row["good"]]
        shares.append(sum(good) / len(good))
    mean = sum(shares) / len(shares)
    error = math.sqrt(sum((share - mean) ** 2 for share in shares) / (len(shares) - 1) / len(shares))
    assert mean <= alpha + 3 * error


def test_lowest_scores_are_those_that_decoding_sees():
    guided = make_guided("pargs", beta=0.0)
    done = guided.generate(["Once", "Hi you", "What"] * 3, seed=4, max_new_tokens=7, stop=["e"], trace=True)
    rows = [completion.model_dump() for completion in done]
    seen = [min(step.scores[step.candidate_ids.index(step.token_id)] for step in c.trace) for c in done]
    assert lowest_scores(guided.scorer, rows) == pytest.approx(seen, abs=1e-4)
    for row in rows:
        del row["token_ids"], row["trace"]
    # a text does not show a stop text, or <s>, <pad> and <unk>
    shown = [i for i, c in enumerate(done) if c.finish_reason == "length" and not {0, 1, 3} & {*c.token_ids}]
    assert len(shown) > 3
    texts, expected = [rows[i] for i in shown], [seen[i] for i in shown]
    assert lowest_scores(guided.scorer, texts) == pytest.approx(expected, abs=1e-4)


def test_rows_that_cannot_be_used_are_named():
    scorer = make_guided("pargs").scorer
    row = {"prompt": "Hi", "text": "ab", "token_ids": [5, 6], "good": True}
    with pytest.raises(DataError, match='row 2: expected true or false in "good"'):
        labels_of([row, row | {"good": 1}], None)
    with pytest.raises(DataError, match='row 1: expected a number in "reward", got None'):
        labels_of([row], 0.5)
    assert labels_of([row | {"reward": 1}, row | {"reward": 0.5}], 0.5) == [True, False]
    with pytest.raises(DataError, match=r"row 2: .*do not say"):
        lowest_scores(scorer, [row, row | {"token_ids": [40, 41]}])
    scorer.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="row 1 has a score of nan"):
        lowest_scores(scorer, [row])


def test_variables_that_nothing_reads_are_errors(tmp_path):
    scorer = load_scorer(str(save(chat_reward(), chat_tokenizer(THINKING), tmp_path / "reward")))
    chat = {"messages": [{"role": "user", "content": "Hi"}], "text": "ab", "finish_reason": "length"}
    fast, slow = (lowest_scores(scorer, [chat], template_kwargs={"enable_thinking": on}) for on in (False, True))
    assert fast != slow
    with pytest.raises(UsageError, match="does not read nonsense"):
        lowest_scores(scorer, [chat], template_kwargs={"nonsense": 1})
    with pytest.raises(UsageError, match="every prompt is plain text"):
        lowest_scores(scorer, [{"prompt": "Hi", "text": "ab"}], template_kwargs={"enable_thinking": False})
