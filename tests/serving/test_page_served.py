"""The playground on the real server shows what GuidedPolicy generates, for every kind of method."""

import pytest

from helpers.browser import Page, open_browser
from helpers.served import on_a_socket, serving, tiny_models
from helpers.tiny_models import tiny_tokenizer
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.models.loading.policy import Policy
from rgtg.serving.engine.models import ServedModels

PROMPT = "Once upon a time"
SEED = 1  # of a chat that does not end at once
CHAT = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = open_browser(tmp_path_factory.mktemp("downloads"))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def served():
    with serving() as made:
        yield made


@pytest.fixture
def page(browser, served):
    with on_a_socket(served) as url:
        shown = Page(browser, url)
        shown.ready()
        shown.put("#max_tokens", "16")
        yield shown
        assert shown.complaints() == []
        browser.get("about:blank")


def expected(served, method, names, prompt=PROMPT, ids=None, length=16, **given):
    scorers = [served.models.scorers[name] for name in names]
    settings = {"seed": 0, "max_new_tokens": length, "trace": True, **given.pop("settings", {})}
    guided = GuidedPolicy(served.models.policy, scorers or None, method=method, **given)
    (done,) = guided.generate([prompt], **settings) if ids is None else guided.generate_ids([ids], **settings)
    return done


def shown(page, panel):
    """The text of a panel without the names of special tokens and marks."""
    code = (
        "const tokens = document.querySelectorAll('.tv-panel')[arguments[0]].querySelectorAll('.tv-token'); "
        "return [...tokens].map((t) => [...t.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join(''))"
    )
    return "".join(page.js(code, panel))


def test_generate_inspect_and_fork_on_the_real_server(page, served):
    page.put("#beta-kind", "2")
    page.write(PROMPT)
    alone, guided = expected(served, "policy", ()), expected(served, "pargs", ("kind",), beta=2.0)
    assert [shown(page, 0), shown(page, 1)] == [alone.text, guided.text]
    page.token(1, 4).click()
    step = guided.trace[4]
    order = sorted(range(10), key=lambda i: -step.guided_log_probs[i])
    assert [row[2] for row in page.candidates()] == [f"{step.scores[i]:.2f}".replace("-", "−") for i in order]
    assert "Move β" in page.text(".tv-note"), "the page recomputes the step as the server did"
    assert len(page.all(".tv-path")) == 2, "the unguided text has scores too"
    other = next(place for place, i in enumerate(order) if step.candidate_ids[i] not in (step.token_id, 2))
    page.all(".tv-fork")[other].click()
    page.done()
    prompt_ids = served.models.tokenizer(PROMPT).input_ids
    ids = [*prompt_ids, *guided.token_ids[:4], step.candidate_ids[order[other]]]
    fork = expected(served, "pargs", ("kind",), ids=ids, length=11, beta=2.0)
    assert shown(page, 1).endswith(fork.text)
    assert len(page.tokens(1)) == 5 + len(fork.token_ids)
    ends = [row for row in page.all(".tv-fork[disabled]") if row.get_attribute("title") == "this token ends the text"]
    assert len(ends) == (2 in step.candidate_ids)


