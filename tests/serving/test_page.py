"""The playground in headless Chromium: generate, inspect a step, fork, save, load, export, show errors."""

import json
import math
import threading
import time

import pytest
import torch

from helpers.browser import PATIENCE, Page, open_browser
from helpers.naive import info
from helpers.page_server import Answers, serve_page
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.decoding.sampling import guided_log_probs
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer

PROMPT = "Once upon a time"
LENGTH = 24


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    opened = open_browser(downloads)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def make():
    """A way to a GuidedPolicy of a method, names, betas and candidates."""
    policy = Policy(tiny_policy(), tiny_tokenizer())
    scorers = {
        name: PrefixScorer(tiny_reward_model(seed=i), tiny_tokenizer(), info=info("prefix-bt"), name=name)
        for i, name in enumerate(("kind", "brief"), 1)
    }

    def made(method, names, betas, top_k):
        chosen = [scorers[name] for name in names]
        beta = None if not betas else betas if len(betas) > 1 else betas[0]
        return GuidedPolicy(policy, chosen or None, method=method, beta=beta, top_k=top_k)

    return made


@pytest.fixture
def answers(make):
    names = ("name", "unit", "scorer", "takes", "top_k", "paper", "rule", "clip")
    methods = [{name: getattr(method, name) for name in names} for method in METHODS.values()]
    return Answers(make, tiny_tokenizer(), methods, ("kind", "brief"))


@pytest.fixture
def page(browser, answers):
    """The page, with its form filled; nothing may have been complained of at the end."""
    with serve_page(answers) as url:
        shown = Page(browser, url)  # another port is another origin: nothing is kept from the test before
        shown.ready()
        shown.put("#max_tokens", str(LENGTH))
        shown.put("#beta-kind", "2")
        yield shown
        assert shown.complaints() == []


