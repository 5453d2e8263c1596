"""From a request body to requests of the engine: prompts as token ids, guidance as settings, a seed for every row."""

import random
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rgtg.config import DecodingSettings
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.decoding.request import Request, require_room, row_seeds
from rgtg.errors import DataError, RgtgError, UsageError
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.serving.engine.engine import Engine, num_sequences
from rgtg.serving.http.errors import ApiError, ParameterNames, from_rgtg
from rgtg.serving.http.requests import Guidance, Sampling, Source
from rgtg.serving.settings import ServeSettings
from rgtg.tokenization.conversation import check_template_kwargs, encode_source
from rgtg.tokenization.encoding import encode_prompt
from rgtg.tokenization.token_bytes import TokenBytes


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt.

    Attributes:
        text: the text, a chat through the policy's template.
        ids: the policy's token ids.
        source: what scorers with a tokenizer of their own encode; None for a prompt of token ids.
    """

    text: str
    ids: tuple[int, ...]
    source: str | list[dict[str, Any]] | None


@dataclass(frozen=True)
class ParsedRequest:
    """A validated request: what the engine runs, and what its answer needs.

    Attributes:
        prompts: encoded prompts.
        groups: for each prompt, its ``n`` requests.
        deadline: of all of them, in ``time.monotonic()`` seconds.
        settings: resolved decoding settings, the method's defaults included.
        scorers: names of the scorers, in the order of the betas.
        n: completions per prompt.
        seed: the request's seed, or the random one it was given.
        names: the request's own field names, for error messages.
        num_logprobs: most likely candidates to return per token; None: no log-probabilities.
        trace: whether the answer holds every step's candidates.
        reports_guidance: whether choices say how they were generated.
        echo: whether choices begin with their prompt.
    """

    prompts: list[Prompt]
    groups: list[list[Request]]
    deadline: float
    settings: DecodingSettings
    scorers: tuple[str, ...]
    n: int
    seed: int
    names: ParameterNames
    num_logprobs: int | None
    trace: bool
    reports_guidance: bool
    echo: bool = False

    @property
    def num_choices(self) -> int:
        """Choices of the answer: n for each prompt."""
        return len(self.prompts) * self.n

    @property
    def echoed_log_probs(self) -> int | None:
        """Most likely tokens to return for each token of the prompts; None: they have no log-probabilities."""
        return self.num_logprobs if self.echo else None


class InputProcessor:
    """Parses requests for the models that are loaded, within the server's limits."""

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        self.engine, self.settings, self.models = engine, settings, engine.models
        self.tokenizer = self.models.policy.tokenizer
        self.token_bytes = TokenBytes(self.tokenizer)
        name = self.models.policy_name
        self.model_names = {name: ()} | {f"{name}+{scorer}": (scorer,) for scorer in self.models.scorers}
        self._guided: dict[tuple[str, tuple[str, ...]], GuidedPolicy] = {}
        self._tokenizer_lock = threading.Lock()
        seeded = "seed" in settings.model_fields_set
        self._random = random.Random(settings.seed) if seeded else secrets.SystemRandom()

    # -- prompts ---------------------------------------------------------------------------------------------------

    def encode(
        self, sources: Sequence[Source], param: str, template_kwargs: dict[str, Any] | None = None
    ) -> list[Prompt]:
        """Encode prompts; blocking, so call it in a worker thread.

        Args:
            sources: texts, token ids or chats.
            param: their field in the request.
            template_kwargs: variables of the chat template.

        Raises:
            ApiError: too many prompts, an empty one, ids outside the vocabulary, a chat the template refuses, or
                variables that it does not read.
        """
        if len(sources) > self.settings.max_prompts:
            raise ApiError(400, f"at most {self.settings.max_prompts} prompts in a request", param=param)
        if template_kwargs and param != "messages":
            raise ApiError(400, "chat_template_kwargs applies to messages", param="chat_template_kwargs")
        try:
            with self._tokenizer_lock:
                return [self._encode_one(source, param, template_kwargs) for source in sources]
        except DataError as error:
            raise from_rgtg(error, ParameterNames(param)) from error

    def _encode_one(self, source: Source, param: str, template_kwargs: dict[str, Any] | None) -> Prompt:
        if isinstance(source, str):
            return Prompt(source, tuple(encode_prompt(self.tokenizer, source)), source)
        if isinstance(source[0], int):
            tokens = [int(i) for i in source]
            self.require_tokens(tokens, param)
            return Prompt(str(self.tokenizer.decode(tokens)), tuple(tokens), None)
        messages = [message.for_template() for message in source]
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(400, "this policy has no chat template; use /v1/completions with a prompt", param="messages")
        try:
            check_template_kwargs(self.tokenizer, template_kwargs)
        except UsageError as error:
            raise from_rgtg(error, ParameterNames(param)) from error
        try:
            text, ids = encode_source(self.tokenizer, messages, template_kwargs=template_kwargs)
        except Exception as error:  # a template is a program and can raise anything
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
        return Prompt(text, tuple(ids), messages)

    def require_tokens(self, ids: Sequence[int], param: str) -> None:
        """Check that all ids are in the policy's vocabulary.

        Raises:
            ApiError: one is not.
        """
        vocabulary = self.models.policy.vocabulary
        if bad := [i for i in ids if not 0 <= i < vocabulary.size or i in vocabulary.missing]:
            size = vocabulary.size - len(vocabulary.missing)
            raise ApiError(400, f"{bad[0]} is not a token id: the vocabulary has {size} tokens", param=param)

    # -- models and scorers ----------------------------------------------------------------------------------------

    def require_model(self, model: str | None) -> None:
        """Check a model name; None stands for the policy.

        Raises:
            ApiError: no model has this name.
        """
        if model is not None and model not in self.model_names:
            known = ", ".join(self.model_names)
            raise ApiError(
                404, f"there is no model {model!r}; available: {known}", param="model", code="model_not_found"
            )

    def scorer_name(self, model: str | None) -> str:
        """The scorer that a request for scores names, or the only one that is loaded.

        Raises:
            ApiError: no scorer has this name, or several are loaded and the request names none.
        """
        if model is None and len(self.models.scorers) == 1:
            return next(iter(self.models.scorers))
        if model not in self.models.scorers:
            problem = "name a scorer" if model is None else f"there is no scorer {model!r}"
            status, code = (400, "missing_parameter") if model is None else (404, "model_not_found")
            raise ApiError(status, f"{problem}; loaded: {self._loaded_scorers()}", param="model", code=code)
        return model

    def _loaded_scorers(self) -> str:
        return ", ".join(self.models.scorers) or "none"

    def _method_and_scorers(self, model: str | None, guidance: Guidance) -> tuple[str, tuple[str, ...]]:
        """The method and the scorers of a request: those it names, else those of the model's name."""
        self.require_model(model)
        scorers = tuple(guidance.scorers or ()) or self.model_names[model or self.models.policy_name]
        for name in scorers:
            if name not in self.models.scorers:
                raise ApiError(
                    400,
                    f"no scorer {name!r} is loaded; loaded: {self._loaded_scorers()}",
                    param="guidance.scorers",
                    code="unknown_scorer",
                )
        method = guidance.method or ("pargs" if scorers or guidance.beta is not None else "policy")
        guided = METHODS[method].scorer is not None
        if not guided and not guidance.scorers:
            return method, ()  # an unguided method overrides the scorer in the model's name
        if guided and not scorers:
            if len(self.models.scorers) != 1:
                raise ApiError(
                    400,
                    f"method {method} needs a scorer: name it (loaded: {self._loaded_scorers()})",
                    param="guidance.scorers",
                )
            return method, tuple(self.models.scorers)
        return method, scorers

    # -- requests --------------------------------------------------------------------------------------------------

    def parse(
        self,
        body: Sampling,
        prompts: list[Prompt],
        param: str,
        *,
        default_tokens: int,
        n: int = 1,
        num_logprobs: int | None = None,
        echo: bool = False,
    ) -> ParsedRequest:
        """Turn a body into requests: those of ``GuidedPolicy.generate`` for prompts × n.

        Args:
            body: the request body.
            prompts: encoded prompts; all have the same settings.
            param: their field in the request.
            default_tokens: maximum number of new tokens for a body without one; less if the context ends before.
            n: completions per prompt.
            num_logprobs: most likely candidates to return per token; None: no log-probabilities.
            echo: begin each choice with its prompt. A body with max_tokens = 0 has nothing else: no requests.

        Raises:
            ApiError: an unknown model or scorer, incompatible settings, or more than the server's limits.
        """
        guidance = body.guidance or Guidance()
        names = _parameter_names(body, param)
        method, scorers = self._method_and_scorers(body.model, guidance)
        # 1. settings: those that the body gives, over the method's defaults
        given = _given_settings(body, guidance, scorers)
        given["max_new_tokens"] = self._max_new_tokens(body, prompts, scorers, default_tokens)
        trace = bool(guidance.trace)
        try:
            guided = self._guided.get((method, scorers)) or self.models.guided(method, scorers)
            self._guided[method, scorers] = guided
            settings = guided.resolve(given, complete=True)
        except UsageError as error:
            raise from_rgtg(error, names) from error
        # 2. limits
        if trace or num_logprobs is not None:
            self._require_narrow(settings, "trace" if trace else "logprobs")
        if (sequences := n * num_sequences(settings)) > self.settings.max_batch:
            raise ApiError(
                400,
                f"{sequences} completions of a prompt at once; this server decodes at most {self.settings.max_batch}",
                param="n" if n > 1 else "guidance.n",
            )
        if echo and num_logprobs is not None and METHODS[method].scorer is not None:
            raise ApiError(
                400,
                f"echo with logprobs returns the policy's own log-probabilities of the prompt, and {method} "
                f"guides this request: ask for {self.models.policy_name!r} without a scorer, or leave one of them out",
                param="logprobs",
                code="unsupported_parameter",
            )
        # 3. n requests for each prompt, with a seed for each
        seed = self._random.randrange(2**31) if body.seed is None else body.seed
        repeated = [prompt for prompt in prompts for _ in range(n)]
        seeds = row_seeds(seed, [prompt.ids for prompt in repeated])
        keeps_trace = trace or num_logprobs is not None
        parsed = partial(
            ParsedRequest, prompts, deadline=time.monotonic() + self.settings.request_seconds, settings=settings,
            scorers=scorers, n=n, seed=seed, names=names, num_logprobs=num_logprobs, trace=trace, echo=echo,
        )  # fmt: skip
        try:
            if body.max_tokens == 0:
                for prompt in prompts:
                    require_room(prompt.ids, 0, self.models.max_length, "policy")
                return parsed([], reports_guidance=False)
            with self._tokenizer_lock:
                requests = guided.make_requests(
                    [prompt.ids for prompt in repeated], [prompt.text for prompt in repeated],
                    [prompt.source for prompt in repeated], seeds, given, trace=keeps_trace,
                )  # fmt: skip
        except RgtgError as error:
            raise from_rgtg(error, names) from error
        groups = [requests[i : i + n] for i in range(0, len(requests), n)]
        return parsed(groups, reports_guidance=body.guidance is not None or bool(scorers))

    def _max_new_tokens(self, body: Sampling, prompts: Sequence[Prompt], scorers: Sequence[str], default: int) -> int:
        """The number that the body gives, else the default, or less if a context ends before."""
        for name in ("max_tokens", "max_completion_tokens"):
            if (given := getattr(body, name, None)) is not None:
                if given > self.settings.max_tokens:
                    limit = self.settings.max_tokens
                    raise ApiError(400, f"{name}: this server makes at most {limit} new tokens", param=name)
                return max(int(given), 1)  # settings are complete without new tokens too
        scoring = [self.models.scorers[name] for name in scorers]
        same_tokens = [scorer for scorer in scoring if not isinstance(scorer, CrossTokenizerScorer)]
        contexts = [self.models.max_length, *(scorer.max_length for scorer in same_tokens)]
        longest = max(len(prompt.ids) for prompt in prompts)
        room = [context - longest for context in contexts if context is not None]
        return max(1, min(default, self.settings.max_tokens, *room))  # the engine refuses prompts that leave no room

    def _require_narrow(self, settings: DecodingSettings, what: str) -> None:
        widest = self.settings.max_candidates
        if settings.top_k is None or settings.top_k > widest:
            raise ApiError(
                400, f"{what} returns every candidate: set guidance.top_k to at most {widest}", param="guidance.top_k"
            )


