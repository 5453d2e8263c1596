"""Errors: unsupported and invalid parameters, bodies and limits, in OpenAI's format."""

import pytest

from helpers.served import FOLDER, events_of, serving
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.serving.engine.models import ServedModels

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}


@pytest.fixture(scope="module")
def served():
    with serving(max_tokens=50, max_batch=4, max_prompts=3, max_candidates=20, max_body_kib=8) as made:
        yield made


def refused(answer, status=400, param=None, code=None, says=""):
    """Assert an error in OpenAI's format that reveals no path of this machine."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["param"] == param, error
    assert says in error["message"]
    assert code is None or error["code"] == code
    assert error["request_id"] == answer.headers["x-request-id"]
    assert FOLDER not in answer.text
    assert "Traceback" not in answer.text


UNSUPPORTED = {
    "audio": {}, "frequency_penalty": 0.5, "function_call": "auto", "functions": [{"name": "f"}],
    "metadata": {"a": "b"}, "modalities": ["audio"], "parallel_tool_calls": True,
    "prediction": {"type": "content"}, "presence_penalty": -1, "prompt_cache_key": "k", "reasoning_effort": "low",
    "response_format": {"type": "json_object"}, "safety_identifier": "x", "service_tier": "flex", "store": True,
    "tool_choice": "auto", "tools": [{"type": "function"}], "verbosity": "low", "web_search_options": {},
}  # fmt: skip
WITHOUT_EFFECT = {
    "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
    "store": False, "tools": [], "tool_choice": "none", "metadata": None, "modalities": ["text"],
    "service_tier": "auto",
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_chat_parameters_are_refused(served, name):
    answer = served.post("/v1/chat/completions", **CHAT, **{name: UNSUPPORTED[name]})
    refused(answer, param=name, code="unsupported_parameter", says=f"{name}: not supported")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("response_format", {"type": "json_schema", "json_schema": {}}, "ask for it in a message, and check the reply"),
        ("tools", [{"type": "function", "function": {"name": "f"}}], "describe the tools in a message"),
        ("tool_choice", "required", "not parsed into tool calls"),
        ("functions", [{"name": "f"}], "not parsed into tool calls"),
        ("frequency_penalty", 0.1, "use logit_bias"),
    ],
)
def test_the_reason_of_a_refusal_is_given(served, path, name, value, why):
    body = (CHAT if "chat" in path else TEXT) | {name: value}
    refused(served.post(path, **body), param=name, code="unsupported_parameter", says=why)


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_of", 2), ("suffix", "end"), ("presence_penalty", 1), ("tools", [{}]), ("response_format", {"type": "x"})],
)
def test_unsupported_completion_parameters_are_refused(served, name, value):
    refused(served.post("/v1/completions", **TEXT, **{name: value}), param=name, code="unsupported_parameter")


def test_values_without_effect_are_accepted(served):
    assert served.post("/v1/chat/completions", **CHAT, **WITHOUT_EFFECT).status_code == 200
    without_effect = {"best_of": 1, "echo": False, "suffix": None, "presence_penalty": 0}
    assert served.post("/v1/completions", **TEXT, **without_effect).status_code == 200


WRONG = [
    ("/v1/chat/completions", CHAT | {"stop": ["a"] * 5}, "stop"),
    ("/v1/chat/completions", CHAT | {"stop": ""}, "stop"),
    ("/v1/chat/completions", CHAT | {"temperature": 2.5}, "temperature"),
    ("/v1/chat/completions", CHAT | {"temperature": "1"}, "temperature"),
    ("/v1/chat/completions", CHAT | {"top_p": 0}, "top_p"),
    ("/v1/chat/completions", CHAT | {"max_tokens": 0}, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"max_tokens": 51}, "max_tokens"),
    ("/v1/chat/completions", CHAT | {"max_completion_tokens": 3}, None),
    ("/v1/chat/completions", CHAT | {"n": 5}, "n"),
    ("/v1/chat/completions", CHAT | {"n": True}, "n"),
    ("/v1/chat/completions", CHAT | {"seed": 2**63}, "seed"),
    ("/v1/chat/completions", CHAT | {"seed": 1.5}, "seed"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 3}, None),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}}, None),
    ("/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ("/v1/chat/completions", CHAT | {"messages": []}, "messages"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0].type"),
    ("/v1/chat/completions", {"messages": MESSAGES}, "model"),
    ("/v1/completions", TEXT | {"prompt": []}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": ""}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": [[]]}, "prompt[0]"),
    ("/v1/completions", TEXT | {"prompt": [1, "a"]}, "prompt[1]"),
    ("/v1/completions", TEXT | {"prompt": [64]}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": [2**70]}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": ["a"] * 4}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": {}}, "prompt"),
    ("/v1/completions", TEXT | {"logprobs": True}, "logprobs"),
    ("/v1/completions", TEXT | {"logit_bias": {"64": 1}}, "logit_bias"),
    ("/v1/completions", TEXT | {"logit_bias": {"5": 100.5}}, "logit_bias.5"),
    ("/v1/chat/completions", CHAT | {"logit_bias": {"five": 1}}, "logit_bias.five"),
    ("/v1/chat/completions", CHAT | {"logit_bias": {"-5": 1}}, "logit_bias"),
    ("/v1/chat/completions", CHAT | {"logit_bias": [5]}, "logit_bias"),
    ("/v1/completions", TEXT | {"unheard_of": 1}, "unheard_of"),
    ("/v1/completions", TEXT | {"guidance": {"beto": 1}}, "guidance.beto"),
    ("/v1/completions", TEXT | {"guidance": []}, "guidance"),
    ("/v1/completions", TEXT | {"guidance": {"beta": 1}}, "guidance.scorers"),
    ("/v1/completions", TEXT | {"guidance": {"method": "magic"}}, "guidance.method"),
    ("/v1/completions", TEXT | {"guidance": {"scorers": ["nobody"]}}, "guidance.scorers"),
    ("/v1/completions", TEXT | {"guidance": {"scorers": ["kind", "kind"]}}, "guidance.scorers"),
    ("/v1/completions", TEXT | {"guidance": {"scorers": {"kind": 1}, "beta": 1}}, "guidance"),
    ("/v1/completions", TEXT | {"guidance": {"scorers": {"kind": 1e300}}}, "guidance.scorers.kind"),
    ("/v1/completions", TEXT | {"guidance": {"scorers": ["kind"], "top_k": 21}}, "guidance.top_k"),
    ("/v1/completions", TEXT | {"guidance": {"scorers": ["kind"], "top_k": None}}, "guidance.top_k"),
    ("/v1/completions", TEXT | {"guidance": {"top_k": None, "trace": True}}, "guidance.top_k"),
    ("/v1/completions", TEXT | {"guidance": {"top_k": None}, "logprobs": 1}, "guidance.top_k"),
    ("/v1/completions", TEXT | {"guidance": {"method": "policy", "scorers": ["kind"]}}, "guidance.scorers"),
    ("/v1/completions", TEXT | {"guidance": {"method": "policy", "beta": 2}}, "guidance.beta"),
    ("/v1/completions", TEXT | {"guidance": {"method": "best-of-n", "scorers": {"kind": 2}}}, "guidance.scorers"),
    ("/v1/completions", TEXT | {"guidance": {"method": "best-of-n", "scorers": ["kind"], "n": 5}}, "guidance.n"),
    ("/v1/completions",
     TEXT | {"guidance": {"method": "best-of-n", "scorers": ["kind", "brief"], "n": 2}}, "guidance.scorers"),
    ("/v1/completions", TEXT | {"guidance": {"method": "farma", "scorers": ["kind"]}}, "guidance.method"),
    ("/v1/completions", TEXT | {"guidance": {"method": "cards", "scorers": ["kind"]}}, "guidance.reward_threshold"),
    ("/v1/completions", TEXT | {"guidance": {"scorers": ["kind"], "retries": 2}}, "guidance.retries"),
    ("/v1/completions",
     TEXT | {"temperature": 0.5, "guidance": {"method": "pargs-greedy", "scorers": ["kind"]}}, "temperature"),
    ("/v1/compare", {"prompt": "Hi"}, "guidance.scorers"),
    ("/v1/compare", {"prompt": "Hi", "guidance": {"method": "policy"}}, "guidance.method"),
    ("/v1/compare", {"prompt": "Hi", "n": 2}, "n"),
    ("/v1/compare", {"guidance": {"scorers": ["kind"]}}, None),
    ("/v1/score", {"prompt": "Hi", "completion": "x"}, "model"),
    ("/v1/score", {"model": "kind", "completion": "x"}, None),
    ("/v1/score", {"model": "kind", "prompt": "Hi", "completion": []}, "completion"),
    ("/v1/score", {"model": "kind", "prompt": "Hi", "completion": ["a"] * 4}, "completion"),
    ("/v1/score", {"model": "kind", "prompt": "", "completion": "a"}, "prompt"),
    ("/v1/score", {"model": "kind", "prompt": "Hi", "completion": "a" * 200}, "completion"),
    ("/tokenize", {}, None),
    ("/detokenize", {"tokens": [64]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_errors_name_the_parameter(served, path, body, param):
    refused(served.post(path, **body), param=param)


BEST = {"method": "best-of-n", "scorers": ["kind"]}
CARDS = {"method": "cards", "scorers": ["kind"], "reward_threshold": 1.0}
SAID = [
    ({"max_tokens": 51}, "max_tokens", "max_tokens: this server makes at most 50 new tokens"),
    ({"prompt": "x" * 100, "max_tokens": 50}, "prompt", "shorten the prompt or lower max_tokens"),
    (
        {"temperature": 0.5, "guidance": BEST | {"method": "args"}},
        "temperature",
        "args takes the maximum and has no temp",
    ),
    ({"guidance": BEST | {"beta": 2}}, "guidance.beta", "best-of-n has no guidance.beta: it takes"),
    ({"guidance": BEST | {"scorers": {"kind": 2}}}, "guidance.scorers", "guidance.scorers: best-of-n has no beta"),
    ({"guidance": {"beta": 1, "method": "policy"}}, "guidance.beta", "policy has no guidance.beta"),
    ({"guidance": {"n": 2, "scorers": ["kind"]}}, "guidance.n", "guidance.n: n applies to cd-blockwise, best-of-n"),
    ({"guidance": {"scorers": ["kind"], "retries": 2}}, "guidance.retries", "guidance.retries applies to cards,"),
    ({"guidance": {"scorers": ["kind"], "top_k": 21}}, "guidance.top_k", "guidance.top_k = 21: kind reads every"),
    ({"guidance": CARDS | {"segment_length": 51}}, "guidance.segment_length", "guidance.segment_length = 51; this"),
    (
        {"guidance": CARDS | {"reward_threshold": None}},
        "guidance.reward_threshold",
        "needs guidance.reward_threshold, the",
    ),
    ({"guidance": {"method": "farma", "scorers": ["kind"]}}, "guidance.method", "guidance.method: farma asks for"),
    ({"guidance": BEST | {"scorers": ["kind", "brief"]}}, "guidance.scorers", "guidance.scorers: several scorers"),
    ({"guidance": {"scorers": ["kind", "kind"]}}, "guidance.scorers", "guidance.scorers: a scorer is named twice"),
]


@pytest.mark.parametrize(("body", "param", "says"), SAID)
def test_error_messages_use_the_requests_field_names(served, body, param, says):
    answer = served.post("/v1/completions", **TEXT | body)
    refused(answer, param=param, says=says)
    assert "max_new_tokens" not in answer.text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length_errors_use_the_field_that_the_request_used(served, name):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 90}]}
    answer = served.post("/v1/chat/completions", **chat, **{name: 50})
    refused(answer, param="messages", code="context_length_exceeded", says=f"lower {name}")
    refused(served.post("/v1/chat/completions", **chat, **{name: 51}), param=name, says=f"{name}: ")


def test_a_comparison_with_too_many_draws_is_refused(served):
    asked = {"prompt": "Hi", "max_tokens": 2, "guidance": BEST | {"n": 4}}
    refused(served.post("/v1/compare", **asked), param="guidance.n", says="guidance.n: 5 completions at once")
    assert served.post("/v1/compare", **asked | {"guidance": BEST | {"n": 3}}).status_code == 200


def test_more_prompts_than_queue_and_batch_are_refused():
    with serving(max_batch=1, max_queue=1, max_prompts=9) as served:
        answer = served.post("/v1/completions", **TEXT | {"prompt": ["a"] * 3})
    refused(answer, param="prompt", says="3 prompts in one request; this server takes at most 2")


def test_errors_suggest_what_was_meant(served):
    refused(served.post("/v1/completions", **TEXT, top_k=5), param="top_k", says="did you mean guidance.top_k?")
    answer = served.post("/v1/completions", **TEXT, chat_template_kwargs={"a": 1})
    refused(answer, param="chat_template_kwargs", says="it is for chats: /v1/chat/completions")
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "echo": True}
    refused(served.post("/v1/chat/completions", **asked), param="echo", says="it is for /v1/completions")
    answer = served.post("/v1/completions", **TEXT | {"model": "gpt"})
    refused(answer, 404, "model", "model_not_found", "tiny, tiny+kind, tiny+brief")
    refused(served.client.get("/v1/models/gpt"), 404, "model", "model_not_found")
    refused(served.post("/v1/score", model="x", prompt="a", completion="b"), 404, "model")


def test_prompts_longer_than_the_context_are_refused(served):
    for body in (TEXT | {"prompt": "x" * 127}, TEXT | {"prompt": "x" * 500}):
        refused(served.post("/v1/completions", **body), param="prompt", code="context_length_exceeded", says="context")
    long = [{"role": "user", "content": "x" * 120}]
    answer = served.post("/v1/chat/completions", model="tiny", messages=long, max_tokens=50)
    refused(answer, param="messages", code="context_length_exceeded")


def test_chat_template_errors_are_reported():
    plain = ServedModels(Policy(tiny_policy(), tiny_tokenizer()), {}, "tiny")
    with serving(plain) as served:
        refused(served.post("/v1/chat/completions", **CHAT), param="messages", says="no chat template")
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('users first') }}"
    with serving(ServedModels(Policy(tiny_policy(), strict), {}, "tiny")) as served:
        refused(served.post("/v1/chat/completions", **CHAT), param="messages", says="users first")


BODIES = [
    (b"", "invalid_json"), (b"{", "invalid_json"), (b"[" * 100_00, "invalid_json"), (b'{"model": NaN}', "invalid_json"),
    (b'{"model": "\\ud800"}', "invalid_json"), (b"\xff\xfe", "invalid_json"), (b'"text"', None), (b"[]", None),
    (b"null", None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code"), BODIES)
def test_invalid_bodies_are_refused(served, body, code):
    answer = served.client.post("/v1/completions", content=body[:7000], headers={"content-type": "application/json"})
    refused(answer, code=code)


def test_other_content_types_are_refused(served):
    body = b'{"model": "tiny", "prompt": "Hi", "max_tokens": 1}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; boundary=x"):
        answer = served.client.post("/v1/completions", content=body, headers={"content-type": kind})
        refused(answer, 415, code="not_json")
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert served.client.post("/v1/completions", content=body, headers=kind).status_code == 200


def test_unknown_paths_and_methods(served):
    refused(served.client.get("/nowhere"), 404)
    answer = served.client.get("/v1/completions")
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_large_bodies_are_refused(served):
    many = b'{"model": "' + b"x" * 9000 + b'"}'
    kind = {"content-type": "application/json"}
    refused(served.client.post("/v1/completions", content=many, headers=kind), 413, code="body_too_large")
    pieces = (many[i : i + 1000] for i in range(0, len(many), 1000))  # sent in chunks, without a length
    refused(served.client.post("/v1/completions", content=pieces, headers=kind), 413, code="body_too_large")


def broken(nan=True):
    """A model whose logits are NaN."""
    model = tiny_reward_model()
    if nan:
        model.score.weight.fill_(float("nan"))
    return PrefixScorer(model, tiny_tokenizer(), name=f"{FOLDER}/broken")


@pytest.mark.filterwarnings("ignore:.*was trained on an unknown objective")
def test_nan_fails_only_its_request():
    models = ServedModels(
        Policy(tiny_policy(), tiny_tokenizer()), {"broken": broken(), "fine": broken(nan=False)}, "tiny"
    )
    body = TEXT | {"max_tokens": 5}
    with serving(models) as served:
        answer = served.post("/v1/completions", **body | {"model": "tiny+broken"})
        refused(answer, 500, code="non_finite")
        assert answer.headers["x-should-retry"] == "false"
        events, done = events_of(served.post("/v1/completions", **body | {"model": "tiny+broken"}, stream=True))
        assert events[-1]["error"]["code"] == "non_finite"
        assert not done
        refused(served.post("/v1/score", model="broken", prompt="Hi", completion="x"), 500, code="non_finite")
        assert served.post("/v1/completions", **body | {"model": "tiny+fine"}).status_code == 200
        assert "rgtg:nan_total 3.0" in served.client.get("/metrics").text
    with serving(models, on_nan="unguided") as served:
        choice = served.post("/v1/completions", **body | {"model": "tiny+broken"}).json()["choices"][0]
        assert choice["guidance"]["fallback"] is True
        assert "rgtg:fallback_total 1.0" in served.client.get("/metrics").text


@pytest.mark.parametrize("number", [0, 2**31, 10**30, 10**4000])
@pytest.mark.parametrize("where", ["n", "max_tokens", "guidance.n", "guidance.top_k", "guidance.segment_length"])
def test_out_of_range_numbers_are_refused(where, number):
    outer, _, inner = where.partition(".")
    body = {"model": "tiny", "prompt": "a", outer: {inner: number} if inner else number}
    with serving() as served:
        answer = served.post("/v1/completions", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, where)
