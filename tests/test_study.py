"""The study's rewards, splits, tables and resumption, with tiny models."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.study import (
    attributes,
    golds,
    human_data,
    intervals,
    judge,
    record,
    reproduce,
    rows,
    scorers,
    shared_states,
    tables,
    worlds,
)
from benchmarks.study.__main__ import best_value
from benchmarks.study.measure import Models, file_of, measured, settings_of

from rgtg import GuidedPolicy
from rgtg.config import DecodingSettings
from rgtg.config.base import validate
from rgtg.data.pairs import TokenizedPair
from rgtg.decoding.methods import METHODS, check_settings
from rgtg.models.loading.policy import load_policy
from rgtg.training.data.state_cache import cache_states
from rgtg.utils.files import write_text

PROMPTS = ["the cat", "a dog ran", "one day", "the end"]


@pytest.fixture
def world(tmp_path: Path, policy_folder: Path) -> worlds.World:
    """A cell with the tests' tiny policy: three prompts to test on, and a gold that counts letters."""
    return worlds.World(
        track="stories", gold_name="letters", seed=0, policy=str(policy_folder), original=str(policy_folder),
        folder=tmp_path / "cell", tune=PROMPTS[:1], test=PROMPTS[1:],
        pairs=[{"prompt": p, "chosen": " is good", "rejected": " is bad"} for p in PROMPTS],
        gold=lambda done: [float(len(c.text)) for c in done], max_new_tokens=4, batch_size=8,
    )  # fmt: skip


def test_lexicon_is_a_sum_and_distinct_depends_on_the_history() -> None:
    assert golds.lexicon("a happy", " sad nice friend.") == 2.0
    assert golds.distinct("the cat", " saw the cat") == 3 / 4


def test_one_name_rewards_the_hero_and_penalises_other_names() -> None:
    assert golds.one_name("Once there was Tim.", " Tim ran. Then Tim sat.") == 1.0
    assert golds.one_name("Once there was Tim.", " Tim saw Sue and Ben.") == 0.5 - 1.0
    assert golds.one_name("Tim", " Tim Tim Tim Tim Tim Tim") == 2.0, "at most four mentions count"
    assert golds.one_name("Once upon a time", " She ran. The end.") == 0.0


def test_labels_follow_the_reward_with_bradley_terry_noise() -> None:
    sampled = [{"prompt": str(i), "texts": ["good", "bad"]} for i in range(2000)]
    gap = worlds.label(sampled, lambda _, text: 1.0 if text == "good" else 0.0, seed=0)
    share = sum(p["chosen"] == "good" for p in gap) / len(gap)
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=0.03)
    assert gap == worlds.label(sampled, lambda _, text: 1.0 if text == "good" else 0.0, seed=0)


@pytest.mark.parametrize("source", human_data.SOURCES)
def test_human_parts_share_no_conversation(shared_data: Path, source: str) -> None:
    parts = human_data.all_rows(shared_data, source)
    first = {name: {row["turns"][0] for row in part} for name, part in parts.items()}
    assert all(first.values())
    assert not first["scorers"] & first["judge"]
    assert not first["scorers"] & first["prompts"]
    assert not first["judge"] & first["prompts"]


def test_a_row_is_a_chat_for_the_policy_and_a_text_for_the_judge() -> None:
    row = {"turns": ["hi", "hello", "how are you?"], "chosen": "fine", "rejected": "no"}
    pair = human_data.as_pair(row)
    assert [m["role"] for m in pair["prompt"]] == ["system", "user", "assistant", "user"]
    assert pair["rejected"] == [{"role": "assistant", "content": "no"}]
    judged = human_data.as_judged(row)
    assert judged["prompt"] == "Human: hi\n\nAssistant: hello\n\nHuman: how are you?\n\nAssistant:"
    assert judged["chosen"] == " fine"


def test_the_split_depends_on_the_conversation_only() -> None:
    parts = [human_data.part_of(f"prompt {i}") for i in range(3000)]
    assert parts.count("scorers") / 3000 == pytest.approx(0.40, abs=0.03)
    assert parts.count("judge") / 3000 == pytest.approx(0.45, abs=0.03)


