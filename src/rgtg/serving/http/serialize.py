"""From the engine's results to response bodies: choices, chunks, log-probabilities, traces, reports and usage."""

import codecs
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Response

from rgtg.decoding.methods import METHODS
from rgtg.serving.engine.request import FinishedEvent
from rgtg.serving.http.input_processor import ParsedRequest, Prompt
from rgtg.serving.http.responses import (
    Answer,
    CachedTokens,
    CandidateLogprob,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatMessage,
    CompletionLogprobs,
    Delta,
    GuidanceReport,
    TextChoice,
    TextCompletion,
    TokenLogprob,
    TraceStep,
    Usage,
)
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.generation import OpenAIFinishReason, StepTrace

# OpenAI's value for a log-probability of minus infinity.
_MINUS_INFINITY = -9999.0


def to_json(answer: Answer) -> bytes:
    """A response body in JSON, with the fields that were set."""
    return answer.model_dump_json(exclude_unset=True).encode()


def json_response(answer: Answer) -> Response:
    """A JSON response."""
    return Response(to_json(answer), media_type="application/json")


# -- choices -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Echo:
    """A prompt at the beginning of a choice.

    Attributes:
        prompt: it.
        steps: of its tokens from the second on, if log-probabilities are returned.
    """

    prompt: Prompt
    steps: Sequence[StepTrace] = ()


@dataclass(frozen=True)
class ChoiceDelta:
    """What is new in a choice; for an answer that is not streamed, the whole choice.

    Attributes:
        index: of the choice.
        text: new text, without that of ``echo``.
        steps: new steps, if log-probabilities or a trace are returned.
        finish_reason: why the choice ended; None: it continues.
        report: how the choice was generated, at its end; None: not requested.
        first: whether the choice begins.
        echo: the prompt, at the beginning of a choice that returns it.
    """

    index: int
    text: str
    steps: Sequence[StepTrace] = ()
    finish_reason: OpenAIFinishReason | None = None
    report: GuidanceReport | None = None
    first: bool = False
    echo: Echo | None = None


class _Serializer:
    """Writes the answers of one request.

    Args:
        request: the parsed request.
        model: its model name, returned as it was sent.
        token_bytes: of the policy's tokenizer.
        include_usage: whether a stream ends with the usage; all its other chunks then have ``"usage": null``.
    """

    id_prefix: str

    def __init__(self, request: ParsedRequest, model: str, token_bytes: TokenBytes, *, include_usage: bool) -> None:
        self.request, self.token_bytes, self.include_usage = request, token_bytes, include_usage
        self._head: dict[str, Any] = {
            "id": self.id_prefix + secrets.token_hex(12), "created": int(time.time()), "model": model,
        }  # fmt: skip

    def _chunk_head(self, usage: Usage | None) -> dict[str, Any]:
        return self._head | ({"usage": usage} if self.include_usage else {})

    def _guidance(self, delta: ChoiceDelta) -> dict[str, GuidanceReport]:
        """The field ``guidance`` of a choice, if there is anything in it."""
        report = delta.report
        if self.request.trace and delta.steps:
            report = report or GuidanceReport()
            report.trace = trace_steps(delta.steps, self.token_bytes)
        return {} if report is None else {"guidance": report}


class ChatSerializer(_Serializer):
    """``/v1/chat/completions``."""

    id_prefix = "chatcmpl-"

    def answer(self, choices: Sequence[ChoiceDelta], usage: Usage) -> Answer:
        """The whole answer."""
        whole = [
            ChatChoice(
                index=choice.index,
                message=ChatMessage(role="assistant", content=choice.text, refusal=None),
                logprobs=self._logprobs(choice),
                finish_reason=choice.finish_reason or "stop",
                **self._guidance(choice),
            )
            for choice in choices
        ]
        return ChatCompletion(object="chat.completion", choices=whole, usage=usage, **self._head)

    def chunk(self, delta: ChoiceDelta | None, usage: Usage | None = None) -> Answer:
        """An event of a stream: new text, or the usage at the end."""
        choices = []
        if delta is not None:
            role = {"role": "assistant"} if delta.first else {}
            content = {"content": delta.text} if delta.text or delta.first else {}
            choice = ChatChunkChoice(
                index=delta.index,
                delta=Delta.model_validate(role | content),
                logprobs=self._logprobs(delta) if delta.steps else None,
                finish_reason=delta.finish_reason,
                **self._guidance(delta),
            )
            choices.append(choice)
        return ChatCompletionChunk(object="chat.completion.chunk", choices=choices, **self._chunk_head(usage))

    def _logprobs(self, delta: ChoiceDelta) -> ChatLogprobs | None:
        count, tokens = self.request.num_logprobs, self.token_bytes
        if count is None:
            return None

        def candidate(token_id: int, log_prob: float) -> dict[str, Any]:
            return {"token": tokens.text(token_id), "logprob": log_prob, "bytes": list(tokens.of(token_id))}

        content = [
            TokenLogprob(
                **candidate(step.token_id, _sampled_logprob(step)),
                top_logprobs=[CandidateLogprob(**candidate(*best)) for best in _most_likely(step, count)],
            )
            for step in delta.steps
        ]
        return ChatLogprobs(content=content, refusal=None)


