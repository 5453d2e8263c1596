"""Traces in the report: a comparison keeps steps, the page contains them, the playground's trace viewer draws them."""

import json
import re

import pytest

from helpers.browser import Page, open_browser
from helpers.made_report import EVIL, steered
from helpers.naive import info
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.config import CompareRun, CompareSettings
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.evaluation.compare.comparison import assemble, compare, run_method
from rgtg.evaluation.compare.grid import expand_runs
from rgtg.evaluation.compare.significance import Resampling
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.report import html_report
from rgtg.report.markdown import render_markdown
from rgtg.report.samples import samples

PROMPTS = ["Hello", "A day", "What now?"]
RUNS = [
    CompareRun(method="policy"), CompareRun(method="pargs", scorer="s", beta=2.0),
    CompareRun(method="best-of-n", scorer="s", n=2), CompareRun(method="pargs", label="all", scorer="s", top_k=None),
]  # fmt: skip


def length(done):
    return [float(len(completion.text)) for completion in done]


@pytest.fixture(scope="module")
def models():
    return (
        Policy(tiny_policy(), tiny_tokenizer()),
        PrefixScorer(tiny_reward_model(), tiny_tokenizer(), info=info("prefix-bt"), name="s"),
    )


@pytest.fixture(scope="module")
def result(models):
    policy, scorer = models
    shared = CompareSettings(prompts="-", output="-", methods=RUNS, max_new_tokens=8, bootstrap=100, permutations=100)
    rows = [
        run_method(policy, scorer if row.scorers else None, row, PROMPTS, shared, length) for row in expand_runs(RUNS)
    ]
    made = provenance(command="rgtg test", settings={}, seed=0, models={}, data={})
    return assemble(rows, reward="length", prompts=3, made=made, how=Resampling(resamples=100, permutations=100))


def test_the_first_prompts_keep_the_steps_of_decoding(result, models):
    policy, guided, best, everything = result.methods
    assert [["steps" in sample for sample in row.samples] for row in (policy, guided)] == [[True, True, False]] * 2
    assert not any("steps" in sample for sample in best.samples), "it chose among whole texts"
    assert not any("steps" in sample for sample in everything.samples), "a step has more than 50 candidates"
    sample = guided.samples[0]
    (done,) = GuidedPolicy(*models, method="pargs", beta=2.0).generate(
        ["Hello"], seed=[sample["seed"]], max_new_tokens=8, trace=True
    )
    assert [step["token_id"] for step in sample["steps"]] == done.token_ids == sample["token_ids"]
    for step, traced in zip(sample["steps"], done.trace, strict=True):
        assert step["candidate_ids"] == traced.candidate_ids
        assert step["scores"] == pytest.approx(traced.scores, abs=1e-4)
        assert step["guided_log_probs"] == pytest.approx(traced.guided_log_probs, abs=1e-4)
    assert sample["rule"] == {"scorers": ["s"], "betas": [2.0], "temperature": 1.0, "greedy": False, "clip": False}
    assert policy.samples[0]["rule"]["betas"] == []


def test_no_traces_no_script(models):
    shared = CompareSettings(prompts="-", output="-", methods=RUNS, max_new_tokens=4, bootstrap=100, traces=0)
    row = run_method(*models, expand_runs(RUNS)[1], PROMPTS, shared, length)
    assert not any("steps" in sample for sample in row.samples)
    assert "<script" not in html_report(steered(), title="t")


def test_shards_keep_traces_and_completions_do_not(tmp_path, policy_folder, scorer_folder, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    settings = CompareSettings(
        policy=str(policy_folder), prompts=prompts, output=tmp_path / "out", max_new_tokens=5, bootstrap=100,
        methods=[CompareRun(method="policy", label=EVIL)], seeds=[1, 2],
    )  # fmt: skip
    first = compare(settings, reward=length)
    lines = (tmp_path / "out/completions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("trace") for line in lines] == [None] * 6
    monkeypatch.setattr(GuidedPolicy, "generate", lambda *_, **__: pytest.fail("everything was made before"))
    again = compare(settings, reward=length)
    assert again.methods[0].samples == first.methods[0].samples
    assert sum("steps" in sample for sample in again.methods[0].samples) == 2


def test_data_in_the_page_cannot_end_the_script(result):
    shown = result.model_copy(deep=True)
    shown.methods[1].label = EVIL + "</script><!--"
    page = html_report(shown, title="t")
    held = re.findall(r'<script type="application/json" class="rgtg-trace">(.*?)</script>', page, re.DOTALL)
    assert len(held) == 2
    branches = json.loads(held[0])["branches"]
    assert [branch["label"] for branch in branches] == ["policy", EVIL + "</script><!--"]
    assert page.count("<script") == page.count("</script>") == 3
    text = render_markdown("t", "", [samples(shown)], "p")
    assert "candidate_ids" not in text


def test_the_report_draws_steps_with_the_playgrounds_trace_viewer(result, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(html_report(result, title="t"), encoding="utf-8")
    browser = open_browser(tmp_path)
    try:
        browser.get(path.as_uri())
        page = Page(browser)
        page.one("details.tokens summary").click()
        page.until(lambda: len(page.all(".tv-panel")) == 2, "both rows are drawn")
        assert len(page.all(".tv")) == 1, "the other prompt's are drawn when they are opened"
        page.token(1, 3).click()
        step = result.methods[1].samples[0]["steps"][3]
        order = sorted(range(10), key=lambda i: -step["guided_log_probs"][i])
        assert [row[2] for row in page.candidates()] == [f"{step['scores'][i]:.2f}".replace("-", "−") for i in order]
        page.put(".tv-slider input[type=number]", "0")
        assert "without calling the model" in page.text(".tv-note")
        assert page.all(".tv-fork") == []
        page.look(390)
        page.drawn()
        assert not page.overflows()
        assert page.complaints() == []
    finally:
        browser.quit()
