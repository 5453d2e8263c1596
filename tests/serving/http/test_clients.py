"""OpenAI's SDK and curl against the server: answers equal those of GuidedPolicy, streamed or not."""

import json
import subprocess

import openai
import pytest
from openai import OpenAI

from helpers.served import close, events_of, on_a_socket, serving
from rgtg.decoding.guided_policy import GuidedPolicy

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi there"}]
# The field ``guidance``, and the same settings in Python.
GUIDED = [
    ({}, ("policy", (), {})),
    ({"scorers": ["kind"], "beta": 2.0}, ("pargs", ("kind",), {"beta": 2.0})),
    ({"scorers": {"kind": 1.5, "brief": -0.5}, "top_k": 5}, 
     ("pargs", ("kind", "brief"), {"beta": [1.5, -0.5], "top_k": 5})),
    ({"scorers": ["brief"], "entropy_gate": 1.0}, ("pargs", ("brief",), {"entropy_gate": 1.0})),
    ({"method": "pargs-greedy", "scorers": ["kind"]}, ("pargs-greedy", ("kind",), {})),
    ({"method": "best-of-n", "scorers": ["kind"], "n": 3}, ("best-of-n", ("kind",), {"n": 3})),
    ({"method": "cd-blockwise", "scorers": ["kind"], "n": 2, "segment_length": 3},
     ("cd-blockwise", ("kind",), {"n": 2, "segment_length": 3})),
    ({"top_k": None}, ("policy", (), {"top_k": None})),
]  # fmt: skip


@pytest.fixture(scope="module")
def served():
    with serving() as made:
        yield made


def expected(served, how, prompt, n=1, **settings):
    method, names, own = how
    scorers = [served.models.scorers[name] for name in names]
    beta = own.get("beta")
    guided = GuidedPolicy(served.models.policy, scorers or None, method=method, beta=beta)
    return guided.generate([prompt] * n, seed=11, **{"max_new_tokens": 12, **settings, **own})


@pytest.mark.parametrize(("guidance", "how"), GUIDED)
def test_completions_equal_guided_policy_streamed_or_not(served, guidance, how):
    (done,) = expected(served, how, "Once upon")
    asked = {"model": "tiny", "prompt": "Once upon", "max_tokens": 12, "seed": 11}
    whole = served.openai.completions.create(**asked, extra_body={"guidance": guidance})
    assert whole.choices[0].text == done.text
    assert whole.choices[0].finish_reason == done.finish_reason
    assert whole.usage.completion_tokens == len(done.token_ids)
    stream = served.openai.completions.create(**asked, stream=True, extra_body={"guidance": guidance})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [done.finish_reason]


def test_chat_equals_guided_policy(served):
    many = expected(served, ("pargs", ("kind",), {"beta": 2.0}), CHAT, n=3, temperature=0.7, top_p=0.9)
    asked = {
        "model": "tiny+kind", "messages": CHAT, "max_completion_tokens": 12, "seed": 11, "n": 3, "temperature": 0.7,
        "top_p": 0.9, "user": "somebody", "extra_body": {"guidance": {"beta": 2.0}},
    }  # fmt: skip
    whole = served.openai.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == [one.text for one in many]
    assert whole.choices[0].message.role == "assistant"
    texts = {0: "", 1: "", 2: ""}
    roles = []
    for chunk in served.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
    assert list(texts.values()) == [one.text for one in many]
    assert roles == ["assistant"] * 3
    assert chunk.choices == []
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens
    assert chunk.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1  # read before
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + sum(len(one.token_ids) for one in many)


