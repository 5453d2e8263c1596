"""Scores, comparisons, tokenization, and the endpoints that describe the server."""

import pytest

from helpers.naive import info
from helpers.other_tokenizers import reward_model_with, tokenizer_of
from helpers.scorer_kinds import kinds
from helpers.served import chat_tokenizer, close, events_of, serving
from helpers.tiny_models import tiny_policy, tiny_reward_model
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.serving.engine.models import ServedModels
from rgtg.tokenization.conversation import encode_source

PROMPT, SAID = "Once upon", [" a time", "", " x"]
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served():
    with serving() as made:
        yield made


# Scores


@pytest.mark.parametrize("kind", list(kinds()[1]))
@pytest.mark.parametrize("finished", [True, False])
def test_scores_equal_their_definition(kind, finished):
    policy, scorers = kinds()
    scorer, by_definition = scorers[kind]
    with serving(ServedModels(policy, {"it": scorer}, "tiny")) as served:
        told = served.post("/v1/score", prompt=PROMPT, completion=SAID, finished=finished, prefixes=True).json()
        plain = served.post("/v1/score", prompt=PROMPT, completion=SAID[0], finished=finished).json()
    tokenizer = policy.tokenizer
    prompt = tokenizer(PROMPT).input_ids
    for text, row in zip(SAID, told["data"], strict=True):
        ids = [*tokenizer(text).input_ids, *([2] if finished and scorer.append_eos else [])]
        if not ids:  # an empty text is worth what its prompt is
            assert row["score"] == pytest.approx(float(by_definition(prompt)), abs=1e-4)
            continue
        assert [one["token_id"] for one in row["prefixes"]] == ids
        for i, one in enumerate(row["prefixes"], 1):
            assert one["score"] == pytest.approx(float(by_definition([*prompt, *ids[:i]])), abs=1e-4)
        assert row["score"] == row["prefixes"][-1]["score"]
    assert close(plain["data"], [{"index": 0, "score": told["data"][0]["score"]}])
    assert told["model"] == "it"


def test_scores_by_another_tokenizer():
    tokenizer = tokenizer_of("byte-level")
    other = PrefixScorer(reward_model_with(tokenizer), tokenizer, name="other")
    models = ServedModels(Policy(tiny_policy(), chat_tokenizer()), {"other": other}, "tiny")
    text = CrossTokenizerScorer(other)
    with serving(models) as served:
        told = served.post("/v1/score", prompt=PROMPT, completion=[" a b"], prefixes=True).json()["data"][0]
        tokenizer.chat_template = chat_tokenizer().chat_template
        chat = served.post("/v1/score", messages=CHAT, completion="x").json()["data"][0]
    prefixes = [text.score([PROMPT], [" a b"[:i]], finished=False)[0] for i in range(1, 4)]
    assert [one["score"] for one in told["prefixes"][:-1]] == pytest.approx(prefixes, abs=1e-4)
    assert told["score"] == pytest.approx(text.score([PROMPT], [" a b"])[0], abs=1e-4)
    assert chat["score"] == pytest.approx(text.score([CHAT], ["x"])[0], abs=1e-4)


def test_scores_of_a_chat(served):
    scorer = served.models.scorers["kind"]
    (text, _) = encode_source(served.models.tokenizer, CHAT)
    told = served.post("/v1/score", model="kind", messages=CHAT, completion="x").json()
    assert told["data"][0]["score"] == pytest.approx(scorer.score([text], ["x"], templated=True)[0], abs=1e-4)


# Comparisons


def sides(served, guidance, **settings):
    scorers = [served.models.scorers[name] for name in guidance["scorers"]]
    guided = GuidedPolicy(served.models.policy, scorers, method=guidance.get("method", "pargs"))
    alone = GuidedPolicy(served.models.policy, method="policy", top_k=guidance.get("top_k", 10))
    more = {name: guidance[name] for name in ("n", "beta", "top_k") if name in guidance}
    return [
        policy.generate([PROMPT], seed=4, max_new_tokens=10, **settings, **(more if policy is guided else {}))[0]
        for policy in (alone, guided)
    ]


