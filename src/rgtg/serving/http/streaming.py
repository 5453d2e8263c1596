"""Events of the engine on the server's event loop, and server-sent events to the client."""

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
from rgtg.serving.http.errors import ApiError, ParameterNames, from_rgtg
from rgtg.serving.metrics import Metrics

T = TypeVar("T")
# A client that reads nothing for this long is disconnected.
_SEND_TIMEOUT_SECONDS = 60.0
# After draining, answers that are complete get this long to reach their clients.
FLUSH_SECONDS = 5


class ClientDisconnected(Exception):
    """The client closed the connection before it was answered."""


class ResponseStream:
    """The engine's events for one HTTP request; leaving the ``with`` block cancels whatever has not ended.

    Rows are numbered through all jobs: the rows of the first job, then those of the second.
    """

    def __init__(
        self, engine: Engine, jobs: Sequence[Job], metrics: Metrics, names: ParameterNames, *, every_token: bool
    ) -> None:
        """Submit all jobs, or none of them.

        Args:
            engine: runs the jobs.
            jobs: of the request.
            metrics: counts the jobs and their tokens.
            names: the request's field names, for error messages.
            every_token: whether ``events`` yields tokens too; each wakes the event loop.

        Raises:
            ApiError: the engine refuses a job.
        """
        self.engine, self.every_token = engine, every_token
        self.timer = metrics.timer()
        self.rows = sum(len(job.rows) for job in jobs)
        self._running = self.rows
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        first_rows = itertools.accumulate((len(job.rows) for job in jobs), initial=0)
        listeners = [(job, partial(self._receive, first)) for job, first in zip(jobs, first_rows, strict=False)]
        try:
            self._tickets = engine.submit_all(listeners)
        except RgtgError as error:
            raise from_rgtg(error, names) from error
        metrics.prompt_tokens.inc(sum(len(job.prompt_ids) for job in jobs))

    def _receive(self, first_row: int, event: Event) -> None:
        """Pass an event on; runs in the engine's thread."""
        row = first_row + event.row
        self.timer.record(row, event)
        if isinstance(event, Step) and not self.every_token:
            return
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._queue, row, event)

    def _queue(self, row: int, event: Event) -> None:
        if not isinstance(event, Step):
            self._running -= 1
        self._events.put_nowait((row, event))

    async def events(self) -> AsyncIterator[tuple[int, Step | Finished]]:
        """Rows with their tokens (if ``every_token``) and ends, in the order in which they happen.

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

    async def ends(self, request: Request) -> list[Finished]:
        """The ends of all rows, in row order.

        Raises:
            ApiError: a row failed.
            ClientDisconnected: the client closed the connection.
        """
        return await while_connected(request, self._collect_ends())

    async def _collect_ends(self) -> list[Finished]:
        ends = {row: event async for row, event in self.events() if isinstance(event, Finished)}
        return [ends[row] for row in range(self.rows)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._running:
            for ticket in self._tickets:
                self.engine.cancel(ticket)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client closes the connection.

    Raises:
        ClientDisconnected: the client closed the connection.
    """
    working = asyncio.ensure_future(work)
    disconnecting = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        for task in (working, disconnecting):
            task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(EventSourceResponse):
    """A response of server-sent events; the response stream is closed with it."""

    def __init__(self, stream: ResponseStream, chunks: AsyncIterator[bytes], request_id: str) -> None:
        self.stream, self.request_id = stream, request_id
        super().__init__(
            self._events(chunks), send_timeout=_SEND_TIMEOUT_SECONDS, sep="\n", shutdown_grace_period=FLUSH_SECONDS
        )

    async def _events(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield b"data: " + chunk + b"\n\n"
            yield b"data: [DONE]\n\n"
        except ApiError as error:  # the status line is already sent; OpenAI's clients raise on an event with "error"
            yield b"data: " + bytes(error.response(self.request_id).body) + b"\n\n"

    async def __call__(self, *asgi: Any) -> None:
        """Send the response."""
        with self.stream:
            await super().__call__(*asgi)
