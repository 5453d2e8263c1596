"""What every request passes before a route sees it: an id and a log line, the Host header, the key, the body's size."""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rgtg.serving.http.errors import ApiError
from rgtg.serving.metrics import Metrics

_log = logging.getLogger("rgtg.serving")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# What answers without a key.
_OPEN = ("/", "/livez", "/readyz", "/health")


class Identified:
    """Outermost: gives a request its id, turns what nobody caught into an answer, and writes a line about it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.monotonic(), 0
        path = quote(scope["path"])[:200]  # as one word: what was asked for is decoded, and may hold lines of a log

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, identified)
        except Exception:
            _log.exception("%s %s failed (%s)", scope["method"], path, request_id)
            if not status:
                failed = ApiError(500, "the server failed; its log has more under the request id")
                await failed.response(request_id)(scope, receive, identified)
        _log.info("%s %s %d %.3f s %s", scope["method"], path, status, time.monotonic() - start, request_id)


class Guarded:
    """Refuses requests for another host, without the key, or with too large a body."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, hosts: Iterable[str] | None, key: str | None, max_body: int
    ) -> None:
        self.app, self.metrics, self.max_body = app, metrics, max_body
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.key = None if key is None else _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._wrong_host(headers) or self._wrong_key(scope, headers) or self._too_long(headers)
        if refusal is not None:
            self.metrics.rejected.labels(refusal.code).inc()
            await refusal.response(scope["state"]["request_id"])(scope, receive, send)
            return
        await self.app(scope, _limited(receive, self.max_body), send)

    def _wrong_host(self, headers: Headers) -> ApiError | None:
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if self.hosts is None or host in self.hosts:
            return None
        return ApiError(403, "this host name is not served; see rgtg serve --allowed-host", code="unknown_host")

    def _wrong_key(self, scope: Scope, headers: Headers) -> ApiError | None:
        path, harmless = scope["path"], scope["method"] in ("GET", "HEAD")
        if self.key is None or (harmless and (path in _OPEN or path.startswith("/static/"))):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # digests have one length, so the comparison's time says nothing of the key's
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(given.strip()), self.key):
            return None
        return ApiError(
            401,
            "this server needs a key: send it as Authorization: Bearer KEY",
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
    return ApiError(413, f"the body is over {limit // 1024} KiB", code="body_too_large")


def _limited(receive: Receive, limit: int) -> Callable[[], Awaitable[Message]]:
    """``receive`` that counts a body which does not say its length.

    FastAPI's own limit answers in plain text.
    """
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise _too_large(limit)
        return message

    return counted
