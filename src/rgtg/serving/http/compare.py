"""``/v1/compare``: one prompt, guided and unguided, from one seed, side by side."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from rgtg.decoding.detokenizer import TextStream
from rgtg.serving.engine.request import Finished, Job, Row, Step
from rgtg.serving.http.bodies import JsonRoute
from rgtg.serving.http.errors import ApiError, request_id_of
from rgtg.serving.http.input_processor import Plan, Planner, Prompt, written
from rgtg.serving.http.requests import CompareRequest, Guidance
from rgtg.serving.http.responses import Comparison, ComparisonChunk, GuidanceReport, Side, Usage, documented
from rgtg.serving.http.serialize import first_divergence, summary, trace_steps, usage
from rgtg.serving.http.state import Service
from rgtg.serving.http.streaming import Flight, Stream

SIDES: tuple[Literal["unguided", "guided"], ...] = ("unguided", "guided")


@dataclass(frozen=True)
class Duel:
    """A comparison that has been read; both sides have one prompt, one seed and one length."""

    service: Service
    prompt: Prompt
    plans: tuple[Plan, Plan]
    job: Job
    seed: int
    id: str

    def report(self, side: int, end: Finished, *, trace: bool) -> GuidanceReport:
        """How a side came about."""
        plan = self.plans[side]
        told = summary(end, plan.resolved, plan.scorers, self.seed)
        if plan.trace:
            told.prompt_token_ids = list(self.prompt.ids)
            if trace:
                told.trace = trace_steps(end.completion.trace or [], self.service.known)
        return told

    def side(self, side: int, end: Finished) -> Side:
        """A side as a whole."""
        made = end.completion
        return Side(
            text=made.text,
            finish_reason=made.finish_reason,
            token_ids=made.token_ids,
            guidance=self.report(side, end, trace=True),
        )

    def usage(self, ends: list[Finished]) -> Usage:
        """Tokens read, and made by both."""
        made = sum(len(end.completion.token_ids) for end in ends)
        return usage(len(self.prompt.ids), made, max(end.cached_tokens for end in ends))


def read(planner: Planner, service: Service, body: CompareRequest) -> Duel:
    """Turn a body into a job of two rows; call it in a thread."""
    guidance = body.guidance or Guidance()
    traced = guidance.trace is not False
    param = "messages" if body.messages is not None else "prompt"
    source = body.messages if body.messages is not None else body.prompt
    assert source is not None, "checked with the body"
    (prompt,) = planner.prompts([source], param)
    asked = guidance.model_copy(update={"method": guidance.method or "pargs", "trace": traced})
    tokens = service.settings.default_max_tokens
    guided = planner.plan(body.model_copy(update={"guidance": asked}), [prompt], tokens=tokens)
    if not guided.scorers:
        raise ApiError(400, "nothing steers: choose a method with a scorer", param="guidance.method")
    alone = Guidance.model_validate({"method": "policy", "top_k": guided.resolved.top_k, "trace": traced})
    length = guided.settings.max_new_tokens
    unguided = planner.plan(
        body.model_copy(update={"guidance": alone, "model": None, "max_tokens": length}), [prompt], tokens=tokens
    )
    seed = planner.seed(body.seed)
    (job,) = planner.jobs([prompt], guided, n=1, seed=seed)
    rows = tuple(Row(plan.settings, plan.scorers, job.rows[0].seed, plan.trace) for plan in (unguided, guided))
    job = Job(job.prompt, job.prompt_ids, rows, job.source, job.deadline)
    return Duel(service, prompt, (unguided, guided), job, seed, f"cmp-{secrets.token_hex(12)}")


async def chunks(duel: Duel, flight: Flight) -> AsyncIterator[bytes]:
    """Every event of a stream."""
    start = time.monotonic()
    known = duel.service.known
    texts = [TextStream(known.tokenizer, duel.prompt.ids, plan.resolved.stop) for plan in duel.plans]
    told = [0, 0]
    ends: dict[int, Finished] = {}
    async for side, event in flight.events():
        if isinstance(event, Step):
            told[side] += 1
            yield _token(duel, side, texts[side].add(event.token_id), event).json_bytes()
            continue
        ends[side] = event
        for chunk in _end(duel, side, texts[side], told[side], event):
            yield chunk.json_bytes()
    yield _summary(duel, [ends[0], ends[1]], time.monotonic() - start).json_bytes()


def _token(duel: Duel, side: int, text: str, step: Step) -> ComparisonChunk:
    chunk = ComparisonChunk(id=duel.id, object="comparison.chunk", side=SIDES[side], text=text, token_id=step.token_id)
    if step.trace is not None:
        chunk.guidance = GuidanceReport(trace=trace_steps([step.trace], duel.service.known))
    return chunk


def _end(duel: Duel, side: int, text: TextStream, told: int, end: Finished) -> list[ComparisonChunk]:
    """Tokens that were not told as they came (best-of-n), the rest of the text, and how the side ended."""
    made = end.completion
    traces = dict(enumerate(made.trace or []))
    late = [Step(side, made.token_ids[i], traces.get(i)) for i in range(told, len(made.token_ids))]
    chunks = [_token(duel, side, text.add(step.token_id), step) for step in late]
    chunks.append(
        ComparisonChunk(
            id=duel.id,
            object="comparison.chunk",
            side=SIDES[side],
            text=text.end(made.text),
            finish_reason=made.finish_reason,
            guidance=duel.report(side, end, trace=False),
        )
    )
    return chunks


def _summary(duel: Duel, ends: list[Finished], seconds: float) -> ComparisonChunk:
    return ComparisonChunk(
        id=duel.id,
        object="comparison.summary",
        seed=duel.seed,
        first_divergence=first_divergence(*(end.completion.token_ids for end in ends)),
        usage=duel.usage(ends),
        seconds=seconds,
    )


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute, tags=["guidance"])

    @router.post("/v1/compare", response_model=None, responses=documented(Comparison, streams=True))
    async def compare(request: Request, body: CompareRequest) -> Response:
        """Continue a prompt twice from one seed: guided and unguided."""
        duel = await run_in_threadpool(read, service.planner, service, body)
        stream = bool(body.stream)
        names = written(body, "messages" if body.messages is not None else "prompt")
        flight = Flight(service.require(), [duel.job], service.metrics, names, stepwise=stream)
        if stream:
            return Stream(flight, chunks(duel, flight), request_id_of(request))
        with flight:
            ends = await flight.finished(request)
        whole = Comparison(
            id=duel.id,
            seed=duel.seed,
            unguided=duel.side(0, ends[0]),
            guided=duel.side(1, ends[1]),
            first_divergence=first_divergence(*(end.completion.token_ids for end in ends)),
            usage=duel.usage(ends),
        )
        return Response(whole.json_bytes(), media_type="application/json")

    return router
