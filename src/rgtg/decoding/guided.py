"""GuidedPolicy: a frozen policy, a scorer and a method, behind one ``generate``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, cast

import torch

from rgtg.config import DecodingSettings, validate
from rgtg.decoding.best_of_n import best_of_n
from rgtg.decoding.join import (
    DRAFTS,
    AnyScorer,
    as_read_beside,
    check_draft,
    check_overlap,
    make_mixture,
    make_segment_reader,
    make_speculation,
    make_stepper,
)
from rgtg.decoding.loading import Source, listed, load_models
from rgtg.decoding.methods import Method, betas_of, check_scorers, check_settings, find_method, require_complete
from rgtg.decoding.requests import (
    Request,
    Stopping,
    end_tokens,
    make_processors,
    require_room,
    row_seeds,
    settled,
    source_of,
    to_completion,
)
from rgtg.decoding.runner import Runner, make_runner
from rgtg.decoding.segmentwise import SegmentRule, SegmentStopping, decode_segments
from rgtg.decoding.speculative import speculate
from rgtg.decoding.tokenwise import TokenRule, decode
from rgtg.errors import DataError, UsageError
from rgtg.models.encoding import decode_completion, encode_prompt, render_chat, require_same_tokenizer
from rgtg.models.policy import Policy, load_policy
from rgtg.models.prefix_scorer import PrefixScorer
from rgtg.models.readout import policy_logits
from rgtg.models.scorer import Scorer
from rgtg.models.text_scorer import TextScorer
from rgtg.types import Completion

Prompt = str | list[dict[str, Any]]


class GuidedPolicy:
    """Steers a frozen causal language model token by token with a scorer (or takes the best of n).

    Example:
        >>> guided = GuidedPolicy.from_pretrained("policy-folder", scorer="scorer-folder")  # doctest: +SKIP
        >>> guided.generate(["Once upon a time"], max_new_tokens=64, seed=0)[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: Policy,
        scorer: AnyScorer | Sequence[AnyScorer] | None = None,
        *,
        method: str = "pargs",
        beta: float | Sequence[float] | None = None,
        top_k: int | Literal["default"] | None = "default",
        n: int | None = None,
        token_tree: bool | None = None,
        overlap: bool | None = None,
        draft: str | Policy | None = None,
    ) -> None:
        self.policy = policy
        self.scorers: list[AnyScorer] = listed(scorer)
        self.method: Method = find_method(method)
        given = {"method": method, "beta": list(beta) if isinstance(beta, Sequence) else beta, "n": n}
        top = self.method.top_k if top_k == "default" else top_k
        self.defaults = {k: v for k, v in given.items() if v is not None} | {"top_k": top}
        self.token_tree, self.overlap = token_tree, overlap
        self.draft = load_policy(draft) if isinstance(draft, str) and draft not in DRAFTS else draft
        check_scorers(self.method, self.scorers)
        if self.method.scorer:
            self.scorers = [as_read_beside(policy, one) for one in self.scorers]
        self._settings({})
        if isinstance(self.draft, Policy):
            require_same_tokenizer(policy.tokenizer, self.draft.tokenizer)
        self.end_tokens = end_tokens(policy)

    @classmethod
    def from_pretrained(
        cls,
        policy: "str | Policy | tuple[Any, Any]",
        scorer: "Source | Sequence[Source] | None" = None,
        *,
        method: str = "pargs",
        beta: float | Sequence[float] | None = None,
        top_k: int | Literal["default"] | None = "default",
        n: int | None = None,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        scorer_device: "str | torch.device | None" = None,
        token_tree: bool | None = None,
        overlap: bool | None = None,
        draft: str | Policy | None = None,
        pack: bool = True,
    ) -> Self:
        """Load policy and scorer, and join them.

        Args:
            policy: folder, hub id, or a loaded (model, tokenizer) pair.
            scorer: a scorer that ``rgtg train`` made or a stock reward model (folder, hub id, or a loaded pair); None
                with method ``policy``. Several in a list steer together, Σ_j β_j·r_j.
            method: a row of ``rgtg.decoding.methods.METHODS``.
            beta: guidance strength (default 1); it multiplies the score. In TRL and DPO beta is the KL coefficient,
                the inverse of ours. Of several scorers, one each.
            top_k: candidates per step; None for the whole vocabulary; ``default`` is the method's own (10 for most).
            n: completions that best-of-n draws (default 10).
            dtype: of models loaded by name; default the checkpoint's own.
            device: of models loaded by name; default the first GPU, else the CPU.
            scorer_device: of a separate scorer loaded by name; default the policy's.
            token_tree: force the one-pass tree (True) or the whole-text fallback (False); None finds out.
            overlap: let the policy read the candidates while a separate scorer scores them; None where the two are on
                different devices.
            draft: speculate, exactly: tokens are drafted by ``policy`` (worth it where the scorer is the dearer model),
                by ``prompt-lookup``, or by a smaller model with the same tokenizer (folder, hub id, loaded ``Policy``).
            pack: lay out the weights of models loaded by name for decoding on a CPU (in place of, not beside, the
                stock layout).

        Raises:
            ModelNotFoundError: a folder or hub id that cannot be loaded.
            TokenizerMismatchError: policy and scorer read text differently.
            UsageError: unusable settings, or a scorer the method cannot use.
        """
        find_method(method)
        loaded, scorers, drafter = load_models(
            policy, scorer, draft, method, dtype=dtype, device=device, scorer_device=scorer_device, pack=pack
        )
        return cls(
            loaded, scorers, method=method, beta=beta, top_k=top_k, n=n, token_tree=token_tree, overlap=overlap,
            draft=drafter,
        )  # fmt: skip

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
                top_p, stop, repetition_penalty, no_repeat_ngram_size, and beta, top_k, n for this call.

        Returns:
            One ``Completion`` per prompt, in order.

        Raises:
            DataError: an empty prompt, or one that does not fit the context.
            UsageError: unusable settings.
            NonFiniteError: NaN from the policy or the scorer.
        """
        many = _as_list(prompts)
        ids, texts = [], []
        for index, prompt in enumerate(many):
            with _naming_prompt(index, len(many)):
                text, prompt_ids = self._encode(prompt)
            ids.append(prompt_ids)
            texts.append(text)
        return self._generate(ids, texts, many, seed, trace, batch_size, settings)

    def row_seeds(self, prompts: Sequence[Prompt], seed: int) -> list[int]:
        """The seeds that ``generate(prompts, seed=seed)`` gives its rows, for callers who feed the prompts in parts."""
        return row_seeds(seed, [self._encode(prompt)[1] for prompt in prompts])

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
        texts = [self.policy.tokenizer.decode(list(ids)) for ids in prompt_ids]
        return self._generate(prompt_ids, texts, [None] * len(texts), seed, trace, batch_size, settings)

    def _generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        texts: Sequence[str],
        sources: Sequence[Prompt | None],
        seed: int | Sequence[int],
        trace: bool,
        batch_size: int,
        settings: dict[str, Any],
    ) -> list[Completion]:
        resolved = self._settings(settings, complete=True)
        if batch_size < 1:
            raise UsageError(f"batch_size = {batch_size}: it must be at least 1")
        requests = self._requests(prompt_ids, texts, sources, seed, resolved)
        for start in range(0, len(requests), batch_size):
            for _ in self._decode(requests[start : start + batch_size], resolved, trace=trace):
                pass
        return [to_completion(request, self.method.name, trace=trace) for request in requests]

    def stream(self, prompt: Prompt, *, seed: int = 0, **settings: Any) -> Iterator[str]:
        """Complete one prompt, yielding text as it is drawn; the pieces joined equal ``generate``'s text.

        A segment-wise method yields whole segments, best-of-n its text at the end. Arguments and errors are those of
        ``generate``.
        """
        resolved = self._settings(settings, complete=True)
        text, ids = self._encode(prompt)
        (request,) = self._requests([ids], [text], [prompt], seed, resolved)
        shown = ""
        steps = self._decode([request], resolved, trace=False)
        for _ in steps:
            if self.method.unit != "completion" and request.finish_reason is None:
                text = decode_completion(self.policy.tokenizer, request.prompt_ids, request.token_ids)
                safe = settled(text, resolved.stop)
                if len(safe) > len(shown) and safe.startswith(shown):
                    yield safe[len(shown) :]
                    shown = safe
        yield request.text[len(shown) :]

    def _settings(self, given: dict[str, Any], *, complete: bool = False) -> DecodingSettings:
        settings = validate(DecodingSettings, self.defaults | given)
        if settings.method != self.method.name:
            raise UsageError(f"this GuidedPolicy decodes with {self.method.name}; make one for {settings.method}")
        check_settings(self.method, settings)
        if complete:
            require_complete(self.method, settings)
        if self._used and len(betas_of(settings)) != len(self._used):
            raise UsageError(
                f"{len(betas_of(settings))} betas for {len(self._used)} scorers: give each scorer one, in their order"
            )
        if self.draft is not None:
            if self.method.unit != "token":
                raise UsageError(f"{self.method.name} does not speculate; leave the draft out")
            self._require_plain("speculative decoding", settings)
            check_draft(self.draft, self._token_scorer, settings)
        elif "draft_length" in settings.model_fields_set and settings.draft_length is not None:
            raise UsageError("draft_length applies to speculative decoding: say where drafts come from (draft)")
        if self.overlap:
            self._require_plain("overlap", settings)
            check_overlap(self._token_scorer, settings, drafted=self.draft is not None)
        return settings

    def _require_plain(self, what: str, settings: DecodingSettings) -> None:
        """Refuse what the faster ways to read one scorer do not do."""
        if len(self._used) > 1:
            raise UsageError(f"{what} takes one scorer, and {len(self._used)} were given")
        if settings.entropy_gate is not None:
            raise UsageError(f"{what} scores every token; leave entropy_gate out")

    @property
    def scorer(self) -> AnyScorer | None:
        """The scorer, the first of several; None without one."""
        return self.scorers[0] if self.scorers else None

    @property
    def _used(self) -> list[AnyScorer]:
        """The scorers, where the method reads any."""
        return self.scorers if self.method.scorer else []

    @property
    def _token_scorer(self) -> AnyScorer | None:
        return self.scorer if self.method.scorer else None

    def _requests(
        self,
        prompt_ids: Sequence[Sequence[int]],
        texts: Sequence[str],
        sources: Sequence[Prompt | None],
        seed: int | Sequence[int],
        settings: DecodingSettings,
    ) -> list[Request]:
        device = self.policy.model.device
        requests = [
            Request(
                text, list(ids), row_seed, make_processors(settings, len(ids), self.end_tokens, device), source=source
            )
            for text, ids, source, row_seed in zip(texts, prompt_ids, sources, row_seeds(seed, prompt_ids), strict=True)
        ]
        for i, request in enumerate(requests):
            with _naming_prompt(i, len(requests)):
                self._require_room(request, settings)
        return requests

    def _encode(self, prompt: Prompt) -> tuple[str, list[int]]:
        tokenizer = self.policy.tokenizer
        if isinstance(prompt, str):
            return prompt, encode_prompt(tokenizer, prompt)
        text = render_chat(tokenizer, prompt, add_generation_prompt=True)
        return text, encode_prompt(tokenizer, text, templated=True)

    def _require_room(self, request: Request, settings: DecodingSettings) -> None:
        prompt_ids = request.prompt_ids
        require_room(prompt_ids, settings.max_new_tokens, self.policy.max_length, "policy")
        for scorer in self._used:
            if isinstance(scorer, TextScorer):  # how many of its tokens a completion takes is not known before
                scorer.require_room(source_of(request, self.policy.tokenizer))
            else:
                require_room(prompt_ids, settings.max_new_tokens, scorer.max_length, "scorer")
        if isinstance(self.draft, Policy):
            require_room(prompt_ids, settings.max_new_tokens, self.draft.max_length, "drafting model")

    def _decode(self, requests: list[Request], settings: DecodingSettings, *, trace: bool) -> Iterator[list[Request]]:
        longest = max(len(request.prompt_ids) for request in requests) + settings.max_new_tokens
        rule = self._rule(settings, trace)
        if self.method.unit == "segment":
            return self._decode_segments(requests, settings, rule, longest)
        stopping = Stopping(self.policy.tokenizer, self.end_tokens, settings)
        if self.method.unit == "completion":
            columns = longest + settings.n * (settings.max_new_tokens + 1)  # one branch of the cache per completion
            return best_of_n(requests, self._policy_runner(columns), self._reward, settings.n, rule, stopping)
        scorer, top_k = self._token_scorer, None if rule.of_sum else settings.top_k
        if self.draft is not None:
            assert scorer is None or isinstance(scorer, PrefixScorer), "checked with the settings"
            run = make_speculation(self.policy, scorer, self.draft, longest, top_k=top_k, tree=self.token_tree)
            return speculate(
                requests, run.policy, run.scorer, run.drafter, run.costs, rule, stopping, settings.draft_length
            )
        if len(self._used) > 1:
            mixed = make_mixture(
                self.policy, self._used, betas_of(settings), longest, top_k=top_k, tree=self.token_tree,
                requests=requests,
            )  # fmt: skip
            return decode(requests, mixed, rule, stopping)
        stepper = make_stepper(
            self.policy, scorer, longest, top_k=top_k, tree=self.token_tree, overlap=self.overlap, requests=requests
        )
        return decode(requests, stepper, rule, stopping)

    def _decode_segments(
        self, requests: list[Request], settings: DecodingSettings, rule: TokenRule, longest: int
    ) -> Iterator[list[Request]]:
        accepts = self.method.rule == "accept"
        n = 1 if accepts else settings.n
        length = settings.segment_length or (64 if accepts else 16)
        segments = SegmentRule(
            "accept" if accepts else "best", n, betas_of(settings)[0], settings.reward_threshold or 0.0,
            settings.threshold_start, settings.retries,
        )  # fmt: skip
        stopping = SegmentStopping(
            self.policy.tokenizer, self.end_tokens, settings, length=length,
            unsure=settings.entropy_threshold if accepts else None,
        )  # fmt: skip
        reader = make_segment_reader(
            self.policy, self._reward, longest, min(length, settings.max_new_tokens), tree=self.token_tree,
            requests=requests,
        )  # fmt: skip
        policy = self._policy_runner(longest + (n + 1) * (length + 1))
        return decode_segments(requests, policy, reader, self._reward, rule, segments, stopping)

    @property
    def _reward(self) -> Scorer | TextScorer:
        """The scorer, as one that reads whole texts (checked when policy and scorer were joined)."""
        return cast(Scorer | TextScorer, self.scorer)

    def _rule(self, settings: DecodingSettings, trace: bool) -> TokenRule:
        """How a token is drawn: with several scorers, their sum is weighted before the rule sees it."""
        betas = betas_of(settings)
        return TokenRule(
            beta=1.0 if len(self._used) > 1 else betas[0], top_k=settings.top_k, top_p=settings.top_p,
            temperature=settings.temperature, greedy=self.method.rule == "greedy", trace=trace, clip=self.method.clip,
            of_sum=self.method.candidates == "sum", entropy_gate=settings.entropy_gate,
        )  # fmt: skip

    def _policy_runner(self, longest: int) -> Runner:
        return make_runner(self.policy.model, policy_logits, longest + 1, tree=self.token_tree)


@contextmanager
def _naming_prompt(index: int, total: int) -> Iterator[None]:
    """A refusal inside says which of several prompts it is about."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"prompt {index + 1} of {total}: {error}" if total > 1 else str(error)) from error


def _as_list(prompts: "Prompt | Sequence[Prompt]") -> list[Prompt]:
    """A text or one conversation (a list of messages) is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and isinstance(many[0], dict) else many
