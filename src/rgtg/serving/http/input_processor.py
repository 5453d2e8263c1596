"""From a request's body to jobs of the engine: prompts as tokens, guidance as settings, a seed for every row."""

import random
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rgtg.config import DecodingSettings, validate
from rgtg.decoding.methods import find_method
from rgtg.decoding.request import row_seeds
from rgtg.errors import DataError, UsageError
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.engine.request import Job, Row
from rgtg.serving.engine.sequence import rows_of
from rgtg.serving.http.errors import ApiError, Written, from_rgtg
from rgtg.serving.http.requests import Guidance, Message, Sampling
from rgtg.serving.settings import ServeSettings
from rgtg.tokenization.conversation import encode_source

Source = str | list[int] | list[Message]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy reads it, and as scorers with a tokenizer of their own do."""

    text: str
    ids: tuple[int, ...]
    source: str | list[dict[str, Any]] | None


@dataclass(frozen=True)
class Plan:
    """How the rows of a request are decoded.

    Attributes:
        settings: those that were given, and the length.
        resolved: with the method's own.
        scorers: names, in the order of the betas.
        trace: whether its steps are sent.
        shown: whether choices say how they came about.
    """

    settings: DecodingSettings
    resolved: DecodingSettings
    scorers: tuple[str, ...]
    trace: bool
    shown: bool


class Planner:
    """Reads requests against what is loaded and allowed."""

    def __init__(self, models: ServedModels, settings: ServeSettings) -> None:
        self.models, self.settings = models, settings
        self.aliases = {models.policy_name: ()} | {f"{models.policy_name}+{name}": (name,) for name in models.scorers}
        self._tokenizer_lock = threading.Lock()
        given = "seed" in settings.model_fields_set
        self._random = random.Random(settings.seed) if given else secrets.SystemRandom()

    def seed(self, given: int | None) -> int:
        """A request's seed, or a new one, small enough for any language's numbers."""
        return self._random.randrange(2**31) if given is None else given

    def deadline(self) -> float:
        """When a request that comes now is given up."""
        return time.monotonic() + self.settings.request_seconds

    # -- prompts ---------------------------------------------------------------------------------------------------

    def prompts(self, sources: Sequence[Source], param: str) -> list[Prompt]:
        """Tokens of prompts; call it in a thread, since a long text takes a while.

        Raises:
            ApiError: too many prompts, an empty one, ids that are no tokens, messages that the chat template refuses.
        """
        if len(sources) > self.settings.max_prompts:
            raise ApiError(400, f"at most {self.settings.max_prompts} prompts in a request", param=param)
        try:
            with self._tokenizer_lock:
                return [self._prompt(source, param) for source in sources]
        except DataError as error:
            raise from_rgtg(error, Written(param)) from error

    def _prompt(self, source: Source, param: str) -> Prompt:
        tokenizer = self.models.tokenizer
        if isinstance(source, str):
            text, ids = encode_source(tokenizer, source)
            return Prompt(text, tuple(ids), source)
        if isinstance(source[0], int):
            tokens = [int(i) for i in source]
            self.require_tokens(tokens, param)
            return Prompt(str(tokenizer.decode(tokens)), tuple(tokens), None)
        messages = [message.plain() for message in source]
        text, ids = self.render(messages)
        return Prompt(text, tuple(ids), messages)

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[int]]:
        """A chat through the policy's own template.

        Raises:
            ApiError: there is none, or it refuses these messages.
        """
        if not getattr(self.models.tokenizer, "chat_template", None):
            raise ApiError(400, "this policy has no chat template; use /v1/completions with a prompt", param="messages")
        try:
            return encode_source(self.models.tokenizer, messages)
        except Exception as error:  # a template is a program of its own, and raises what it likes
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error

    def require_tokens(self, ids: Sequence[int], param: str) -> None:
        """Refuse ids that the policy has no token for.

        Raises:
            ApiError: naming the first.
        """
        size = min(len(self.models.tokenizer), self.models.policy.model.config.get_text_config().vocab_size)
        if bad := [i for i in ids if not 0 <= i < size]:
            raise ApiError(400, f"{bad[0]} is no token: this vocabulary has {size}", param=param)

    # -- guidance --------------------------------------------------------------------------------------------------

    def plan(self, body: Sampling, prompts: Sequence[Prompt], *, tokens: int, traced: bool = False) -> Plan:
        """Settings of a request's rows.

        Args:
            body: the request.
            prompts: all of them get the same settings.
            tokens: most new tokens where the request does not say; fewer where the context ends before.
            traced: log-probabilities are asked for, which come from traces.

        Raises:
            ApiError: an unknown model or scorer, guidance that cannot be had, or settings that do not go together.
        """
        guidance = body.guidance or Guidance()
        scorers = self._scorers(body.model, guidance)
        method = guidance.method or ("pargs" if scorers or guidance.beta is not None else "policy")
        if find_method(method).scorer is None and not guidance.scorers:
            scorers = ()  # the method that was asked for wins over the model's name
        elif find_method(method).scorer is not None and not scorers:
            scorers = self._only_scorer(method)
        given = self._given(body, guidance, scorers) | {"method": method}
        given["max_new_tokens"] = self._length(body, prompts, scorers, tokens)
        try:
            settings = validate(DecodingSettings, given)
            _, resolved = self.models.resolve(settings, scorers)
        except UsageError as error:
            raise from_rgtg(error, written(body)) from error
        trace = bool(guidance.trace)
        if trace or traced:
            self._require_narrow(resolved, "trace" if trace else "logprobs")
        return Plan(settings, resolved, scorers, trace, shown=body.guidance is not None or bool(scorers))

    def _scorers(self, model: str | None, guidance: Guidance) -> tuple[str, ...]:
        """Names of those that the request, or else its model's name, asks for."""
        if model is not None and model not in self.aliases:
            known = ", ".join(self.aliases)
            raise ApiError(
                404, f"there is no model {model!r}; there are: {known}", param="model", code="model_not_found"
            )
        if not guidance.scorers:
            return self.aliases[model] if model is not None else ()
        names = tuple(guidance.scorers)
        if unknown := [name for name in names if name not in self.models.scorers]:
            raise self._unknown_scorer(unknown[0], "guidance.scorers")
        return names

    def _unknown_scorer(self, name: str, param: str) -> ApiError:
        known = ", ".join(self.models.scorers) or "none"
        return ApiError(400, f"no scorer {name!r} is loaded; loaded: {known}", param=param, code="unknown_scorer")

    def _only_scorer(self, method: str) -> tuple[str, ...]:
        if len(self.models.scorers) != 1:
            known = ", ".join(self.models.scorers) or "none"
            raise ApiError(400, f"method {method} needs a scorer: name it (loaded: {known})", param="guidance.scorers")
        return tuple(self.models.scorers)

    def scorer(self, name: str | None) -> str:
        """A scorer that is asked for by name, or the only one.

        Raises:
            ApiError: there is none of that name, or none was named and there are several.
        """
        if name is None and len(self.models.scorers) == 1:
            return next(iter(self.models.scorers))
        if name not in self.models.scorers:
            known = ", ".join(self.models.scorers) or "none"
            wrong = "name a scorer" if name is None else f"there is no scorer {name!r}"
            status, code = (400, "missing_parameter") if name is None else (404, "model_not_found")
            raise ApiError(status, f"{wrong}; loaded: {known}", param="model", code=code)
        return name

    def _given(self, body: Sampling, guidance: Guidance, scorers: tuple[str, ...]) -> dict[str, Any]:
        """Decoding settings that the request names."""
        own = guidance.model_dump(exclude_none=True, exclude={"method", "scorers", "trace", "beta"})
        if "top_k" in guidance.model_fields_set:
            own["top_k"] = guidance.top_k
        shared = {"temperature": body.temperature, "top_p": body.top_p, "stop": body.stops or None}
        return {k: v for k, v in shared.items() if v is not None} | own | _strengths(guidance, scorers)

    def _length(self, body: Sampling, prompts: Sequence[Prompt], scorers: Sequence[str], default: int) -> int:
        """New tokens: as asked, or as many as there is room for, up to the default."""
        for name in ("max_tokens", "max_completion_tokens"):
            if (asked := getattr(body, name, None)) is not None:
                if asked > self.settings.max_tokens:
                    limit = self.settings.max_tokens
                    raise ApiError(400, f"{name}: this server makes at most {limit} new tokens", param=name)
                return int(asked)
        loaded = [self.models.scorers[name] for name in scorers]
        limits = [
            self.models.max_length,
            *(one.max_length for one in loaded if not isinstance(one, CrossTokenizerScorer)),
        ]
        longest = max(len(prompt.ids) for prompt in prompts)
        rooms = [limit - longest for limit in limits if limit is not None]
        return max(1, min(default, self.settings.max_tokens, *rooms))  # without room, the engine says so

    def _require_narrow(self, settings: DecodingSettings, what: str) -> None:
        widest = self.settings.max_candidates
        if settings.top_k is None or settings.top_k > widest:
            raise ApiError(
                400, f"{what} shows every candidate: set guidance.top_k to at most {widest}", param="guidance.top_k"
            )

    # -- jobs ------------------------------------------------------------------------------------------------------

    def jobs(self, prompts: Sequence[Prompt], plan: Plan, *, n: int, seed: int, traced: bool = False) -> list[Job]:
        """A job for each prompt, with n rows, which are those of ``GuidedPolicy.generate`` for prompts × n.

        Raises:
            ApiError: more completions of one prompt than are ever decoded at once.
        """
        draws = rows_of(plan.resolved)
        if n * draws > self.settings.max_batch:
            raise ApiError(
                400,
                f"{n * draws} completions of a prompt at once; this server decodes at most {self.settings.max_batch}",
                param="n" if n > 1 else "guidance.n",
            )
        seeds = iter(row_seeds(seed, [prompt.ids for prompt in prompts for _ in range(n)]))
        deadline, trace = self.deadline(), plan.trace or traced
        return [
            Job(
                prompt.text,
                prompt.ids,
                tuple(Row(plan.settings, plan.scorers, next(seeds), trace) for _ in range(n)),
                prompt.source,
                deadline,
            )
            for prompt in prompts
        ]


def written(body: Sampling, prompt: str | None = None) -> Written:
    """What a request calls its prompt, and the names of which it used one or the other."""
    newer = body.max_tokens is None and getattr(body, "max_completion_tokens", None) is not None
    each = body.guidance is not None and isinstance(body.guidance.scorers, dict)
    return Written(
        prompt,
        "max_completion_tokens" if newer else "max_tokens",
        "guidance.scorers" if each else "guidance.beta",
    )


def _strengths(guidance: Guidance, scorers: tuple[str, ...]) -> dict[str, Any]:
    """The betas, where any is named or several scorers need one each."""
    if isinstance(guidance.scorers, dict):
        betas = [guidance.scorers[name] for name in scorers]
    elif guidance.beta is not None or len(scorers) > 1:
        betas = [1.0 if guidance.beta is None else guidance.beta] * max(len(scorers), 1)
    else:
        return {}
    return {"beta": betas[0] if len(betas) == 1 else betas}