class CompletionSerializer(_Serializer):
    """``/v1/completions``."""

    id_prefix = "cmpl-"

    def __init__(self, request: ParsedRequest, model: str, token_bytes: TokenBytes, *, include_usage: bool) -> None:
        super().__init__(request, model, token_bytes, include_usage=include_usage)
        self._offsets: dict[int, _TextOffsets] = {}  # by choice

    def answer(self, choices: Sequence[ChoiceDelta], usage: Usage) -> Answer:
        """The whole answer."""
        whole = [self._choice(choice) for choice in choices]
        return TextCompletion(object="text_completion", choices=whole, usage=usage, **self._head)

    def chunk(self, delta: ChoiceDelta | None, usage: Usage | None = None) -> Answer:
        """An event of a stream: new text, or the usage at the end."""
        choices = [] if delta is None else [self._choice(delta)]
        return TextCompletion(object="text_completion", choices=choices, **self._chunk_head(usage))

    def _choice(self, delta: ChoiceDelta) -> TextChoice:
        with_tokens = delta.steps or delta.echo or delta.finish_reason is None
        return TextChoice(
            index=delta.index,
            text=delta.text if delta.echo is None else delta.echo.prompt.text + delta.text,
            logprobs=self._logprobs(delta) if with_tokens else None,
            finish_reason=delta.finish_reason,
            **self._guidance(delta),
        )

    def _logprobs(self, delta: ChoiceDelta) -> CompletionLogprobs | None:
        count, steps = self.request.num_logprobs, delta.steps
        if count is None:
            return None
        tokens: list[str] = []
        log_probs: list[float | None] = []
        best: list[dict[str, float] | None] = []
        text_offset: list[int] = []
        if delta.echo is not None:
            prompt, steps = delta.echo.prompt, [*delta.echo.steps, *steps]
            tokens.append(self._name(prompt.ids[0]))
            log_probs.append(None)
            best.append(None)
            text_offset += prompt_offsets(prompt, self.token_bytes)
            self._offsets[delta.index] = _TextOffsets(self.token_bytes, len(prompt.text))
        for step in steps:
            tokens.append(self._name(step.token_id))
            log_probs.append(_sampled_logprob(step))
            best.append(self._best(step, count))
        offsets = self._offsets.setdefault(delta.index, _TextOffsets(self.token_bytes))
        text_offset += [offsets.next(step.token_id) for step in delta.steps]
        return CompletionLogprobs(
            tokens=tokens, token_logprobs=log_probs, top_logprobs=best if count else None, text_offset=text_offset
        )

    def _best(self, step: StepTrace, count: int) -> dict[str, float]:
        """The token itself, and the most likely ones; of two with one name, the more likely counts."""
        best = {self._name(step.token_id): _sampled_logprob(step)}
        return best | {self._name(i): value for i, value in reversed(_most_likely(step, count))}

    def _name(self, token_id: int) -> str:
        """The token's text; its bytes in hex where they are not valid text, so that names rarely collide."""
        text = self.token_bytes.text(token_id)
        if "�" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.token_bytes.of(token_id))


Serializer = ChatSerializer | CompletionSerializer


# -- log-probabilities and traces --------------------------------------------------------------------------------------


