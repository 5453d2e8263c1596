"""What the engine tells, as clients read it: log-probabilities, trace steps, summaries. Pure."""

import codecs
import math
from collections.abc import Iterable, Sequence

from rgtg.config import DecodingSettings
from rgtg.decoding.methods import betas_of, find_method
from rgtg.serving.engine.request import Finished
from rgtg.serving.http.responses import (
    CachedTokens,
    ChatLogprobs,
    GuidanceReport,
    Likely,
    Logprobs,
    TokenLogprob,
    TraceStep,
    Usage,
)
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.generation import StepTrace

# What OpenAI sends for a log-probability of minus infinity.
_NONE = -9999.0


def _sendable(log_prob: float) -> float:
    return log_prob if math.isfinite(log_prob) else _NONE


def _best(step: StepTrace, count: int) -> list[int]:
    """Places of the likeliest candidates under the guided distribution, likeliest first."""
    order = sorted(range(len(step.candidate_ids)), key=lambda i: -step.guided_log_probs[i])
    return [i for i in order[:count] if step.guided_log_probs[i] > -math.inf]


def _chosen(step: StepTrace) -> float:
    return _sendable(step.guided_log_probs[step.candidate_ids.index(step.token_id)])


def chat_logprobs(steps: Sequence[StepTrace], known: TokenBytes, top: int) -> ChatLogprobs:
    """Log-probabilities of steps in the form of chat completions; ``top`` candidates each."""

    def likely(token_id: int, log_prob: float) -> dict[str, object]:
        return {"token": known.text(token_id), "logprob": log_prob, "bytes": list(known.of(token_id))}

    def of_step(step: StepTrace) -> TokenLogprob:
        best = [Likely(**likely(step.candidate_ids[i], step.guided_log_probs[i])) for i in _best(step, top)]
        return TokenLogprob(**likely(step.token_id, _chosen(step)), top_logprobs=best)

    return ChatLogprobs(content=[of_step(step) for step in steps], refusal=None)


class LegacyLogprobs:
    """Log-probabilities in the form of legacy completions; counts characters from the first token on."""

    def __init__(self, known: TokenBytes, top: int) -> None:
        self.known, self.top = known, top
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._offset = 0

    def add(self, steps: Sequence[StepTrace]) -> Logprobs:
        """Of the next steps."""
        offsets = []
        for step in steps:
            offsets.append(self._offset)
            self._offset += len(self._decode(self.known.of(step.token_id)))
        best = [
            {self._name(step.candidate_ids[i]): step.guided_log_probs[i] for i in reversed(_best(step, self.top))}
            for step in steps
        ]
        return Logprobs(
            tokens=[self._name(step.token_id) for step in steps],
            token_logprobs=[_chosen(step) for step in steps],
            top_logprobs=best if self.top else None,
            text_offset=offsets,
        )

    def _name(self, token_id: int) -> str:
        """Text of a token, or its bytes spelt out, so that two tokens seldom have one name."""
        text = self.known.text(token_id)
        if "�" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.known.of(token_id))


def trace_steps(steps: Iterable[StepTrace], known: TokenBytes) -> list[TraceStep]:
    """Steps with the texts of their candidates."""
    return [
        TraceStep(
            **{name: getattr(step, name) for name in step.model_fields_set},
            candidate_texts=[known.text(i) for i in step.candidate_ids],
            candidate_bytes=[list(known.of(i)) for i in step.candidate_ids],
        )
        for step in steps
    ]


def summary(done: Finished, settings: DecodingSettings, scorers: Sequence[str], seed: int) -> GuidanceReport:
    """How a choice came about; ``settings`` are the resolved ones, ``seed`` the request's."""
    made, method = done.completion, find_method(settings.method)
    strengths = betas_of(settings) if "beta" in method.takes else [None] * len(scorers)
    return GuidanceReport(
        method=method.name,
        scorers=dict(zip(scorers, strengths, strict=True)),
        top_k=settings.top_k,
        temperature=0.0 if method.rule == "greedy" else settings.temperature,
        seed=seed,
        policy_log_prob=made.policy_log_prob,
        guided_log_prob=made.guided_log_prob,
        candidates_log_prob=made.candidates_log_prob,
        kl_nats=_difference(made.guided_log_prob, made.policy_log_prob) + made.selection_nats,
        score=made.score,
        policy_calls=made.policy_calls,
        scorer_calls=made.scorer_calls,
        cached_tokens=done.cached_tokens,
        fallback=bool(done.fallback),
        fallback_tokens=int(done.fallback),
    )


def _difference(guided: float, policy: float) -> float:
    return guided - policy if math.isfinite(guided) and math.isfinite(policy) else 0.0


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> Usage:
    """Tokens read and made."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=cached_tokens),
    )


def first_divergence(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs (or that one text alone has); None where none does."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(other) else min(len(one), len(other))
