"""Exact speculation: draft several tokens, verify policy and scorer in one pass each, keep what is accepted.

The output has the distribution of the plain loop, whatever drafts: each drafted token meets the *guided* distribution
at its place (arXiv 2211.17192, with p the guided distribution), and the first rejected one is drawn again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgtg.config import DecodingSettings
from rgtg.decoding.engine.batch import Batch
from rgtg.decoding.engine.drafters import (
    MAX_DRAFT,
    Acceptance,
    Draft,
    Drafter,
    DraftSampler,
    ModelDrafter,
    PolicyDrafter,
    PromptLookupDrafter,
    Roofline,
    no_draft,
)
from rgtg.decoding.request import Request, process, step_trace
from rgtg.decoding.runners.model_runner import Runner, make_runner, outputs
from rgtg.decoding.runners.policy_runner import MAX_WIDTH
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.decoding.sampling import (
    NO_FINITE_PROBABILITY,
    SCORES_NOT_FINITE,
    SamplingParams,
    accept_draft,
    greedy,
    guided_log_probs,
    propose,
    sample,
)
from rgtg.errors import NonFiniteError, UsageError
from rgtg.models.loading.policy import Policy
from rgtg.models.ops.lm_head import policy_logits, scorer_scores
from rgtg.models.ops.packed_linear import decode_bytes
from rgtg.models.scorers.base import AnyScorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.reward_model import PrefixScorer


@dataclass
class _Verified:
    """What is known at every place of the drafts, on the host: places 0 … n, each with its K candidates."""

    ids: Tensor  # (B, n + 1, K)
    candidate_log_probs: Tensor
    scores: Tensor | None
    guided: Tensor
    policy_log_probs: Tensor  # (B, n + 1, K), over the whole vocabulary and before the processors


class SpeculativeBatch(Batch):
    """A batch whose steps draw one to n + 1 tokens for every request: drafted ones that are accepted, and one more.

    All requests are added at once, and share their sampling parameters.
    """

    def __init__(
        self,
        policy: Policy,
        scorer: PrefixScorer | None,
        draft: "str | Policy",
        columns: int,
        *,
        top_k: int | None,
        length: int | None = None,
        tree: bool | None = None,
    ) -> None:
        """Make the runners.

        Args:
            policy: the frozen policy.
            scorer: a scorer of its own, or None for the policy alone.
            draft: ``policy``, ``prompt-lookup``, or a small model with the policy's tokenizer.
            columns: tokens of the longest prompt and its completion together.
            top_k: candidates per step.
            length: tokens per draft; None adapts it to each request's acceptance and the costs.
            tree: force token trees (True) or the whole-text fallback (False); None finds out what the models can do.
        """
        super().__init__()
        k = top_k or 0
        width = MAX_DRAFT + (MAX_DRAFT + 1) * k
        self.policy_runner = make_runner(policy.model, policy_logits, columns + MAX_DRAFT + 1, tree=tree)
        self.scorer_runner = make_runner(scorer.model, scorer_scores, columns + width, tree=tree) if scorer else None
        roofline = Roofline(
            decode_bytes(policy.model), decode_bytes(scorer.model) if scorer else 0.0,
            32.0 if policy.model.device.type == "cpu" else 256.0, k,
        )  # fmt: skip
        self.drafter: Drafter
        if isinstance(draft, Policy):
            small = make_runner(draft.model, policy_logits, columns + MAX_DRAFT + 1, tree=tree)
            self.drafter = ModelDrafter(small, decode_bytes(draft.model), roofline)
        elif draft == "policy":
            self.drafter = PolicyDrafter(self.policy_runner, roofline)
        else:
            self.drafter = PromptLookupDrafter(roofline)
        self.length = length
        self.costs = [self.drafter.cost(n) + roofline.verify(n) for n in range(MAX_DRAFT + 1)]
        self.acceptance: dict[Request, Acceptance] = {}
        self._draft = no_draft(0, "cpu")
        self._logits = torch.zeros(0)  # (B, n + 1, V) at the newest token and at every drafted one

    @torch.inference_mode()
    def start(self, requests: Sequence[Request]) -> None:
        """Read the prompts of all requests; the first token has no draft."""
        prompts = [request.prompt_ids for request in requests]
        final = self.policy_runner.prefill(prompts).final
        if self.scorer_runner is not None:
            self.scorer_runner.prefill(prompts)
        self.drafter.prefill(requests)
        self.requests = list(requests)
        self.acceptance = {request: Acceptance() for request in requests}
        self._draft = no_draft(len(requests), final.device)
        self._logits = self.policy_runner.head(final)[:, None]

    @torch.inference_mode()
    def step(self, on_draw: Callable[[list[Request]], None] | None = None) -> list[Request]:
        """Draw one to n + 1 tokens for every request; as ``Batch.step``."""
        before = list(self.requests)
        params = before[0].params
        temperature = 0.0 if params.greedy else params.temperature
        draft = self._draft
        # 1. verify: the candidates of every place, scored in one pass
        places = self._verify(params, temperature)
        # 2. accept from the left, then draw one token from what a rejection left, or one more after the last
        accepted, choice = _accept(before, draft, places, temperature)
        _emit(before, draft, accepted, choice, places)
        _count(before, draft, accepted, scored=self.scorer_runner is not None)
        for row, request in enumerate(before):
            self.acceptance[request].update(accepted[row], draft.counts[row])
        if on_draw is not None:
            on_draw(before)
        left = [request for request in before if request.ended]
        if len(left) == len(before):
            self.requests = []
            return left
        # 3. commit: the accepted tokens stay in every cache, and the one drawn after them in the scorer's
        self.policy_runner.rollback([draft.tokens.shape[1] - n for n in accepted])
        self.drafter.commit(accepted)
        if self.scorer_runner is not None:
            self.scorer_runner.commit(_path(draft, accepted, choice, places.ids.shape[2]), [n + 1 for n in accepted])
        self._drop(left)
        # 4. draft, and read the policy's logits at every place
        newest = torch.tensor([[request.token_ids[-1]] for request in self.requests], device=self._logits.device)
        counts = [self._draft_length(request) for request in self.requests]
        sampler = DraftSampler(params.top_k, params.top_p, temperature, params.vocabulary)
        self._draft = self.drafter.draft(self.requests, newest, counts, sampler)
        drafted = self._draft.logits
        self._logits = drafted if drafted is not None else _read_chain(self.policy_runner, newest, self._draft)
        return left

    def _drop(self, leaving: Iterable[Request]) -> list[int] | None:
        """Remove requests from every cache; rows of those that stay, None if all do."""
        gone = set(leaving)
        if not gone:
            return None
        kept = [row for row, request in enumerate(self.requests) if request not in gone]
        self.requests = [self.requests[row] for row in kept]
        self.policy_runner.select_rows(kept)
        self.drafter.select_rows(kept)
        if self.scorer_runner is not None:
            self.scorer_runner.select_rows(kept)
        return kept

    def _verify(self, params: SamplingParams, temperature: float) -> _Verified:
        """Guided distribution at each of the n + 1 places of every request."""
        logits, draft = self._logits, self._draft
        batch, places, _ = logits.shape
        log_probs = torch.log_softmax(logits.float(), -1)
        drafted = draft.tokens.tolist()
        allowed = torch.stack(
            [
                process(self.requests, logits[:, i], log_probs[:, i], [mine[:i] for mine in drafted])
                for i in range(places)
            ], 1,
        )  # fmt: skip
        ids, candidates = propose(
            allowed.flatten(0, 1), top_k=params.top_k, top_p=params.top_p, vocabulary=params.vocabulary
        )
        ids, candidates = (t.view(batch, places, -1) for t in (ids, candidates))
        scores = _score(self.scorer_runner, draft, ids) if self.scorer_runner is not None else None
        used = torch.arange(places, device=ids.device) <= torch.tensor(draft.counts, device=ids.device)[:, None]
        if not bool(candidates[used][:, 0].isfinite().all()):
            raise NonFiniteError(NO_FINITE_PROBABILITY)
        if scores is not None and not bool(scores[used].isfinite().all()):
            raise NonFiniteError(SCORES_NOT_FINITE)
        flat = candidates.flatten(0, 1)
        steering = scores.nan_to_num().flatten(0, 1) if scores is not None else torch.zeros_like(flat)
        if params.clip:
            steering = steering.clamp(0, 1)
        guided = guided_log_probs(flat, steering, params.beta if scores is not None else 0.0, temperature)
        return _Verified(
            ids.cpu(), candidates.cpu(), scores.cpu() if scores is not None else None,
            guided.view(batch, places, -1).cpu(), log_probs.gather(-1, ids).cpu(),
        )  # fmt: skip

    def _draft_length(self, request: Request) -> int:
        """Tokens to draft: never more than the request may still need after the one that is drawn anyway."""
        assert request.stopping is not None, "requests have stopping criteria"
        room = max(request.stopping.limit - len(request.token_ids) - 1, 0)
        return min(room, self.length if self.length is not None else self.acceptance[request].best_length(self.costs))


def check_draft(draft: "str | Policy", scorer: AnyScorer | None, settings: DecodingSettings) -> None:
    """Refuse drafts that cannot be verified, or cannot save anything.

    Raises:
        UsageError: saying why, and what to do.
    """
    if isinstance(scorer, CrossTokenizerScorer):
        raise UsageError(
            f"drafts are verified with a scorer that reads the policy's tokens; {scorer.name} reads text, with a "
            "tokenizer of its own: leave the draft out"
        )
    if scorer is not None and not isinstance(scorer, PrefixScorer):
        raise UsageError(
            f"drafts are verified with a scorer that is a model of its own; {scorer.name} reads the policy's states or "
            "scores from the prefix, which costs too little to speculate on: leave the draft out"
        )
    if scorer is None and draft == "policy":
        raise UsageError("the policy cannot draft for itself: draft from prompt-lookup or a smaller model")
    if scorer is not None and (settings.top_k is None or settings.top_k > MAX_WIDTH):
        raise UsageError(f"drafts are verified over at most {MAX_WIDTH} candidates: set top_k (10 is usual)")


def _score(scorer: Runner, draft: Draft, ids: Tensor) -> Tensor:
    """Scores (B, n + 1, K): one pass over the chain of drafted tokens with the candidates of each place hung on it."""
    batch, places, k = ids.shape
    n = places - 1
    parents = (*range(-1, n - 1), *(place - 1 for place in range(places) for _ in range(k)))
    tree = TokenTree(torch.cat([draft.tokens, ids.flatten(1)], 1), parents)
    scores = outputs(scorer, tree)[:, n:]
    return scores.reshape(batch, places, k).float().to(ids.device)


def _accept(rows: Sequence[Request], draft: Draft, places: _Verified, temperature: float) -> tuple[list[int], Tensor]:
    """How many drafted tokens of each row are accepted, and which candidate of the next place is drawn."""
    accepted = [0] * len(rows)
    rejected = [False] * len(rows)
    last = torch.stack([places.guided[b, n] for b, n in enumerate(draft.counts)])
    tokens, q_ids, q = draft.tokens.cpu(), draft.ids.cpu(), draft.log_probs.cpu()
    for place in range(tokens.shape[1]):
        open_ = [not gone and place < n for gone, n in zip(rejected, draft.counts, strict=True)]
        uniforms = torch.tensor([row.uniform() if o else 0.0 for row, o in zip(rows, open_, strict=True)])
        on_candidates = _on(places.ids[:, place], q_ids[:, place], q[:, place])
        found = places.ids[:, place] == tokens[:, place, None]
        drafted = torch.where(found.any(-1), found.long().argmax(-1), -1)
        kept, rest = accept_draft(places.guided[:, place], on_candidates, drafted, uniforms.double())
        for b in (b for b, o in enumerate(open_) if o):
            if kept[b]:
                accepted[b] += 1
            else:
                rejected[b], last[b] = True, rest[b]
    draws = torch.tensor([row.uniform() for row in rows], dtype=torch.float64)
    return accepted, greedy(last) if temperature == 0 else sample(last, draws)


def _on(ids: Tensor, support: Tensor, log_probs: Tensor) -> Tensor:
    """A draft distribution's log-probabilities (B, K) at other candidates (B, K)."""
    matches = ids[:, :, None] == support[:, None]
    return (matches * log_probs.double().exp()[:, None]).sum(-1).log()


