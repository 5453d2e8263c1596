"""Warm-up: requests of every kind before the server says that it is ready, so that clients wait for none of it.

The first request of a kind pays for what later ones find done: the check whether a model reads token trees, the first
touch of the weights, kernels chosen by shape, and chat templates, routes and models of answers made on first use.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI

from rgtg.decoding.methods import METHODS, scores_vocabulary
from rgtg.serving.engine.engine import Engine
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.http.app import create_app
from rgtg.serving.http.state import ServerState
from rgtg.serving.settings import ServeSettings

_log = logging.getLogger("rgtg.serving")
# Long enough for the prefix cache; cut where a context is shorter.
_TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all."
_MOST_TOKENS, _NEW_TOKENS = 24, 3
# Methods that decode in ways of their own, and the least that they need; the others take the way of pargs.
_WAYS: dict[str, dict[str, Any]] = {
    "pargs": {}, "farma": {}, "genarm": {}, "cd-blockwise": {"n": 2, "segment_length": 2},
    "cards": {"reward_threshold": 0.0, "segment_length": 2, "retries": 1}, "best-of-n": {"n": 2},
}  # fmt: skip


def warm_up(engine: Engine, settings: ServeSettings) -> None:
    """Answer requests of every kind that the loaded models take, and forget them.

    An app of its own answers them: the server's is not ready before. A kind that fails is logged: requests of clients
    for it will fail in the same way.

    Args:
        engine: running, without requests.
        settings: of the server.
    """
    start = time.monotonic()
    state = ServerState(settings)
    state.open(engine)
    mine = f"warm-up-{secrets.token_hex(8)}"

    def is_theirs(record: logging.LogRecord) -> bool:
        return not (isinstance(record.args, tuple) and mine in record.args)

    _log.addFilter(is_theirs)
    try:
        with ThreadPoolExecutor(1) as apart:  # this thread may have an event loop already
            failures = apart.submit(asyncio.run, _ask_all(create_app(state), settings, engine.models, mine)).result()
    finally:
        _log.removeFilter(is_theirs)
    for failure in failures:
        _log.warning("%s", failure)
    engine.run(engine.forget).result()
    _log.info("warmed up in %.1f s", time.monotonic() - start)


async def _ask_all(app: FastAPI, settings: ServeSettings, models: ServedModels, request_id: str) -> list[str]:
    """Send all requests, one after the other; why some failed."""
    headers = {"host": "localhost", "content-type": "application/json", "x-request-id": request_id}
    if settings.api_key is not None:
        headers["authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    failures = []
    for path, body in _requests(settings, models):
        status, answer = await _post(app, path, body, headers)
        if status not in (200, 400, 429):  # 400: these models do not take this; 429: a queue for none at all
            method = body.get("guidance", {}).get("method", "policy")
            failures.append(f"requests for {body['model']} with method {method} get status {status}: {answer[:500]}")
    return failures


def _requests(settings: ServeSettings, models: ServedModels) -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths and bodies: the policy alone, and each scorer by every way of decoding."""
    most = min(_MOST_TOKENS, (models.max_length or _MOST_TOKENS + _NEW_TOKENS) - _NEW_TOKENS)
    ids = list(models.tokenizer(_TEXT).input_ids)[: max(most, 1)] or [0]
    sizes = {"max_tokens": min(_NEW_TOKENS, settings.max_tokens), "seed": 0}
    kinds: list[tuple[str, dict[str, Any]]] = [(models.policy_name, {})]
    for name, scorer in models.scorers.items():
        for method, own in _WAYS.items():
            if not METHODS[method].vocabulary or scores_vocabulary(scorer):
                kinds.append((f"{models.policy_name}+{name}", {"guidance": {"method": method, **own}}))
    for model, guidance in kinds:
        body = {"model": model, "prompt": ids, **sizes, **guidance}
        yield "/v1/completions", body
        yield "/v1/completions", body | {"stream": True}  # finds the prompt in the prefix cache
        top_k = METHODS[guidance.get("guidance", {}).get("method", "policy")].top_k
        if top_k is not None and top_k <= settings.max_candidates:
            yield "/v1/completions", body | {"logprobs": 1}
    yield "/v1/completions", {"model": models.policy_name, "prompt": _TEXT, **sizes, "echo": True, "logprobs": 1}
    if getattr(models.tokenizer, "chat_template", None):
        chat = {"model": kinds[-1][0], "messages": [{"role": "user", "content": "Hi"}], **sizes}
        yield "/v1/chat/completions", chat
        yield "/v1/chat/completions", chat | {"stream": True}
    if models.scorers:
        yield "/v1/score", {"model": next(iter(models.scorers)), "prompt": _TEXT, "completion": "It is so."}


async def _post(app: FastAPI, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
    """Post JSON to an app in this process; status and body of its answer."""
    sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    status, parts = 0, []

    async def receive() -> dict[str, Any]:
        if not sent:
            await asyncio.Event().wait()  # the client stays
        return sent.pop()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None, "server": None,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    return status, b"".join(parts).decode(errors="replace")
