import json
import math

import pytest

from helpers.naive import EOS, completion_distribution, make_guided, tiny_scorer
from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.errors import DataError, NonFiniteError, PromptTooLongError, UsageError
from rgtg.evaluation.audit.candidate_rollouts import (
    make_rollouts,
    plan_cuts,
    read_rollouts,
    rescore_rollouts,
    write_rollouts,
)
from rgtg.models.loading.policy import Policy

PROMPTS = ["Say this: ", "Why not?", "One day, "]
SMALL = {"prefixes": 5, "candidates": 3, "per_candidate": 2, "max_new_tokens": 6, "seed": 1}


def policy():
    return Policy(tiny_policy(), tiny_tokenizer())


def vowels(text):
    return sum(text.count(letter) for letter in "aeiou") - len(text) / 10


def uppercase(text):
    return float(sum(c.isupper() for c in text))


class Stops:
    """A reward that is interrupted at its n-th call."""

    __qualname__ = "vowels"

    def __init__(self, after):
        self.left = after

    def __call__(self, text):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return vowels(text)


def make(reward=vowels, prompts=PROMPTS, **settings):
    return make_rollouts(policy(), prompts, reward, **SMALL | settings)


def test_values_converge_to_those_of_enumeration():
    made = make(prompts=["Say"], prefixes=1, per_candidate=3000, max_new_tokens=3)
    (row,) = made.rows
    written, tokenizer = [*row.prompt_ids, *row.written_ids], tiny_tokenizer()
    for token, rewards in zip(row.candidate_ids, row.rewards, strict=True):
        left = 3 - len(row.written_ids) - 1
        assert left > 0  # the one cut of one prompt is not at its end, or this test compares nothing
        exact = completion_distribution(make_guided("policy"), [*written, token], left)
        values = {ids: vowels("Say" + text_of(tokenizer, [*row.written_ids, token, *ids])) for ids in exact}
        value = sum(p * values[ids] for ids, p in exact.items())
        spread = math.sqrt(sum(p * (values[ids] - value) ** 2 for ids, p in exact.items()))
        assert sum(rewards) / 3000 == pytest.approx(value, abs=4 * spread / math.sqrt(3000))
        assert spread > 0.1


def text_of(tokenizer, ids):
    return tokenizer.decode([i for i in ids if i != EOS], skip_special_tokens=True)


def test_a_row_contains_the_texts_and_their_rewards():
    made = make()
    assert [row.index for row in made.rows] == [0, 1, 2, 3, 4]
    assert [row.prompt for row in made.rows] == [*PROMPTS, *PROMPTS[:2]]
    for row in made.rows:
        for j, text in enumerate(row.candidate_texts):
            assert all(whole.startswith(text) for whole in row.texts[j])
            assert row.rewards[j] == pytest.approx(
                [vowels(row.prompt + t) for t in row.texts[j]] * (3 - len(row.texts[j]))
            )
            assert row.ended[j] == (row.candidate_ids[j] == EOS or len(row.written_ids) == 5)
            assert len(row.texts[j]) == (1 if row.ended[j] else 2)


def test_a_reward_model_is_told_which_completions_ended():
    scorer = tiny_scorer(objective="full-bt")
    made = make(scorer)
    assert made.header.reward == "tiny"
    row = made.rows[0]
    for j, group in enumerate(row.rewards):
        expected = scorer.score([row.prompt] * len(row.texts[j]), row.texts[j], finished=row.finished[j])
        assert group[: len(expected)] == pytest.approx(expected, abs=1e-5)


def test_the_file_reads_back_as_written(tmp_path):
    made = make(path=tmp_path / "r.jsonl")
    assert read_rollouts(tmp_path / "r.jsonl") == made
    write_rollouts(made, tmp_path / "copy.jsonl")
    assert (tmp_path / "copy.jsonl").read_bytes() == (tmp_path / "r.jsonl").read_bytes()


