"""Request bodies: OpenAI's fields plus ``guidance``; an unsupported or unknown field is an error."""

from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from rgtg.data.openai_batch import not_supported
from rgtg.decoding.methods import METHODS
from rgtg.serving.http.errors import ApiError

_MAX_STRENGTH = 1e6  # larger than any useful strength, and far from overflow
Name = Annotated[str, Field(max_length=512)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]  # every stop text is searched for after every token


def _tag_of(value: Any) -> str:
    """The member of a union that a value is validated as, so that errors are about that member only."""
    if isinstance(value, dict):
        return "#map"
    if not isinstance(value, list):
        return "#text"
    if value and isinstance(value[0], list):
        return "#lists"
    return "#ids" if value and isinstance(value[0], int) else "#list"


def _by_tag(expected: str) -> Discriminator:
    return Discriminator(_tag_of, custom_error_type="kind", custom_error_message=f"expected {expected}")


_text_or_texts = _by_tag("a text, or a list of texts")


class Body(BaseModel):
    """Base of all request bodies.

    Attributes:
        unsupported: OpenAI parameters that are not implemented → values that have no effect and are accepted.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name in cls.unsupported.keys() & given.keys():
            if not any(given[name] == value and type(given[name]) is type(value) for value in cls.unsupported[name]):
                raise ApiError(400, f"{name}: {not_supported(name)}", param=name, code="unsupported_parameter")
        return {name: value for name, value in given.items() if name not in cls.unsupported}


class TextPart(Body):
    """A text part of a message."""

    type: Literal["text"]
    text: str


_NONE: tuple[Any, ...] = (None,)
_NONE_OR_EMPTY: tuple[Any, ...] = (None, [])
_OF_CHATS: dict[str, tuple[Any, ...]] = {"chat_template": _NONE}
Text = Annotated[str, Tag("#text")]


class Message(Body):
    """A chat message; the chat template decides which roles it accepts."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "refusal": _NONE, "audio": _NONE, "function_call": _NONE, "tool_calls": _NONE_OR_EMPTY,
        "annotations": _NONE_OR_EMPTY,
    }  # fmt: skip

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text | Annotated[list[TextPart], Tag("#list"), Field(min_length=1)], _text_or_texts] = Field(
        description="a text, or text parts"
    )
    name: Name | None = Field(None, description="of who speaks, for chat templates that write it")

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it: one text; ``developer`` becomes ``system``."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, **name, "content": text}


TemplateKwargs = Annotated[
    dict[Name, JsonValue] | None,
    Field(
        description='variables of the chat template: {"enable_thinking": false}; one that it does not read is an error'
    ),
]
# A prompt: text, token ids or a chat.
Source = str | list[int] | list[Message]


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"unknown method {name[:40]!r}; choose one of {', '.join(METHODS)}")
    return name


Method = Annotated[str, AfterValidator(_known_method), Field(json_schema_extra={"enum": list(METHODS)})]
Strength = Annotated[float, Field(ge=-_MAX_STRENGTH, le=_MAX_STRENGTH)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]  # JSON's keys are texts
# A number of tokens, candidates or completions; the server's own limits are lower.
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Guidance(Body):
    """How a completion is guided; the method has a default for every field that is left out."""

    method: Method | None = Field(None, description="default: pargs with a scorer, else policy (unguided)")
    beta: Strength | None = Field(None, description="guidance strength of every scorer in a list; default 1")
    top_k: Count | None = Field(
        None, description="candidates per step; an explicit null means the whole vocabulary; default: the method's"
    )
    scorers: (
        Annotated[
            Annotated[dict[Name, Strength], Tag("#map"), Field(min_length=1, max_length=16)]
            | Annotated[list[Name], Tag("#list"), Field(min_length=1, max_length=16)],
            _by_tag("names, or names with betas"),
        ]
        | None
    ) = Field(None, description="names, or names with a strength each; default: the only loaded scorer")
    trace: bool | None = Field(None, description="return the candidates of every step with their scores")
    entropy_gate: Annotated[float, Field(ge=0)] | None = Field(
        None, description="guide only where the policy's entropy, in nats, exceeds this"
    )
    value_threshold: Strength | None = Field(None, description="vfd: score that a token must reach")
    abstain_below: Strength | None = Field(
        None, description="end a completion where its score falls below this; its finish_reason is content_filter"
    )
    kl_budget: Annotated[float, Field(gt=0, le=_MAX_STRENGTH)] | None = Field(
        None, description="in place of beta: nats per completion, by which beta adapts at every token"
    )
    n: Count | None = Field(
        None, description="number of completions (best-of-n, smc) or of segments (cd-blockwise) to draw"
    )
    proposal: Literal["pargs", "policy"] | None = Field(None, description="smc: what draws tokens")
    resample_finished: bool | None = Field(None, description="smc: resample finished completions with unfinished ones")
    segment_length: Count | None = Field(None, description="tokens per segment")
    min_segment: Count | None = Field(None, description="cards: minimum tokens per segment")
    entropy_threshold: Annotated[float, Field(ge=0)] | None = Field(
        None, description="cards: entropy in nats that ends a segment"
    )
    reward_threshold: Strength | None = Field(None, description="cards: reward that a completion should reach")
    threshold_start: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="cards: first threshold")
    retries: Annotated[int, Field(ge=0, le=100)] | None = Field(None, description="cards: rejections per segment")

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if self.beta is not None and isinstance(self.scorers, dict):
            raise ValueError("give either beta or scorers with a beta each, not both")
        return self


