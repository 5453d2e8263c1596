"""What every request passes before its route runs: request id, log line, host, API key, body size, JSON only."""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import quote

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rgtg.serving.http.errors import ApiError
from rgtg.serving.metrics import Metrics

_log = logging.getLogger("rgtg.serving")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Paths that need no API key.
_OPEN_PATHS = ("/", "/livez", "/readyz", "/health")


class RequestIdMiddleware:
    """Outermost middleware: gives each request an id, answers unhandled exceptions with 500, and logs one line."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.monotonic(), 0
        # the path is decoded and could hold line breaks, which would forge lines of the log
        path = quote(scope["path"])[:200]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            _log.exception("%s %s failed (%s)", scope["method"], path, request_id)
            if not status:
                failed = ApiError(500, "the server failed; its log has the details under this request id")
                await failed.response(request_id)(scope, receive, send_with_id)
        _log.info("%s %s %d %.3f s %s", scope["method"], path, status, time.monotonic() - start, request_id)


class AccessMiddleware:
    """Refuses requests with an unknown Host header, without the API key, or with a body that is too large."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, hosts: Iterable[str] | None, key: str | None, max_body: int
    ) -> None:
        self.app, self.metrics, self.max_body = app, metrics, max_body
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.key = None if key is None else _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        error = self._wrong_host(headers) or self._wrong_key(scope, headers) or self._too_long(headers)
        if error is not None:
            self.metrics.rejected.labels(error.code).inc()
            await error.response(scope["state"]["request_id"])(scope, receive, send)
            return
        await self.app(scope, _limited(receive, self.max_body), send)

    def _wrong_host(self, headers: Headers) -> ApiError | None:
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if self.hosts is None or host in self.hosts:
            return None
        return ApiError(403, "this host name is not served; see rgtg serve --allowed-host", code="unknown_host")

    def _wrong_key(self, scope: Scope, headers: Headers) -> ApiError | None:
        path, reads_only = scope["path"], scope["method"] in ("GET", "HEAD")
        if self.key is None or (reads_only and (path in _OPEN_PATHS or path.startswith("/static/"))):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # both digests have the same length, so the time of the comparison reveals nothing about the key's length
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(given.strip()), self.key):
            return None
        return ApiError(
            401,
            "this server needs an API key: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _too_long(self, headers: Headers) -> ApiError | None:
        length = headers.get("content-length", "")
        wrong = length.isdecimal() and (len(length) > 15 or int(length) > self.max_body)
        return _too_large(self.max_body) if wrong else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit // 1024} KiB", code="body_too_large")


def _limited(receive: Receive, limit: int) -> Callable[[], Awaitable[Message]]:
    """``receive`` that raises once a body without a Content-Length exceeds ``limit`` bytes."""
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(limit)
        return message

    return receive_limited


class JsonRequest(Request):
    """A request whose JSON body is parsed strictly.

    Python's own parser accepts NaN and lone surrogates, which no tokenizer can encode, and raises RecursionError on
    deep nesting.
    """

    async def json(self) -> Any:
        """The body.

        Raises:
            ApiError: the body is not JSON.
        """
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error


class JsonRoute(APIRoute):
    """A route that takes only bodies declared as JSON.

    A page of another site can post text/plain without a CORS preflight, so other content types are refused.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, called with a ``JsonRequest``."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":
                raise ApiError(415, "send JSON, with the header Content-Type: application/json", code="not_json")
            return await handler(JsonRequest(request.scope, request.receive))

        return handle
