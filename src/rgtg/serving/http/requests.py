"""Bodies of requests, as OpenAI names them, with guidance; what is not done is refused, never ignored."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from rgtg.decoding.methods import METHODS
from rgtg.serving.http.errors import ApiError

_BIG = 1e6  # a strength beyond any use, far from overflow
Name = Annotated[str, Field(max_length=512)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]  # each is looked for after every token


def _kind(given: Any) -> str:
    """Which of a union's kinds a value is: errors then speak of that kind alone."""
    if isinstance(given, dict):
        return "#map"
    if not isinstance(given, list):
        return "#text"
    if given and isinstance(given[0], list):
        return "#lists"
    return "#ids" if given and isinstance(given[0], int) else "#list"


_texts = Discriminator(_kind, custom_error_type="kind", custom_error_message="expected a text, or a list of texts")


class Body(BaseModel):
    """Base of all bodies.

    Attributes:
        neutral: parameters of OpenAI that are not done here → values that ask for nothing and may be sent.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name in cls.neutral.keys() & given.keys():
            if not any(given[name] == value and type(given[name]) is type(value) for value in cls.neutral[name]):
                raise ApiError(400, f"{name} is not supported here", param=name, code="unsupported_parameter")
        return {name: value for name, value in given.items() if name not in cls.neutral}


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


_NOTHING: tuple[Any, ...] = (None, [])
Text = Annotated[str, Tag("#text")]


class Message(Body):
    """A message of a chat; the roles are the chat template's."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "refusal": (None,), "audio": (None,), "function_call": (None,), "tool_calls": _NOTHING,
        "annotations": _NOTHING, "name": (None,),
    }  # fmt: skip

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text | Annotated[list[TextPart], Tag("#list"), Field(min_length=1)], _texts] = Field(
        description="text, or parts that are texts"
    )

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: one text, and ``developer`` under its older name."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"unknown method {name[:40]!r}; choose one of {', '.join(METHODS)}")
    return name


Strength = Annotated[float, Field(ge=-_BIG, le=_BIG)]
_named = Field(json_schema_extra={"enum": list(METHODS)})


# A number of tokens, candidates or completions; limits of the server's own are lower.
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Guidance(Body):
    """How a completion is steered; what is left out is the method's own."""

    method: Annotated[str, AfterValidator(_known_method), _named] | None = Field(
        None, description="default: pargs where a scorer steers, else policy (nothing steers)"
    )
    beta: Strength | None = Field(None, description="guidance strength, of every scorer in a list; default 1")
    top_k: Count | None = Field(
        None, description="candidates per step; null, if sent, is the whole vocabulary; default: the method's own"
    )
    scorers: (
        Annotated[
            Annotated[dict[Name, Strength], Tag("#map"), Field(min_length=1, max_length=16)]
            | Annotated[list[Name], Tag("#list"), Field(min_length=1, max_length=16)],
            Discriminator(_kind, custom_error_type="kind", custom_error_message="expected names, or names with betas"),
        ]
        | None
    ) = Field(None, description="names, or names with a strength each; default: the only one that is loaded")
    trace: bool | None = Field(None, description="send every step's candidates with their figures")
    entropy_gate: Annotated[float, Field(ge=0)] | None = Field(
        None, description="steer only where the policy's entropy, in nats, exceeds this"
    )
    n: Count | None = Field(None, description="draws of best-of-n, or of cd-blockwise's segments")
    segment_length: Count | None = Field(None, description="tokens of a segment")
    min_segment: Count | None = Field(None, description="cards: fewest tokens of a segment")
    entropy_threshold: Annotated[float, Field(ge=0)] | None = Field(None, description="cards: ends a segment, in nats")
    reward_threshold: Strength | None = Field(None, description="cards: reward that a completion should reach")
    threshold_start: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="cards: first threshold")
    retries: Annotated[int, Field(ge=0, le=100)] | None = Field(None, description="cards: rejections of a segment")

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if self.beta is not None and isinstance(self.scorers, dict):
            raise ValueError("give a beta, or scorers with a beta each, not both")
        return self


