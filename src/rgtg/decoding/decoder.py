"""A policy and its scorers joined under one method: settings checked, rows made, and steps taken."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from rgtg.config import DecodingSettings, validate
from rgtg.decoding.engine.best_of_n import best_of_n
from rgtg.decoding.engine.chunked_prefill import Feed, Reading, unread
from rgtg.decoding.engine.prefix_cache import policy_key
from rgtg.decoding.engine.segments import SegmentRule, SegmentStopping, decode_segments
from rgtg.decoding.engine.speculative import speculate
from rgtg.decoding.engine.tokenwise import TokenRule, decode
from rgtg.decoding.loading import listed
from rgtg.decoding.methods import (
    Method,
    betas_of,
    branch_columns,
    check_scorers,
    check_settings,
    find_method,
    require_complete,
    segments_of,
)
from rgtg.decoding.request import Request, Stopping, end_tokens, make_processors, require_room, row_seeds, source_of
from rgtg.decoding.runners.ended import InParts
from rgtg.decoding.runners.factory import (
    DRAFTS,
    as_read_beside,
    check_draft,
    check_overlap,
    make_mixture,
    make_segment_reader,
    make_speculation,
    make_stepper,
    require_embeddings,
)
from rgtg.decoding.runners.model_runner import Runner, TreeRunner, make_runner
from rgtg.decoding.runners.policy_runner import Stepper
from rgtg.decoding.runners.segment_scorer import CachedSegments, SegmentReader
from rgtg.errors import DataError, UsageError
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.tensor_parallel import register_parallel_models
from rgtg.models.ops.lm_head import policy_logits
from rgtg.models.scorers.base import AnyScorer, Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.tokenization.encoding import require_same_tokenizer

# One text, or a conversation.
Prompt = str | list[dict[str, Any]]


@dataclass
class Run:
    """Rows that are joined with the models, none of which has read anything yet.

    Attributes:
        steps: the rows still active after each token; the first step reads what has not been read of the prompts.
        parts: runners, steppers and readers that the steps use.
        prompt: of one row, to be read in parts before its first step.
    """

    steps: Iterator[list[Request]]
    parts: Sequence[object]
    prompt: Reading = field(default_factory=lambda: Reading([]))


class Decoder:
    """What ``GuidedPolicy`` and the server decode with; arguments are those of ``GuidedPolicy``."""

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
        self.resolve({})
        read = [policy, *self.scorers, *([self.draft] if isinstance(self.draft, Policy) else [])]
        if register_parallel_models(one.model for one in read) and overlap:
            raise UsageError("overlap reads in two threads, and processes that split a model must read in one order")
        if isinstance(self.draft, Policy):
            require_same_tokenizer(policy.tokenizer, self.draft.tokenizer)
        self.end_tokens = end_tokens(policy)

    def resolve(self, given: dict[str, Any], *, complete: bool = False) -> DecodingSettings:
        """Settings of one call over those the decoder was made with; ``complete``: enough to decode with.

        Raises:
            UsageError: unusable settings, or some that the method or the scorers do not take.
        """
        settings = validate(DecodingSettings, self.defaults | given)
        if settings.method != self.method.name:
            raise UsageError(f"this GuidedPolicy decodes with {self.method.name}; make one for {settings.method}")
        check_settings(self.method, settings)
        if settings.top_k is None and self.method.scorer and self.method.unit == "token":
            for one in self.scorers:
                require_embeddings(self.policy, one, whole=True)
        if complete:
            require_complete(self.method, settings)
        if self.used and len(betas_of(settings)) != len(self.used):
            raise UsageError(
                f"{len(betas_of(settings))} betas for {len(self.used)} scorers: give each scorer one, in their order",
                setting="beta",
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
        if len(self.used) > 1:
            raise UsageError(f"{what} takes one scorer, and {len(self.used)} were given")
        if settings.entropy_gate is not None:
            raise UsageError(f"{what} scores every token; leave entropy_gate out")

    @property
    def scorer(self) -> AnyScorer | None:
        """The scorer, the first of several; None without one."""
        return self.scorers[0] if self.scorers else None

    @property
    def used(self) -> list[AnyScorer]:
        """The scorers, where the method reads any."""
        return self.scorers if self.method.scorer else []

    @property
    def _token_scorer(self) -> AnyScorer | None:
        return self.scorer if self.method.scorer else None

    def requests(
        self,
        prompt_ids: Sequence[Sequence[int]],
        texts: Sequence[str],
        sources: Sequence[Prompt | None],
        seed: int | Sequence[int],
        settings: DecodingSettings,
    ) -> list[Request]:
        """A row for each prompt, by its token ids, its text, and what a scorer that reads text takes for it.

        Raises:
            DataError: a prompt that is empty, or does not fit a context.
            UsageError: another number of seeds than of prompts.
        """
        device = self.policy.model.device
        requests = [
            Request(
                text, list(ids), row_seed, make_processors(settings, len(ids), self.end_tokens, device), source=source
            )
            for text, ids, source, row_seed in zip(texts, prompt_ids, sources, row_seeds(seed, prompt_ids), strict=True)
        ]
        for i, request in enumerate(requests):
            with naming_prompt(i, len(requests)):
                self.require_room(request, settings)
        return requests

    def require_room(self, request: Request, settings: DecodingSettings) -> None:
        """Refuse a prompt that does not fit the context of every model that reads it.

        Raises:
            DataError: saying whose.
        """
        prompt_ids = request.prompt_ids
        require_room(prompt_ids, settings.max_new_tokens, self.policy.max_length, "policy")
        for scorer in self.used:
            if isinstance(scorer, CrossTokenizerScorer):  # how many of its tokens a completion takes is unknown
                scorer.require_room(source_of(request, self.policy.tokenizer))
            else:
                require_room(prompt_ids, settings.max_new_tokens, scorer.max_length, "scorer")
        if isinstance(self.draft, Policy):
            require_room(prompt_ids, settings.max_new_tokens, self.draft.max_length, "drafting model")

    def steps(self, requests: list[Request], settings: DecodingSettings, *, trace: bool) -> Iterator[list[Request]]:
        """Complete rows in one batch; yields those still active after each token.

        Raises:
            NonFiniteError: NaN from the policy or the scorer.
        """
        return self._joined(requests, settings, trace).steps

    def begin(self, request: Request, settings: DecodingSettings, *, trace: bool, chunk: int) -> "Run":
        """Complete one row whose prompt is read in parts first; then the steps, which complete it as ``steps`` does.

        Ended completions are read in parts too, of ``chunk`` tokens, where their scorer has a cache.
        """
        run = self._joined([request], settings, trace, chunk)
        for part in run.parts:
            for runner, texts in unread(part, [request.prompt_ids]):
                run.prompt.feeds.append(Feed(self._key(runner), runner, texts[0], len(texts)))
        return run

    def _key(self, runner: Runner) -> str:
        """Whose reading of a text it is, for those that are kept."""
        if runner.model is self.policy.model:
            return policy_key(None)
        of = next(scorer for scorer in self.used if scorer.model is runner.model)
        return policy_key(of.name) if isinstance(of, SharedTrunkScorer) else of.name

    def _joined(
        self, requests: list[Request], settings: DecodingSettings, trace: bool, chunk: int | None = None
    ) -> "Run":
        """All that ``steps`` needs, made; nothing has been read."""
        longest = max(len(request.prompt_ids) for request in requests) + settings.max_new_tokens
        rule = self.rule(settings, trace)
        if self.method.unit == "segment":
            return self._by_segments(requests, settings, rule, longest, chunk)
        stopping = self.stopping(settings)
        if self.method.unit == "completion":
            columns = longest + branch_columns(self.method, settings)  # one branch of the cache per completion
            policy = self._policy_runner(columns)
            ends = self._in_parts(self._segment_reader(requests, longest, 1), chunk) if chunk else None
            drawn = best_of_n(requests, policy, self._reward, settings.n, rule, stopping, ends)
            return Run(drawn, [policy, ends.runner] if ends else [policy])
        scorer, top_k = self._token_scorer, None if rule.of_sum else settings.top_k
        if self.draft is not None:
            assert scorer is None or isinstance(scorer, PrefixScorer), "checked with the settings"
            run = make_speculation(self.policy, scorer, self.draft, longest, top_k=top_k, tree=self.token_tree)
            drafted = speculate(
                requests, run.policy, run.scorer, run.drafter, run.costs, rule, stopping, settings.draft_length
            )
            return Run(drafted, [run.policy, run.scorer])
        stepper: Stepper
        if len(self.used) > 1:
            stepper = make_mixture(
                self.policy, self.used, betas_of(settings), longest, top_k=top_k, tree=self.token_tree,
                requests=requests,
            )  # fmt: skip
        else:
            stepper = make_stepper(
                self.policy, scorer, longest, top_k=top_k, tree=self.token_tree, overlap=self.overlap, requests=requests
            )
        return Run(decode(requests, stepper, rule, stopping), [stepper])

    def _by_segments(
        self, requests: list[Request], settings: DecodingSettings, rule: TokenRule, longest: int, chunk: int | None
    ) -> "Run":
        accepts = self.method.rule == "accept"
        n, length = segments_of(self.method, settings)
        segments = SegmentRule(
            "accept" if accepts else "best", n, betas_of(settings)[0], settings.reward_threshold or 0.0,
            settings.threshold_start, settings.retries,
        )  # fmt: skip
        stopping = SegmentStopping(
            self.policy.tokenizer, self.end_tokens, settings, length=length,
            unsure=settings.entropy_threshold if accepts else None,
        )  # fmt: skip
        reader = self._segment_reader(requests, longest, min(length, settings.max_new_tokens))
        policy = self._policy_runner(longest + branch_columns(self.method, settings))
        ends = self._in_parts(reader, chunk) if chunk else None
        drawn = decode_segments(requests, policy, reader, self._reward, rule, segments, stopping, ends)
        return Run(drawn, [policy, reader])

    def _segment_reader(self, requests: list[Request], longest: int, length: int) -> SegmentReader:
        return make_segment_reader(self.policy, self._reward, longest, length, tree=self.token_tree, requests=requests)

    def _in_parts(self, reader: SegmentReader, chunk: int) -> InParts | None:
        """How ended completions are read over a reader's cache; None where there is no cache."""
        if not isinstance(reader, CachedSegments) or not isinstance(reader.runner, TreeRunner):
            return None
        reader.runner.grows = True  # an ended text may be written in more tokens than were drawn
        return InParts(cast(PrefixScorer, self._reward), reader.runner, chunk)

    @property
    def _reward(self) -> Scorer | CrossTokenizerScorer:
        """The scorer, as one that reads whole texts (checked when policy and scorer were joined)."""
        return cast(Scorer | CrossTokenizerScorer, self.scorer)

    def stopping(self, settings: DecodingSettings) -> Stopping:
        """When a row that is drawn token by token ends."""
        return Stopping(self.policy.tokenizer, self.end_tokens, settings)

    def rule(self, settings: DecodingSettings, trace: bool) -> TokenRule:
        """How a token is drawn: with several scorers, their sum is weighted before the rule sees it."""
        betas = betas_of(settings)
        return TokenRule(
            beta=1.0 if len(self.used) > 1 else betas[0], top_k=settings.top_k, top_p=settings.top_p,
            temperature=settings.temperature, greedy=self.method.rule == "greedy", trace=trace, clip=self.method.clip,
            of_sum=self.method.candidates == "sum", entropy_gate=settings.entropy_gate,
        )  # fmt: skip

    def _policy_runner(self, longest: int) -> Runner:
        return make_runner(self.policy.model, policy_logits, longest + 1, tree=self.token_tree)


@contextmanager
def naming_prompt(index: int, total: int) -> Iterator[None]:
    """A refusal inside says which of several prompts it is about."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"prompt {index + 1} of {total}: {error}" if total > 1 else str(error)) from error
