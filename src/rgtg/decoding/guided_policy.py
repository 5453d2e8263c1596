"""GuidedPolicy: a frozen policy, its scorers and a method, behind one ``generate``."""

import math
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch

from rgtg.config import DecodingSettings, validate
from rgtg.config.engines import require_carried
from rgtg.decoding.detokenizer import IncrementalDetokenizer
from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.engine.beams import BeamSearch, search_beams
from rgtg.decoding.engine.best_of_n import best_of_n
from rgtg.decoding.engine.chunked_prefill import BatchPrefill, ChunkedPrefill, PrefillTask
from rgtg.decoding.engine.drafters import DRAFTS
from rgtg.decoding.engine.particles import ParticleParams, branch, sample_particles, start_particles
from rgtg.decoding.engine.segments import SegmentParams, SegmentStopping, decode_segments
from rgtg.decoding.engine.speculative import SpeculativeBatch, check_draft
from rgtg.decoding.loading import ScorerSource, load_models
from rgtg.decoding.methods import (
    Method,
    betas_of,
    branch_columns,
    check_scorers,
    check_settings,
    find_method,
    require_complete,
    resampling_period,
    segments_of,
)
from rgtg.decoding.request import (
    Prompt,
    Request,
    StoppingCriteria,
    any_chat,
    end_tokens,
    make_processors,
    prompt_source,
    require_chats,
    require_room,
    row_seeds,
)
from rgtg.decoding.runners.factory import (
    RunnerFactory,
    TokenRunners,
    fit_scorer,
    require_all_tokens,
    scorer_kind,
    tree_columns,
)
from rgtg.decoding.runners.model_runner import TreeRunner, make_runner
from rgtg.decoding.runners.policy_runner import MAX_WIDTH
from rgtg.decoding.runners.segment_scorer import ChunkedRewards
from rgtg.decoding.sampling import SamplingParams
from rgtg.errors import DataError, UsageError, of_row
from rgtg.models.loading.device_map import DeviceMap, Placement
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.tensor_parallel import TpPlan, is_tensor_parallel, register_parallel_models
from rgtg.models.ops.lm_head import policy_logits
from rgtg.models.scorers.base import AnyScorer, Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.tokenization.conversation import check_template_kwargs, encode_source
from rgtg.tokenization.encoding import embedding_rows, encode_prompt, require_embeddings, require_same_tokenizer
from rgtg.types.generation import Completion

_MAX_CACHED_SETTINGS = 256


@dataclass(frozen=True)
class _Resolved:
    """Settings of a call, and what all its requests share."""

    settings: DecodingSettings
    params: SamplingParams
    stopping: StoppingCriteria
    betas: tuple[float, ...]
    processed: bool


@dataclass
class SegmentRun:
    """Requests of a method that draws segments or whole completions: they have caches of their own.

    Attributes:
        prefill: what must be read before the first step; the first step reads what is left.
        steps: the active requests after each step.
    """

    prefill: ChunkedPrefill
    steps: Iterator[list[Request]]