def test_stop_texts_and_several_prompts(served):
    asked = {"model": "tiny", "max_tokens": 20, "seed": 11, "stop": ["e", "M"]}
    prompts = ["Once upon", "Hi"]
    many = [
        done
        for p in prompts
        for done in expected(served, ("policy", (), {}), p, n=2, max_new_tokens=20, stop=["e", "M"])
    ]
    whole = served.openai.completions.create(prompt=prompts, n=2, **asked)
    assert [choice.text for choice in whole.choices] == [done.text for done in many]
    assert "stop" in [choice.finish_reason for choice in whole.choices]
    texts = [""] * 4
    for chunk in served.openai.completions.create(prompt=prompts, n=2, **asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [done.text for done in many]


def test_a_prompt_of_token_ids_continues_them(served):
    ids = served.post("/tokenize", prompt="Once upon").json()["tokens"]
    (done,) = expected(served, ("policy", (), {}), "Once upon")
    for prompt in (ids, [ids]):
        made = served.openai.completions.create(model="tiny", prompt=prompt, max_tokens=12, seed=11)
        assert made.choices[0].text == done.text


def test_logprobs_are_of_the_guided_distribution(served):
    (done,) = expected(served, ("pargs", ("kind",), {"beta": 2.0}), CHAT, trace=True)
    made = served.openai.chat.completions.create(
        model="tiny+kind", messages=CHAT, max_tokens=12, seed=11, logprobs=True, top_logprobs=3,
        extra_body={"guidance": {"beta": 2.0}},
    )  # fmt: skip
    content = made.choices[0].logprobs.content
    assert sum(token.logprob for token in content) == pytest.approx(done.guided_log_prob, abs=1e-4)
    assert bytes(byte for token in content for byte in token.bytes).decode() == done.text
    for token, step in zip(content, done.trace, strict=True):
        order = sorted(zip(step.guided_log_probs, step.candidate_ids, strict=True), reverse=True)[:3]
        assert [one.logprob for one in token.top_logprobs] == pytest.approx([p for p, _ in order], abs=1e-4)
    streamed = served.openai.chat.completions.create(
        model="tiny+kind", messages=CHAT, max_tokens=12, seed=11, logprobs=True, top_logprobs=3, stream=True,
        extra_body={"guidance": {"beta": 2.0}},
    )  # fmt: skip
    told = [t for chunk in streamed if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    assert [token.bytes for token in told] == [token.bytes for token in content]
    assert [token.logprob for token in told] == pytest.approx([token.logprob for token in content], abs=1e-4)


def test_logprobs_of_completions(served):
    asked = {"model": "tiny", "prompt": "Once upon", "max_tokens": 12, "seed": 11, "logprobs": 2}
    (done,) = expected(served, ("policy", (), {}), "Once upon", trace=True)
    logprobs = served.openai.completions.create(**asked).choices[0].logprobs
    assert sum(logprobs.token_logprobs) == pytest.approx(done.guided_log_prob, abs=1e-4)
    for name, log_prob, best, step in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, done.trace, strict=True
    ):
        order = [i for _, i in sorted(zip(step.guided_log_probs, step.candidate_ids, strict=True), reverse=True)]
        assert len(best) == (2 if step.token_id in order[:2] else 3)  # the two most likely ones, and the token itself
        assert best[name] == log_prob
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert token in ("</s>", "<unk>") or done.text[offset : offset + len(token)] == token
    chunks = [chunk.choices[0].logprobs for chunk in served.openai.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert close([one for part in chunks if part for one in getattr(part, name)], getattr(logprobs, name))


def test_logprobs_of_greedy_decoding(served):
    asked = {"model": "tiny+kind", "prompt": "Once upon", "max_tokens": 4, "temperature": 0}
    made = served.post("/v1/completions", **asked, logprobs=3, guidance={"trace": True}).json()["choices"][0]
    assert made["logprobs"]["token_logprobs"] == [0.0] * 4
    assert [len(best) for best in made["logprobs"]["top_logprobs"]] == [1] * 4
    step = made["guidance"]["trace"][0]
    assert step["guided_log_probs"].count("-Infinity") == 9


@pytest.mark.parametrize("method", ["pargs", "best-of-n"])
def test_traces_equal_those_of_guided_policy(served, method):
    guidance = {"method": method, "scorers": ["kind"], "trace": True}
    if method == "best-of-n":
        guidance["n"] = 2
    (done,) = expected(served, (method, ("kind",), {"n": 2} if method == "best-of-n" else {}), "Once", trace=True)
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "seed": 11, "guidance": guidance}
    told = served.post("/v1/completions", **asked).json()["choices"][0]["guidance"]
    assert told["method"] == method
    assert told["scorers"] == {"kind": 1.0 if method == "pargs" else None}
    assert told["seed"] == 11
    assert told["prompt_token_ids"] == served.post("/tokenize", prompt="Once").json()["tokens"]
    assert told["kl_nats"] == pytest.approx(done.guided_log_prob - done.policy_log_prob + done.selection_nats, abs=1e-4)
    assert [step["token_id"] for step in told["trace"]] == done.token_ids
    for step, true in zip(told["trace"], done.trace, strict=True):
        assert step["candidate_ids"] == true.candidate_ids
        assert step["policy_log_probs"] == pytest.approx(true.policy_log_probs, abs=1e-4)
        assert [bytes(b).decode() for b in step["candidate_bytes"]] == [
            "" if t.startswith("<") else t for t in step["candidate_texts"]
        ]
    events, ended = events_of(served.post("/v1/completions", **asked, stream=True))
    parts = [event["choices"][0].get("guidance", {}) for event in events]
    assert ended
    assert close([step for part in parts for step in part.get("trace", [])], told.pop("trace"))
    read_before = {"cached_tokens": 0}
    assert close(parts[-1] | read_before, told | read_before)


def test_a_model_name_selects_a_scorer(served):
    asked = {"prompt": "Once upon", "max_tokens": 12, "seed": 11}
    (guided,) = expected(served, ("pargs", ("brief",), {}), "Once upon")
    (alone,) = expected(served, ("policy", (), {}), "Once upon")
    names = [model.id for model in served.openai.models.list()]
    assert names == ["tiny", "tiny+kind", "tiny+brief"]
    assert served.openai.models.retrieve("tiny+brief").id == "tiny+brief"
    choice = served.openai.completions.create(model="tiny+brief", **asked).choices[0]
    assert choice.text == guided.text
    assert choice.guidance["scorers"] == {"brief": 1.0}
    other = served.openai.completions.create(
        model="tiny+brief", **asked, extra_body={"guidance": {"method": "policy"}}
    ).choices[0]
    assert other.text == alone.text
    plain = served.openai.completions.create(model="tiny", **asked).choices[0]
    assert not hasattr(plain, "guidance")


def test_a_random_seed_is_returned_and_reproduces_the_answer(served):
    asked = {"model": "tiny", "prompt": "Once upon", "max_tokens": 20, "guidance": {}}
    one, other = (served.post("/v1/completions", **asked).json()["choices"][0] for _ in range(2))
    assert one["text"] != other["text"]
    again = served.post("/v1/completions", **asked, seed=one["guidance"]["seed"]).json()["choices"][0]
    assert again["text"] == one["text"]


def test_a_server_with_a_seed_is_reproducible():
    asked = {"model": "tiny", "prompt": "Once upon", "max_tokens": 8}
    texts = []
    for _ in range(2):
        with serving(seed=5) as served:
            texts.append([served.post("/v1/completions", **asked).json()["choices"][0]["text"] for _ in range(3)])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_the_default_of_max_tokens_fits_the_context(served):
    made = served.openai.completions.create(model="tiny", prompt="Once", seed=1, logprobs=0)
    assert len(made.choices[0].logprobs.tokens) == 16
    long = [{"role": "user", "content": "x" * 90}]
    chat = served.openai.chat.completions.create(model="tiny", messages=long, seed=3)
    assert chat.usage.total_tokens <= 128


def test_over_a_socket(served):
    (done,) = expected(served, ("pargs", ("kind",), {"beta": 2.0}), CHAT)
    asked = {
        "model": "tiny+kind", "messages": CHAT, "max_tokens": 12, "seed": 11,
        "extra_body": {"guidance": {"beta": 2.0}},
    }  # fmt: skip
    with on_a_socket(served) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(**asked).choices[0].message.content == done.text
        with client.chat.completions.create(**asked, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == done.text
        with pytest.raises(openai.BadRequestError, match="tools: not supported") as refused:
            client.chat.completions.create(**asked, tools=[{"type": "function"}])
        assert refused.value.param == "tools"
        body = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 3, "stream": True})
        said = curl(f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", body, "-N")
        assert said.rstrip().endswith("data: [DONE]")
        assert json.loads(curl(f"{url}/readyz")) == {"status": "ready"}


def curl(*arguments):
    return subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout
