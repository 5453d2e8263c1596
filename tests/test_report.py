import math
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from rgtg.errors import DataError
from rgtg.evaluation.figures import COLOURS
from rgtg.report import html_report, write_report
from rgtg.types import AuditPoint, AuditResult, ComparisonResult, Interval, MethodResult, Provenance

EVIL = "<script>alert('x')</script> & $x_1$ \"q\""
_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags that are opened and closed in order, the texts of table cells, and whatever points outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.first_cells, self.outside = [], [], [], []
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


def _parse(page: str) -> Page:
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def _interval(mean: float) -> Interval:
    return Interval(mean=mean, low=mean - 0.5, high=mean + 0.5, n=10)


def _method(label: str, method: str, reward: float, kl: float, text: str = "Fine.") -> MethodResult:
    return MethodResult(
        label=label, method=method, beta=1.0, metrics={"reward": _interval(reward), "kl_nats": _interval(kl)},
        seconds=1.0, tokens_per_second=120.0, policy_calls=1234, scorer_calls=99,
        samples=[{"prompt": EVIL, "text": text, "reward": reward, "finish_reason": "length"}],
    )  # fmt: skip


@pytest.fixture
def result():
    methods = [
        _method("policy", "policy", 0.1, 1.0), _method("pargs β=1", "pargs", 2.0, 3.0, EVIL),
        _method("args β=1", "args", 1.0, 4.0),
    ]  # fmt: skip
    of = Provenance(version="9.9", command="rgtg test", seed=5, settings={"a": EVIL}, models={"policy": "abc"})
    return ComparisonResult(reward=EVIL, prompts=10, methods=methods, provenance=of)


@pytest.fixture
def audit():
    nothing = Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    points = [
        AuditPoint(position=0.5, accuracy=nothing, margin=nothing, ties=0, pairs=0),
        AuditPoint(position=1.0, accuracy=_interval(0.7), margin=_interval(1), ties=0, pairs=30),
    ]
    return AuditResult(
        scorer="s", objective="prefix-bt", pairs=30, by_tokens=[], by_fraction=points, full_accuracy=_interval(0.7),
        calibration_error=0.1, verdict=EVIL, provenance=Provenance(version="9.9", command="rgtg audit"),
    )  # fmt: skip


def test_the_page_is_well_formed_self_contained_and_escaped(result, audit):
    page = html_report(result, {EVIL: audit}, title=EVIL, intro=f"One.\n{EVIL}")
    parsed = _parse(page)
    assert "script" not in parsed.tags
    assert parsed.outside == []
    assert parsed.tags.count("svg") == 2
    assert "<script>" not in page
    assert page.count("alert(") >= 6
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page


def test_seven_curves_have_seven_colours_and_none_is_lost_on_a_dark_page(result, audit):
    result.methods = [_method(f"m{i}", "policy", i, 1.0 + i) for i in range(7)]
    page = html_report(result, {"s": audit}, title="t")
    assert "#000000" not in page
    assert page.count("stroke: currentColor") > 4  # the seventh curve, beside the axes
    curves = page[page.index("<svg") : page.index("</svg>")]
    assert all(colour.lower() in curves for colour in COLOURS[:-1])


def test_the_page_is_made_without_torch():
    code = "import sys, rgtg.report; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_methods_are_sorted_by_reward_with_their_costs(result):
    page = html_report(result, title="t")
    assert _parse(page).first_cells == ["pargs β=1", "args β=1", "policy"]
    assert "1,234" in page
    assert "2.00 <small>1.50 to 2.50</small>" in page
    assert "(cut off)" in page
    assert "rgtg test" in page
    assert "partial completions" not in page


def test_figures_that_are_missing_are_dashes(result, audit):
    result.methods[0].metrics["reward"] = Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    del result.methods[1].metrics["kl_nats"]
    page = html_report(result, {"s": audit}, title="t")
    _parse(page)
    assert ">nan" not in page
    assert page.count("<svg") == 2
    assert "<td>–</td>" in page


def test_a_comparison_without_samples_or_figures_still_renders(result):
    for row in result.methods:
        row.samples = []
        row.metrics = {"reward": row.metrics["reward"]}
    page = html_report(result, title="t")
    assert "side by side" not in page
    assert "<svg" not in page


def test_written_from_files(result, audit, tmp_path):
    (tmp_path / "results.json").write_text(result.model_dump_json())
    (tmp_path / "audit.json").write_text(audit.model_dump_json())
    (tmp_path / "bad.json").write_text('{"version": 1}')
    write_report(tmp_path / "results.json", tmp_path / "r.html", audits={"s": tmp_path / "audit.json"}, title="T")
    _parse((tmp_path / "r.html").read_text(encoding="utf-8"))
    (tmp_path / "r.html").unlink()
    with pytest.raises(DataError, match=r"bad\.json is not a valid AuditResult: scorer"):
        write_report(tmp_path / "results.json", tmp_path / "r.html", audits={"s": tmp_path / "bad.json"})
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(DataError, match="cannot read"):
        write_report(tmp_path / "none.json", tmp_path / "r.html")