class GuidedPolicy:
    """Steers a frozen causal language model token by token with a scorer (or takes the best of n).

    Example:
        >>> guided = GuidedPolicy.from_pretrained("policy-folder", scorer="scorer-folder")  # doctest: +SKIP
        >>> guided.generate(["Once upon a time"], max_new_tokens=64, seed=0)[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: Policy,
        scorer: AnyScorer | Sequence[AnyScorer] | Mapping[str, AnyScorer] | None = None,
        *,
        method: str = "pargs",
        beta: float | Sequence[float] | None = None,
        top_k: int | Literal["default"] | None = "default",
        n: int | None = None,
        token_tree: bool | None = None,
        overlap: bool | None = None,
        draft: str | Policy | None = None,
    ) -> None:
        """As ``from_pretrained``, of loaded models; scorers may have names of their own (a mapping)."""
        self.policy = policy
        self.method: Method = find_method(method)
        given = {"method": method, "beta": list(beta) if isinstance(beta, Sequence) else beta, "n": n}
        top = self.method.top_k if top_k == "default" else top_k
        self.defaults = {k: v for k, v in given.items() if v is not None} | {"top_k": top}
        self.token_tree, self.overlap = token_tree, overlap
        self.draft = load_policy(draft) if isinstance(draft, str) and draft not in DRAFTS else draft
        named = _named(scorer)
        check_scorers(self.method, list(named.values()))
        if self.method.scorer:
            named = {name: fit_scorer(policy, one) for name, one in named.items()}
        self._require_engine(named)
        self.scorers: list[AnyScorer] = list(named.values())
        self.names: tuple[str, ...] = tuple(named) if self.method.scorer else ()
        self.factory = RunnerFactory(policy, named if self.method.scorer else {}, token_tree)
        self.end_tokens = end_tokens(policy)
        self._resolved: dict[str, _Resolved] = {}
        self._limits = self._context_limits()
        self._embeddings = self._embedding_counts()
        self._fewest_embeddings = min((rows for _, rows in self._embeddings if rows is not None), default=math.inf)
        self._runners: TokenRunners | None = None
        self.resolve({})
        read = [policy, *self.scorers, *([self.draft] if isinstance(self.draft, Policy) else [])]
        if register_parallel_models(one.model for one in read) and overlap:
            raise UsageError("overlap reads in two threads, and processes that split a model must read in one order")
        if isinstance(self.draft, Policy):
            require_same_tokenizer(policy.tokenizer, self.draft.tokenizer)
            require_all_tokens(policy, self.draft.model, "the drafting model")
        self._can_overlap = bool(overlap)
        if overlap is None and len(self.used) == 1 and isinstance(self.scorers[0], PrefixScorer | CrossTokenizerScorer):
            devices = {policy.model.device, self.scorers[0].model.device}
            self._can_overlap = len(devices) == 2 and not is_tensor_parallel(policy.model)

    @classmethod
    def from_pretrained(
        cls,
        policy: "str | Policy | tuple[Any, Any]",
        scorer: "ScorerSource | Sequence[ScorerSource] | None" = None,
        *,
        method: str = "pargs",
        beta: float | Sequence[float] | None = None,
        top_k: int | Literal["default"] | None = "default",
        n: int | None = None,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        device_map: DeviceMap | None = None,
        tp_plan: TpPlan | None = None,
        scorer_device: "str | torch.device | None" = None,
        scorer_device_map: DeviceMap | None = None,
        scorer_tp_plan: TpPlan | None = None,
        token_tree: bool | None = None,
        overlap: bool | None = None,
        draft: str | Policy | None = None,
        pack: bool = True,
        cache_gguf: bool = False,
        engine: str | None = None,
        threads: int | None = None,
    ) -> Self:
        """Load policy and scorer, and put them together.

        Args:
            policy: folder, GGUF file, hub id, or a loaded (model, tokenizer) pair.
            scorer: a scorer that ``rgtg train`` made or a stock reward model (folder, hub id, or a loaded pair); None
                with method ``policy``. Several in a list steer together, Σ_j β_j·r_j.
            method: a row of ``rgtg.decoding.methods.METHODS``.
            beta: guidance strength (default 1); it multiplies the score. In TRL and DPO beta is the KL coefficient,
                the inverse of ours. Of several scorers, one each.
            top_k: candidates per step; None for the whole vocabulary; ``default`` is the method's own (10 for most).
            n: completions that best-of-n draws (default 10).
            dtype: of models loaded by name; default the checkpoint's own (see `load_policy`).
            device: of models loaded by name; default the first GPU, else the CPU.
            device_map: of a policy loaded by name, in place of ``device``: ``auto`` or a device for each module, over
                GPUs, memory and disk (accelerate). Scorers do not follow it.
            tp_plan: of a policy loaded by name, in place of both: ``auto`` (or styles by module) splits each layer
                among the processes of a torchrun. All of them must make the same calls; all get the same completions.
            scorer_device: of a separate scorer loaded by name; default the policy's.
            scorer_device_map: of a separate scorer loaded by name, as ``device_map``.
            scorer_tp_plan: of a separate scorer loaded by name, as ``tp_plan``.
            token_tree: force the one-pass tree (True) or the whole-text fallback (False); None finds out.
            overlap: let the policy read the candidates while a separate scorer scores them; None where the two are on
                different devices.
            draft: speculate, exactly: tokens are drafted by ``policy`` (worth it where the scorer is the dearer model),
                by ``prompt-lookup``, or by a smaller model with the same tokenizer (folder, hub id, loaded ``Policy``).
            pack: lay out the weights of models loaded by name for decoding on a CPU (in place of, not beside, the
                stock layout).
            cache_gguf: keep the conversion of a policy's GGUF file beside it, as in
                `rgtg.models.loading.policy.load_policy`.
            engine: that runs a policy loaded by name: ``torch``, ``llama-cpp`` (GGUF files), or None (``auto``) for
                llama.cpp where it is installed and runs the file. `rgtg.config.engines` lists what each carries.
            threads: of this process's engines; default: torch's number, which OMP_NUM_THREADS sets.

        Raises:
            ModelNotFoundError: a folder or hub id that cannot be loaded.
            TokenizerMismatchError: policy and scorer read text differently.
            UsageError: unusable settings, or a scorer the method cannot use.
        """
        find_method(method)
        loaded, scorers, drafter = load_models(
            policy, scorer, draft, method, pack=pack, cache_gguf=cache_gguf, engine=engine, threads=threads,
            of_policy=Placement(dtype, device, device_map, tp_plan),
            of_scorers=Placement(dtype, scorer_device, scorer_device_map, scorer_tp_plan),
        )  # fmt: skip
        return cls(
            loaded, scorers, method=method, beta=beta, top_k=top_k, n=n, token_tree=token_tree, overlap=overlap,
            draft=drafter,
        )  # fmt: skip

    def _require_engine(self, named: Mapping[str, AnyScorer]) -> None:
        """Refuse what the policy's engine cannot carry."""
        wanted = [self.method.name]
        if self.method.scorer:
            wanted += [scorer_kind(self.policy, one) for one in named.values()]
        wanted += [name for name, given in (("drafts", self.draft), ("overlap", self.overlap)) if given]
        for what in wanted:
            require_carried(self.policy.engine, what)

    @property
    def scorer(self) -> AnyScorer | None:
        """The scorer, the first of several; None without one."""
        return self.scorers[0] if self.scorers else None

    @property
    def used(self) -> list[AnyScorer]:
        """The scorers, where the method reads any."""
        return self.scorers if self.method.scorer else []

    # -- settings --------------------------------------------------------------------------------------------------

    def resolve(self, given: dict[str, Any], *, complete: bool = False) -> DecodingSettings:
        """Settings of one call over the defaults; ``complete``: enough to decode with.

        Raises:
            UsageError: unusable settings, or some that the method or the scorers do not take.
        """
        if complete:
            return self._resolve(given).settings
        settings = validate(DecodingSettings, self.defaults | given)
        self._check(settings)
        return settings

    def _resolve(self, given: dict[str, Any]) -> _Resolved:
        """Complete settings of a call, made once for all calls that give the same."""
        key = repr(given)
        found = self._resolved.get(key)
        if found is None:
            settings = self.resolve(given)
            require_complete(self.method, settings)
            betas = tuple(betas_of(settings))
            params = SamplingParams(
                beta=1.0 if len(self.used) > 1 else betas[0], top_k=settings.top_k, top_p=settings.top_p,
                temperature=settings.temperature, greedy=self.method.rule == "greedy", clip=self.method.clip,
                top_k_of_sums=self.method.candidates == "sum", entropy_gate=settings.entropy_gate,
                kl_budget=settings.kl_budget, value_threshold=settings.value_threshold,
                vocabulary=self.policy.vocabulary,
            )  # fmt: skip
            stopping = StoppingCriteria(self.policy.tokenizer, self.end_tokens, settings)
            found = _Resolved(
                settings, params, stopping, betas if self.names else (),
                processed=bool(make_processors(settings, 1, self.end_tokens, None)),
            )  # fmt: skip
            if len(self._resolved) >= _MAX_CACHED_SETTINGS:
                self._resolved.clear()
            self._resolved[key] = found
        return found

    def _check(self, settings: DecodingSettings) -> None:
        """Refuse settings that the method, the scorers or the draft do not take."""
        if settings.method != self.method.name:
            raise UsageError(f"this GuidedPolicy decodes with {self.method.name}; make one for {settings.method}")
        check_settings(self.method, settings)
        self._check_token_ids(settings.logit_bias)
        if self.used and len(betas_of(settings)) != len(self.used):
            raise UsageError(
                f"{len(betas_of(settings))} betas for {len(self.used)} scorers: give each scorer one, in their order",
                setting="beta",
            )
        token_scorer = self.scorer if self.method.scorer else None
        if self.draft is not None:
            if self.method.unit != "token" or self.method.rule == "filter":
                raise UsageError(f"{self.method.name} does not speculate; leave the draft out")
            for name in ("kl_budget", "value_threshold", "abstain_below"):
                if getattr(settings, name) is not None:
                    raise UsageError(f"{name} decides token by token and does not speculate; leave the draft out")
            self._require_one_scorer("speculative decoding", settings)
            check_draft(self.draft, token_scorer, settings)
        elif "draft_length" in settings.model_fields_set and settings.draft_length is not None:
            raise UsageError("draft_length applies to speculative decoding: say where drafts come from (draft)")
        if self.overlap:
            self._require_one_scorer("overlap", settings)
            if not isinstance(token_scorer, PrefixScorer | CrossTokenizerScorer) or self.draft is not None:
                raise UsageError("overlap runs the policy beside a scorer that is a model of its own, without a draft")
            if settings.top_k is None or settings.top_k > MAX_WIDTH:
                raise UsageError(
                    f"overlap reads at most {MAX_WIDTH} candidates with the policy: set top_k (10 is usual)"
                )

    def _check_token_ids(self, ids: Iterable[int]) -> None:
        """Refuse a bias of tokens that are not in the vocabulary."""
        size = self.policy.vocabulary.size
        if bad := [token for token in ids if token >= size]:
            raise UsageError(
                f"logit_bias: {bad[0]} is not a token id; the vocabulary has {size} tokens, from 0 to {size - 1}",
                setting="logit_bias",
            )

    def _require_one_scorer(self, what: str, settings: DecodingSettings) -> None:
        if len(self.used) > 1:
            raise UsageError(f"{what} takes one scorer, and {len(self.used)} were given")
        if settings.entropy_gate is not None:
            raise UsageError(f"{what} scores every token; leave entropy_gate out")

    # -- requests --------------------------------------------------------------------------------------------------

    def make_requests(
        self,
        prompt_ids: Sequence[Sequence[int]],
        texts: Sequence[str],
        sources: Sequence[Prompt | None],
        seed: int | Sequence[int],
        settings: dict[str, Any],
        *,
        trace: bool = False,
    ) -> list[Request]:
        """A request for each prompt, checked against the models' contexts.

        Args:
            prompt_ids: tokens of the prompts.
            texts: their texts.
            sources: what a scorer that reads text takes for them; None for what the tokens say.
            seed: one for all, or one each.
            settings: of this call, over the defaults.
            trace: record every candidate's figures of every step.

        Raises:
            DataError: a prompt that is empty, or does not fit a context.
            UsageError: unusable settings, or another number of seeds than of prompts.
        """
        found = self._resolve(settings)
        device, requests = self.policy.model.device, []
        seeds = row_seeds(seed, prompt_ids)
        for i, (ids, text, source) in enumerate(zip(prompt_ids, texts, sources, strict=True)):
            processors: Any = ()
            if found.processed:
                processors = make_processors(found.settings, len(ids), self.end_tokens, device)
            request = Request(
                text, list(ids), seeds[i], processors, found.params, found.stopping, self.method.name, self.names,
                found.betas, source, trace, found.settings,
            )  # fmt: skip
            try:
                self.require_room(request, found.settings)
            except DataError as error:
                raise of_row(error, i, len(prompt_ids), "prompt") from error
            requests.append(request)
        return requests

    def require_embeddings(self, prompt_ids: Sequence[int]) -> None:
        """Refuse a prompt with a token for which a model that reads it has no embedding.

        Raises:
            UnknownTokenError: saying whose.
        """
        for role, rows in self._embeddings:
            require_embeddings(prompt_ids, rows, role)

    def require_room(self, request: Request, settings: DecodingSettings) -> None:
        """Refuse a prompt that not every model that reads it can read: a token without embedding, or no room.

        Raises:
            DataError: saying whose.
        """
        ids = request.prompt_ids
        if ids and (max(ids) >= self._fewest_embeddings or min(ids) < 0):
            self.require_embeddings(ids)
        for role, limit in self._limits:
            require_room(request.prompt_ids, settings.max_new_tokens, limit, role)
        for scorer in self.scorers:
            if isinstance(scorer, CrossTokenizerScorer) and self.names:
                # how many of its tokens the completion takes is not known yet
                scorer.require_room(prompt_source(request, self.policy.tokenizer), settings.chat_template_kwargs)

    def _embedding_counts(self) -> list[tuple[str, int | None]]:
        """Numbers of embeddings of all models that read the policy's tokens."""
        readers: list[tuple[str, Any]] = [("the policy", self.policy)]
        readers += [(f"the scorer {one.name}", one) for one in self.used if not isinstance(one, CrossTokenizerScorer)]
        if isinstance(self.draft, Policy):
            readers.append(("the drafting model", self.draft))
        return [(role, embedding_rows(one.model)) for role, one in readers]

    def _context_limits(self) -> list[tuple[str, int | None]]:
        """Contexts, in the policy's tokens, of all models that read them."""
        limits = [("policy", self.policy.max_length)]
        limits += [("scorer", one.max_length) for one in self.used if not isinstance(one, CrossTokenizerScorer)]
        if isinstance(self.draft, Policy):
            limits.append(("drafting model", self.draft.max_length))
        return limits

    # -- generate --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: "Prompt | Sequence[Prompt]",
        *,
        seed: int | Sequence[int] = 0,
        trace: bool = False,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[Completion]:
        """Complete prompts; a row's text depends on its prompt, seed and settings, never on its neighbours.

        Args:
            prompts: texts, or lists of chat messages (rendered by the tokenizer's chat template).
            seed: one for all (each row derives its own), or one per prompt, used as it is.
            trace: keep every candidate's figures of every step.
            batch_size: prompts decoded together.
            **settings: fields of ``rgtg.config.DecodingSettings``: max_new_tokens, min_new_tokens, temperature,
                top_p, stop, repetition_penalty, no_repeat_ngram_size, logit_bias, and beta, top_k, n for this
                call; chat_template_kwargs are variables of the chat template, such as {"enable_thinking": False}.

        Returns:
            One ``Completion`` per prompt, in order.

        Raises:
            DataError: an empty prompt, or one that does not fit the context.
            UsageError: unusable settings.
            NonFiniteError: NaN from the policy or the scorer.
        """
        if settings.get("chat_template_kwargs"):
            require_chats(_as_list(prompts))
        return self._complete_all(self.prepare(prompts, seed=seed, trace=trace, **settings), batch_size)

    def prepare(
        self,
        prompts: "Prompt | Sequence[Prompt]",
        *,
        seed: int | Sequence[int] = 0,
        trace: bool = False,
        **settings: Any,
    ) -> list[Request]:
        """Requests for ``complete``: prompts encoded and checked; arguments and errors are those of ``generate``."""
        many = _as_list(prompts)
        kwargs = settings.get("chat_template_kwargs")
        if kwargs and any_chat(many):
            check_template_kwargs(self.policy.tokenizer, kwargs)
        ids, texts = [], []
        for i, prompt in enumerate(many):
            try:
                if isinstance(prompt, str):
                    text, prompt_ids = prompt, encode_prompt(self.policy.tokenizer, prompt)
                else:
                    text, prompt_ids = encode_source(self.policy.tokenizer, prompt, template_kwargs=kwargs)
            except DataError as error:
                raise of_row(error, i, len(many), "prompt") from error
            ids.append(prompt_ids)
            texts.append(text)
        return self.make_requests(ids, texts, many, seed, settings, trace=trace)

    def row_seeds(self, prompts: Sequence[Prompt], seed: int, **settings: Any) -> list[int]:
        """The seeds that ``generate(prompts, seed=seed)`` gives its rows, for callers who feed the prompts in parts."""
        kwargs = settings.get("chat_template_kwargs")
        encoded = [encode_source(self.policy.tokenizer, prompt, template_kwargs=kwargs) for prompt in prompts]
        return row_seeds(seed, [prompt_ids for _, prompt_ids in encoded])

    def generate_ids(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        seed: int | Sequence[int] = 0,
        trace: bool = False,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[Completion]:
        """``generate`` for prompts that are token ids already."""
        if settings.get("chat_template_kwargs"):
            require_chats(())
        for i, ids in enumerate(prompt_ids):
            try:
                self.require_embeddings(ids)
            except DataError as error:
                raise of_row(error, i, len(prompt_ids), "prompt") from error
        texts = [self.policy.tokenizer.decode(list(ids)) for ids in prompt_ids]
        requests = self.make_requests(prompt_ids, texts, [None] * len(texts), seed, settings, trace=trace)
        return self._complete_all(requests, batch_size)

    def _complete_all(self, requests: list[Request], batch_size: int) -> list[Completion]:
        """Complete requests, ``batch_size`` at once; the first error ends the call."""
        if batch_size < 1:
            raise UsageError(f"batch_size = {batch_size}: it must be at least 1")
        completions = []
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]
            for _ in self.steps(part):
                for request in part:
                    if request.error is not None:
                        raise request.error
            for request in part:
                completions.append(request.to_completion())
        if requests and requests[0].settings.kl_budget is not None:
            _warn_of_budget(completions, requests)
        return completions

    def particles(
        self,
        prompts: "Prompt | Sequence[Prompt]",
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[list[Completion]]:
        """All n weighted completions of each prompt (method ``smc``), where ``generate`` draws one of them.

        ``Completion.weight`` sums to 1 over the completions of a prompt, and ``Completion.log_normaliser`` estimates
        log Σ_y π(y)·exp(β·r(y)). The completions share ancestors: they are not independent. Arguments and errors are
        those of ``generate``.
        """
        if self.method.rule != "resample":
            raise UsageError(f"{self.method.name} draws no weighted completions; use method smc", setting="method")
        requests = self.prepare(prompts, seed=seed, **settings)
        self._complete_all(requests, batch_size)
        return [[particle.to_completion() for particle in request.particles] for request in requests]

    def stream(self, prompt: Prompt, *, seed: int = 0, **settings: Any) -> Iterator[str]:
        """Complete one prompt, yielding text as it is drawn; the parts joined equal ``generate``'s text.

        A segment-wise method yields whole segments, best-of-n its text at the end. Arguments and errors are those of
        ``generate``.
        """
        if settings.get("chat_template_kwargs"):
            require_chats(_as_list(prompt))
        requests = self.prepare(prompt, seed=seed, **settings)
        (request,) = requests
        assert request.stopping is not None, "prepared requests have stopping criteria"
        text = IncrementalDetokenizer(self.policy.tokenizer, request.prompt_ids, request.stopping.stop.texts)
        read = 0
        for _ in self.steps(requests):
            if request.error is not None:
                raise request.error
            if self.method.unit != "completion" and request.finish_reason is None:
                new = "".join(map(text.add, request.token_ids[read:]))
                read = len(request.token_ids)
                if new:
                    yield new
        yield text.end(request.text)

    def complete(self, requests: list[Request]) -> None:
        """Complete requests of ``prepare`` in one batch; one that fails has its ``error`` set, and the others go on."""
        try:
            for _ in self.steps(requests):
                pass
            return
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # and with them the caches
            if len(requests) == 1:
                requests[0].error = error
                return
        # methods that draw segments or drafts complete each request alone, to find the one that fails
        for request in requests:
            request.restart()
            self.complete([request])

    def steps(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Complete requests with the same settings in one batch; yields them after each step.

        A request that fails in a token-wise method has its ``error`` set, and the others go on.

        Raises:
            NonFiniteError: NaN from the policy or the scorer, in a method that draws segments or drafts.
        """
        if not requests:
            return
        if self.method.unit != "token":
            yield from self.start_segments(requests).steps
            return
        batch = self._start_drafts(requests) if self.draft is not None else self._start_batch(requests)
        if not batch.requests:
            yield requests  # none could be read
        while batch.requests:
            batch.step()
            yield requests

    def _start_batch(self, requests: list[Request]) -> Batch:
        """A batch of all these requests, with their prompts read; those that cannot be read fail."""
        if self._runners is None:
            self._runners = self.factory.token_runners(self.names)
        settings = requests[0].settings
        # where policy and scorer are on different devices, the policy reads the candidates at the same time
        narrow = settings.top_k is not None and settings.top_k <= MAX_WIDTH
        overlap = self._can_overlap and narrow and settings.entropy_gate is None
        batch = Batch(**self._runners.options, overlap=overlap)
        # 1. all together
        with suppress(Exception):
            batch.add(requests, self._prefill(requests, self._runners, overlap))
            return batch
        # 2. those that cannot be read alone fail, and the others are read again
        for request in requests:
            try:
                self._prefill([request], self._runners, overlap)
            except Exception as error:
                traceback.clear_frames(error.__traceback__)
                request.error = error
        if rest := [request for request in requests if request.error is None]:
            try:
                batch.add(rest, self._prefill(rest, self._runners, overlap))
            except Exception as error:
                for request in rest:
                    request.error = error
        return batch

    @torch.inference_mode()
    def _prefill(self, requests: Sequence[Request], runners: TokenRunners, overlap: bool, n: int = 1) -> Prefilled:
        """Read the prompts whole, each model in one pass, with room for n completions of each."""
        prompts, longest = [], 0
        for request in requests:
            prompts.append(request.prompt_ids)
            longest = max(longest, len(request.prompt_ids))
        settings, params = requests[0].settings, requests[0].params
        longest += n * settings.max_new_tokens
        width = MAX_WIDTH if params.top_k_of_sums or params.top_k is None else min(params.top_k, MAX_WIDTH)
        reads_candidates = overlap or runners.options["fused"] is not None
        policy = runners.policy.fresh(longest, n * width if reads_candidates else n)
        scorers = {}
        for name, runner in runners.scorers.items():
            scorers[name] = runner.fresh(longest, n * width)
            scorers[name].prefill(requests, prompts)
        return Prefilled(policy, policy.prefill(prompts), scorers)

    def _start_drafts(self, requests: list[Request]) -> Batch:
        settings = requests[0].settings
        scorer = self.scorer if self.method.scorer else None
        assert self.draft is not None, "asked for with a draft"
        assert scorer is None or isinstance(scorer, PrefixScorer), "checked with the settings"
        columns = max(len(request.prompt_ids) for request in requests) + settings.max_new_tokens
        batch = SpeculativeBatch(
            self.policy, scorer, self.draft, columns, top_k=settings.top_k, length=settings.draft_length,
            tree=self.token_tree,
        )  # fmt: skip
        batch.start(requests)
        return batch

    def start_segments(self, requests: list[Request], *, chunk: int | None = None) -> SegmentRun:
        """Start requests of a method that draws segments or whole completions; nothing has been read yet.

        Args:
            requests: of ``prepare``; only one, where texts are read in chunks.
            chunk: tokens of an ended completion that its scorer reads at once; None reads it whole.
        """
        if self.method.grows_together:
            return self._start_particles(requests, chunk)
        settings = requests[0].settings
        longest = max(len(request.prompt_ids) for request in requests) + settings.max_new_tokens
        reward = cast(Scorer | CrossTokenizerScorer, self.scorer)
        n, length = segments_of(self.method, settings)
        whole = self.method.unit == "completion"
        # 1. the policy, with a branch of its cache for each segment or completion
        branches = branch_columns(self.method, settings)
        policy = make_runner(self.policy.model, policy_logits, longest + branches + 1, tree=self.token_tree)
        prompts = [request.prompt_ids for request in requests]
        tasks = [PrefillTask(("policy", None), policy, prompts)]
        # 2. the scorer's cache: of segments, or of completions that are read in chunks
        width = max(1 if whole else min(length, settings.max_new_tokens), MAX_WIDTH)
        scores = self.factory.segment_scorer(reward, longest + width)
        if scores.runner is not None and (chunk or not whole):
            tasks.append(PrefillTask(("scorer", self.names[0]), scores.runner, prompts))
        chunked = None
        if chunk and isinstance(scores.runner, TreeRunner):
            chunked = ChunkedRewards(cast(PrefixScorer, reward), scores.runner, chunk)

        def steps() -> Iterator[list[Request]]:
            with torch.inference_mode():
                states = [task.states if task.states is not None else task.read_all() for task in tasks]
            if whole:
                stopping = requests[0].stopping
                assert stopping is not None, "prepared requests have stopping criteria"
                yield from best_of_n(requests, policy, states[0], reward, settings.n, stopping, chunked)
                return
            accepts = self.method.rule == "accept"
            params = SegmentParams(
                "accept" if accepts else "best", n, betas_of(settings)[0], settings.reward_threshold or 0.0,
                settings.threshold_start, settings.retries,
            )  # fmt: skip
            ends = SegmentStopping(
                self.policy.tokenizer, self.end_tokens, settings, length=length,
                max_entropy=settings.entropy_threshold if accepts else None,
            )  # fmt: skip
            of_scorer = states[1] if len(states) > 1 else None
            yield from decode_segments(requests, policy, states[0], scores, of_scorer, reward, params, ends, chunked)

        return SegmentRun(ChunkedPrefill(tasks), steps())

    def _start_particles(self, requests: list[Request], chunk: int | None) -> SegmentRun:
        """Start requests whose completions grow together; ``chunk``: the only prompt is read in chunks."""
        settings = requests[0].settings
        runners = self.factory.token_runners(self.names)
        columns = settings.n * (settings.max_new_tokens + tree_columns(settings.top_k))
        in_chunks = BatchPrefill(runners, requests[0], columns=columns) if chunk else None

        def steps() -> Iterator[list[Request]]:
            if in_chunks is not None:
                prefilled = in_chunks.result()
            else:
                prefilled = self._prefill(requests, runners, False, settings.n)
            if self.method.rule == "beam":
                beams = BeamSearch(requests, settings.n, settings.segment_length or 1, self.end_tokens)
                with torch.inference_mode():
                    rows = branch(beams.rows, prefilled, 1)
                yield from search_beams(beams, Batch(**runners.options, chooser=beams), rows)
                return
            particles = start_particles(requests, settings.n)
            with torch.inference_mode():
                rows = branch([row for one in particles for row in one.rows], prefilled, settings.n)
            drawn_first = settings.proposal == "policy"
            period = resampling_period(settings)
            batch = Batch(**runners.options, score_every=period if drawn_first else None)
            params = ParticleParams(period, settings.resample_finished)
            yield from sample_particles(particles, batch, rows, params)

        return SegmentRun(in_chunks or ChunkedPrefill([]), steps())


def _warn_of_budget(completions: Sequence[Completion], requests: Sequence[Request]) -> None:
    """Say so where completions went beyond their KL budget: the cut to the candidates takes nats whatever beta is."""
    over, cut = 0, 0.0
    for completion, request in zip(completions, requests, strict=True):
        budget, spent = request.params.kl_budget, completion.expected_kl_nats
        if budget is not None and spent is not None:
            over += spent > 1.1 * budget * len(completion.token_ids) / request.settings.max_new_tokens
            cut += (completion.candidates_log_prob or 0.0) - completion.policy_log_prob
    if over:
        warnings.warn(
            f"{over} of {len(completions)} completions went beyond their share of kl_budget: the cut to the candidates "
            f"(top_k, top_p) and the processors take nats at any beta, {cut / len(completions):.3g} per completion for "
            "the cut. Use more candidates (top_k null is the whole vocabulary) or a larger budget",
            stacklevel=4,
        )


def _named(scorer: Any) -> dict[str, AnyScorer]:
    """None, one scorer, several, or several by name, as a mapping; equal names are numbered."""
    if isinstance(scorer, Mapping):
        return dict(scorer)
    listed = [] if scorer is None else list(scorer) if isinstance(scorer, list | tuple) else [scorer]
    found: dict[str, AnyScorer] = {}
    for i, one in enumerate(listed):
        found[one.name if one.name not in found else f"{one.name} ({i + 1})"] = one
    return found


def _as_list(prompts: "Prompt | Sequence[Prompt]") -> list[Prompt]:
    """A text or one conversation (a list of messages) is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and isinstance(many[0], dict) else many
