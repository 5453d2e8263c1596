"""GuidedPolicy: a frozen policy, a scorer and a method, behind one ``generate``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch

from rgtg.config import DecodingSettings, validate
from rgtg.decoding.join import DRAFTS, AnyScorer, check_draft, check_overlap, make_speculation, make_stepper
from rgtg.decoding.methods import Method, check_scorer, check_settings, find_method
from rgtg.decoding.requests import (
    Request,
    Stopping,
    end_tokens,
    make_processors,
    require_room,
    row_seeds,
    to_completion,
)
from rgtg.decoding.runner import Runner, make_runner
from rgtg.decoding.segmentwise import best_of_n
from rgtg.decoding.speculative import speculate
from rgtg.decoding.tokenwise import TokenRule, decode
from rgtg.errors import DataError, UsageError
from rgtg.models.encoding import decode_completion, encode_prompt, render_chat, require_same_tokenizer
from rgtg.models.packed import group_linears, groups_of, pack_linears
from rgtg.models.policy import Policy, load_policy
from rgtg.models.prefix_scorer import PrefixScorer
from rgtg.models.readout import policy_logits
from rgtg.models.scorer import load_scorer, trunk_of
from rgtg.models.shared_trunk import SharedTrunkScorer
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
        scorer: AnyScorer | None = None,
        *,
        method: str = "pargs",
        beta: float | None = None,
        top_k: int | None = 10,
        n: int | None = None,
        token_tree: bool | None = None,
        overlap: bool | None = None,
        draft: str | Policy | None = None,
    ) -> None:
        self.policy, self.scorer = policy, scorer
        self.method: Method = find_method(method)
        given = {"method": method, "beta": beta, "n": n}
        self.defaults = {k: v for k, v in given.items() if v is not None} | {"top_k": top_k}
        self.token_tree, self.overlap = token_tree, overlap
        self.draft = load_policy(draft) if isinstance(draft, str) and draft not in DRAFTS else draft
        self._settings({})
        check_scorer(self.method, scorer)
        if scorer is not None and self.method.scorer is not None:
            require_same_tokenizer(policy.tokenizer, scorer.tokenizer)
        if isinstance(self.draft, Policy):
            require_same_tokenizer(policy.tokenizer, self.draft.tokenizer)
        self.end_tokens = end_tokens(policy)

    @classmethod
    def from_pretrained(
        cls,
        policy: "str | Policy | tuple[Any, Any]",
        scorer: "str | AnyScorer | tuple[Any, Any] | None" = None,
        *,
        method: str = "pargs",
        beta: float | None = None,
        top_k: int | None = 10,
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
                with method ``policy``.
            method: a row of ``rgtg.decoding.methods.METHODS``.
            beta: guidance strength (default 1); it multiplies the score. In TRL and DPO beta is the KL coefficient,
                the inverse of ours.
            top_k: candidates per step; None for the whole vocabulary.
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
        loaded = load_policy(policy, **(_placement(dtype, device) if isinstance(policy, str) else {}))
        if isinstance(policy, str):  # in place of the stock layout: weights are held once
            if pack:
                loaded.model = pack_linears(loaded.model)
            if isinstance(scorer, str) and trunk_of(scorer) == "shared" and not groups_of(loaded.model):
                loaded.model = group_linears(loaded.model, pack=False)
        reward = scorer
        if isinstance(reward, str | tuple):
            reward = _load_scorer(reward, loaded, method, dtype, scorer_device or device, pack=pack)
        elif reward is not None and scorer_device is not None:
            raise UsageError("scorer_device applies to a scorer loaded by name; move a loaded model yourself")
        if scorer_device is not None and not isinstance(reward, PrefixScorer):
            raise UsageError("scorer_device applies to a scorer that is a model of its own")
        if isinstance(draft, str) and draft not in DRAFTS:
            draft = load_policy(draft, dtype=dtype, device=loaded.model.device)
            draft.model = pack_linears(draft.model) if pack else draft.model
        return cls(
            loaded, reward, method=method, beta=beta, top_k=top_k, n=n, token_tree=token_tree, overlap=overlap,
            draft=draft,
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
        return self._generate(ids, texts, seed, trace, batch_size, settings)

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
        return self._generate(prompt_ids, texts, seed, trace, batch_size, settings)

    def _generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        texts: Sequence[str],
        seed: int | Sequence[int],
        trace: bool,
        batch_size: int,
        settings: dict[str, Any],
    ) -> list[Completion]:
        resolved = self._settings(settings)
        if batch_size < 1:
            raise UsageError(f"batch_size = {batch_size}: it must be at least 1")
        requests = self._requests(prompt_ids, texts, seed, resolved)
        for start in range(0, len(requests), batch_size):
            for _ in self._decode(requests[start : start + batch_size], resolved, trace=trace):
                pass
        return [to_completion(request, self.method.name, trace=trace) for request in requests]

    def stream(self, prompt: Prompt, *, seed: int = 0, **settings: Any) -> Iterator[str]:
        """Complete one prompt, yielding text as it is drawn; the pieces joined equal ``generate``'s text.

        A completion-level method yields its text at the end. Arguments and errors are those of ``generate``.
        """
        resolved = self._settings(settings)
        text, ids = self._encode(prompt)
        (request,) = self._requests([ids], [text], seed, resolved)
        shown = ""
        steps = self._decode([request], resolved, trace=False)
        for _ in steps:
            if self.method.unit == "token" and request.finish_reason is None:
                text = decode_completion(self.policy.tokenizer, request.prompt_ids, request.token_ids)
                safe = _settled(text, resolved.stop)
                if len(safe) > len(shown) and safe.startswith(shown):
                    yield safe[len(shown) :]
                    shown = safe
        yield request.text[len(shown) :]

    def _settings(self, given: dict[str, Any]) -> DecodingSettings:
        settings = validate(DecodingSettings, self.defaults | given)
        if settings.method != self.method.name:
            raise UsageError(f"this GuidedPolicy decodes with {self.method.name}; make one for {settings.method}")
        check_settings(self.method, settings)
        if self.draft is not None:
            if self.method.unit != "token":
                raise UsageError(f"{self.method.name} does not speculate; leave the draft out")
            check_draft(self.draft, self._token_scorer, settings)
        elif "draft_length" in settings.model_fields_set and settings.draft_length is not None:
            raise UsageError("draft_length applies to speculative decoding: say where drafts come from (draft)")
        if self.overlap:
            check_overlap(self._token_scorer, settings, drafted=self.draft is not None)
        return settings

    @property
    def _token_scorer(self) -> AnyScorer | None:
        return self.scorer if self.method.scorer else None

    def _requests(
        self,
        prompt_ids: Sequence[Sequence[int]],
        texts: Sequence[str],
        seed: int | Sequence[int],
        settings: DecodingSettings,
    ) -> list[Request]:
        for i, ids in enumerate(prompt_ids):
            with _naming_prompt(i, len(prompt_ids)):
                self._require_room(ids, settings)
        device = self.policy.model.device
        return [
            Request(text, list(ids), row_seed, make_processors(settings, len(ids), self.end_tokens, device))
            for text, ids, row_seed in zip(texts, prompt_ids, row_seeds(seed, prompt_ids), strict=True)
        ]

    def _encode(self, prompt: Prompt) -> tuple[str, list[int]]:
        tokenizer = self.policy.tokenizer
        if isinstance(prompt, str):
            return prompt, encode_prompt(tokenizer, prompt)
        text = render_chat(tokenizer, prompt, add_generation_prompt=True)
        return text, encode_prompt(tokenizer, text, templated=True)

    def _require_room(self, prompt_ids: Sequence[int], settings: DecodingSettings) -> None:
        require_room(prompt_ids, settings.max_new_tokens, self.policy.max_length, "policy")
        if self.scorer is not None and self.method.scorer is not None:
            require_room(prompt_ids, settings.max_new_tokens, self.scorer.max_length, "scorer")
        if isinstance(self.draft, Policy):
            require_room(prompt_ids, settings.max_new_tokens, self.draft.max_length, "drafting model")

    def _decode(self, requests: list[Request], settings: DecodingSettings, *, trace: bool) -> Iterator[list[Request]]:
        rule = TokenRule(
            beta=settings.beta, top_k=settings.top_k, top_p=settings.top_p, temperature=settings.temperature,
            greedy=self.method.rule == "greedy", trace=trace,
        )  # fmt: skip
        stopping = Stopping(self.policy.tokenizer, self.end_tokens, settings)
        longest = max(len(request.prompt_ids) for request in requests) + settings.max_new_tokens
        if self.method.rule == "best":
            assert not isinstance(self.scorer, SharedTrunkScorer | None), "checked when policy and scorer were joined"
            columns = longest + settings.n * (settings.max_new_tokens + 1)  # one branch of the cache per completion
            return best_of_n(requests, self._policy_runner(columns), self.scorer, settings.n, rule, stopping)
        scorer, top_k, tree = self._token_scorer, settings.top_k, self.token_tree
        if self.draft is not None:
            assert scorer is None or isinstance(scorer, PrefixScorer), "checked with the settings"
            run = make_speculation(self.policy, scorer, self.draft, longest, top_k=top_k, tree=tree)
            return speculate(
                requests, run.policy, run.scorer, run.drafter, run.costs, rule, stopping, settings.draft_length
            )
        stepper = make_stepper(self.policy, scorer, longest, top_k=top_k, tree=tree, overlap=self.overlap)
        return decode(requests, stepper, rule, stopping)

    def _policy_runner(self, longest: int) -> Runner:
        return make_runner(self.policy.model, policy_logits, longest + 1, tree=self.token_tree)


@contextmanager
def _naming_prompt(index: int, total: int) -> Iterator[None]:
    """A refusal inside says which of several prompts it is about."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"prompt {index + 1} of {total}: {error}" if total > 1 else str(error)) from error


def _load_scorer(
    source: "str | tuple[Any, Any]", policy: Policy, method: str, dtype: Any, device: Any, *, pack: bool
) -> AnyScorer:
    """A scorer by name; one that is not part of the policy is packed as the policy is."""
    if not isinstance(source, str):
        return PrefixScorer.from_pretrained(source)
    scorer = load_scorer(
        source, policy=policy, dtype=dtype, device=device or policy.model.device,
        join=find_method(method).unit == "token",
    )  # fmt: skip
    if pack and isinstance(scorer, PrefixScorer):
        scorer.model = pack_linears(scorer.model)
    return scorer


def _placement(dtype: Any, device: Any) -> dict[str, Any]:
    return {"dtype": dtype, "device": device}


def _as_list(prompts: "Prompt | Sequence[Prompt]") -> list[Prompt]:
    """A text or one conversation (a list of messages) is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and isinstance(many[0], dict) else many


def _settled(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished text that later tokens cannot change: no half character, no half stop text."""
    text = text.rstrip("�")
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - held]
