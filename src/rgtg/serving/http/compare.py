"""``/v1/compare``: one prompt, guided and unguided, with the same seed."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from rgtg.decoding.detokenizer import IncrementalDetokenizer
from rgtg.decoding.request import Request as GenerationRequest
from rgtg.serving.engine.request import FinishedEvent, TokenEvent
from rgtg.serving.http.errors import ApiError
from rgtg.serving.http.input_processor import InputProcessor, ParsedRequest
from rgtg.serving.http.middleware import JsonRoute
from rgtg.serving.http.requests import CompareRequest, Guidance
from rgtg.serving.http.responses import (
    Comparison,
    ComparisonChunk,
    GuidanceReport,
    Side,
    documented,
)
from rgtg.serving.http.serialize import guidance_report, json_response, to_json, trace_steps, usage_of
from rgtg.serving.http.state import ServerState
from rgtg.serving.http.streaming import EventStream, ResponseStream
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.generation import OPENAI_FINISH_REASONS, StepTrace

SIDES: tuple[Literal["unguided", "guided"], ...] = ("unguided", "guided")


@dataclass(frozen=True)
class ParsedComparison:
    """A validated comparison.

    Attributes:
        sides: the unguided and the guided request; both have the same prompt, seed and length.
        requests: one for each side.
        token_bytes: of the policy's tokenizer.
        id: of the answer.
    """

    sides: tuple[ParsedRequest, ParsedRequest]
    requests: list[GenerationRequest]
    token_bytes: TokenBytes
    id: str

    def side(self, side: int, end: FinishedEvent) -> Side:
        """A side of the answer."""
        completion, report = end.completion, guidance_report(self.sides[side], 0, end)
        if self.sides[side].trace:
            report.trace = trace_steps(completion.trace or [], self.token_bytes)
        return Side(
            text=completion.text,
            finish_reason=OPENAI_FINISH_REASONS[completion.finish_reason],
            token_ids=completion.token_ids,
            guidance=report,
        )

    def chunk(self, side: int, text: str, **fields: Any) -> ComparisonChunk:
        """An event of one side."""
        return ComparisonChunk(id=self.id, object="comparison.chunk", side=SIDES[side], text=text, **fields)

    def token_chunk(self, side: int, text: str, token_id: int, trace: StepTrace | None) -> ComparisonChunk:
        """The event of a token."""
        fields = {} if trace is None else {"guidance": GuidanceReport(trace=trace_steps([trace], self.token_bytes))}
        return self.chunk(side, text, token_id=token_id, **fields)


def _parse(processor: InputProcessor, body: CompareRequest) -> ParsedComparison:
    """Validate a comparison; blocking, so call it in a worker thread."""
    guidance = body.guidance or Guidance()
    trace = guidance.trace is not False
    source, param = body.source
    prompts = processor.encode([source], param, body.chat_template_kwargs)

    def parse(guidance: Guidance, **changes: Any) -> ParsedRequest:
        changed = body.model_copy(update=changes | {"guidance": guidance})
        return processor.parse(changed, prompts, param, default_tokens=processor.settings.default_max_tokens)

    # 1. the guided side, with a trace unless the request says otherwise
    guided = parse(guidance.model_copy(update={"method": guidance.method or "pargs", "trace": trace}))
    if not guided.scorers:
        raise ApiError(400, "nothing guides this request: choose a method with a scorer", param="guidance.method")
    # 2. the unguided side: the same candidates, length and seed
    unguided = parse(
        Guidance.model_validate({"method": "policy", "top_k": guided.settings.top_k, "trace": trace}),
        model=None, max_tokens=guided.settings.max_new_tokens, seed=guided.seed,
    )  # fmt: skip
    requests = [unguided.groups[0][0], guided.groups[0][0]]
    return ParsedComparison((unguided, guided), requests, processor.token_bytes, f"cmp-{secrets.token_hex(12)}")


async def _chunks(comparison: ParsedComparison, stream: ResponseStream) -> AsyncIterator[bytes]:
    """The events of a stream."""
    start = time.monotonic()
    tokenizer, prompt_ids = comparison.token_bytes.tokenizer, comparison.requests[0].prompt_ids
    texts = [IncrementalDetokenizer(tokenizer, prompt_ids, side.settings.stop) for side in comparison.sides]
    num_tokens = [0, 0]
    ends: dict[int, FinishedEvent] = {}
    async for event in stream.events():
        side, text = event.row, texts[event.row]
        if isinstance(event, TokenEvent):
            num_tokens[side] += 1
            yield to_json(comparison.token_chunk(side, text.add(event.token_id), event.token_id, event.trace))
            continue
        ends[side], completion = event, event.completion
        # tokens without an event of their own: best-of-n knows its completion only at the end
        traces = dict(enumerate(completion.trace or []))
        for i in range(num_tokens[side], len(completion.token_ids)):
            token_id = completion.token_ids[i]
            yield to_json(comparison.token_chunk(side, text.add(token_id), token_id, traces.get(i)))
        report = guidance_report(comparison.sides[side], 0, event)
        rest = text.end(completion.text)
        yield to_json(
            comparison.chunk(side, rest, finish_reason=OPENAI_FINISH_REASONS[completion.finish_reason], guidance=report)
        )
    both = [ends[0], ends[1]]
    summary = ComparisonChunk(
        id=comparison.id,
        object="comparison.summary",
        seed=comparison.sides[1].seed,
        first_divergence=_first_divergence(both),
        usage=usage_of(comparison.sides[1], both),
        seconds=time.monotonic() - start,
    )
    yield to_json(summary)


def _first_divergence(ends: Sequence[FinishedEvent]) -> int | None:
    """Index of the first token that differs or that only one side has; None if the sides are equal."""
    one, other = (end.completion.token_ids for end in ends)
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other))


def routes(state: ServerState) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute, tags=["guidance"])

    @router.post("/v1/compare", response_model=None, responses=documented(Comparison, streams=True))
    async def compare(request: Request, body: CompareRequest) -> Response:
        """Continue a prompt twice with one seed: guided and unguided."""
        processor = state.require()
        comparison = await run_in_threadpool(_parse, processor, body)
        guided = comparison.sides[1]
        stream = ResponseStream(
            processor.engine, [comparison.requests], state.metrics, guided.names, deadline=guided.deadline,
            every_token=bool(body.stream),
        )  # fmt: skip
        if body.stream:
            return EventStream(stream, _chunks(comparison, stream), request.state.request_id)
        with stream:
            ends = await stream.ends(request)
        answer = Comparison(
            id=comparison.id,
            object="comparison",
            seed=guided.seed,
            unguided=comparison.side(0, ends[0]),
            guided=comparison.side(1, ends[1]),
            first_divergence=_first_divergence(ends),
            usage=usage_of(guided, ends),
        )
        return json_response(answer)

    return router
