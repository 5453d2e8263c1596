"""The page is well-formed, self-contained and escaped, and shows everything in the result."""

import math
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from helpers.made_report import EVIL, audit, comparison, grown, judged, method, rollout_audit, steered
from rgtg.evaluation.plots import COLOURS
from rgtg.report import html_report, write_report
from rgtg.types.base import Interval, Provenance
from rgtg.types.comparison import ComparisonResult

_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects the texts of table cells and links to the outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.first_cells, self.outside, self.headings = [], [], [], [], []
        self.in_row = False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)
        self.in_row = tag == "tr" or (self.in_row and tag == "td")
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.in_row and self.open[-1:] == ["td"]:
            self.first_cells.append(data)
            self.in_row = False
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def _parse(page: str) -> Page:
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture
def result():
    """Version 1 has no seeds and no rewards per prompt."""
    methods = [
        method("policy", "policy", 0.1, 1.0), method("pargs β=1", "pargs", 2.0, 3.0, EVIL),
        method("args β=1", "args", 1.0, 4.0),
    ]  # fmt: skip
    of = Provenance(version="9.9", command="rgtg test", seed=5, settings={"a": EVIL}, models={"policy": "abc"})
    return ComparisonResult(version=1, reward=EVIL, prompts=10, methods=methods, provenance=of)


def test_the_page_is_well_formed_self_contained_and_escaped(result):
    page = html_report(result, {EVIL: audit(EVIL)}, title=EVIL, intro=f"One.\n{EVIL}")
    parsed = _parse(page)
    assert "script" not in parsed.tags
    assert parsed.outside == []
    assert parsed.tags.count("svg") == 3
    assert "<script>" not in page
    assert page.count("alert(") >= 6
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page


def test_every_section_has_its_anchor():
    page = html_report(steered(), {"s": audit()}, title="t", judged=judged(("policy", "pargs β=2", 0.2)))
    parsed = _parse(page)
    for key in (
        "glance",
        "rewards",
        "frontier",
        "cost",
        "differences",
        "strengths",
        "wins",
        "audits",
        "samples",
        "made",
    ):
        assert f'<a href="#{key}">' in page
        assert f'<section id="{key}">' in page
    assert "Win rates, by judge-8b" in parsed.headings
    assert parsed.tags.count("svg") == 3


def test_differences_marks_and_recommended_strengths_are_shown():
    result = steered()
    assert [mark.at for mark in result.over_optimised] == ["pargs β=4"]
    page = html_report(result, title="t")
    assert '<td>pargs β=4<span class="mark over-optimised">over-optimised</span></td>' in page
    assert '<td>pargs β=2<span class="mark recommended">recommended</span></td>' in page
    assert '<td>policy<span class="mark baseline">baseline</span></td>' in page
    assert "<b>Strengths to use:</b> pargs β=2" in page
    assert "pargs β=2: 2.50 (2.00 to 3.00); +2.00 over policy (p" in page
    assert "<td>pargs β=4 minus policy</td>" in page
    assert "β = 2" in page
    assert "var(--bad)" in page[page.index("<svg") : page.index("</svg>")]  # the cross on the over-optimised point


def test_the_frontier_has_a_second_panel_only_if_the_cut_kl_is_known(result):
    assert "KL over the same" not in html_report(result, title="t")
    wide = html_report(steered(), title="t")
    narrow = html_report(result, title="t")
    assert 'width="720' in wide
    assert 'width="518' in narrow[: narrow.index("</svg>")]


def test_seven_curves_have_seven_colours_that_show_on_a_dark_page(result):
    result.methods = [method(f"m{i}", "policy", i, 1.0 + i) for i in range(7)]
    page = html_report(result, {"s": audit()}, title="t")
    assert "#000000" not in page
    assert page.count("stroke: currentColor") > 4  # the seventh curve, beside the axes
    curves = page[page.index("<svg") : page.index("</svg>")]
    assert all(colour.lower() in curves for colour in COLOURS[:-1])


def test_long_tables_are_folded_under_a_summary():
    rows = [grown("policy", 0.0), *(grown(f"m{i}", 1.0 + i) for i in range(13))]
    page = html_report(comparison(rows), title="t")
    assert "<summary>26 differences, 13 of them with an adjusted p below 0.05</summary>" in page


def test_the_page_needs_no_torch():
    code = "import sys, rgtg.report; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_methods_are_sorted_by_reward_with_their_costs(result):
    page = html_report(result, title="t")
    cells = _parse(page).first_cells
    assert cells == ["pargs β=1", "args β=1", "policy"] * 2
    assert "<td>2.00<small>1.50 to 2.50</small></td>" in page
    # 240 policy and 60 scorer calls for 120 tokens in one second
    assert "<td>pargs β=1</td><td>2.00</td><td>0.50</td><td>8.33</td><td>120</td><td>2.00</td>" in page
    assert "(cut off)" in page
    assert "rgtg test" in page
    assert "partial completions" not in page


def test_strengths_with_the_same_cost_share_one_row_of_the_cost_table():
    rows = [
        grown("policy", 0.0), *(grown(f"pargs β={b}", b, b, "pargs") for b in (1.0, 2.0)),
        *(grown(f"best-of-n n={n}", 1.0 + n / 10, float(n), "best-of-n", policy_calls=100 * n) for n in (2, 8)),
    ]  # fmt: skip
    page = html_report(comparison(rows), title="t")
    costs = page[page.index('<section id="cost">') : page.index('<section id="differences">')]
    assert costs.count("<td>best-of-n n=") == 2
    assert costs.count("<td>pargs β=") == 1


def test_missing_numbers_are_dashes(result):
    result.methods[0].metrics["reward"] = Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    del result.methods[1].metrics["kl_nats"]
    page = html_report(result, {"s": audit()}, title="t")
    _parse(page)
    assert ">nan" not in page
    assert "<td>–</td>" in page


def test_a_comparison_without_samples_or_kl_still_renders(result):
    for row in result.methods:
        row.samples = []
        row.metrics = {"reward": row.metrics["reward"]}
    page = html_report(result, title="t")
    assert "side by side" not in page
    assert "Reward against KL" not in page


def test_methods_without_time_or_tokens_have_no_costs(result):
    for row in result.methods:
        row.tokens_per_second, row.seconds = 0.0, 0.0
    page = html_report(result, title="t")
    assert "Reward against cost" not in page


def test_the_page_is_written_last_and_figures_are_beside_the_markdown(tmp_path):
    written = write_report(steered(), tmp_path / "r.html", audits={"s": audit()}, title="T")
    assert written == [tmp_path / "r.html", tmp_path / "r.md"]
    _parse(written[0].read_text(encoding="utf-8"))
    pictures = sorted(path.name for path in (tmp_path / "r-figures").iterdir())
    assert pictures == ["audit.png", "cost.png", "frontier.png"]
    text = written[1].read_text(encoding="utf-8")
    assert all(f"(r-figures/{name})" in text for name in pictures)


def test_audits_by_rollouts_have_two_panels_a_table_and_their_verdict(result):
    page = html_report(result, rollouts={EVIL: rollout_audit(), "b": rollout_audit()}, title="t")
    assert _parse(page).tags.count("svg") == 3
    assert "Scorers among the candidates of one prefix" in page
    assert "<td>0.40<small>0.30 to 0.50</small></td><td>0.90</td>" in page
    assert "+0.20" in page
    assert "Orders well." in page
    assert "20 prefixes, reward gold" in page