@pytest.mark.parametrize(
    "guidance", [{"scorers": ["kind"], "beta": 3.0, "top_k": 6}, {"method": "best-of-n", "scorers": ["kind"], "n": 3}]
)
def test_both_sides_of_a_comparison_use_the_same_seed(served, guidance):
    unguided, guided = sides(served, guidance)
    asked = {"prompt": PROMPT, "guidance": guidance, "seed": 4, "max_tokens": 10}
    told = served.post("/v1/compare", **asked).json()
    assert (told["unguided"]["token_ids"], told["guided"]["token_ids"]) == (unguided.token_ids, guided.token_ids)
    assert (told["unguided"]["text"], told["guided"]["text"]) == (unguided.text, guided.text)
    pairs = zip(unguided.token_ids, guided.token_ids, strict=False)
    assert told["first_divergence"] == next(i for i, (a, b) in enumerate(pairs) if a != b)
    assert told["unguided"]["guidance"]["method"] == "policy"
    assert {step["scores"] for step in told["unguided"]["guidance"]["trace"]} == {None}
    assert [step["token_id"] for step in told["guided"]["guidance"]["trace"]] == guided.token_ids
    assert told["seed"] == 4

    events, done = events_of(served.post("/v1/compare", **asked, stream=True))
    assert done
    for side in ("unguided", "guided"):
        mine = [event for event in events if event.get("side") == side]
        assert "".join(event["text"] for event in mine) == told[side]["text"]
        assert [event["token_id"] for event in mine if "token_id" in event] == told[side]["token_ids"]
        trace = [step for event in mine for step in event["guidance"].get("trace", [])]
        assert close(trace, told[side]["guidance"]["trace"])
        assert mine[-1]["finish_reason"] == told[side]["finish_reason"]
        assert "trace" not in mine[-1]["guidance"]
    assert events[-1]["object"] == "comparison.summary"
    assert events[-1]["first_divergence"] == told["first_divergence"]
    assert events[-1]["usage"]["completion_tokens"] == len(unguided.token_ids) + len(guided.token_ids)


def test_comparisons_of_chats_and_of_tokens(served):
    guidance = {"scorers": ["kind"], "trace": False}
    told = served.post("/v1/compare", messages=CHAT, guidance=guidance, max_tokens=3, model="tiny").json()
    assert "trace" not in told["guided"]["guidance"]
    ids = served.post("/tokenize", prompt=PROMPT).json()["tokens"]
    asked = {"guidance": {"scorers": ["kind"]}, "max_tokens": 5, "seed": 1}
    one, other = (served.post("/v1/compare", prompt=prompt, **asked).json() for prompt in (ids, PROMPT))
    assert one["guided"]["text"] == other["guided"]["text"]


def test_a_comparison_with_beta_0_has_no_divergence(served):
    guidance = {"scorers": {"kind": 0.0}}
    told = served.post("/v1/compare", prompt=PROMPT, guidance=guidance, seed=1, max_tokens=4).json()
    assert told["first_divergence"] is None


# Tokens


def test_tokenize_and_detokenize_round_trip(served):
    told = served.post("/tokenize", prompt="Hi you").json()
    assert told["count"] == len(told["tokens"]) == 6
    assert "".join(told["token_strs"]) == "Hi you"
    assert told["max_model_len"] == 128
    assert served.post("/detokenize", tokens=told["tokens"]).json() == {"prompt": "Hi you"}
    assert served.post("/detokenize", tokens=[0, 5, 2]).json() == {"prompt": "<s>a</s>"}
    chat = served.post("/tokenize", messages=CHAT).json()
    assert "".join(chat["token_strs"]) == encode_source(served.models.tokenizer, CHAT)[0].replace(
        "\n", chat["token_strs"][8]
    )
    assert served.post("/tokenize", prompt="").json()["tokens"] == []


def test_tokenize_adds_special_tokens_on_request():
    tokenizer = tokenizer_of("byte-level-bos")
    from helpers.other_tokenizers import policy_with

    with serving(ServedModels(Policy(policy_with(tokenizer), tokenizer), {}, "tiny")) as served:
        with_them = served.post("/tokenize", prompt="a").json()
        without = served.post("/tokenize", prompt="a", add_special_tokens=False).json()
    assert with_them["tokens"] == [0, *without["tokens"]]
    assert with_them["token_strs"][0] == "<s>"


# Biased logits


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_logit_bias_is_that_of_generate(served, path):
    guided = GuidedPolicy(served.models.policy, served.models.scorers["kind"])
    bias = {7: 5.5, 40: -100.0, 2: -100.0}
    asked = {"messages": CHAT} if "chat" in path else {"prompt": PROMPT}
    told = served.post(
        path, model="tiny+kind", **asked, logit_bias={str(t): b for t, b in bias.items()}, seed=4, max_tokens=12
    ).json()["choices"][0]
    source = CHAT if "chat" in path else PROMPT
    done, plain = (guided.generate([source], seed=4, max_new_tokens=12, logit_bias=b)[0] for b in (bias, {}))
    assert (told["message"]["content"] if "chat" in path else told["text"]) == done.text != plain.text
    assert 40 not in done.token_ids
    assert len(done.token_ids) == 12, "no token ends it"


# Description of the server