def test_positive_reads_words_with_their_neighbours() -> None:
    pytest.importorskip("vaderSentiment", reason="the rated words come with rgtg[demo]")
    assert attributes.positive("I love it.") > 0 > attributes.positive("I do not love it.")
    assert attributes.positive("I love it. I love it.") == pytest.approx(attributes.positive("I love it."))


def test_plain_prefers_short_words_in_short_sentences() -> None:
    pytest.importorskip("textstat", reason="pip install textstat")
    long = "Notwithstanding considerable administrative complications, organisations nevertheless collaborated."
    assert attributes.plain("We do it. It is fun.") > attributes.plain(long) >= -5.0
    assert attributes.plain("...") == -5.0


def test_clean_prefers_polite_words() -> None:
    pytest.importorskip("profanity_check", reason="pip install alt-profanity-check")
    assert 6.0 >= attributes.clean("Thank you for the cake.") > attributes.clean("You damn idiot.") >= -6.0


@pytest.mark.parametrize("kind", ["state", "vocab"])
def test_shared_states_equal_those_that_a_training_reads(tmp_path: Path, policy_folder: Path, kind: str) -> None:
    model = load_policy(str(policy_folder), dtype="float32").model
    prompt = [5, 6, 7]
    units = [TokenizedPair(prompt, [8, 9], [10, 11, 12]), TokenizedPair([5, 9], [8], [8, 9])]
    layers = [model.config.num_hidden_layers]
    read = cache_states(model, units, layers, kind)
    shared = shared_states.SharedStates(tmp_path)
    shared.cache(model, units[:1], layers, "vocab" if kind == "state" else "state")  # another kind has read a part
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    found = shared.cache(model, units, layers, kind)
    assert found.starts == read.starts
    assert found.token_ids.tolist() == read.token_ids.tolist()
    torch.testing.assert_close(found.states[layers[0]], read.states[layers[0]], rtol=1e-5, atol=1e-5)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing is read again"


def test_shared_states_do_not_depend_on_what_was_read_before(tmp_path: Path, policy_folder: Path) -> None:
    model = load_policy(str(policy_folder), dtype="bfloat16").model  # whose rounding depends on a batch's shape
    prompt = [5, 6, 7]
    units = [TokenizedPair(prompt, [8, 9], [10, 11, 12]), TokenizedPair([5, 9] * 9, [8] * 7, [8, 9])]
    layers = [model.config.num_hidden_layers]
    first, second = (shared_states.SharedStates(tmp_path / name) for name in ("a", "b"))
    read = first.cache(model, units, layers, "state")
    second.cache(model, [TokenizedPair(prompt, [10, 11, 12], [4])], layers, "state")  # labels of another seed
    again = second.cache(model, units[::-1], layers, "state")
    for c, same in enumerate([2, 3, 0, 1]):
        assert torch.equal(read.completion(layers[0], c)[0], again.completion(layers[0], same)[0])


def test_the_judges_agreement_is_told_for_all_pairs_and_for_sides_of_equal_length() -> None:
    class Longer:
        def score(self, texts: list[str]) -> list[float]:
            return [float(len(text)) for text in texts]

    pairs = [
        {"prompt": "p", "chosen": "a long reply", "rejected": "short"},
        {"prompt": "p", "chosen": "equal", "rejected": "equals"},
    ]
    found = judge.agreement(Longer(), pairs)
    assert (found["accuracy"], found["longer_side_chosen"]) == (0.5, 0.5)
    assert found["about_equally_long"] == {"pairs": 1, "accuracy": 0.0}


def test_reward_is_compared_at_the_policys_length() -> None:
    part = {"tokens": [10, 20, 30], "rewards": [1.0, 2.0, 3.0]}
    slope, typical = tables.length_effect({"policy": {None: {0: part}}})
    assert (slope, typical) == (pytest.approx(0.1), 20.0)
    assert tables.length_effect({}) == (None, None)


