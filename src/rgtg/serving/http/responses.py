"""Response bodies: OpenAI's fields plus ``guidance`` for each choice. Only fields that were set are sent."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from rgtg.decoding.methods import Rule, Unit
from rgtg.serving.http.errors import ErrorBody
from rgtg.types.generation import OpenAIFinishReason, StepTrace

# JSON has no infinity: the log-probability of a token with probability 0 is the text "-Infinity", as in rgtg's files.
Nats = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "-Infinity"}]})]


class Answer(BaseModel):
    """Base of all response bodies."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")


class CandidateLogprob(Answer):
    """One candidate of a step in OpenAI's format."""

    token: str = Field(description="its text; U+FFFD for part of a character; the name of a special token")
    logprob: float = Field(description="nats, under the guided distribution; -9999 for probability 0")
    bytes: list[int] = Field(description="UTF-8 bytes that it adds to the text; empty for special tokens")


class TokenLogprob(CandidateLogprob):
    """The sampled token, and the most likely candidates of its step."""

    top_logprobs: list[CandidateLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities of a chat choice or chunk."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(Answer):
    """Log-probabilities of a choice of ``/v1/completions``."""

    tokens: list[str] = Field(description='text of each token; "bytes:\\xe2…" where the bytes are not valid text')
    token_logprobs: list[float | None] = Field(description="null for the first token of an echoed prompt")
    top_logprobs: list[dict[str, float] | None] | None = Field(
        description="the most likely tokens, and the token itself; null as above, and altogether if logprobs is 0"
    )
    text_offset: list[int] = Field(description="character position in the choice's text where each token begins")


class TraceStep(StepTrace):
    """One decoding step: its candidates with the figures of policy and scorers, and their texts. In nats."""

    policy_log_probs: list[Nats]
    guided_log_probs: list[Nats]
    candidate_texts: list[str]
    candidate_bytes: list[list[int]]


class GuidanceReport(Answer):
    """How a choice was generated. In a stream, chunks carry new trace steps and the last chunk carries the rest."""

    method: str | None = None
    scorers: dict[str, float | None] | None = Field(
        None, description="with the strength of each; null for a method without strengths"
    )
    top_k: int | None = Field(None, description="null: the whole vocabulary")
    temperature: float | None = Field(None, description="0 for methods that take the maximum")
    seed: int | None = Field(None, description="the request's seed, or the random one that was used")
    policy_log_prob: Nats | None = Field(None, description="of the tokens under the policy")
    guided_log_prob: Nats | None = Field(None, description="of the tokens under the distribution they were drawn from")
    candidates_log_prob: Nats | None = Field(
        None, description="of the tokens under the policy, renormalised over each step's candidates"
    )
    kl_nats: float | None = Field(None, description="guided − policy log-probability, plus the selection term")
    score: float | None = None
    policy_calls: int | None = None
    scorer_calls: int | None = None
    cached_tokens: int | None = Field(None, description="prompt tokens found in the prefix cache")
    fallback: bool | None = Field(None, description="a scorer returned NaN, and some tokens were drawn unguided")
    fallback_tokens: int | None = None
    prompt_token_ids: list[int] | None = Field(None, description="only with a trace")
    trace: list[TraceStep] | None = None


class CachedTokens(Answer):
    """Details of the prompt tokens."""

    cached_tokens: int


class Usage(Answer):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatMessage(Answer):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One completion of a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: OpenAIFinishReason
    guidance: GuidanceReport | None = None


class ChatCompletion(Answer):
    """Response of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Answer):
    """New text of a chat choice."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    """What is new in one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: OpenAIFinishReason | None
    guidance: GuidanceReport | None = None


class ChatCompletionChunk(Answer):
    """An event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(Answer):
    """One completion, or what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: OpenAIFinishReason | None
    guidance: GuidanceReport | None = None


class TextCompletion(Answer):
    """Response of ``/v1/completions``, and an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(Answer):
    """A model name that requests can use."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["rgtg"]
    scorer: str | None = Field(description="the scorer that guides it; null: unguided")
    max_model_len: int | None


class ModelList(Answer):
    """Response of ``/v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class ScorerCard(Answer):
    """A loaded scorer."""

    name: str
    objective: str | None = Field(description="its training objective; null for other reward models")
    kind: Literal["prefix", "vocabulary", "head", "adapter", "text"]
    max_length: int | None


class MethodCard(Answer):
    """A decoding method."""

    name: str
    unit: Unit
    scorer: str | None
    rule: Rule
    clip: bool = Field(description="scores are clipped to [0, 1] before they are used")
    takes: list[str]
    top_k: int | None
    paper: str


class GuidanceInfo(Answer):
    """Response of ``/v1/guidance``: scorers, methods and limits."""

    policy: str
    max_model_len: int | None
    scorers: list[ScorerCard]
    methods: list[MethodCard]
    limits: dict[str, int]
    chat_template: bool
    end_token_ids: list[int] = Field(description="tokens that end a completion")


class PrefixScore(Answer):
    """The score after one token."""

    token_id: int
    text: str
    score: float


class Score(Answer):
    """The score of one completion."""

    index: int
    score: float
    prefixes: list[PrefixScore] | None = None


class Scores(Answer):
    """Response of ``/v1/score``."""

    object: Literal["list"]
    model: str
    data: list[Score]
    usage: Usage


class Side(Answer):
    """One side of a comparison."""

    text: str
    finish_reason: OpenAIFinishReason
    token_ids: list[int]
    guidance: GuidanceReport


class Comparison(Answer):
    """Response of ``/v1/compare``."""

    id: str
    object: Literal["comparison"]
    seed: int
    unguided: Side
    guided: Side
    first_divergence: int | None = Field(description="index of the first differing token; null: the sides are equal")
    usage: Usage


class ComparisonChunk(Answer):
    """An event of a comparison stream: a token, the end of a side, or the summary."""

    id: str
    object: Literal["comparison.chunk", "comparison.summary"]
    side: Literal["guided", "unguided"] | None = None
    text: str | None = None
    token_id: int | None = None
    finish_reason: OpenAIFinishReason | None = None
    guidance: GuidanceReport | None = None
    seed: int | None = None
    first_divergence: int | None = None
    usage: Usage | None = None
    seconds: float | None = None


class Tokens(Answer):
    """Response of ``/tokenize``."""

    tokens: list[int]
    count: int
    max_model_len: int | None
    token_strs: list[str]


class Detokenized(Answer):
    """Response of ``/detokenize``."""

    prompt: str


class Status(Answer):
    """Response of ``/livez``, ``/readyz`` and ``/health``."""

    status: Literal["alive", "ready"]


class Version(Answer):
    """Response of ``/version``."""

    version: str


# An event of a stream: its data is the JSON of a chunk or of an error; the last event's data is [DONE].
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}


def documented(kind: type[Answer], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses`` of a route: its body, its stream, and errors."""
    documents: dict[int | str, dict[str, Any]] = {200: {"model": kind}}
    if streams:
        documents[200]["content"] = {"text/event-stream": {"itemSchema": _EVENT}}
    for status, text in {"4XX": "refused", "5XX": "failed"}.items():
        documents[status] = {"model": ErrorBody, "description": text}
    return documents
