"""Access control (API key, host names, CORS), static files, logs, metrics and settings."""

import logging

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from helpers.served import serving, settings
from rgtg.errors import UsageError
from rgtg.serving.http.app import create_app
from rgtg.serving.http.state import ServerState
from rgtg.serving.settings import ServeSettings

BODY = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def locked():
    with serving(api_key="sesame", cors_origin=["https://page.example"]) as made:
        yield made


OPEN = ["/livez", "/readyz", "/health", "/", "/static/app.js"]
CLOSED = [
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/v1/guidance"), ("GET", "/metrics"),
    ("GET", "/version"), ("GET", "/openapi.json"),
    ("GET", "/nowhere"), ("GET", "/static"), ("POST", "/v1/completions"), ("POST", "/livez"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/score"), ("POST", "/v1/compare"), ("POST", "/tokenize"),
    ("POST", "/detokenize"), ("POST", "/"), ("OPTIONS", "/v1/completions"), ("GET", "//v1/models"),
]  # fmt: skip


@pytest.mark.parametrize("path", OPEN)
def test_open_paths_need_no_key(locked, path):
    assert locked.client.get(path).status_code == 200


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}, {"Authorization": "Basic sesame"},
                {"Authorization": "Bearer \xe9"}, {"X-Api-Key": "sesame"}]
)  # fmt: skip
def test_all_other_paths_need_the_key(locked, method, path, headers):
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = locked.client.request(method, path, headers=raw)
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "sesame" not in answer.text


def test_requests_with_the_key_are_answered(locked):
    assert locked.client.post("/v1/completions", json=BODY, headers=KEY).status_code == 200
    assert locked.client.get("/v1/models", headers={"Authorization": "bearer sesame"}).status_code == 200


