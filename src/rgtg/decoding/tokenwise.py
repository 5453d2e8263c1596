"""THE loop: propose → score → rule → commit, one token for every row of a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgtg.decoding.candidates import propose
from rgtg.decoding.mixture import Mixture
from rgtg.decoding.requests import Request, Stopping, process
from rgtg.decoding.rules import best_sums, entropy, greedy, guided_log_probs, sample
from rgtg.decoding.steps import Stepper
from rgtg.errors import NonFiniteError
from rgtg.types import StepTrace


@dataclass(frozen=True)
class TokenRule:
    """How a token is chosen: π(v)·exp(β·r(prefix⊕v)) over the candidates, sampled or maximised.

    Attributes:
        beta: multiplies the score.
        top_k: candidates.
        top_p: their nucleus.
        temperature: of the guided distribution.
        greedy: take the maximum.
        trace: keep every candidate's figures.
        clip: cut scores to [0, 1] (RAD).
        of_sum: ``top_k`` counts the largest log π + β·r, not the policy's likeliest (FaRMA).
        entropy_gate: steer a row only where the policy's entropy exceeds this many nats.
    """

    beta: float
    top_k: int | None
    top_p: float
    temperature: float
    greedy: bool
    trace: bool = False
    clip: bool = False
    of_sum: bool = False
    entropy_gate: float | None = None

    def steered(self, whole: Tensor) -> Tensor | None:
        """Which rows are steered here (B,), by the policy's log-probabilities (B, V); None: all of them."""
        return None if self.entropy_gate is None else entropy(whole) > self.entropy_gate

    def guide(self, log_probs: Tensor, scores: Tensor | None, steered: Tensor | None = None) -> Tensor:
        """Guided log-probabilities (B, K) of candidates with these policy log-probabilities and scores."""
        strength, steering = self._steering(log_probs, scores, steered)
        return guided_log_probs(log_probs, steering, strength, 0.0 if self.greedy else self.temperature)

    def cut(self, log_probs: Tensor, scores: Tensor | None, steered: Tensor | None) -> Tensor:
        """Indices (B, k) of the candidates that have the largest sums."""
        strength, steering = self._steering(log_probs, scores, steered)
        return best_sums(log_probs, steering, strength, self.top_k or log_probs.shape[-1])

    def _steering(
        self, log_probs: Tensor, scores: Tensor | None, steered: Tensor | None
    ) -> tuple[float | Tensor, Tensor]:
        """Beta, for all rows or one each (B, 1), and what it multiplies (B, K)."""
        if scores is None:
            return 0.0, torch.zeros_like(log_probs)
        read = scores.clamp(0, 1) if self.clip else scores
        return (self.beta if steered is None else self.beta * steered[:, None]), read


@torch.inference_mode()
def decode(
    requests: Sequence[Request], stepper: Stepper, rule: TokenRule, stopping: Stopping, logits: Tensor | None = None
) -> Iterator[list[Request]]:
    """Complete all requests; yields the rows still active after each token (their newest token is set).

    Args:
        requests: the rows.
        stepper: reads the models.
        rule: candidates and choice.
        stopping: when a row ends.
        logits: (B, V) the policy's after each prompt, where the stepper has read them already.

    Raises:
        NonFiniteError: the policy or the scorer gave NaN or infinite values.
    """
    active = list(requests)
    if logits is None:
        logits = stepper.prefill([request.prompt_ids for request in requests])
    while active:
        # 1. propose: the policy's likeliest next tokens
        whole = torch.log_softmax(logits.float(), -1)
        if len(staying := stopping.staying(active, logits, whole)) < len(active):
            rows = torch.tensor(staying, dtype=torch.long, device=logits.device)
            stepper.select_rows(rows)
            active, logits, whole = [active[i] for i in staying], logits[rows], whole[rows]
            if not active:
                return
        allowed = process(active, logits, whole)
        ids, log_probs = propose(allowed, top_k=None if rule.of_sum else rule.top_k, top_p=rule.top_p)
        # 2. score: every candidate, in the stepper's way
        steered = rule.steered(whole)
        scores = stepper.score(ids) if steered is None or bool(steered.any()) else None
        each = stepper.each if isinstance(stepper, Mixture) and scores is not None else None
        # 3. rule
        if rule.of_sum:
            best = rule.cut(log_probs, scores, steered)
            ids, log_probs = ids.gather(1, best), log_probs.gather(1, best)
            scores = scores if scores is None else scores.gather(1, best)
            each = each if each is None else each.gather(2, best.expand(len(each), -1, -1))
        guided = rule.guide(log_probs, scores, steered)
        choice = _choose(guided, active, rule)
        # 4. commit
        tokens = ids.gather(1, choice[:, None])
        _record(active, _Step(choice, whole, ids, log_probs, scores, each, guided, steered), rule.trace)
        for row in active:
            stopping.update(row)
        yield active
        going = [i for i, row in enumerate(active) if row.finish_reason is None]
        if not going:
            return
        if scores is None:
            stepper.skip(tokens)
        else:
            stepper.keep(ids, choice)
        if len(going) < len(active):
            stepper.select_rows(torch.tensor(going, device=tokens.device))
            active = [active[i] for i in going]
        logits = stepper.advance()