def test_accuracy_by_position_is_a_line_of_each_audited_scorer() -> None:
    places = [{"position": i / 10, "accuracy": {"mean": i / 20}} for i in range(1, 11)]
    verdict = (
        "Weak on prefixes: over the first half of completions it orders 57.6% of prefixes correctly (53.8% to 61.3%), "
        "on whole ones 68.0%."
    )
    found = {"pairs": 200, "by_fraction": places, "full_accuracy": {"mean": 0.68}, "verdict": verdict}
    cells = [{"gold": "dialogue", "seed": 1, "audits": {"prefix-bt": found}}, {"gold": "plain", "seed": 0}]
    *_, line = tables.audits(cells, "dialogue").splitlines()
    assert line.startswith("| prefix-bt (seed 1, 200 pairs) | 0.05 | 0.10 |")
    assert line.endswith("| 0.45 | 0.68 | 0.576 (0.538 to 0.613) |")
    assert tables.audits(cells, "plain") == ""


def test_self_rouge_is_one_for_equal_texts() -> None:
    same = {"texts": ["the cat sat", "a dog ran"]}
    assert tables.self_rouge([same, same]) == 1.0
    assert tables.self_rouge([same, {"texts": ["one two", "three four"]}]) == 0.0
    assert tables.self_rouge([same]) is None


def test_the_first_seeds_choice_holds_for_all_seeds_of_a_real_model(world: worlds.World) -> None:
    real = replace(world, track="human", gold_name="dialogue", seed=2, folder=world.folder.parent / "dialogue-s2")
    row = rows.BY_NAME["pargs, vocabulary head"]
    first = real.folder.with_name("dialogue-s0")
    made = {"rewards": [1.0], "kl": [1.0]}
    keep = lambda row, value, reward: write_text(  # noqa: E731
        first / "rows/tune" / file_of(rows.key_of(row, value)), json.dumps(made | {"rewards": [reward]})
    )
    keep(rows.BY_NAME["policy"], None, 0.0)
    for value, reward in zip(row.grid_of("human"), (1.0, 3.0, 2.0, 0.0), strict=True):
        keep(row, value, reward)
    assert best_value(real, row, Models()) == row.grid_of("human")[1]


@pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.name)
def test_every_row_has_settings_that_its_method_accepts(row: rows.StudyRow, world: worlds.World) -> None:
    for value in row.grid:
        settings = settings_of(world, row, value)
        given = {k: v for k, v in settings.items() if k not in ("scorer", "tuned_policy", "method")}
        if given.get("reward_threshold") == "best-of-n":
            given["reward_threshold"] = 1.0
        if "beta" in given and isinstance(row.scorer, tuple):
            assert len(given["beta"]) == len(row.scorer)
        check_settings(METHODS[row.method], validate(DecodingSettings, given))


def test_rows_have_unique_names_and_cover_every_method() -> None:
    assert len(rows.BY_NAME) == len(rows.ROWS)
    assert {row.method for row in rows.ROWS} == set(METHODS)


def test_reward_at_equal_kl_is_interpolated_between_two_strengths() -> None:
    assert intervals.at_kl([(4, 1.0), (8, 3.0), (20, 5.0)], 14) == 4.0
    assert intervals.at_kl([(4, 1.0), (8, 3.0)], 9) is None
    flat = [(np.full(5, k), np.full(5, r)) for k, r in ((4.0, 1.0), (8.0, 3.0))]
    assert intervals.reward_at_kl([flat, flat], 6.0) == {"mean": 2.0, "low": 2.0, "high": 2.0}
    low = [(kl, reward - 0.5) for kl, reward in flat]
    assert intervals.reward_at_kl([flat, low], 6.0, less=[low, low]) == {"mean": 0.25, "low": 0.0, "high": 0.5}
    assert intervals.reward_at_kl([flat], 9.0, less=[flat]) is None


