from html.parser import HTMLParser

from rgtg.evaluation.provenance import provenance
from rgtg.report import html_report
from rgtg.types import AuditPoint, AuditResult, ComparisonResult, Interval, MethodResult


def _interval(mean):
    return Interval(mean=mean, low=mean - 0.1, high=mean + 0.1, n=10)


def _made():
    return provenance(command="test", settings={}, seed=0, models={}, data={})


def _result():
    sample = {"prompt": "<b>Hi</b>", "text": "<script>alert(1)</script>", "reward": 1.0}
    rows = [
        MethodResult(
            label=label, method=label.split(" ")[0], beta=None,
            metrics={"reward": _interval(r), "kl_nats": _interval(r)},
            seconds=1, tokens_per_second=10, policy_calls=5, scorer_calls=5, samples=[sample],
        )
        for label, r in (("policy", 0.5), ("pargs β=1", 1.5), ("pargs β=2", 2.5))
    ]  # fmt: skip
    return ComparisonResult(reward="gold", prompts=10, methods=rows, provenance=_made())


def _audit():
    points = [AuditPoint(position=q, accuracy=_interval(0.6), margin=_interval(1), ties=0, pairs=9) for q in (0.5, 1.0)]
    return AuditResult(
        scorer="s", objective="prefix-bt", pairs=9, by_tokens=[], by_fraction=points, full_accuracy=_interval(0.6),
        calibration_error=0.1, verdict="Fit, by <this> measure", provenance=_made(),
    )  # fmt: skip


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.fetched, self.headings = [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.fetched += [v for k, v in values.items() if k in ("src", "href") and not v.startswith("#")]
        if tag in ("script", "link", "img"):
            self.fetched.append(tag)


def test_the_page_fetches_nothing_and_escapes_texts():
    page = html_report(_result(), {"prefix-bt": _audit()}, title="A <title>", intro="One.\n\nTwo.")
    links = _Links()
    links.feed(page)
    assert links.fetched == []
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "A &lt;title&gt;" in page
    assert "by &lt;this&gt; measure" in page


def test_methods_come_best_first():
    page = html_report(_result(), {})
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    assert table.index("pargs β=2") < table.index("pargs β=1") < table.index("policy")


def test_the_same_results_give_the_same_table():
    assert html_report(_result(), {}).split("<figure>")[0] == html_report(_result(), {}).split("<figure>")[0]