def _choose(guided: Tensor, active: list[Request], rule: TokenRule) -> Tensor:
    uniforms = torch.tensor([row.uniform() for row in active], dtype=torch.float64, device=guided.device)
    return greedy(guided) if rule.greedy or rule.temperature == 0 else sample(guided, uniforms)


def require_finite(policy: bool, scores: bool) -> None:
    """Refuse what is no distribution.

    Args:
        policy: whether every row's likeliest candidate has a finite log-probability.
        scores: whether all scores are finite.

    Raises:
        NonFiniteError: saying whose are not, and what to try.
    """
    if not policy:
        raise NonFiniteError(
            "the policy gives no finite probability to any next token: its logits are NaN or infinite, or every token "
            "is banned. Try dtype=float32, or relax the bans"
        )
    if not scores:
        raise NonFiniteError("the scorer returned NaN or infinite scores; try dtype=float32, or check its training")


@dataclass(frozen=True)
class _Step:
    """One step of all rows: what was chosen, among what."""

    choice: Tensor  # (B,)
    whole: Tensor  # (B, V) policy log-probabilities
    ids: Tensor  # (B, K)
    log_probs: Tensor  # (B, K)
    scores: Tensor | None  # (B, K)
    each: Tensor | None  # (S, B, K), where there are several scorers
    guided: Tensor  # (B, K)
    steered: Tensor | None  # (B,); None: all


def _record(active: list[Request], step: _Step, trace: bool) -> None:
    """Write what was chosen into each row. All figures come to the host in one transfer, the step's only wait."""
    at = step.choice[:, None]
    tokens, scores = step.ids.gather(1, at), step.scores
    cut = step.log_probs.gather(1, at) - step.log_probs.logsumexp(-1, keepdim=True)
    finite = step.log_probs.max(-1, keepdim=True).values.isfinite()
    columns = [tokens, step.whole.gather(1, tokens), step.guided.gather(1, at), cut, finite]
    if scores is not None:
        scored = torch.ones_like(step.choice, dtype=torch.bool) if step.steered is None else step.steered
        columns += [scores.gather(1, at), scores.isfinite().all(-1, keepdim=True), scored[:, None]]
    figures = torch.cat([column.double() for column in columns], 1).tolist()
    require_finite(all(row[4] for row in figures), scores is None or all(row[6] for row in figures))
    for i, (row, chosen) in enumerate(zip(active, figures, strict=True)):
        row.token_ids.append(int(chosen[0]))
        row.policy_log_prob += chosen[1]
        row.guided_log_prob += chosen[2]
        row.candidates_log_prob += chosen[3]
        row.policy_calls += 1
        mine = None
        if scores is not None and chosen[7]:
            row.score, mine = chosen[5], scores[i]
            row.scorer_calls += 1
        if trace:
            traced = step_trace(row.token_ids[-1], step.ids[i], step.log_probs[i], mine, step.guided[i])
            if mine is not None and step.each is not None:
                traced.scores_of_each = step.each[:, i].tolist()
            row.trace.append(traced)


def step_trace(token: int, ids: Tensor, log_probs: Tensor, scores: Tensor | None, guided: Tensor) -> StepTrace:
    """The public record of one row's step; tensors (K,)."""
    return StepTrace(
        token_id=token,
        candidate_ids=ids.tolist(),
        policy_log_probs=log_probs.tolist(),
        scores=scores.tolist() if scores is not None else None,
        guided_log_probs=guided.tolist(),
    )
