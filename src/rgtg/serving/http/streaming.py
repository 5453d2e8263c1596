"""Events of the engine on the server's event loop, and server-sent events to the client."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse

from rgtg.decoding.request import Request as GenerationRequest
from rgtg.errors import DeadlineError, RgtgError
from rgtg.serving.engine.engine import Engine
from rgtg.serving.engine.request import Event, FailedEvent, FinishedEvent, TokenEvent
from rgtg.serving.http.errors import ApiError, ParameterNames, from_rgtg
from rgtg.serving.metrics import Metrics

T = TypeVar("T")
# A client that reads nothing for this long is disconnected.
_SEND_TIMEOUT_SECONDS = 60.0
# After draining, answers that are complete get this long to reach their clients.
FLUSH_SECONDS = 5


class ClientDisconnected(Exception):
    """The client closed the connection before it was answered."""


class RequestTimer:
    """Records the latencies of one request's rows."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.arrival = metrics, time.monotonic()
        self._last_token: dict[int, float] = {}  # time of each row's latest token

    def record(self, row: int, event: Event) -> None:
        """Record an event that happens now."""
        now = time.monotonic()
        match event:
            case TokenEvent():
                if row in self._last_token:
                    self.metrics.between_tokens.observe(now - self._last_token[row])
                else:
                    self.metrics.first_token.observe(now - self.arrival)
                self._last_token[row] = now
            case FinishedEvent():
                self._record_end(row, event, now)
            case FailedEvent():
                self.metrics.success.labels("abort").inc()

    def _record_end(self, row: int, event: FinishedEvent, now: float) -> None:
        metrics, completion = self.metrics, event.completion
        if row not in self._last_token:  # best-of-n has no tokens before its end
            metrics.first_token.observe(now - self.arrival)
        metrics.latency.observe(now - self.arrival)
        metrics.success.labels(completion.finish_reason).inc()
        metrics.generation_tokens.inc(len(completion.token_ids))
        metrics.kl.observe(completion.guided_log_prob - completion.policy_log_prob + completion.selection_nats)
        if event.scores_not_finite:
            metrics.fallback.inc()


class ResponseStream:
    """The engine's events for one HTTP request; leaving the ``with`` block cancels whatever has not ended.

    Rows are numbered through all prompts: the requests of the first prompt, then those of the second.
    """

    def __init__(
        self,
        engine: Engine,
        groups: Sequence[Sequence[GenerationRequest]],
        metrics: Metrics,
        names: ParameterNames,
        *,
        deadline: float,
        every_token: bool,
    ) -> None:
        """Submit all requests, or none of them.

        Args:
            engine: runs them.
            groups: for each prompt, its requests.
            metrics: counts them and their tokens.
            names: the HTTP request's field names, for error messages.
            deadline: in ``time.monotonic()`` seconds.
            every_token: whether ``events`` yields tokens too; each wakes the event loop.

        Raises:
            ApiError: the engine refuses them.
        """
        self.engine, self.every_token = engine, every_token
        self.timer = RequestTimer(metrics)
        self.rows = self._running = sum(map(len, groups))
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        try:
            self._handle = engine.submit(groups, self._receive, deadline)
        except RgtgError as error:
            raise from_rgtg(error, names) from error
        metrics.prompt_tokens.inc(sum(len(group[0].prompt_ids) for group in groups))

    def _receive(self, event: Event) -> None:
        """Pass an event on; runs in the engine's thread."""
        self.timer.record(event.row, event)
        if isinstance(event, TokenEvent) and not self.every_token:
            return
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._queue, event)

    def _queue(self, event: Event) -> None:
        if not isinstance(event, TokenEvent):
            self._running -= 1
        self._events.put_nowait(event)

    async def events(self) -> AsyncIterator[TokenEvent | FinishedEvent]:
        """Tokens (if ``every_token``) and ends of all rows, in the order in which they happen.

        Raises:
            ApiError: a row failed.
        """
        ended = 0
        while ended < self.rows:
            event = await self._events.get()
            if isinstance(event, FailedEvent):
                raise from_rgtg(event.error) from event.error
            ended += isinstance(event, FinishedEvent)
            yield event

    async def ends(self, request: Request) -> list[FinishedEvent]:
        """The ends of all rows, in row order.

        Raises:
            ApiError: a row failed.
            ClientDisconnected: the client closed the connection.
        """
        return await while_connected(request, self._collect_ends())

    async def _collect_ends(self) -> list[FinishedEvent]:
        ends = {event.row: event async for event in self.events() if isinstance(event, FinishedEvent)}
        return [ends[row] for row in range(self.rows)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._running:
            self.engine.cancel(self._handle)


async def run_calls(engine: Engine, calls: Sequence[Callable[[], T]], names: ParameterNames, seconds: float) -> list[T]:
    """Results of calls that the engine runs between its steps; the rest is cancelled where one fails.

    Raises:
        ApiError: the queue is full, a call failed, or they did not end within so many seconds.
    """
    futures: list[Future[T]] = []
    try:
        futures = engine.run_all(calls)
        async with asyncio.timeout(seconds):
            return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
    except TimeoutError:
        raise from_rgtg(DeadlineError("the request did not finish within its time limit")) from None
    except RgtgError as error:
        raise from_rgtg(error, names) from error
    finally:
        for future in futures:
            future.cancel()  # after a failure, the remaining calls are not needed


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