def downloaded(folder, ending):
    """The one finished file of that kind, taken out of the folder."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = [path for path in folder.glob(f"*{ending}") if path.stat().st_size]
        if found and not list(folder.glob("*.crdownload")):
            return found[0].rename(folder / f"taken-{time.monotonic_ns()}{ending}.done")
        time.sleep(0.03)
    raise AssertionError(f"no {ending} file came; there are {list(folder.iterdir())}")


def expected(make, method="pargs", names=("kind",), betas=(2.0,), ids=None, length=LENGTH):
    decoder = make(method, list(names), list(betas), 10)
    given = tiny_tokenizer()(PROMPT).input_ids if ids is None else ids
    (done,) = decoder.generate_ids([given], seed=0, max_new_tokens=length, trace=True)
    return done


def divergence(one, other):
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def percent(log_prob):
    p = math.exp(log_prob)
    return "<0.1 %" if 0 < p < 0.0005 else ">99.9 %" if 0.9995 < p < 1 else f"{100 * p:.1f} %"


def test_both_texts_stream_side_by_side_and_the_first_difference_is_marked(page, answers, make):
    answers.gate = threading.Semaphore(0)
    page.put("#prompt", PROMPT)
    page.one("#run").click()
    page.until(lambda: page.one("#stop").is_displayed(), "it runs")
    for _ in range(6):
        answers.gate.release()
    page.until(lambda: len(page.tokens(0)) == len(page.tokens(1)) == 3, "three tokens of each side are shown")
    assert page.text(".tv-panel .tv-state") == "generating …"
    assert not page.one("#run").is_enabled()
    answers.gate.release(500)
    page.done()
    guided, alone = expected(make), expected(make, "policy", (), ())
    assert [len(page.tokens(0)), len(page.tokens(1))] == [len(alone.token_ids), len(guided.token_ids)]
    for panel, done in enumerate((alone, guided)):
        assert "".join(page.tokens(panel)).replace("</s>", "").replace("<unk>", "").replace("↵", "") == done.text
    parts = divergence(alone.token_ids, guided.token_ids)
    for panel in (0, 1):
        marked = page.js(
            "return [...[...document.querySelectorAll('.tv-panel')][arguments[0]].querySelectorAll('.tv-token')]"
            ".map((t) => t.classList.contains('tv-parts')).indexOf(true)", panel,
        )  # fmt: skip
        assert marked == parts
    figures = page.text(".tv-panel:last-child .tv-figures")
    assert f"scorer calls{guided.scorer_calls}" in figures
    assert f"KL{guided.guided_log_prob - guided.policy_log_prob:.2f} nats" in figures
    assert "tokens/s" in figures
    path, body = answers.bodies[0]
    assert path == "/v1/compare"
    assert body["guidance"] == {"method": "pargs", "top_k": 10, "scorers": {"kind": 2}}
    assert (body["seed"], body["max_tokens"], body["stream"]) == (0, LENGTH, True)


def test_a_step_shows_its_candidates_and_the_slider_recomputes_it(page, answers, make):
    page.write(PROMPT)
    done, before = expected(make), len(answers.bodies)
    page.token(1, 5).click()
    step = done.trace[5]
    order = sorted(range(10), key=lambda i: -step.guided_log_probs[i])
    rows = page.candidates()
    assert [row[1] for row in rows] == [percent(step.policy_log_probs[i]) for i in order]
    assert [row[2] for row in rows] == [f"{step.scores[i]:.2f}".replace("-", "−") for i in order]
    assert [row[4] for row in rows] == [percent(step.guided_log_probs[i]) for i in order]
    assert [row[5].split()[0] for row in rows] == [str(i + 1) for i in order]  # ranks under the policy come first
    drawn = order.index(step.candidate_ids.index(step.token_id))
    assert [("drawn" in row[0]) for row in rows] == [i == drawn for i in range(10)]
    page.put(".tv-slider input[type=number]", "0.25")
    again = guided_log_probs(torch.tensor([step.policy_log_probs]), torch.tensor([step.scores]), 0.25)[0].tolist()
    fresh = sorted(range(10), key=lambda i: -again[i])
    assert [row[4] for row in page.candidates()] == [percent(again[i]) for i in fresh]
    assert "without calling the model" in page.text(".tv-note")
    page.one(".tv-slider input[type=range]").send_keys("\ue010")  # End: the largest beta
    assert page.one(".tv-slider input[type=number]").get_property("value") == "8"
    assert page.candidates()[0][4] != rows[0][4]
    page.one(".tv-sliders button").click()  # as drawn
    assert page.candidates() == rows
    assert len(answers.bodies) == before, "no request was made"


def test_two_scorers_have_a_slider_and_a_column_each(page, answers, make):
    page.one("#scorer-brief").click()
    page.put("#beta-brief", "-1.5")
    page.write(PROMPT)
    assert answers.bodies[0][1]["guidance"]["scorers"] == {"kind": 2, "brief": -1.5}
    page.token(1, 3).click()
    step = expected(make, names=("kind", "brief"), betas=(2.0, -1.5)).trace[3]
    best = max(range(10), key=lambda i: step.guided_log_probs[i])
    row = page.candidates()[0]
    figures = [step.scores_of_each[0][best], step.scores_of_each[1][best]]
    assert row[2:4] == [f"{value:.2f}".replace("-", "−") for value in figures]
    assert row[5] == percent(step.guided_log_probs[best])
    assert len(page.all(".tv-slider")) == 2


def test_fork_save_reload_load_and_export(page, answers, make, browser, downloads):
    page.write(PROMPT)
    page.token(1, 4).click()
    done = expected(make)
    step = done.trace[4]
    order = sorted(range(10), key=lambda i: -step.guided_log_probs[i])
    other = next(place for place, i in enumerate(order) if step.candidate_ids[i] not in (step.token_id, 2))
    page.all(".tv-fork")[other].click()
    page.done()
    chosen = step.candidate_ids[order[other]]
    ids = [*tiny_tokenizer()(PROMPT).input_ids, *done.token_ids[:4], chosen]
    path, body = answers.bodies[-1]
    assert (path, body["prompt"], body["max_tokens"]) == ("/v1/completions", ids, LENGTH - 5)
    assert body["guidance"] == {"method": "pargs", "top_k": 10, "scorers": {"kind": 2}, "trace": True}
    fork = expected(make, ids=ids, length=LENGTH - 5)
    assert len(page.tokens(1)) == 5 + len(fork.token_ids)
    forked = page.tokens(1)
    items = page.all('[role="treeitem"]')
    assert [item.get_attribute("aria-level") for item in items] == ["1", "1", "2"]
    items[1].find_element("css selector", ".tv-node").click()
    assert len(page.tokens(1)) == len(done.token_ids)
    page.one("#save").click()
    saved = downloaded(downloads, ".json")
    trace = json.loads(saved.read_text(encoding="utf-8"))
    assert [len(branch["steps"]) for branch in trace["branches"]][1:] == [len(done.token_ids), len(fork.token_ids)]

    browser.refresh()
    page.ready()
    assert page.one("#prompt").get_property("value") == PROMPT
    assert page.all(".tv-panel") == []
    page.one("#file").send_keys(str(saved))
    page.until(lambda: len(page.all('[role="treeitem"]')) == 3, "the trace is loaded")
    page.all('[role="treeitem"]')[2].find_element("css selector", ".tv-node").click()
    assert page.tokens(1) == forked
    page.one("#export").click()
    exported = downloaded(downloads, ".html").rename(downloads / "alone.html")
    requests = len(answers.bodies)
    browser.get(exported.as_uri())
    page.until(lambda: len(page.all(".tv-panel")) == 2, "the exported file shows both texts")
    page.token(1, 4).click()
    page.put(".tv-slider input[type=number]", "0")
    policy = torch.tensor(step.policy_log_probs)
    assert page.candidates()[0][4] == percent(float((policy - policy.logsumexp(0)).max()))
    assert page.all(".tv-fork") == []
    assert PROMPT in page.text(".tv-made")
    assert len(answers.bodies) == requests
    assert "http" not in exported.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", ""
    )


def test_colours_show_change_score_or_entropy(page):
    page.write(PROMPT)
    at = (
        "return [...document.querySelectorAll('.tv-panel:last-child .tv-token')].map((t) => "
        "[t.className, t.style.getPropertyValue('--at'), t.ariaLabel])"
    )
    change = page.js(at)
    assert any("tv-up" in name for name, _, _ in change)
    assert any("tv-down" in name for name, _, _ in change)
    assert all("change" in label for _, _, label in change)
    assert "nats" in page.text(".tv-legend")
    background = "return getComputedStyle(document.querySelector('.tv-panel:last-child .tv-up')).backgroundColor"
    orange = page.js(background)
    for mode in ("score", "entropy"):
        page.one(f'.tv-segments input[value="{mode}"] + span').click()
        shown = page.js(at)
        assert all(mode in label for _, _, label in shown)
        assert not any("tv-down" in name for name, _, _ in shown)
        assert page.js(background) != orange


def test_the_unguided_text_gets_its_scores_afterwards(page, answers):
    page.write(PROMPT)
    path, body = answers.bodies[-1]
    assert (path, body["model"], body["prefixes"]) == ("/v1/score", "kind", True)
    assert body["completion"] == "".join(page.tokens(0)).replace("</s>", "").replace("↵", "")
    assert len(page.all(".tv-path")) == 2
    assert "score1.00" in page.text(".tv-panel .tv-figures")
    label = page.one(".tv-plot svg").get_attribute("aria-label")
    assert "Unguided: from" in label
    assert "Guided: from" in label


def test_errors_are_shown_at_the_field_or_above_the_texts(page, answers):
    answers.refusals = [
        (429, {"message": "the queue is full", "param": None}, [("Retry-After", "3")]),
        (400, {"message": "beta must be a finite number", "param": "guidance.scorers.kind"}),
        (503, {"message": "the server is about to stop", "param": None}),
    ]
    page.write(PROMPT)
    assert "busy" in page.text("#banner")
    assert "3 s" in page.text("#banner")
    assert "req-1" in page.text("#banner")
    page.one("#banner button").click()  # try again
    page.until(lambda: page.all('[aria-invalid="true"]'), "the field is marked")
    page.done()
    field = page.one('[aria-invalid="true"]')
    assert field.get_property("id") == "beta-kind"
    assert page.text(f"#{field.get_attribute('aria-describedby')}") == "beta must be a finite number"
    page.write()
    assert "not ready" in page.text("#banner")
    page.one("#banner button").click()
    page.done()
    assert not page.one("#banner").is_displayed()
    assert page.all('[aria-invalid="true"]') == []
    assert len(page.tokens(1)) == LENGTH
    page.complaints()  # the browser logs refused requests as errors of its own


def test_choices_of_a_method_are_sent_where_they_are_made(page, answers):
    pick = (
        "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    page.js(pick, "#method", "smc")
    assert [option.text for option in page.all("#proposal option")] == ["default", "by pargs", "from the policy"]
    for proposal, finished, expected in (
        ("", "", {}),
        ("policy", "false", {"proposal": "policy", "resample_finished": False}),
        ("pargs", "true", {"proposal": "pargs", "resample_finished": True}),
    ):
        page.js(pick, "#proposal", proposal)
        page.js(pick, "#resample_finished", finished)
        answers.refusals = [(400, {"message": "not here", "param": "guidance.proposal"})]
        page.write(PROMPT)
        sent = answers.bodies[-1][1]["guidance"]
        assert sent["method"] == "smc"
        assert {name: sent[name] for name in ("proposal", "resample_finished") if name in sent} == expected
        assert page.one('[aria-invalid="true"]').get_property("id") == "proposal"
    page.js(pick, "#method", "pargs")
    assert page.all("#proposal") == []
    page.complaints()  # the browser logs refused requests as errors of its own


def test_a_refused_fork_leaves_no_branch(page, answers):
    page.write(PROMPT)
    page.token(1, 4).click()
    answers.refusals = [(429, {"message": "the queue is full", "param": None})]
    page.all(".tv-fork:not([disabled])")[0].click()
    page.done()
    assert "busy" in page.text("#banner")
    assert page.all('[role="treeitem"]') == []
    assert len(page.tokens(1)) == LENGTH
    page.one("#banner button").click()
    page.done()
    assert len(page.all('[role="treeitem"]')) == 3
    page.complaints()  # the browser logs refused requests as errors of its own


def test_stop_keeps_the_text_so_far_and_closes_the_connection(page, answers):
    answers.gate = threading.Semaphore(4)
    page.put("#prompt", PROMPT)
    page.one("#run").click()
    page.until(lambda: len(page.tokens(0)) == 2 and len(page.tokens(1)) == 2, "two tokens of each side")
    page.one("#prompt").send_keys("\ue00c")  # Escape does what the button does
    page.done()
    assert page.text(".tv-panel .tv-state") == "stopped by you"
    answers.gate.release(500)
    page.until(lambda: answers.left, "the server saw that nobody listens")
    assert len(page.tokens(0)) == 2


def test_an_error_in_the_stream_and_an_early_end_are_shown(page, answers):
    first = {"object": "comparison.chunk", "side": "guided", "text": "On", "token_id": 7, "guidance": None}
    answers.broken = [first, {"error": {"message": "the scorer returned NaN", "param": None, "code": None}}]
    page.write(PROMPT)
    assert "the scorer returned NaN" in page.text("#banner")
    assert page.text(".tv-panel .tv-state") == "failed"
    assert "On" in page.text(".tv-panel:last-child .tv-strip"), "what has come stays, a trace or not"
    answers.broken = []
    page.write()
    assert "closed the stream before its end" in page.text("#banner")
    assert "On" in page.text(".tv-panel:last-child .tv-strip"), "the text before is not lost to a failure"


def test_the_api_key_is_requested_sent_and_forgotten_with_the_tab(browser, answers):
    answers.key = "geheim"
    with serve_page(answers) as url:
        page = Page(browser, url)
        page.until(lambda: "needs a key" in page.text("#banner"), "it says that a key is needed")
        page.put("#key", "geheim")
        page.one("h1").click()
        page.ready()
        assert answers.keys[-1] == "Bearer geheim"
        page.put("#max_tokens", "4")
        page.write(PROMPT)
        assert len(page.tokens(1)) == 4
        assert page.js("return localStorage.length + document.cookie.length") == 0
        page.complaints()


HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>'


def hostile_trace():
    step = {
        "token_id": 7, "candidate_ids": [7, 8, 9, 10], "policy_log_probs": [-1, -2, -3, "-Infinity"], "scores": None,
        "scores_of_each": None, "guided_log_probs": [-0.5, -1.2, -2.2, "-Infinity"],
        "candidate_texts": [HOSTILE, "\ufffd", "שלום", "\u202eevil"],
        "candidate_bytes": [list(HOSTILE.encode()), [0xE4, 0xB8], list("שלום".encode()), list("\u202eevil".encode())],
    }  # fmt: skip
    rule = {"scorers": [HOSTILE], "betas": [1], "temperature": 1, "greedy": False, "clip": False}
    branch = {
        "id": 0, "parent": None, "at": 0, "token_id": None, "label": HOSTILE, "side": "guided", "rule": rule,
        "steps": [step, step | {"token_id": 8}, step | {"token_id": 9}], "text": HOSTILE, "finish_reason": HOSTILE,
        "guidance": {"method": HOSTILE, "score": HOSTILE}, "seconds": 1, "reward": None, "prefix_scores": None,
    }  # fmt: skip
    return {
        "format": "rgtg-trace", "version": 1, "created": HOSTILE, "policy": HOSTILE, "prompt": HOSTILE,
        "messages": None, "prompt_token_ids": [1], "branches": [branch],
        "request": {"seed": 0, "guidance": {"method": HOSTILE}},
    }  # fmt: skip


def test_untrusted_files_are_shown_as_text_or_refused(page, browser, downloads, tmp_path):
    for content, said in (("{", "not JSON"), ('{"format": "x"}', "no saved trace"), ("[1]", "no saved trace")):
        path = tmp_path / "bad.json"
        path.write_text(content, encoding="utf-8")
        page.one("#file").send_keys(str(path))
        page.until(lambda said=said: said in page.text("#banner"), said)
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps(hostile_trace()), encoding="utf-8")
    page.one("#file").send_keys(str(path))
    page.until(lambda: page.all(".tv-token"), "it is shown")
    page.token(0, 0).click()
    assert page.text(".tv-word").replace("· ", " ") == HOSTILE
    page.one(".tv-check input").click()
    assert page.tokens(0)[0].replace("· ", " ") == HOSTILE
    assert page.tokens(0)[0] != HOSTILE, "spaces are shown"
    assert page.js("return document.querySelectorAll('#viewer img, #viewer script').length") == 0
    reasons = {button.get_attribute("title") for button in page.all(".tv-fork")}
    assert reasons == {f"this trace was made with another policy, {HOSTILE}"}
    table = page.text(".tv-inspector table")
    assert "E4 B8" in table  # bytes that are no text
    assert "U+202E" in table  # an override of direction acts no more
    assert page.js("return document.querySelector('.tv-inspector tbody bdi') !== null")
    page.one("#export").click()
    exported = downloaded(downloads, ".html").rename(tmp_path / "hostile.html")
    browser.get(exported.as_uri())
    page.until(lambda: page.all(".tv-token"), "the exported file shows it too")
    assert page.js("return window.hacked === undefined")
    assert page.js("return document.querySelectorAll('main img, main script:not(.rgtg-trace)').length") == 0


def test_everything_works_by_keyboard(page, answers):
    from selenium.webdriver.common.keys import Keys

    page.one("#prompt").send_keys(PROMPT, Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.all(".tv-panel"), "Ctrl+Enter starts it")
    page.done()
    active = page.browser.switch_to.active_element
    page.js("document.querySelector('.tv-panel:last-child .tv-token').focus()")
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.END, Keys.HOME, Keys.ARROW_RIGHT):
        page.browser.switch_to.active_element.send_keys(key)
    active = page.browser.switch_to.active_element
    assert active.get_attribute("data-at") == "1"
    assert active.get_attribute("aria-selected") == "true"
    assert page.text(".tv-inspector h3").startswith(f"Token 2 of {LENGTH}")
    assert len(page.all('.tv-panel:last-child .tv-token[tabindex="0"]')) == 1
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "focus is visible"
    page.all(".tv-fork:not([disabled])")[0].send_keys(Keys.ENTER)
    page.until(lambda: len(page.all('[role="treeitem"]')) == 3, "a fork")
    page.done()
    page.js("document.querySelector('[role=treeitem][tabindex=\"0\"]').focus()")
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert page.browser.switch_to.active_element.get_attribute("aria-level") == "1"


def test_the_page_suits_screen_readers_and_narrow_screens(page, browser):
    from axe_core_python.selenium import Axe

    page.write(PROMPT)
    page.token(1, 3).click()
    page.all(".tv-fork:not([disabled])")[2].click()
    page.done()
    page.one(".tv-all summary").click()
    for width, dark in ((1400, False), (1400, True), (360, False)):
        page.look(width, dark=dark)
        page.drawn()
        assert not page.overflows(), f"scrolls sideways at {width}"
        if width > 400:
            found = Axe().run(browser)["violations"]
            assert [(v["id"], [node["html"][:200] for node in v["nodes"]][:3]) for v in found] == [], f"dark: {dark}"
    dark = "return getComputedStyle(document.body).backgroundColor"
    page.look(1400, dark=True)
    night = page.js(dark)
    page.look(1400)
    assert page.js(dark) != night