def test_intervals_widen_with_seeds_that_disagree() -> None:
    rng = np.random.default_rng(0)
    same = np.tile(rng.normal(size=200), (3, 1))
    apart = same + np.array([[-1.0], [0.0], [1.0]])
    width = [i["high"] - i["low"] for i in (intervals.interval(same), intervals.interval(apart))]
    assert width[1] > 3 * width[0]


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(scale=5, size=(1, 300))
    found = intervals.paired(a + 0.2 + rng.normal(scale=0.1, size=a.shape), a)
    assert found["p"] < 0.001
    assert 0.15 < found["low"] < 0.2 < found["high"] < 0.25
    assert intervals.paired(a, a)["p"] == 1.0


def test_finished_parts_are_reused_and_a_row_can_be_reproduced(
    world: worlds.World, tmp_path: Path, capsys: Any
) -> None:
    models = reproduce.WithoutProxy()
    row = rows.BY_NAME["policy"]
    part = measured(world, row, None, "test", models)
    path = world.folder / "rows" / "test" / "policy.json"
    assert json.loads(path.read_text()) == part
    path.write_text(json.dumps(part | {"rewards": "kept"}))
    assert measured(world, row, None, "test", models)["rewards"] == "kept", "a finished part is not measured again"
    kept = {"cells": [{"gold": "letters", "seed": 0, "rows": [record.slim(part, private=False)]}]}
    (tmp_path / "study-stories.json").write_text(json.dumps(kept))
    assert reproduce.compare(world, "policy", tmp_path) == 0
    assert "to the digit" in capsys.readouterr().out
    kept["cells"][0]["rows"][0]["rewards"][0] += 0.001
    (tmp_path / "study-stories.json").write_text(json.dumps(kept))
    assert reproduce.compare(world, "policy", tmp_path) == 1
    assert reproduce.compare(world, "no such row", tmp_path) == 2


def test_parts_are_restored_from_the_committed_json(world: worlds.World, tmp_path: Path, capsys: Any) -> None:
    work = tmp_path / "work"
    prompts = {"tune": world.tune, "test": world.test}
    worlds.write_text(work / "stories/setup.json", json.dumps(prompts))
    row = rows.BY_NAME["policy"]
    parts = [measured(world, row, None, split, reproduce.WithoutProxy()) for split in ("test", "tune")]
    slimmed = record.whole([record.slim(p, private=False) for p in parts])
    kept = {
        "prompts": {split: {"prompts": p} for split, p in prompts.items()},
        "cells": [{"gold": "letters", "seed": 0, "training": {"full-bt": {}}, "fine_tuned": {}, "rows": slimmed}],
    }
    (tmp_path / "study-stories.json").write_text(json.dumps(kept))
    assert record.restore(work, "stories", tmp_path) == 0
    folder = work / "stories/letters-s0"
    again_slim = [json.loads((folder / "rows" / p["split"] / "policy.json").read_text()) for p in parts]
    assert record.whole([record.slim(p, private=False) for p in again_slim]) == slimmed, "nothing is lost on the way"
    assert record.restored(folder)["training"] == {"full-bt": {}}
    worlds.write_text(work / "stories/setup.json", json.dumps(prompts | {"test": ["other"]}))
    assert record.restore(work, "stories", tmp_path) == 1
    assert "not those of the committed study" in capsys.readouterr().out


def test_row_seeds_in_the_file_are_those_of_the_completions(world: worlds.World) -> None:
    guided = GuidedPolicy(load_policy(world.policy, dtype="float32", device="cpu"), method="policy")
    done = guided.generate(world.test, seed=0, max_new_tokens=2)
    assert [c.seed for c in done] == guided.row_seeds(world.test, 0)


