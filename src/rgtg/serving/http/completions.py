"""``/v1/chat/completions`` and ``/v1/completions``: one flow, two formats."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from rgtg.decoding.detokenizer import TextStream
from rgtg.serving.engine.request import Finished, Job, Step
from rgtg.serving.http.bodies import JsonRoute
from rgtg.serving.http.errors import Written, request_id_of
from rgtg.serving.http.formats import ChatFormat, Format, Piece, TextFormat
from rgtg.serving.http.input_processor import Plan, Planner, Prompt, Source, written
from rgtg.serving.http.requests import ChatRequest, Choices, CompletionRequest
from rgtg.serving.http.responses import Chat, GuidanceReport, Text, Usage, documented
from rgtg.serving.http.serialize import summary, trace_steps, usage
from rgtg.serving.http.state import Service
from rgtg.serving.http.streaming import Flight, Stream

# New tokens of a legacy completion that asks for no number: OpenAI's default.
_LEGACY_TOKENS = 16


@dataclass(frozen=True)
class Order:
    """A request that has been read: what to make, and how its choices are told."""

    service: Service
    prompts: list[Prompt]
    plan: Plan
    jobs: list[Job]
    n: int
    seed: int
    written: Written
    traced: bool

    def flight(self, *, stepwise: bool) -> Flight:
        """Hand it to the engine."""
        return Flight(self.service.require(), self.jobs, self.service.metrics, self.written, stepwise=stepwise)

    def piece(self, index: int, end: Finished) -> Piece:
        """A choice as a whole."""
        made = end.completion
        guidance = self.report(index, end)
        if guidance is not None and self.plan.trace:
            guidance.trace = trace_steps(made.trace or [], self.service.known)
        return Piece(index, made.text, made.trace or () if self.traced else (), made.finish_reason, guidance)

    def report(self, index: int, end: Finished) -> GuidanceReport | None:
        """How a choice came about, where that is shown."""
        if not self.plan.shown:
            return None
        told = summary(end, self.plan.resolved, self.plan.scorers, self.seed)
        if self.plan.trace:
            told.prompt_token_ids = list(self.prompts[index // self.n].ids)
        return told

    def usage(self, ends: Sequence[Finished]) -> Usage:
        """Tokens read and made; a prompt counts once, whatever n."""
        return usage(
            sum(len(prompt.ids) for prompt in self.prompts),
            sum(len(end.completion.token_ids) for end in ends),
            sum(max(end.cached_tokens for end in ends[i : i + self.n]) for i in range(0, len(ends), self.n)),
        )


def read(planner: Planner, service: Service, body: Choices, sources: list[Source], param: str) -> Order:
    """Turn a body into jobs; call it in a thread."""
    traced = body.logprobs is not None and body.logprobs is not False  # type: ignore[attr-defined]
    tokens = _LEGACY_TOKENS if isinstance(body, CompletionRequest) else service.settings.default_max_tokens
    prompts = planner.prompts(sources, param)
    plan = planner.plan(body, prompts, tokens=tokens, traced=traced)
    n, seed = body.n or 1, planner.seed(body.seed)
    jobs = planner.jobs(prompts, plan, n=n, seed=seed, traced=traced)
    return Order(service, prompts, plan, jobs, n, seed, written(body, param), traced)


async def answer(request: Request, order: Order, form: Format, *, stream: bool) -> Response:
    """Make the completions, and write them as they come or at the end."""
    flight = order.flight(stepwise=stream)
    if stream:
        return Stream(flight, chunks(order, form, flight), request_id_of(request))
    with flight:
        ends = await flight.finished(request)
    pieces = [order.piece(index, end) for index, end in enumerate(ends)]
    return Response(form.whole(pieces, order.usage(ends)).json_bytes(), media_type="application/json")


async def chunks(order: Order, form: Format, flight: Flight) -> AsyncIterator[bytes]:
    """Every event of a stream."""
    tellers = [Teller(order, index) for index in range(flight.rows)]
    ends: dict[int, Finished] = {}
    async for index, event in flight.events():
        if isinstance(event, Finished):
            ends[index] = event
        for piece in tellers[index].tell(event):
            yield form.chunk(piece, None).json_bytes()
    if getattr(form, "with_usage", False):
        yield form.chunk(None, order.usage([ends[i] for i in range(flight.rows)])).json_bytes()


class Teller:
    """One choice of a stream: which pieces its events make."""

    def __init__(self, order: Order, index: int) -> None:
        prompt = order.prompts[index // order.n]
        self.order, self.index = order, index
        self.text = TextStream(order.service.known.tokenizer, prompt.ids, order.plan.resolved.stop)
        self._begun = False
        self._told = 0

    def tell(self, event: Step | Finished) -> list[Piece]:
        """Pieces to send now."""
        if isinstance(event, Finished):
            return self._end(event)
        self._told += 1
        traced = [event.trace] if event.trace is not None else []
        text = self.text.add(event.token_id)
        return [self._piece(text, traced)] if text or traced else []

    def _end(self, event: Finished) -> list[Piece]:
        """The rest of the text, with steps that were not told before; then how it ended."""
        made = event.completion
        rest, steps = self.text.end(made.text), (made.trace or [])[self._told :]
        pieces = [self._piece(rest, steps)] if rest or steps or not self._begun else []
        return [*pieces, Piece(self.index, "", (), made.finish_reason, self.order.report(self.index, event))]

    def _piece(self, text: str, steps: list) -> Piece:  # type: ignore[type-arg]
        first, self._begun = not self._begun, True
        told = None
        if self.order.plan.trace and steps:
            told = GuidanceReport(trace=trace_steps(steps, self.order.service.known))
        return Piece(self.index, text, steps if self.order.traced else (), None, told, first)


def routes(service: Service) -> APIRouter:
    """Both endpoints."""
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/v1/chat/completions", response_model=None, responses=documented(Chat, streams=True))
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Continue a chat."""
        order = await run_in_threadpool(read, service.planner, service, body, [body.messages], "messages")
        top = (body.top_logprobs or 0) if body.logprobs else None
        form = ChatFormat(body.model, service.known, top, body.with_usage)
        return await answer(request, order, form, stream=bool(body.stream))

    @router.post("/v1/completions", response_model=None, responses=documented(Text, streams=True))
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Continue a text, or several."""
        order = await run_in_threadpool(read, service.planner, service, body, _sources(body), "prompt")
        form = TextFormat(body.model, service.known, body.logprobs, body.with_usage)
        return await answer(request, order, form, stream=bool(body.stream))

    return router


def _sources(body: CompletionRequest) -> list[Source]:
    """A prompt, or each of several."""
    given = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)