def _most_likely(step: StepTrace, count: int) -> list[tuple[int, float]]:
    """The ``count`` most likely candidates under the guided distribution: token ids and log-probabilities in nats."""
    ranked = sorted(zip(step.candidate_ids, step.guided_log_probs, strict=True), key=lambda pair: -pair[1])
    return [(token_id, log_prob) for token_id, log_prob in ranked[:count] if log_prob > -math.inf]


def _sampled_logprob(step: StepTrace) -> float:
    log_prob = step.guided_log_probs[step.candidate_ids.index(step.token_id)]
    return log_prob if math.isfinite(log_prob) else _MINUS_INFINITY


class _TextOffsets:
    """Character positions of the tokens of one completion, after so many of an echoed prompt."""

    def __init__(self, token_bytes: TokenBytes, start: int = 0) -> None:
        self._bytes_of = token_bytes.of
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._offset = start

    def next(self, token_id: int) -> int:
        """Where the next token begins."""
        offset = self._offset
        self._offset += len(self._decode(self._bytes_of(token_id)))
        return offset


def prompt_offsets(prompt: Prompt, token_bytes: TokenBytes) -> list[int]:
    """Character positions in the prompt's text where its tokens begin.

    A special token takes room only if the text spells it: a BOS that the tokenizer adds does not. Spaces that the
    tokenizer adds or drops (SentencePiece, at the beginning and where several follow each other) are passed over.
    """
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    offsets, at, text = [], 0, prompt.text
    for token_id in prompt.ids:
        raw = token_bytes.of(token_id)
        piece = decode(raw) if raw else token_bytes.text(token_id)
        length = len(piece) if raw or text.startswith(piece, at) else 0
        if raw and not text.startswith(piece, at):
            after_spaces, bare = at, piece.lstrip()
            while text[after_spaces : after_spaces + 1].isspace():
                after_spaces += 1
            if not bare:
                length = min(length, after_spaces - at)
            elif text.startswith(bare, after_spaces):
                at, length = after_spaces, len(bare)
        offsets.append(at)
        at = min(at + length, len(text))
    return offsets


def trace_steps(steps: Iterable[StepTrace], token_bytes: TokenBytes) -> list[TraceStep]:
    """Trace steps with the texts of their candidates."""
    return [
        TraceStep(
            **{name: getattr(step, name) for name in step.model_fields_set},
            candidate_texts=[token_bytes.text(i) for i in step.candidate_ids],
            candidate_bytes=[list(token_bytes.of(i)) for i in step.candidate_ids],
        )
        for step in steps
    ]


# -- reports and usage -------------------------------------------------------------------------------------------------


def guidance_report(request: ParsedRequest, index: int, end: FinishedEvent) -> GuidanceReport:
    """How choice ``index`` was generated."""
    completion, settings = end.completion, request.settings
    method = METHODS[settings.method]
    betas = request.groups[0][0].betas if "beta" in method.takes else [None] * len(request.scorers)
    log_probs = completion.guided_log_prob, completion.policy_log_prob
    kl = log_probs[0] - log_probs[1] if all(map(math.isfinite, log_probs)) else 0.0
    report = GuidanceReport(
        method=method.name,
        scorers=dict(zip(request.scorers, betas, strict=True)),
        top_k=settings.top_k,
        temperature=settings.temperature if method.random else 0.0,
        seed=request.seed,
        policy_log_prob=completion.policy_log_prob,
        guided_log_prob=completion.guided_log_prob,
        candidates_log_prob=completion.candidates_log_prob,
        kl_nats=kl + completion.selection_nats,
        score=completion.score,
        policy_calls=completion.policy_calls,
        scorer_calls=completion.scorer_calls,
        cached_tokens=end.cached_tokens,
        fallback=bool(end.scores_not_finite),
        fallback_tokens=int(end.scores_not_finite),
    )
    if request.trace:
        report.prompt_token_ids = list(request.prompts[index // request.n].ids)
    return report


def usage_of(request: ParsedRequest, ends: Sequence[FinishedEvent]) -> Usage:
    """Token counts of a request; every prompt counts once, whatever n."""
    rows = max(len(ends) // len(request.prompts), 1)
    return usage(
        sum(len(prompt.ids) for prompt in request.prompts),
        sum(len(end.completion.token_ids) for end in ends),
        sum(max(end.cached_tokens for end in ends[i : i + rows]) for i in range(0, len(ends), rows)),
    )


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> Usage:
    """Token counts."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=cached_tokens),
    )
