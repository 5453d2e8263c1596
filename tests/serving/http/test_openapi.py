"""The server against its OpenAPI document: generated valid and invalid requests, and malformed bodies."""

import asyncio
import json
import random

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from helpers.served import serving

# A valid body can still be refused: for an unknown model, its length, or fields that exclude each other.
LEFT_OUT = [positive_data_acceptance]


@pytest.fixture(scope="module")
def served():
    # schemathesis does not expect 413, and generates lists that are too long for the schema and for the default limit
    with serving(max_tokens=8, default_max_tokens=4, max_batch=8, max_body_kib=2**16) as made:
        yield made


def operations():
    with serving() as made:
        schema = schemathesis.openapi.from_dict(made.app.openapi())
        return sorted(f"{found.ok().method.upper()} {found.ok().path}" for found in schema.get_all_operations())


def repaired(path, body):
    """A generated body with existing names and consistent fields, so that most bodies reach the engine."""
    told = {"model": "kind" if path == "/v1/score" else "tiny+kind"} if "model" in body else {}
    told |= {"max_tokens": 3} if "max_tokens" in body or path == "/v1/compare" else {}
    told |= {"logit_bias": {"5": 1.0}} if body.get("logit_bias") else {}  # ids of the vocabulary
    told |= {"echo": False} if "echo" in body and body.get("logprobs") is not None else {}  # not of guided requests
    if isinstance(body.get("guidance"), dict):
        told["guidance"] = {k: v for k, v in body["guidance"].items() if k in ("beta", "trace")} | {"scorers": ["kind"]}
    elif path == "/v1/compare":
        told["guidance"] = {"scorers": ["brief"]}
    if path in ("/v1/compare", "/v1/score", "/tokenize"):
        body = {k: v for k, v in body.items() if k != "messages"}
        told["prompt"] = body.get("prompt") or "Hi"
    if path == "/detokenize":
        told["tokens"] = [i % 64 for i in body["tokens"]]
    return body | told


def exercise(served, label, examples):
    """Run schemathesis' checks on valid and invalid requests to one operation; return the statuses."""
    method, path = label.split(" ")
    operation = schemathesis.openapi.from_asgi("/openapi.json", served.app)[path][method]
    statuses = set()
    many = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @many
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def good(case):
        if isinstance(case.body, dict):
            case.body = repaired(path, case.body)
        statuses.add(case.call_and_validate(excluded_checks=LEFT_OUT).status_code)

    @many
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def bad(case):
        statuses.add(case.call_and_validate().status_code)

    good()
    if operation.body:
        bad()
    return statuses


@pytest.mark.parametrize("label", operations())
def test_generated_requests(served, label):
    statuses = exercise(served, label, 12)
    assert 200 in statuses or "{model}" in label
    assert max(statuses) < 500


@pytest.mark.slow
@pytest.mark.parametrize("label", operations())
def test_many_generated_requests(served, label):
    assert max(exercise(served, label, 400)) < 500


# Malformed bodies: valid ones with one error, and arbitrary bytes

GOOD = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/v1/completions": {
        "model": "tiny+kind", "prompt": "Hi", "max_tokens": 1, "stop": ["x"], "guidance": {"beta": 2.0, "top_k": 5},
    },
    "/v1/compare": {"prompt": "Hi", "max_tokens": 1, "guidance": {"scorers": ["kind"]}},
    "/v1/score": {"model": "kind", "prompt": "Hi", "completion": ["x"]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5, 6]},
}  # fmt: skip
ODD = [
    None, True, -1, 0, 1.5, 1e308, -1e308, 2**80, "", "\0", "x" * 300, "��", "\U0010ffff", [], [[]], [None], {},
    {"a": 1}, [1, "x"], [[1], "x"], [{"role": "user"}], {"\0": []}, "Infinity", [2**80], ["a"] * 40,
    {"scorers": {"kind": 1e9}},
]  # fmt: skip


def malformed(draw):
    """A path and a malformed body."""
    path = draw.choice(list(GOOD))
    body = json.loads(json.dumps(GOOD[path]))
    at = body
    while isinstance(at, dict) and draw.random() < 0.4 and any(isinstance(v, dict) for v in at.values()):
        at = next(v for v in at.values() if isinstance(v, dict))
    kind = draw.randrange(6)
    if kind == 0:  # a field of the wrong type
        at[draw.choice(list(at))] = draw.choice(ODD)
    elif kind == 1:  # an unknown field
        at["".join(draw.choices("abcXYZ_. 0é", k=draw.randrange(12)))] = draw.choice(ODD)
    elif kind == 2:  # a missing field
        del at[draw.choice(list(at))]
    text = json.dumps(draw.choice(ODD) if kind == 3 else body).encode()
    if kind == 4:  # cut off
        text = text[: draw.randrange(len(text))]
    if kind == 5:  # bytes changed
        raw = bytearray(text)
        for _ in range(draw.randrange(1, 6)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        text = bytes(raw)
    return path, text


def test_malformed_bodies_are_refused_in_openais_shape(served):
    sent, refused = asyncio.run(refusals(served, 2000))
    assert refused / sent > 0.7
    assert served.post("/v1/completions", **GOOD["/v1/completions"]).status_code == 200


async def refusals(served, wanted):
    """Send malformed bodies until ``wanted`` are refused; return how many were sent."""
    draw, refused, sent = random.Random(0), 0, 0
    transport = httpx2.ASGITransport(served.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://testserver") as client:
        while refused < wanted:
            path, body = malformed(draw)
            sent += 1
            answer = await client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code < 500, (path, body)
            if answer.status_code != 200:  # else the change had no effect
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code", "request_id"}, (path, body)
                assert error["type"] == "invalid_request_error"
                assert error["message"]
                refused += 1
    return sent, refused
