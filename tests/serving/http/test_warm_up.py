"""Warm-up: what the first requests would set up is set up before the server is ready."""

import logging

import pytest

from helpers.naive import info
from helpers.scorer_kinds import kinds
from helpers.served import TEMPLATE, Served, chat_tokenizer, scorer, settings
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.runners import model_runner
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.serving.engine.engine import Engine
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.http import warm_up as module
from rgtg.serving.http.warm_up import warm_up


@pytest.fixture
def models():
    return ServedModels(Policy(tiny_policy(), chat_tokenizer()), {"kind": scorer(1)}, "tiny")


@pytest.fixture
def running(models):
    engine = Engine(models, settings())
    engine.start()
    yield engine
    engine.stop()


def asked(monkeypatch):
    """The requests of the warm-up and their status."""
    seen, post = [], module._post

    async def watched(app, path, body, headers):
        status, answer = await post(app, path, body, headers)
        seen.append((path, body, status))
        return status, answer

    monkeypatch.setattr(module, "_post", watched)
    return seen


def test_every_way_of_decoding_is_tried_once_and_forgotten(running, monkeypatch, caplog):
    seen = asked(monkeypatch)
    with caplog.at_level(logging.INFO, logger="rgtg.serving"):
        warm_up(running, running.settings)
    assert {status for _, _, status in seen} == {200}
    ways = {body.get("guidance", {}).get("method", "policy") for path, body, _ in seen if path == "/v1/completions"}
    assert ways == {"policy", "pargs", "cd-blockwise", "cards", "best-of-n"}
    assert {path for path, _, _ in seen} == {"/v1/completions", "/v1/chat/completions", "/v1/score"}
    now = running.snapshot()
    assert (now.running, now.waiting, now.prefix_bytes, now.prompt_tokens, now.cached_tokens) == (0,) * 5
    assert (now.scorer_seconds, now.nan, now.cache_bytes) == ({}, 0, 0)
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == ["warmed up"], "no line per request"


def test_models_are_probed_before_the_server_is_ready(running, models, monkeypatch):
    probed, probe = [], model_runner._probe_agrees
    monkeypatch.setattr(model_runner, "_probe_agrees", lambda *args: probed.append(args[0]) or probe(*args))
    warm_up(running, running.settings)
    assert set(map(id, probed)) == {id(models.policy.model), id(models.scorers["kind"].model)}
    made = Served.__new__(Served)
    made._open(running)
    count = len(probed)
    for path, what in (("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", {"messages": [
        {"role": "user", "content": "Hi"}]})):  # fmt: skip
        for model in ("tiny", "tiny+kind"):
            assert made.post(path, model=model, max_tokens=2, **what).status_code == 200
    assert len(probed) == count


def test_the_same_seed_gives_the_same_text_as_without(models):
    body = {"model": "tiny+kind", "prompt": "Once upon", "max_tokens": 8, "seed": 3}
    texts = []
    for warm in (False, True):
        made = Served(models)
        if warm:
            warm_up(made.engine, made.settings)
        answer = made.post("/v1/completions", **body).json()
        texts.append((answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]))
        made.close()
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", list(kinds()[1]))
def test_every_kind_of_scorer_is_warmed_up(kind, monkeypatch):
    policy, scorers = kinds()
    engine = Engine(ServedModels(policy, {"it": scorers[kind][0]}, "tiny"), settings())
    engine.start()
    seen = asked(monkeypatch)
    warm_up(engine, engine.settings)
    engine.stop()
    guided = [(body["guidance"]["method"], status) for _, body, status in seen if "guidance" in body]
    assert ("pargs", 200) in guided
    assert {status for _, status in guided} <= {200, 400}, "400: the method does not take the scorer"
    if kind in ("vocab", "vocabulary scorer"):
        assert {("farma", 200), ("genarm", 200)} <= set(guided)


@pytest.mark.parametrize("broken", ["nan", "key", "short context", "small limits"])
def test_nothing_stops_a_server_from_starting(broken, monkeypatch, caplog):
    tokenizer, policy, given = tiny_tokenizer(), tiny_policy(), {}
    reward = tiny_reward_model()
    if broken == "nan":
        reward.score.weight.fill_(float("nan"))
    if broken == "key":
        given = {"api_key": "geheim", "host": "0.0.0.0", "allowed_host": ["example.org"]}
    if broken == "short context":
        policy.config.max_position_embeddings = 5
        tokenizer.chat_template = TEMPLATE
    if broken == "small limits":
        given = {"max_tokens": 1, "max_batch": 1, "max_queue": 1, "max_candidates": 3, "prefix_cache_mib": 0}
    models = ServedModels(
        Policy(policy, tokenizer), {"it": PrefixScorer(reward, tokenizer, info=info("prefix-bt"), name="it")}, "tiny"
    )
    engine = Engine(models, settings(**given))
    engine.start()
    seen = asked(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="rgtg.serving"):
        warm_up(engine, engine.settings)
    engine.stop()
    assert seen[0][2] == 200
    warned = [record.getMessage() for record in caplog.records]
    if broken == "nan":
        assert any("requests for tiny+it with method pargs get status 500" in text for text in warned)
    else:
        assert warned == []