class StreamOptions(Body):
    """What a stream ends with."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (None, False)}

    include_usage: bool | None = None


class Sampling(Body):
    """What all requests for completions share."""

    model: Name = Field(description="a name of GET /v1/models; POLICY+SCORER is steered by that scorer")
    max_tokens: Count | None = Field(None, description="most new tokens")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="default 1; 0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="nucleus of the candidates; default 1")
    stop: (
        Annotated[
            Annotated[StopText, Tag("#text")] | Annotated[list[StopText], Tag("#list"), Field(max_length=4)],
            _texts,
        ]
        | None
    ) = Field(None, description="up to four texts that end a completion; not part of it")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="the same request with the same seed gives the same completions; default: a random one"
    )
    stream: bool | None = None
    user: str | None = Field(None, description="taken, and neither used nor kept")
    guidance: Guidance | None = Field(None, description="how this request is steered")

    @property
    def stops(self) -> list[str]:
        """Stop texts, none or more."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Choices(Sampling):
    """What OpenAI's two endpoints share."""

    n: Count | None = Field(None, description="completions of each prompt; default 1")
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream to true")
        return self

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


_PENALTIES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0, 0.0), "presence_penalty": (None, 0, 0.0), "logit_bias": (None, {}),
}  # fmt: skip
_NULL = (None,)


class ChatRequest(Choices):
    """``POST /v1/chat/completions``."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = _PENALTIES | {
        "audio": _NULL, "function_call": (None, "none"), "functions": _NOTHING, "metadata": (None, {}),
        "modalities": (None, ["text"]), "moderation": _NULL, "parallel_tool_calls": _NULL, "prediction": _NULL,
        "prompt_cache_key": _NULL, "prompt_cache_options": _NULL, "prompt_cache_retention": _NULL,
        "reasoning_effort": _NULL, "response_format": (None, {"type": "text"}), "safety_identifier": _NULL,
        "service_tier": (None, "auto", "default"), "store": (None, False), "tool_choice": (None, "none"),
        "tools": _NOTHING, "verbosity": _NULL, "web_search_options": _NULL,
    }  # fmt: skip

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="log-probabilities under the guided distribution")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="likeliest candidates per token")

    @model_validator(mode="after")
    def _at_odds(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


TokenId = Annotated[int, Field(ge=0)]
Prompts = Annotated[
    Text
    | Annotated[list[str], Tag("#list"), Field(min_length=1)]
    | Annotated[list[TokenId], Tag("#ids"), Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Tag("#lists"), Field(min_length=1)],
    Discriminator(
        _kind, custom_error_type="kind", custom_error_message="expected a text, token ids, or a list of either"
    ),
]


class CompletionRequest(Choices):
    """``POST /v1/completions``."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = _PENALTIES | {
        "best_of": (None, 1), "echo": (None, False), "suffix": (None, ""),
    }  # fmt: skip

    prompt: Prompts = Field(description="a text, token ids, or a list of either")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="likeliest candidates per token, with their log-probabilities under the guided distribution"
    )


class _OnePrompt(Body):
    prompt: Text | None = Field(None, description="a text; or give messages")
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = Field(
        None, description="a chat, written out by the policy's chat template"
    )

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


OnePrompt = Annotated[
    Text | Annotated[list[TokenId], Tag("#ids"), Field(min_length=1)],
    Discriminator(_kind, custom_error_type="kind", custom_error_message="expected a text, or token ids"),
]


class CompareRequest(Sampling, _OnePrompt):
    """``POST /v1/compare``: one prompt, guided and unguided, from one seed."""

    model: Name | None = None  # type: ignore[assignment]
    prompt: OnePrompt | None = Field(  # type: ignore[assignment]
        None, description="a text or token ids; or give messages"
    )


class ScoreRequest(_OnePrompt):
    """``POST /v1/score``: what a scorer says of completions."""

    model: Name | None = Field(None, description="a scorer's name; default: the only one")
    completion: Annotated[Text | Annotated[list[str], Tag("#list"), Field(min_length=1)], _texts] = Field(
        description="a text, or a list"
    )
    finished: bool = Field(True, description="whether the completions have ended, or will go on")
    prefixes: bool = Field(False, description="also the score after each token")


class TokenizeRequest(_OnePrompt):
    """``POST /tokenize``: tokens as prompts are read here."""

    model: Name | None = None
    add_special_tokens: bool = Field(True, description="as a prompt's are; a chat template writes its own")


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: Name | None = None
    tokens: list[TokenId]
