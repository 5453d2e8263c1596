"""Bodies of answers: OpenAI's, with ``guidance`` beside each choice. Only fields that were set are sent."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from rgtg.types.generation import StepTrace

# JSON knows no infinity; a candidate without probability has the log-probability "-Infinity", as in rgtg's files.
Nats = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "-Infinity"}]})]
Finish = Literal["stop", "length"]


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")
    _constant: ClassVar[set[str]] = set()

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls._constant = {name for name, field in cls.model_fields.items() if isinstance(field.default, str)}

    def model_post_init(self, _: Any) -> None:
        """Count what is the same in every answer as set."""
        self.model_fields_set.update(self._constant)

    def json_bytes(self) -> bytes:
        """As it is sent."""
        return self.model_dump_json(exclude_unset=True).encode()


class Likely(Answer):
    """A candidate of a step, as OpenAI shows it."""

    token: str = Field(description="its text; U+FFFD where it is half a character, its name where it is special")
    logprob: float = Field(description="nats, under the guided distribution; -9999 for none")
    bytes: list[int] = Field(description="what it adds to the text in UTF-8; nothing for special tokens")


class TokenLogprob(Likely):
    """A chosen token, and the likeliest candidates of its step."""

    top_logprobs: list[Likely]


class ChatLogprobs(Answer):
    """Of a chat choice, or of a chunk of one."""

    content: list[TokenLogprob]
    refusal: None = None


class Logprobs(Answer):
    """Of a legacy completion choice."""

    tokens: list[str] = Field(description='text of each token; "bytes:\\xe2…" where it is no text')
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int] = Field(description="where each token begins in the choice's text, in characters")


class TraceStep(StepTrace):
    """A step: its candidates with what policy and scorers said of them, and their texts. Nats."""

    policy_log_probs: list[Nats]
    guided_log_probs: list[Nats]
    candidate_texts: list[str]
    candidate_bytes: list[list[int]]


class GuidanceReport(Answer):
    """How a choice came about. In a stream, chunks have the trace's new steps, the last chunk the rest."""

    method: str | None = None
    scorers: dict[str, float | None] | None = Field(None, description="with the strength of each; null: it has none")
    top_k: int | None = Field(None, description="null: the whole vocabulary")
    temperature: float | None = Field(None, description="0 where the maximum is taken")
    seed: int | None = Field(None, description="the request's, given or drawn: the same request with it says the same")
    policy_log_prob: Nats | None = Field(None, description="of the tokens under the policy")
    guided_log_prob: Nats | None = Field(None, description="of the tokens under what they were drawn from")
    candidates_log_prob: Nats | None = Field(None, description="under the policy cut to each step's candidates")
    kl_nats: float | None = Field(None, description="guided - policy, with what choosing among drawn texts adds")
    score: float | None = None
    policy_calls: int | None = None
    scorer_calls: int | None = None
    cached_tokens: int | None = Field(None, description="of the prompt, read before for another request")
    fallback: bool | None = Field(None, description="tokens were left to the policy, since a scorer returned NaN")
    fallback_tokens: int | None = None
    prompt_token_ids: list[int] | None = Field(None, description="with a trace")
    trace: list[TraceStep] | None = None


class CachedTokens(Answer):
    """Of the prompt."""

    cached_tokens: int


class Usage(Answer):
    """Tokens read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatMessage(Answer):
    """What the assistant said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer):
    """One completion of a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    guidance: GuidanceReport | None = None


class Chat(Answer):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Answer):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    """What is new of one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    guidance: GuidanceReport | None = None


class ChatChunk(Answer):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(Answer):
    """One completion, or what is new of it."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Finish | None
    guidance: GuidanceReport | None = None


class Text(Answer):
    """Answer of ``/v1/completions``, and an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(Answer):
    """A model's name, and what it stands for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["rgtg"] = "rgtg"
    scorer: str | None = Field(description="what steers it; null: nothing")
    max_model_len: int | None


class ModelList(Answer):
    """Answer of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ScorerCard(Answer):
    """A loaded scorer."""

    name: str
    objective: str | None = Field(description="what it was trained for; null: a stock reward model")
    kind: Literal["prefix", "vocabulary", "head", "adapter", "text"]
    max_length: int | None


class MethodCard(Answer):
    """A row of the table of methods."""

    name: str
    unit: Literal["token", "segment", "completion"]
    scorer: str | None
    rule: Literal["sample", "greedy", "accept", "best"]
    clip: bool = Field(description="scores are cut to [0, 1] before they steer")
    takes: list[str]
    top_k: int | None
    paper: str


class GuidanceInfo(Answer):
    """Answer of ``/v1/guidance``: what requests may ask for."""

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
    """What a scorer says of one completion."""

    index: int
    score: float
    prefixes: list[PrefixScore] | None = None


class Scores(Answer):
    """Answer of ``/v1/score``."""

    object: Literal["list"] = "list"
    model: str
    data: list[Score]
    usage: Usage


class Side(Answer):
    """One side of a comparison."""

    text: str
    finish_reason: Finish
    token_ids: list[int]
    guidance: GuidanceReport


class Comparison(Answer):
    """Answer of ``/v1/compare``."""

    id: str
    object: Literal["comparison"] = "comparison"
    seed: int
    unguided: Side
    guided: Side
    first_divergence: int | None = Field(description="index of the first token that differs; null: none does")
    usage: Usage


class ComparisonChunk(Answer):
    """An event of a comparison's stream: a token, the end of a side, or the end."""

    id: str
    object: Literal["comparison.chunk", "comparison.summary"]
    side: Literal["guided", "unguided"] | None = None
    text: str | None = None
    token_id: int | None = None
    finish_reason: Finish | None = None
    guidance: GuidanceReport | None = None
    seed: int | None = None
    first_divergence: int | None = None
    usage: Usage | None = None
    seconds: float | None = None


class Tokens(Answer):
    """Answer of ``/tokenize``."""

    tokens: list[int]
    count: int
    max_model_len: int | None
    token_strs: list[str]


class Detokenized(Answer):
    """Answer of ``/detokenize``."""

    prompt: str


class Status(Answer):
    """Answer of ``/livez``, ``/readyz`` and ``/health``."""

    status: Literal["alive", "ready"]


class Version(Answer):
    """Answer of ``/version``."""

    version: str


# A stream's events: each has the JSON of a chunk, or of an error, as data; the last has [DONE].
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
}


def documented(kind: type[Answer], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """What FastAPI's ``responses`` takes: the answer of a route, its stream, and errors."""
    from rgtg.serving.http.errors import ErrorBody

    found: dict[int | str, dict[str, Any]] = {200: {"model": kind}}
    if streams:
        found[200]["content"] = {"text/event-stream": {"itemSchema": _EVENT}}
    for status, text in {"4XX": "refused", "5XX": "failed"}.items():
        found[status] = {"model": ErrorBody, "description": text}
    return found