def test_guidance_endpoint_lists_scorers_methods_and_limits(served):
    told = served.client.get("/v1/guidance").json()
    assert [scorer["name"] for scorer in told["scorers"]] == ["kind", "brief"]
    assert told["scorers"][0] == {"name": "kind", "objective": "prefix-bt", "kind": "prefix", "max_length": 128}
    assert [method["name"] for method in told["methods"]] == list(METHODS)
    assert told["chat_template"] is True
    assert told["limits"]["max_batch"] == served.settings.max_batch
    for kind, (scorer, _) in kinds()[1].items():
        with serving(ServedModels(kinds()[0], {}, "tiny")) as other:
            other.models.scorers["it"] = scorer
            (card,) = other.client.get("/v1/guidance").json()["scorers"]
        names = {"separate": "prefix", "state": "head", "vocab": "head", "vocabulary scorer": "vocabulary"}
        assert card["kind"] == names.get(kind, kind)


def test_the_openapi_document_names_every_route(served):
    document = served.client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/compare", "/v1/score", "/v1/models", "/v1/models/{model}",
        "/v1/guidance", "/tokenize", "/detokenize", "/livez", "/readyz", "/health", "/version", "/metrics",
    }  # fmt: skip
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False
    assert "tools" not in chat["properties"]


# A variable that the caller may set, and names.
BRIEF = (
    "{% for m in messages %}{{ m.name }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}a:{{ ' no' if brief }}{% endif %}"
)


@pytest.fixture(scope="module")
def with_variables():
    """A policy and a scorer with templates of their own that read ``brief``."""
    policy = Policy(tiny_policy(), chat_tokenizer())
    other = PrefixScorer(tiny_reward_model(seed=5), chat_tokenizer(), info=info())
    policy.tokenizer.chat_template, other.tokenizer.chat_template = BRIEF, BRIEF.replace("no", "Never")
    with serving(ServedModels(policy, {"other": other}, "tiny")) as made:
        yield made, policy, other


NAMED = [{"role": "user", "name": "Ann", "content": "Hi"}]
PARTS = [{"role": "user", "name": "Ann", "content": [{"type": "text", "text": text} for text in "Hi"]}]
BY_PATH = {
    "/tokenize": {}, "/v1/score": {"completion": "x"}, "/v1/chat/completions": {"model": "tiny"}, "/v1/compare": {},
}  # fmt: skip


@pytest.mark.parametrize("path", BY_PATH)
def test_unknown_variables_and_other_templates_are_refused(with_variables, path):
    def error(**body):
        answer = with_variables[0].post(path, messages=NAMED, **BY_PATH[path], **body)
        assert answer.status_code == 400
        return answer.json()["error"]

    unknown = error(chat_template_kwargs={"brief": True, "long": 1})
    assert unknown["param"] == "chat_template_kwargs"
    assert "does not read long; it reads brief" in unknown["message"]
    assert error(chat_template_kwargs=[1])["param"].startswith("chat_template_kwargs")
    template = error(chat_template="{{ messages }}")
    assert template["param"] == "chat_template"
    assert "set their variables with chat_template_kwargs" in template["message"]


def test_variables_of_the_chat_template_and_names(with_variables):
    served, policy, other = with_variables
    guided = GuidedPolicy(policy, other, method="pargs", beta=2.0)
    brief = {"brief": True}
    texts, scores = [], []
    for more in ({}, {"chat_template_kwargs": brief}):
        texts.append("".join(served.post("/tokenize", messages=PARTS, **more).json()["token_strs"]))
        asked = {"messages": PARTS, "completion": "x", "finished": False}
        scores.append(served.post("/v1/score", **asked, **more).json()["data"][0]["score"])
        assert scores[-1] == pytest.approx(other.score([NAMED], ["x"], finished=False, **more)[0], abs=1e-4)
        (expected,) = guided.generate([NAMED], seed=11, max_new_tokens=6, **more)
        answer = served.post("/v1/chat/completions", model="tiny+other", messages=PARTS, max_tokens=6, seed=11,
                             guidance={"beta": 2.0}, **more)  # fmt: skip
        assert answer.json()["choices"][0]["message"]["content"] == expected.text
        assert served.post("/v1/compare", messages=PARTS, max_tokens=3, **more).status_code == 200
    assert texts == ["Ann: Hi a:", "Ann: Hi a: no"]
    assert scores[0] != pytest.approx(scores[1])


@pytest.mark.parametrize("path", ["/tokenize", "/v1/score", "/v1/compare"])
def test_variables_without_messages_are_refused(with_variables, path):
    answer = with_variables[0].post(path, prompt="Hi", chat_template_kwargs={"brief": True}, **BY_PATH[path])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")
