"""``/v1/chat/completions`` and ``/v1/completions``."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from rgtg.decoding.detokenizer import IncrementalDetokenizer
from rgtg.serving.engine.request import FinishedEvent, TokenEvent
from rgtg.serving.http.input_processor import InputProcessor, ParsedRequest
from rgtg.serving.http.middleware import JsonRoute
from rgtg.serving.http.requests import ChatRequest, CompletionRequest
from rgtg.serving.http.responses import ChatCompletion, TextCompletion, documented
from rgtg.serving.http.serialize import (
    ChatSerializer,
    ChoiceDelta,
    CompletionSerializer,
    Echo,
    Serializer,
    guidance_report,
    json_response,
    to_json,
    usage_of,
)
from rgtg.serving.http.state import ServerState
from rgtg.serving.http.streaming import EventStream, ResponseStream, run_calls, while_connected
from rgtg.types.generation import OPENAI_FINISH_REASONS, StepTrace

# OpenAI's default of max_tokens for /v1/completions.
_DEFAULT_COMPLETION_TOKENS = 16


def routes(state: ServerState) -> APIRouter:
    """Both endpoints."""
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/v1/chat/completions", response_model=None, responses=documented(ChatCompletion, streams=True))
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Continue a chat."""
        return await _answer(state, request, body)

    @router.post("/v1/completions", response_model=None, responses=documented(TextCompletion, streams=True))
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Continue a text, or several."""
        return await _answer(state, request, body)

    return router


async def _answer(state: ServerState, request: Request, body: ChatRequest | CompletionRequest) -> Response:
    """Parse the request, run it, and send the answer as a stream or at the end."""
    processor = state.require()
    parsed = await run_in_threadpool(_parse, processor, body)
    echoes = await while_connected(request, _echoes(state, processor, parsed)) if parsed.echo else None
    kind = ChatSerializer if isinstance(body, ChatRequest) else CompletionSerializer
    serializer = kind(parsed, body.model, processor.token_bytes, include_usage=body.include_usage)
    stream = ResponseStream(
        processor.engine, parsed.groups, state.metrics, parsed.names, deadline=parsed.deadline,
        every_token=bool(body.stream),
    )  # fmt: skip
    if body.stream:
        return EventStream(stream, _chunks(serializer, stream, echoes), request.state.request_id)
    with stream:
        ends = await stream.ends(request)
    choices = [_choice(parsed, index, end) for index, end in enumerate(ends)] or _no_tokens(parsed)
    if echoes is not None:
        choices = [replace(choice, echo=echoes[choice.index // parsed.n]) for choice in choices]
    return json_response(serializer.answer(choices, usage_of(parsed, ends)))


def _parse(processor: InputProcessor, body: ChatRequest | CompletionRequest) -> ParsedRequest:
    sources, param = body.sources
    chat = isinstance(body, ChatRequest)
    return processor.parse(
        body,
        processor.encode(sources, param, body.chat_template_kwargs if isinstance(body, ChatRequest) else None),
        param,
        default_tokens=processor.settings.default_max_tokens if chat else _DEFAULT_COMPLETION_TOKENS,
        n=body.n or 1,
        num_logprobs=body.num_logprobs,
        echo=isinstance(body, CompletionRequest) and bool(body.echo),
    )


async def _echoes(state: ServerState, processor: InputProcessor, request: ParsedRequest) -> list[Echo]:
    """The prompts as choices begin with them, with the log-probabilities of their tokens if they are returned."""
    if request.echoed_log_probs is None:
        return [Echo(prompt) for prompt in request.prompts]
    engine, count = processor.engine, request.echoed_log_probs
    calls = [engine.prompt_log_probs(prompt.ids, count) for prompt in request.prompts]
    together = [call for each in calls for call in each]
    results = iter(await run_calls(engine, together, request.names, state.settings.request_seconds))
    return [
        Echo(prompt, [step for _ in each for step in next(results)])
        for prompt, each in zip(request.prompts, calls, strict=True)
    ]


def _no_tokens(request: ParsedRequest) -> list[ChoiceDelta]:
    """The ends of choices without new tokens."""
    return [ChoiceDelta(index, "", finish_reason="length") for index in range(request.num_choices)]


def _choice(request: ParsedRequest, index: int, end: FinishedEvent) -> ChoiceDelta:
    """A choice as a whole."""
    completion = end.completion
    report = guidance_report(request, index, end) if request.reports_guidance else None
    return ChoiceDelta(
        index, completion.text, completion.trace or (), OPENAI_FINISH_REASONS[completion.finish_reason], report
    )


async def _chunks(
    serializer: Serializer, stream: ResponseStream, echoes: Sequence[Echo] | None = None
) -> AsyncIterator[bytes]:
    """The events of a stream; each choice begins with its prompt where the prompts are given."""
    request = serializer.request
    if echoes is not None:
        for index in range(request.num_choices):
            yield to_json(serializer.chunk(ChoiceDelta(index, "", first=True, echo=echoes[index // request.n])))
        for delta in [] if stream.rows else _no_tokens(request):
            yield to_json(serializer.chunk(delta))
    formatters = [StreamFormatter(serializer, index) for index in range(stream.rows)]
    ends: dict[int, FinishedEvent] = {}
    async for event in stream.events():
        if isinstance(event, FinishedEvent):
            ends[event.row] = event
            deltas = formatters[event.row].end(event)
        else:
            deltas = formatters[event.row].add(event)
        for delta in deltas:
            yield to_json(serializer.chunk(delta))
    if serializer.include_usage:
        usage = usage_of(serializer.request, [ends[index] for index in range(stream.rows)])
        yield to_json(serializer.chunk(None, usage))


class StreamFormatter:
    """Turns the tokens of one choice into deltas."""

    def __init__(self, serializer: Serializer, index: int) -> None:
        request = serializer.request
        self.request, self.index = request, index
        prompt = request.prompts[index // request.n]
        self._text = IncrementalDetokenizer(serializer.token_bytes.tokenizer, prompt.ids, request.settings.stop)
        self._begun = False
        self._num_steps = 0

    def add(self, token: TokenEvent) -> list[ChoiceDelta]:
        """The delta of a token; none while its text can still change, unless its trace is sent."""
        self._num_steps += 1
        return self._delta(self._text.add(token.token_id), [token.trace] if token.trace is not None else [])

    def end(self, end: FinishedEvent) -> list[ChoiceDelta]:
        """The rest of the text with steps that had no event of their own, then a delta with the finish reason."""
        completion = end.completion
        rest, steps = self._text.end(completion.text), (completion.trace or [])[self._num_steps :]
        report = guidance_report(self.request, self.index, end) if self.request.reports_guidance else None
        last = ChoiceDelta(self.index, "", (), OPENAI_FINISH_REASONS[completion.finish_reason], report)
        return [*self._delta(rest, steps, always=not self._begun), last]

    def _delta(self, text: str, steps: list[StepTrace], *, always: bool = False) -> list[ChoiceDelta]:
        if not (text or steps or always):
            return []
        first, self._begun = not self._begun, True
        return [ChoiceDelta(self.index, text, steps, first=first)]
