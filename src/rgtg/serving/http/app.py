"""The web app: routes, what they pass through, errors, and the page."""

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
from rgtg.serving.http import compare as comparing
from rgtg.serving.http import completions
from rgtg.serving.http import info as about
from rgtg.serving.http import score as scoring
from rgtg.serving.http.errors import ApiError, request_id_of, told
from rgtg.serving.http.middleware import Guarded, Identified
from rgtg.serving.http.state import Service
from rgtg.serving.http.streaming import ClientGone
from rgtg.version import __version__

STATIC = Path(__file__).parents[1] / "static"
# The page loads nothing from elsewhere, and talks to nobody else.
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# nginx's status for an answer that nobody waits for.
_NOBODY = 499


def create_app(service: Service, start: Callable[[], None] | None = None) -> FastAPI:
    """The app of a service.

    Args:
        service: settings, and the engine once it is there.
        start: called once the server listens; it may take its time in a thread of its own.
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
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        middleware=_middleware(service),
    )
    for router in (
        completions.routes(service), comparing.routes(service), scoring.routes(service), about.models(service),
        about.tokens(service), about.health(service),
    ):  # fmt: skip
        app.include_router(router)
    for kind in (RgtgError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handler(service))
    app.add_exception_handler(ClientGone, _nobody)
    app.add_api_route("/", _page, include_in_schema=False)
    app.mount("/static", _Static(directory=STATIC, check_dir=False))
    return app


def _middleware(service: Service) -> list[Middleware]:
    """Outermost first."""
    settings = service.settings
    key = settings.api_key.get_secret_value() if settings.api_key else None
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origin,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=["x-request-id", "retry-after"],
    )
    guarded = Middleware(Guarded, service.metrics, hosts=settings.hosts, key=key, max_body=settings.max_body_kib * 1024)
    return [Middleware(Identified), *([cors] if settings.cors_origin else []), guarded]


def _handler(service: Service) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        refusal: ApiError = told(request, error)
        service.metrics.rejected.labels(refusal.code or str(refusal.status_code)).inc()
        return refusal.response(request_id_of(request))

    return answer


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=_NOBODY)


async def _page() -> Response:
    """The playground."""
    return FileResponse(STATIC / "index.html", headers=_PAGE_HEADERS)


class _Static(StaticFiles):
    """Files of the page, and nothing else of this machine."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file with the page's headers."""
        response = await super().get_response(path, scope)
        response.headers.update(_PAGE_HEADERS)
        return response
