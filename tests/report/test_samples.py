"""Completions side by side: the baseline first, words that it lacks marked, one row per method if there are many."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.made_report import comparison, grown, steered
from rgtg.report import html_report
from rgtg.report.comparison import representatives, rewards, summary
from rgtg.report.samples import marked_words, samples


@pytest.mark.parametrize(
    ("text", "baseline", "marked"),
    [
        ("the same", "the same", []),
        ("a new word", "a word", ["new"]),
        ("a word", "a word less", []),
        ("quite other things", "nothing shared", ["quite other things"]),
        ("one  two\nthree", "one three", ["two"]),
        ("x", "", ["x"]),
        ("", "x", []),
    ],
)
def test_words_that_the_baseline_lacks_are_marked(text, baseline, marked):
    runs = marked_words(text, baseline)
    assert [run for run, new in runs if new] == marked
    assert "".join(run for run, _ in runs) == text


@given(st.text("ab \n", max_size=30), st.text("ab \n", max_size=30))
def test_no_character_is_lost_and_marks_are_whole_words(text, baseline):
    runs = marked_words(text, baseline)
    assert "".join(run for run, _ in runs) == text
    for run, new in runs:
        assert not new or (run.strip() == run and run)


def test_the_baseline_comes_first_and_unmarked():
    result = steered()
    for row, text in zip(result.methods, ("A dog ran.", "A cat ran.", "", "A dog ran."), strict=True):
        row.samples[0]["text"] = text
        row.samples[0]["finish_reason"] = "stop"
    _, sample = samples(result).blocks
    assert [card.label for card in sample.groups[""]] == ["policy", "pargs β=2", "pargs β=1", "pargs β=4"]
    assert sample.groups[""][0].words == [("A dog ran.", False)]
    assert sample.groups[""][2].words == [("A ", False), ("cat", True), (" ran.", False)]
    assert sample.groups[""][1].notes == ["empty"]


def test_many_rows_are_reduced_to_one_of_each_curve():
    rows = [grown("policy", 0.0)]
    for name in ("x", "y", "z"):
        rows += [grown(f"{name} β={b:g}", b, b, name) for b in (1.0, 2.0, 3.0)]
    result = comparison(rows)
    assert [row.label for row in representatives(result)] == ["policy", "x β=3", "y β=3", "z β=3"]
    note, sample = samples(result).blocks
    assert len(sample.groups[""]) == 4
    assert "6 rows of other strengths are left out" in note.text


def test_greedy_rows_stand_beside_greedy_rows():
    rows = steered().methods
    greedy = {"settings": {"temperature": 0.0}}
    rows += [grown("policy, greedy", 3.0, **greedy), grown("pargs, greedy β=1", 2.0, 1.0, "pargs, greedy", **greedy)]
    result = comparison(rows)
    assert {(d.a, d.b) for d in result.differences if d.family == "baseline"} == {
        *((f"pargs β={beta}", "policy") for beta in (1, 2, 4)), ("pargs, greedy β=1", "policy, greedy"),
    }  # fmt: skip
    note, sample = samples(result).blocks
    assert [[card.label for card in cards] for cards in sample.groups.values()] == [
        ["policy", "pargs β=2", "pargs β=1", "pargs β=4"], ["policy, greedy", "pargs, greedy β=1"],
    ]  # fmt: skip
    assert note.text == "Marked: words that the completion of policy or policy, greedy lacks in that position."
    sampled, first, likeliest, second, _ = rewards(result).blocks
    assert (sampled.lead, likeliest.lead) == ("Sampled", "Greedy: the likeliest token at each step")
    assert (first.headings[2], second.headings[2]) == ("minus policy", "minus policy, greedy")
    assert [lead for lead, _ in summary(result).blocks[0].items][:2] == [
        "Highest gold, sampled",
        "Highest gold, greedy",
    ]
    page = html_report(result, title="t")
    assert page.index("Greedy: the likeliest token") < page.index(
        "Every row minus policy, greedy rows minus policy, gr"
    )
