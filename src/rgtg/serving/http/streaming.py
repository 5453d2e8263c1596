"""Jobs under way: the engine's events on the server's event loop, until all rows have ended or the client is gone."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse

from rgtg.errors import RgtgError
from rgtg.serving.engine.engine import Engine
from rgtg.serving.engine.request import Event, Failed, Finished, Job, Step
from rgtg.serving.http.errors import ApiError, Written, from_rgtg
from rgtg.serving.metrics import Metrics

T = TypeVar("T")
# A client that reads nothing for so long is given up.
_SEND_SECONDS = 60.0
# Time that answers get to reach their clients once the server stops and all are made.
FAREWELL_SECONDS = 5


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Flight:
    """The jobs of one request; leaving the block cancels what has not ended.

    Rows are counted through all jobs: the first job's, then the second's.
    """

    def __init__(
        self, engine: Engine, jobs: Sequence[Job], metrics: Metrics, written: Written, *, stepwise: bool
    ) -> None:
        """Hand the jobs in, all or none.

        Args:
            engine: takes them.
            jobs: of the request.
            metrics: count them.
            written: the request's own names, for refusals.
            stepwise: tokens are told as they come, not the ends alone: each wakes the event loop.

        Raises:
            ApiError: one is refused.
        """
        self.engine, self.metrics = engine, metrics
        self.clock, self.stepwise = metrics.clock(), stepwise
        self.rows = sum(len(job.rows) for job in jobs)
        self.left = self.rows
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        firsts = itertools.accumulate((len(job.rows) for job in jobs), initial=0)
        heard = [(job, partial(self._hear, first)) for job, first in zip(jobs, firsts, strict=False)]
        try:
            self._tickets = engine.submit_all(heard)
        except RgtgError as error:
            raise from_rgtg(error, written) from error
        metrics.prompt_tokens.inc(sum(len(job.prompt_ids) for job in jobs))

    def _hear(self, first: int, event: Event) -> None:
        """In the engine's thread."""
        row = first + event.row
        self.clock.hear(row, event)
        if isinstance(event, Step) and not self.stepwise:
            return
        with suppress(RuntimeError):  # the event loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._take, row, event)

    def _take(self, row: int, event: Event) -> None:
        if not isinstance(event, Step):
            self.left -= 1
        self._events.put_nowait((row, event))

    async def events(self) -> AsyncIterator[tuple[int, Step | Finished]]:
        """Every row's tokens, if they are told, and ends, as they come.

        Raises:
            ApiError: a row failed.
        """
        ended = 0
        while ended < self.rows:
            row, event = await self._events.get()
            if isinstance(event, Failed):
                raise from_rgtg(event.error) from event.error
            ended += isinstance(event, Finished)
            yield row, event

    async def finished(self, request: Request) -> list[Finished]:
        """All rows' ends, in order.

        Raises:
            ApiError: a row failed.
            ClientGone: the client has closed the connection.
        """
        return await while_connected(request, self._all())

    async def _all(self) -> list[Finished]:
        ends = {row: event async for row, event in self.events() if isinstance(event, Finished)}
        return [ends[row] for row in range(self.rows)]

    def cancel(self) -> None:
        """Give up what has not ended."""
        if self.left:
            for ticket in self._tickets:
                self.engine.cancel(ticket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.cancel()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns, unless the client closes the connection first.

    Raises:
        ClientGone: it did; the work is cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(EventSourceResponse):
    """Server-sent events of a flight, which ends with the response however that ends."""

    def __init__(self, flight: Flight, chunks: AsyncIterator[bytes], request_id: str) -> None:
        self.flight, self.request_id = flight, request_id
        super().__init__(
            self._events(chunks), send_timeout=_SEND_SECONDS, sep="\n", shutdown_grace_period=FAREWELL_SECONDS
        )

    async def _events(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield b"data: " + chunk + b"\n\n"
            yield b"data: [DONE]\n\n"
        except ApiError as error:  # the status has been sent; OpenAI's clients raise on this
            yield b"data: " + bytes(error.response(self.request_id).body) + b"\n\n"

    async def __call__(self, *asgi: Any) -> None:
        """Send it."""
        with self.flight:
            await super().__call__(*asgi)