def test_cors_allows_configured_origins_only(locked):
    asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    allowed = locked.client.options("/v1/completions", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = locked.client.options("/v1/completions", headers=asks | {"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    with serving() as served:
        answer = served.client.get("/v1/models", headers={"Origin": "https://page.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_without_a_key_only_local_host_names_are_served():
    with serving() as served:
        for host in ("evil.example", "evil.example:8000", "", "localhost.evil.example"):
            answer = served.client.get("/v1/models", headers={"Host": host})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_host")
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:9", "testserver"):
            assert served.client.get("/v1/models", headers={"Host": host}).status_code == 200
    with serving(api_key="sesame", allowed_host=[]) as served:
        assert served.client.get("/v1/models", headers=KEY | {"Host": "any.example"}).status_code == 200


def test_only_files_of_the_page_are_served(locked):
    for path in (
        "/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/static//etc/passwd",
        "/static/%2fetc/passwd", "/static/..\\server.py", "/static/%00", "/static/", "/static/nothing.js",
        "/static/" + "x" * 5000,
    ):  # fmt: skip
        answer = locked.client.get(path)
        assert answer.status_code in (404, 401), path
        assert "def " not in answer.text
        assert "root:" not in answer.text
    page = locked.client.get("/")
    for answer in (page, locked.client.get("/static/app.js")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_request_ids_are_kept_or_created():
    with serving() as served:
        mine = served.client.get("/livez", headers={"x-request-id": "mine-1"})
        assert mine.headers["x-request-id"] == "mine-1"
        for odd in ("a b", "x" * 65, "<script>"):
            given = served.client.get("/livez", headers={"x-request-id": odd}).headers["x-request-id"]
            assert given.startswith("req-")


def test_internal_errors_reveal_nothing_to_the_client(caplog, monkeypatch):
    with serving() as served:

        def fail(_):
            raise ValueError("a secret at /home/somebody")

        monkeypatch.setattr(served.engine, "check", fail)
        logging.getLogger("rgtg.serving").propagate = True
        answer = served.post("/v1/completions", **BODY)
        assert answer.status_code == 500
        assert "secret" not in answer.text
        error = answer.json()["error"]
        assert error["request_id"] in caplog.text
        assert "a secret" in caplog.text


def test_prompts_and_users_are_not_logged(caplog):
    with serving() as served, caplog.at_level(logging.DEBUG, logger="rgtg.serving"):
        logging.getLogger("rgtg.serving").propagate = True
        served.post("/v1/completions", **BODY | {"prompt": "private words", "user": "somebody"})
        assert "/v1/completions 200" in caplog.text
        assert "private" not in caplog.text
        assert "somebody" not in caplog.text


def test_requests_get_503_while_the_models_load():
    state = ServerState(settings())
    client = TestClient(create_app(state))
    assert client.get("/livez").status_code == 200
    for answer in (
        client.get("/readyz"),
        client.get("/health"),
        client.get("/v1/models"),
        client.post("/v1/completions", json=BODY),
    ):
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "not_serving"
    assert client.get("/metrics").status_code == 200


def test_metrics():
    with serving() as served:
        served.post("/v1/completions", **BODY | {"model": "tiny+kind", "max_tokens": 3})
        served.post("/v1/completions", **BODY | {"unheard_of": []})
        text = served.client.get("/metrics").text
    for line in (
        "rgtg:prompt_tokens_total 2.0", "rgtg:generation_tokens_total 3.0", "rgtg:num_requests_running 0.0",
        "rgtg:num_requests_waiting 0.0", 'rgtg:request_success_total{finished_reason="length"} 1.0',
        "rgtg:time_to_first_token_seconds_count 1.0", "rgtg:inter_token_latency_seconds_count 2.0",
        "rgtg:e2e_request_latency_seconds_count 1.0", "rgtg:guidance_kl_nats_count 1.0",
        'rgtg:rejected_total{reason="unknown_parameter"} 1.0', 'rgtg:scorer_seconds_total{scorer="kind"} ',
        "rgtg:prefix_cache_queries_total ", "rgtg:nan_total 0.0", "rgtg:fallback_total 0.0",
    ):  # fmt: skip
        assert line in text, line


# Settings


def test_flags_override_the_environment(monkeypatch):
    monkeypatch.setenv("RGTG_SCORER", "kind=/a, brief=/b")
    monkeypatch.setenv("RGTG_API_KEY", "sesame")
    monkeypatch.setenv("RGTG_PORT", "9000")
    monkeypatch.setenv("RGTG_MAX_QUEUE", "0")
    made = ServeSettings.resolve(None, None, {"policy": "folder/mine", "port": 9001})
    assert made.scorer == {"kind": "/a", "brief": "/b"}
    assert (made.port, made.max_queue, made.name) == (9001, 0, "mine")
    assert made.api_key.get_secret_value() == "sesame"
    assert "sesame" not in made.model_dump_json() + repr(made)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "policy is required"),
        ({"policy": "p", "host": "0.0.0.0"}, "set a key"),
        ({"policy": "p", "host": "example.org"}, "--allow-public"),
        ({"policy": "p", "api_key": ""}, "printable ASCII"),
        ({"policy": "p", "api_key": "é"}, "printable ASCII"),
        ({"policy": "p", "scorer": ["x"]}, "NAME=FOLDER"),
        ({"policy": "p", "scorer": ["a+b=x"]}, "cannot be called"),
        ({"policy": "p", "scorer": ["a=x", "a=y"]}, "two scorers"),
        ({"policy": "p", "prot": 1}, "did you mean port"),
        ({"policy": "p", "port": 70000}, "port = 70000"),
    ],
)
def test_invalid_settings_are_refused(given, says):
    with pytest.raises(UsageError, match=says) as refused:
        ServeSettings.resolve(None, None, given)
    assert isinstance(refused.value.__cause__, ValidationError)


@pytest.mark.parametrize(
    "given",
    [
        {"host": "::1"},
        {"host": "127.9.9.9"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "allow_public": True},
        {"host": "0.0.0.0", "api_key": "k"},
    ],
)
def test_valid_addresses_are_accepted(given):
    ServeSettings.resolve(None, None, {"policy": "p", **given})