@pytest.mark.parametrize("half", [False, True])
def test_a_stopped_run_continues_and_writes_the_same_file(tmp_path, half):
    whole = make(Stops(10**6), path=tmp_path / "whole.jsonl")
    path = tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        make(Stops(13), path=path)
    kept = len(read_rollouts(path).rows)
    assert 0 < kept < 5
    if half:
        path.write_bytes(path.read_bytes() + b'{"index": 4, "pro')
        with pytest.warns(UserWarning, match="line is incomplete"):
            again = make(Stops(10**6), path=path)
    else:
        again = make(Stops(10**6), path=path)
    assert again == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_asking_for_more_prefixes_adds_them_and_fewer_reads_a_part(tmp_path):
    path = tmp_path / "r.jsonl"
    make(path=path, prefixes=2)
    assert make(path=path, prefixes=5).rows == make(prefixes=5).rows
    before = path.read_bytes()
    assert [row.index for row in make(path=path, prefixes=3).rows] == [0, 1, 2]
    assert path.read_bytes() == before


def test_a_finished_file_is_not_computed_again(tmp_path):
    path = tmp_path / "r.jsonl"
    first = make(Stops(10**6), path=path)
    assert make(Stops(0), path=path) == first


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 2}, "seed"), ({"per_candidate": 3}, "per_candidate"), ({"reward": uppercase}, "reward 'vowels'"),
     ({"prompts": PROMPTS[:2]}, "prompts")],
)  # fmt: skip
def test_a_file_with_other_settings_is_an_error(tmp_path, change, named):
    make(path=tmp_path / "r.jsonl")
    with pytest.raises(UsageError, match=named):
        make(path=tmp_path / "r.jsonl", **change)


def test_rescoring_equals_making_them_with_the_other_reward(tmp_path):
    assert rescore_rollouts(make(vowels), uppercase).rows == make(uppercase).rows


def test_cuts_are_spread_evenly_and_differ():
    cuts = plan_cuts([10, 1, 4], 12)
    assert len({(cut.prompt, cut.position) for cut in cuts}) == len(cuts)
    assert [cut.index for cut in cuts if cut.prompt == 1] == [1]  # one token has one cut
    assert {cut.position for cut in cuts if cut.prompt == 2} == {0, 1, 2, 3}
    assert plan_cuts([10, 1, 4], 6) == cuts[:5]
    quarters = [0] * 4
    for cut in plan_cuts([64] * 100, 100):
        quarters[cut.position // 16] += 1
    assert min(quarters) >= 23


def test_duplicate_prompts_are_used_once():
    assert make(prompts=[*PROMPTS, PROMPTS[0]]) == make()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"prefixes": 0}, UsageError, "prefixes = 0"),
        ({"candidates": 1}, UsageError, "at least 2"),
        ({"per_candidate": 0}, UsageError, "per_candidate"),
        ({"prompts": []}, DataError, "no prompts"),
        ({"prompts": ["a" * 125]}, PromptTooLongError, "context of 128"),
        ({"reward": 3}, UsageError, "not int"),
        ({"reward": lambda text: math.nan}, NonFiniteError, "reward is NaN"),
    ],
)
def test_unusable_arguments_are_errors(change, error, text):
    with pytest.raises(error, match=text):
        make(**change)


def _damage(path, line, change):
    lines = path.read_text().splitlines()
    lines[line] = change(lines[line])
    path.write_text("".join(text + "\n" for text in lines))


@pytest.mark.parametrize(
    ("line", "change", "text"),
    [
        (0, lambda _: '{"prompt": "a"}', "r.jsonl:1: not the first line"),
        (2, lambda _: "nonsense", "r.jsonl:3: not a line of roll-outs"),
        (2, lambda row: json.dumps(json.loads(row) | {"index": 0}), "prefix 0 comes after 0"),
        (3, lambda row: json.dumps(json.loads(row) | {"rewards": [[1.0]]}), "r.jsonl:4: expected lists of"),
        (3, lambda row: json.dumps(json.loads(row) | {"candidate_ids": [5]}), "of 3 candidates, with 2 rewards each"),
    ],
)
def test_a_damaged_file_is_an_error_with_its_line(tmp_path, line, change, text):
    make(path=tmp_path / "r.jsonl")
    _damage(tmp_path / "r.jsonl", line, change)
    with pytest.raises(DataError, match=text):
        read_rollouts(tmp_path / "r.jsonl")


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot read the roll-outs"):
        read_rollouts(tmp_path / "none.jsonl")


def test_a_reward_model_is_identified_by_its_weights():
    one, other = (make(tiny_scorer(seed=seed)).header for seed in (1, 2))
    assert one.reward_fingerprint != other.reward_fingerprint
