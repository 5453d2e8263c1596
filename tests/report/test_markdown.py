"""The report in Markdown: tables keep their form, and texts are escaped."""

import re

import pytest

from helpers.made_report import EVIL, audit, judged, method, steered
from rgtg.report.build import report_sections
from rgtg.report.document import Card, Cell, Paragraph, Sample, Section, Table
from rgtg.report.markdown import figures_of, render_markdown


def render(*blocks, title="T", intro=""):
    return render_markdown(title, intro, [Section("k", "S", blocks)], "figures")


def test_table_lines_have_equal_cells_for_any_text():
    sections = report_sections(steered(), {EVIL: audit(EVIL)}, judged=judged(("policy", EVIL, 0.3)))
    text = render_markdown(EVIL, EVIL, sections, "figures")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, table
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert len(figures_of(sections)) == 3


def test_bold_rows_details_and_marks():
    table = Table(["a", "b"], [[Cell("x", marks=("recommended",)), Cell("1", detail="0 to 2")]], frozenset({0}))
    assert "| **x** *recommended* | **1** (0 to 2) |" in render(table)


def test_a_summary_precedes_its_table():
    assert "12 differences:\n\n| a |" in render(Table(["a"], [[Cell("x")]], summary="12 differences"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# not a heading", "\\# not a heading"),
        ("- not a list", "\\- not a list"),
        ("1. not a list", "1\\. not a list"),
        ("a * b_c `d` [e](f)", "a \\* b\\_c \\`d\\` \\[e\\](f)"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("3.5 is a number", "3.5 is a number"),
    ],
)
def test_texts_are_escaped(text, shown):
    assert render(Paragraph(text)).splitlines()[-1] == shown


def test_completions_are_bullets_with_new_words_in_bold():
    card = Card("pargs", "1.00", [("The ", False), ("red\nold ", True), ("dog", False)], ["cut off"])
    text = render(Sample("Two\nlines", {"": [card]}))
    assert "> Two<br>lines" in text
    assert "- **pargs** 1.00: The **red<br>old** dog *(cut off)*" in text


def test_results_of_version_one_render_too():
    result = steered()
    result.methods = [method("policy", "policy", 0.1, 1.0), method("pargs β=1", "pargs", 2.0, 3.0)]
    result.differences, result.recommended, result.over_optimised, result.budgets = [], [], [], []
    text = render_markdown("t", "", report_sections(result), "f")
    assert "| pargs β=1 | 2.00 (1.50 to 2.50) |" in text
    assert "## Win rates" not in text