def _parameter_names(body: Sampling, prompt: str) -> ParameterNames:
    newer = body.max_tokens is None and getattr(body, "max_completion_tokens", None) is not None
    each = body.guidance is not None and isinstance(body.guidance.scorers, dict)
    return ParameterNames(
        prompt,
        "max_completion_tokens" if newer else "max_tokens",
        "guidance.scorers" if each else "guidance.beta",
    )


def _given_settings(body: Sampling, guidance: Guidance, scorers: tuple[str, ...]) -> dict[str, Any]:
    """Decoding settings that the body gives."""
    given = guidance.model_dump(exclude_none=True, exclude={"method", "scorers", "trace", "beta"})
    if "top_k" in guidance.model_fields_set:  # null means the whole vocabulary
        given["top_k"] = guidance.top_k
    shared: dict[str, Any] = {"temperature": body.temperature, "top_p": body.top_p, "stop": body.stop_texts or None}
    shared["logit_bias"] = {int(token): bias for token, bias in (body.logit_bias or {}).items()} or None
    shared["chat_template_kwargs"] = getattr(body, "chat_template_kwargs", None)
    given |= {name: value for name, value in shared.items() if value is not None}
    if isinstance(guidance.scorers, dict):
        betas = [guidance.scorers[name] for name in scorers]
    elif guidance.beta is not None or len(scorers) > 1:
        betas = [1.0 if guidance.beta is None else guidance.beta] * max(len(scorers), 1)
    else:
        return given
    return given | {"beta": betas[0] if len(betas) == 1 else betas}
