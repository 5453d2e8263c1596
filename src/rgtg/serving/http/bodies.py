"""How bodies are read: JSON that says it is JSON, through pydantic's reader."""

from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute

from rgtg.serving.http.errors import ApiError


class JsonRequest(Request):
    """A request whose JSON is read strictly.

    Python's own reader takes NaN and half characters, which no tokenizer can, and gives up on deep nesting with an
    exception of its own kind.
    """

    async def json(self) -> Any:
        """The body.

        Raises:
            ApiError: it is not JSON.
        """
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error


class JsonRoute(APIRoute):
    """A route that takes JSON.

    A page of another site can post text/plain without asking first, so only what is called JSON is read.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, for such requests."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "send JSON, with the header Content-Type: application/json", code="not_json")
            return await handler(JsonRequest(request.scope, request.receive))

        return handle