def test_the_best_value_on_tuning_prompts_is_used(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    means = {1.0: 0.1, 2.0: 0.5, 4.0: 0.4, 8.0: 9.0}  # the last is 40 nats away: too far
    asked = []

    def fake(world: Any, row: Any, value: float | None, split: str, models: Any) -> dict[str, list[float]]:
        asked.append(split)
        if value is None:  # the policy, cut to ten candidates
            return {"rewards": [0.0], "kl": [5.0]}
        return {"rewards": [means[value]], "kl": [5.0 * value]}

    monkeypatch.setattr("benchmarks.study.__main__.measured", fake)
    assert best_value(world, rows.BY_NAME["pargs"], None) == 2.0
    assert asked == ["tune"] * 5


def test_the_bound_is_counted_from_the_cut_policy() -> None:
    tries = {1.0: {"rewards": [1.0], "kl": [30.0]}, 2.0: {"rewards": [2.0], "kl": [38.0]}}
    pargs = rows.BY_NAME["pargs"]
    assert rows.chosen(pargs, tries, {"kl": [24.0]}) == 2.0
    assert rows.chosen(pargs, tries, {"kl": [5.0]}) == 1.0, "none is near: the nearest"
    level = {value: {"rewards": [1.0], "kl": [6.0]} for value in (4.0, 2.0)}
    assert rows.chosen(pargs, level, {"kl": [5.0]}) == 2.0, (
        "of level tries the first of the grid, in any order of files"
    )


def test_openings_are_drawn_until_there_are_enough_and_are_distinct(policy_folder: Path) -> None:
    found = [row["prompt"] for row in worlds.story_prompts(str(policy_folder), 12)]
    assert len(set(found)) == 12


def test_too_few_pairs_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "without_eos", lambda source, folder: source)
    monkeypatch.setattr(worlds, "sample_twice", lambda policy, prompts, tokens: [{"prompt": p} for p in prompts[:3]])
    monkeypatch.setattr(worlds, "story_prompts", lambda policy, count: [{"prompt": str(i)} for i in range(count)])
    args = argparse.Namespace(policy="p", work=tmp_path, pairs=4, tune=1, test=1, tokens=4, batch=8)
    with pytest.raises(ValueError, match="seed 2 has 3 pairs of 4"):
        worlds.stories(args, "lexicon", 2)