def _emit(rows: Sequence[Request], draft: Draft, accepted: list[int], choice: Tensor, places: _Verified) -> None:
    """Write each request's new tokens into it one by one, until it ends."""
    for b, row in enumerate(rows):
        drafted = draft.tokens[b, : accepted[b]].tolist()
        for place, token in enumerate([*drafted, int(places.ids[b, accepted[b], choice[b]])]):
            j = int((places.ids[b, place] == token).nonzero()[0])
            row.token_ids.append(token)
            row.policy_log_prob += float(places.policy_log_probs[b, place, j])
            row.guided_log_prob += float(places.guided[b, place, j])
            here = places.candidate_log_probs[b, place]
            row.candidates_log_prob += float(here[j] - here.logsumexp(-1))
            scores = places.scores[b, place] if places.scores is not None else None
            row.score = float(scores[j]) if scores is not None else None
            if row.keep_trace:
                known = (places.ids[b, place], places.candidate_log_probs[b, place], scores, places.guided[b, place])
                row.trace.append(step_trace(token, *known))
            assert row.stopping is not None, "requests have stopping criteria"
            row.stopping.update(row)
            if row.finish_reason is not None:
                break


def _count(rows: Sequence[Request], draft: Draft, accepted: list[int], *, scored: bool) -> None:
    """Passes and drafts of the round, in each row's record."""
    for b, row in enumerate(rows):
        row.policy_calls += draft.policy_passes(b)
        row.scorer_calls += int(scored)
        row.drafted += draft.counts[b]
        row.accepted += accepted[b]


def _path(draft: Draft, accepted: list[int], choice: Tensor, k: int) -> Tensor:
    """Nodes (B, n + 1) of the scorer's tree down to the token drawn: accepted drafts, then a candidate."""
    n = draft.tokens.shape[1]
    return torch.tensor(
        [[*range(kept), n + kept * k + int(j), *[0] * (n - kept)] for kept, j in zip(accepted, choice, strict=True)]
    )


def _read_chain(policy: Runner, newest: Tensor, draft: Draft) -> Tensor:
    """The policy's logits (B, n + 1, V) at the newest token and at every drafted one, in one pass; all are kept."""
    chain = TokenTree.chain(torch.cat([newest, draft.tokens], 1))
    logits = outputs(policy, chain)
    policy.commit(torch.arange(chain.width).expand(len(newest), -1))
    return logits