METHODS = {
    "pargs-greedy": {},
    "best-of-n": {"n": 3},
    "cd-blockwise": {"n": 2, "segment_length": 4},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:rad cuts scores")
def test_every_kind_of_method_is_shown(page, served, method):
    page.js(
        "const m = document.querySelector('#method'); m.value = arguments[0]; "
        "m.dispatchEvent(new Event('change', {bubbles: true}))", method,
    )  # fmt: skip
    for name, value in METHODS[method].items():
        page.put(f"#{name}", str(value))
    page.write(PROMPT)
    assert not page.one("#banner").is_displayed(), page.text("#banner")
    done = expected(served, method, ("kind",), settings=dict(METHODS[method]))
    assert shown(page, 1) == done.text
    page.token(1, 2).click()
    steered = done.trace[2].scores is not None
    assert page.text(".tv-note").startswith("Move β" if steered else "This token was drawn unguided.")
    assert f"scorer calls{done.scorer_calls}" in page.text(".tv-panel:last-child .tv-figures")


def test_chats_and_stop_texts(page, served):
    page.choose("chat")
    page.one("#messages textarea").send_keys("Hi there")
    page.put("#seed", str(SEED))
    done = expected(served, "pargs", ("kind",), prompt=CHAT, settings={"seed": SEED})
    stop = next(c for i, c in enumerate(done.text) if i and c not in done.text[:i])
    page.put("#stop-texts", stop.replace("\n", "\\n"))
    page.one("#run").click()
    page.done()
    cut = expected(served, "pargs", ("kind",), prompt=CHAT, settings={"seed": SEED, "stop": [stop]})
    assert cut.text == done.text[: done.text.index(stop)]
    assert len(page.tokens(1)) == len(cut.token_ids)
    beyond = page.js("return [...document.querySelectorAll('.tv-panel:last-child .tv-beyond')].length")
    assert beyond == 1, "the stop text was drawn, and is no part of the text"
    page.token(1, 0).click()
    page.all(".tv-fork:not([disabled])")[-1].click()
    page.done()
    assert not page.one("#banner").is_displayed(), page.text("#banner")
    assert len(page.all('[role="treeitem"]')) == 3


def test_a_first_visitor_chats_with_a_policy_that_has_a_template(page, served, browser):
    assert page.one('.tabs input[value="chat"]').is_selected()
    assert not page.one("#prompt").is_displayed()
    page.one("#run").click()
    assert page.js("return document.activeElement.getAttribute('aria-label')") == "message", "it waits for a message"
    assert page.all(".tv-panel") == []
    page.one("#messages textarea").send_keys("Hi there")
    page.put("#seed", str(SEED))
    page.one("#run").click()
    page.done()
    for panel, (method, names) in enumerate((("policy", ()), ("pargs", ("kind",)))):
        done = expected(served, method, names, prompt=CHAT, settings={"seed": SEED})
        assert shown(page, panel) == done.text != ""
    page.choose("text")  # what is chosen by hand is kept
    page.write(PROMPT)
    browser.refresh()
    page.ready()
    assert page.one('.tabs input[value="text"]').is_selected()
    assert page.one("#prompt").get_property("value") == PROMPT


def test_a_policy_without_a_template_is_given_text(browser):
    plain = Policy(tiny_models().policy.model, tiny_tokenizer())
    with serving(ServedModels(plain, {}, "tiny")) as alone, on_a_socket(alone) as url:
        page = Page(browser, url)
        page.ready()
        assert page.one('.tabs input[value="text"]').is_selected()
        assert not page.one('.tabs input[value="chat"]').is_enabled()
        assert "no chat template" in page.text("#chat-note")
        page.put("#max_tokens", "4")
        page.write(PROMPT)
        assert len(page.tokens(0)) == 4
        assert page.complaints() == []
        browser.get("about:blank")


def test_a_server_error_is_shown_at_its_field(page):
    page.put("#max_tokens", "120")  # with the prompt, over the context of 128 tokens
    page.write(PROMPT)
    assert "context" in page.text("#banner")
    field = page.one('[aria-invalid="true"]')
    assert field.get_property("id") in ("prompt", "max_tokens")
    page.complaints()  # the browser logs a refused request as an error of its own


def test_a_policy_without_scorers_is_shown(browser):
    with serving(ServedModels(tiny_models().policy, {}, "tiny")) as alone, on_a_socket(alone) as url:
        page = Page(browser, url)
        page.ready()
        page.put("#max_tokens", "8")
        page.write(PROMPT)
        assert len(page.all(".tv-panel")) == 1
        assert shown(page, 0) == expected(alone, "policy", (), length=8).text
        assert not page.one("#scorers").is_displayed()
        page.token(0, 2).click()
        page.all(".tv-fork:not([disabled])")[1].click()
        page.done()
        assert len(page.all('[role="treeitem"]')) == 2
        assert page.complaints() == []