def test_labels_of_cumulative_mse_span_all_rewards_it_sees(
    world: worlds.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a", "text": "b", "reward": r} for r in (-2.0, 0.5, 3.0)]
    worlds.write_rows(world.folder / "rollouts.jsonl", rows)
    asked = []

    def fake(settings: Any) -> Any:
        asked.append(settings)
        raise InterruptedError

    monkeypatch.setattr(scorers, "train_scorer", fake)
    with pytest.raises(InterruptedError):
        scorers.train(world, "cumulative-mse")
    assert asked[0].cumulative_mse.reward_range == (-2.0, 3.0)


def test_integral_numbers_are_written_without_their_point() -> None:
    assert json.dumps(record.whole({"a": [1.0, 2.5, True, None, "1.0"]})) == '{"a": [1, 2.5, true, null, "1.0"]}'


def test_tables_compare_rows_at_their_tuned_values() -> None:
    def part(row: str, value: Any, split: str, reward: float, kl: float) -> dict[str, Any]:
        return {
            "row": row, "value": value, "split": split, "rewards": [reward, reward + 1], "kl": [kl, kl],
            "tokens": [4, 4], "policy_calls": 8, "scorer_calls": 8, "policy_bytes": 10**6, "scorer_bytes": 10**6,
            "seconds": 1.0, "proxy": [0.0, 0.0], "distinct_2": 1.0,
        }  # fmt: skip

    cell = {"gold": "g", "seed": 0, "rows": [
        part("policy", None, "test", 0.0, 4.0), part("policy", None, "tune", 0.0, 4.0),
        part("pargs", 1.0, "tune", 1.0, 6.0), part("pargs", 2.0, "tune", 3.0, 9.0),
        part("pargs", 2.0, "test", 2.0, 8.0),
    ]}  # fmt: skip
    policy, pargs = tables.summarise([cell], "g", (6.0,))
    assert (pargs["values"], pargs["reward"]["mean"], pargs["at_kl"]["6.0"]["mean"]) == ([2.0], 2.5, 1.5)
    assert pargs["megabytes_per_token"] == 2.0
    assert pargs["scorer_calls_per_token"] == 1.0
    assert policy["less_pargs"]["mean"] == -2.0
    assert "| pargs | 1 | 2 | 2.50" in tables.markdown("g", [policy, pargs], (6.0,))
    *_, last = tables.differences({"g": [policy, pargs], "h": [policy]}, "less_policy").splitlines()
    assert last == "| pargs | **2.00** (2.00 to 2.00) at 8.0; 1 seed | – |"


def test_prefixes_are_compared_with_whole_replies_at_equal_kl() -> None:
    def part(row: str, value: float | None, kl: float, reward: float) -> dict[str, Any]:
        return {
            "row": row, "value": value, "split": "test" if value in (None, 1.0) else "frontier", "kl": [kl, kl],
            "rewards": [reward, reward], "tokens": [4, 4], "policy_calls": 8, "scorer_calls": 8, "policy_bytes": 1,
            "scorer_bytes": 1, "seconds": 1.0, "proxy": None, "distinct_2": 1.0,
        }  # fmt: skip

    def cell(seed: int, strengths: list[float]) -> dict[str, Any]:
        rows = [part("policy", None, 4.0, 1.0)]
        for value in strengths:
            rows += [part("pargs", value, 4 + 4 * value, 1 + 2 * value),
                     part("args-sample", value, 4 + 8 * value, 1 + value)]  # fmt: skip
        return {"gold": "g", "seed": seed, "rows": rows}

    cells = [cell(0, [1.0, 2.0]), cell(1, [1.0])]  # the second has no curve
    lines = tables.summarise(cells, "g", (8.0, 12.0, 20.0))
    less = next(line for line in lines if line["row"] == "pargs")["less_whole_at_kl"]
    assert (less["8.0"]["mean"], less["12.0"]["mean"], less["20.0"]) == (1.5, 3.0, None)
    assert less["8.0"]["seeds"] == 1
    *_, last = tables.at_equal_kl({"g": lines}, (8.0, 12.0, 20.0)).splitlines()
    assert last == "| pargs | 12 | **3.00** (3.00 to 3.00); 1 seed |"


def test_rows_are_compared_on_the_seeds_that_both_have() -> None:
    def part(row: str, reward: float) -> dict[str, Any]:
        return {
            "row": row, "value": None, "split": "test", "rewards": [reward, reward], "kl": [1.0, 1.0],
            "tokens": [4, 4], "policy_calls": 8, "scorer_calls": 8, "policy_bytes": 1, "scorer_bytes": 1,
            "seconds": 1.0, "proxy": None, "distinct_2": 1.0,
        }  # fmt: skip

    cells = [
        {"gold": "g", "seed": 0, "rows": [part("policy", 1.0), part("sft", 2.0)]},
        {"gold": "g", "seed": 1, "rows": [part("policy", 1.0), part("sft", 4.0), part("dpo", 7.0)]},
    ]
    _, sft, dpo = tables.summarise(cells, "g", (6.0,))
    assert (sft["less_policy"]["mean"], sft["less_dpo"]["mean"], sft["less_dpo"]["seeds"]) == (2.0, -3.0, [-3.0])
    assert dpo["less_policy"]["seeds"] == [6.0]


RESULTS = Path(__file__).parents[1] / "docs/results"


def sections(page: str) -> dict[str, str]:
    """Parts of a page by their heading."""
    return {part.split("\n", 1)[0]: part.strip() for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["study-stories"], marks=pytest.mark.slow),
        ["study-demo"],
        ["study-human", "study-attributes"],
        ["second-run/study-human", "second-run/study-attributes"],
    ],
    ids=lambda names: names[0],
)
def test_the_tables_page_comes_out_of_the_committed_rows(names: list[str]) -> None:
    made = sections(tables.page([RESULTS / f"{name}.json" for name in names]))
    shown = sections((RESULTS.parent / "study-tables.md").read_text(encoding="utf-8"))
    assert len(made) >= len(names)
    assert {name: shown[name] for name in made} == made


def test_the_study_shows_the_differences_of_its_tables_page() -> None:
    study, shown = ((RESULTS.parent / name).read_text(encoding="utf-8") for name in ("study.md", "study-tables.md"))
    copied = re.findall(r"^\| (?:less the policy|prefixes less whole replies) .*\n(?:\|.*\n)+", study, re.MULTILINE)
    assert len(copied) == 2
    assert all(table in shown for table in copied)