class StreamOptions(Body):
    """Options of a stream."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (None, False)}

    include_usage: bool | None = None


class Sampling(Body):
    """Fields of every request for completions."""

    model: Name = Field(description="a name from GET /v1/models; POLICY+SCORER is guided by that scorer")
    max_tokens: Count | None = Field(None, description="maximum number of new tokens")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="default 1; 0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="nucleus of the candidates; default 1")
    stop: (
        Annotated[
            Annotated[StopText, Tag("#text")] | Annotated[list[StopText], Tag("#list"), Field(max_length=4)],
            _text_or_texts,
        ]
        | None
    ) = Field(None, description="up to four texts that end a completion; they are not part of it")
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="the same request with the same seed returns the same completions; default: a random seed"
    )
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id → bias, -100 to 100, added to the policy's logits before candidates are chosen"
    )
    stream: bool | None = None
    user: str | None = Field(None, description="accepted, but neither used nor stored")
    guidance: Guidance | None = Field(None, description="how this request is guided")

    @property
    def stop_texts(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChoicesRequest(Sampling):
    """Fields of OpenAI's two endpoints."""

    n: Count | None = Field(None, description="completions per prompt; default 1")
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options applies to streams only: set stream to true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


# Of both endpoints; OpenAI's older one has no tools, but other servers of it do.
_OF_BOTH: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0, 0.0), "presence_penalty": (None, 0, 0.0), "function_call": (None, "none"),
    "functions": _NONE_OR_EMPTY, "parallel_tool_calls": _NONE, "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none"), "tools": _NONE_OR_EMPTY,
}  # fmt: skip


class ChatRequest(ChoicesRequest):
    """``POST /v1/chat/completions``."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = _OF_BOTH | _OF_CHATS | {
        "audio": _NONE, "metadata": (None, {}), "modalities": (None, ["text"]), "moderation": _NONE,
        "prediction": _NONE, "prompt_cache_key": _NONE, "prompt_cache_options": _NONE, "prompt_cache_retention": _NONE,
        "reasoning_effort": _NONE, "safety_identifier": _NONE, "service_tier": (None, "auto", "default"),
        "store": (None, False), "verbosity": _NONE, "web_search_options": _NONE,
    }  # fmt: skip

    messages: list[Message] = Field(min_length=1, max_length=4096)
    chat_template_kwargs: TemplateKwargs = None
    max_completion_tokens: Count | None = Field(None, description="newer name of max_tokens")
    logprobs: bool | None = Field(None, description="return log-probabilities under the guided distribution")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="number of most likely candidates per token"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def sources(self) -> tuple[list[Source], str]:
        """The prompts, and the name of their field."""
        return [self.messages], "messages"

    @property
    def num_logprobs(self) -> int | None:
        """Most likely candidates to return per token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


TokenId = Annotated[int, Field(ge=0)]


class CompletionRequest(ChoicesRequest):
    """``POST /v1/completions``."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = _OF_BOTH | {
        "best_of": (None, 1), "suffix": (None, ""),
    }  # fmt: skip

    prompt: Annotated[
        Text
        | Annotated[list[str], Tag("#list"), Field(min_length=1)]
        | Annotated[list[TokenId], Tag("#ids"), Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Tag("#lists"), Field(min_length=1)],
        _by_tag("a text, token ids, or a list of either"),
    ] = Field(description="a text, token ids, or a list of either")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="maximum number of new tokens; default 16; 0 with echo returns the prompt alone"
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="number of most likely candidates per token to return with their guided log-probabilities"
    )
    echo: bool | None = Field(
        None,
        description="begin each text with the prompt; with logprobs, the prompt's tokens have the policy's own "
        "log-probabilities, and the first one null",
    )

    @model_validator(mode="after")
    def _some_text(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: 0 needs echo: true", param="max_tokens", code="invalid_value")
        return self

    @property
    def sources(self) -> tuple[list[Source], str]:
        """The prompts, and the name of their field."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast(list[Source], [self.prompt] if one else self.prompt), "prompt"

    @property
    def num_logprobs(self) -> int | None:
        """Most likely candidates to return per token; None: no log-probabilities at all."""
        return self.logprobs


class OnePromptRequest(Body):
    """Fields of a request with one prompt: either ``prompt`` or ``messages``."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = _OF_CHATS

    prompt: Text | None = Field(None, description="a text; or give messages")
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = Field(
        None, description="a chat, rendered with the policy's chat template"
    )
    chat_template_kwargs: TemplateKwargs = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    @property
    def source(self) -> tuple[Source, str]:
        """The prompt, and the name of its field."""
        if self.messages is not None:
            return self.messages, "messages"
        assert self.prompt is not None, "validated"
        return self.prompt, "prompt"


class CompareRequest(Sampling, OnePromptRequest):
    """``POST /v1/compare``: one prompt, guided and unguided, with one seed."""

    model: Name | None = None  # type: ignore[assignment]
    prompt: (
        Annotated[Text | Annotated[list[TokenId], Tag("#ids"), Field(min_length=1)], _by_tag("a text, or token ids")]
        | None
    ) = Field(None, description="a text or token ids; or give messages")  # type: ignore[assignment]


class ScoreRequest(OnePromptRequest):
    """``POST /v1/score``: scores of completions."""

    model: Name | None = Field(None, description="a scorer's name; default: the only loaded scorer")
    completion: Annotated[Text | Annotated[list[str], Tag("#list"), Field(min_length=1)], _text_or_texts] = Field(
        description="a text, or a list of texts"
    )
    finished: bool = Field(True, description="whether the completions have ended")
    prefixes: bool = Field(False, description="also return the score after each token")


class TokenizeRequest(OnePromptRequest):
    """``POST /tokenize``: token ids as the server encodes prompts."""

    model: Name | None = None
    add_special_tokens: bool = Field(True, description="as for prompts; a chat template writes its own special tokens")


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: Name | None = None
    tokens: list[TokenId]
