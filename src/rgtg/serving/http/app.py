"""The ASGI app: routes, middleware, error handlers, and the page."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from rgtg.errors import RgtgError
from rgtg.serving.http import compare, completions, info, score
from rgtg.serving.http.errors import to_api_error
from rgtg.serving.http.middleware import AccessMiddleware, RequestIdMiddleware
from rgtg.serving.http.state import ServerState
from rgtg.serving.http.streaming import ClientDisconnected
from rgtg.version import __version__

STATIC = Path(__file__).parents[1] / "static"
# The page loads nothing from other hosts and connects to this server only.
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# nginx's status for a client that closed the connection.
_CLIENT_CLOSED_REQUEST = 499


def create_app(state: ServerState, start: Callable[[], None] | None = None) -> FastAPI:
    """The app of a server.

    Args:
        state: settings, and the engine once it is loaded.
        start: called when the app starts; long work belongs in a thread of its own.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if start is not None:
            start()
        yield

    app = FastAPI(
        title="rgtg",
        version=__version__,
        description="Reward-guided text generation behind OpenAI's API, with guidance per request.",
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
        middleware=_middleware(state),
    )
    for router in (
        completions.routes(state), compare.routes(state), score.routes(state), info.model_routes(state),
        info.token_routes(state), info.health_routes(state),
    ):  # fmt: skip
        app.include_router(router)
    for kind in (RgtgError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _error_handler(state))
    app.add_exception_handler(ClientDisconnected, _client_closed_request)
    app.add_api_route("/", _page, include_in_schema=False)
    app.mount("/static", _PageFiles(directory=STATIC, check_dir=False))
    return app


def _middleware(state: ServerState) -> list[Middleware]:
    """Outermost first."""
    settings = state.settings
    key = settings.api_key.get_secret_value() if settings.api_key else None
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origin,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=["x-request-id", "retry-after"],
    )
    access = Middleware(
        AccessMiddleware, state.metrics, hosts=settings.hosts, key=key, max_body=settings.max_body_kib * 1024
    )
    return [Middleware(RequestIdMiddleware), *([cors] if settings.cors_origin else []), access]


def _error_handler(state: ServerState) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        refusal = to_api_error(request, error)
        state.metrics.rejected.labels(refusal.code or str(refusal.status_code)).inc()
        return refusal.response(request.state.request_id)

    return handle


async def _client_closed_request(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _page() -> Response:
    """The playground."""
    return FileResponse(STATIC / "index.html", headers=_PAGE_HEADERS)


class _PageFiles(StaticFiles):
    """The files of the page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, with the page's headers."""
        response = await super().get_response(path, scope)
        response.headers.update(_PAGE_HEADERS)
        return response
