"""THE loop: propose → score → rule → commit, one token for every row of a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgtg.decoding.candidates import propose
from rgtg.decoding.request import Request, Stopping, process
from rgtg.decoding.runners.mixture import Mixture
from rgtg.decoding.runners.policy_runner import Stepper
from rgtg.decoding.sampling import best_sums, entropy, greedy, guided_log_probs, sample
from rgtg.errors import NonFiniteError
from rgtg.types.generation import StepTrace


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
        proposal = propose_next(whole, process(active, logits, whole), rule)
        # 2. score: every candidate, in the stepper's way
        scores = stepper.score(proposal.ids) if proposal.is_steered else None
        each = stepper.each if isinstance(stepper, Mixture) and scores is not None else None
        # 3. rule
        drawn = draw(active, proposal, scores, each, rule)
        require_finite(all(drawn.finite_policy), all(drawn.finite_scores))
        # 4. commit
        for row in active:
            stopping.update(row)
        yield active
        going = [i for i, row in enumerate(active) if row.finish_reason is None]
        if not going:
            return
        if scores is None:
            stepper.skip(drawn.tokens)
        else:
            stepper.keep(drawn.ids, drawn.choice)
        if len(going) < len(active):
            stepper.select_rows(torch.tensor(going, device=logits.device))
            active = [active[i] for i in going]
        logits = stepper.advance()


@dataclass(frozen=True)
class Proposal:
    """The next tokens that rows of one rule may take.

    Attributes:
        whole: (B, V) the policy's log-probabilities.
        ids: (B, K) candidates.
        log_probs: (B, K) theirs, -inf for what is no candidate of a row.
        steered: (B,) whether a scorer is asked; None: for every row.
    """

    whole: Tensor
    ids: Tensor
    log_probs: Tensor
    steered: Tensor | None

    @property
    def is_steered(self) -> bool:
        """Whether any row's candidates are scored."""
        return self.steered is None or bool(self.steered.any())


@dataclass(frozen=True)
class Drawn:
    """What was chosen.

    Attributes:
        ids: (B, K) candidates, after a rule that cuts them by their sums.
        choice: (B,) place of the chosen one.
        tokens: (B, 1) its token.
        finite_policy: for each row, whether its likeliest candidate has a finite log-probability.
        finite_scores: for each row, whether all its scores are finite.
    """

    ids: Tensor
    choice: Tensor
    tokens: Tensor
    finite_policy: list[bool]
    finite_scores: list[bool]


def propose_next(whole: Tensor, allowed: Tensor, rule: TokenRule) -> Proposal:
    """Candidates of rows that share a rule.

    Args:
        whole: (B, V) the policy's log-probabilities.
        allowed: (B, V) the same after each row's processors.
        rule: says which are candidates, and which rows are steered.
    """
    ids, log_probs = propose(allowed, top_k=None if rule.of_sum else rule.top_k, top_p=rule.top_p)
    return Proposal(whole, ids, log_probs, rule.steered(whole))


def draw(
    rows: Sequence[Request], proposal: Proposal, scores: Tensor | None, each: Tensor | None, rule: TokenRule
) -> Drawn:
    """Choose a token for every row by its own random number, and write it into the row.

    All figures come to the host in one transfer, the step's only wait.

    Args:
        rows: that share the rule.
        proposal: their candidates.
        scores: (B, K); None where nothing was scored.
        each: (S, B, K), of several scorers.
        rule: how one is chosen.
    """
    ids, log_probs = proposal.ids, proposal.log_probs
    if rule.of_sum:
        best = rule.cut(log_probs, scores, proposal.steered)
        ids, log_probs = ids.gather(1, best), log_probs.gather(1, best)
        scores = scores if scores is None else scores.gather(1, best)
        each = each if each is None else each.gather(2, best.expand(len(each), -1, -1))
    guided = rule.guide(log_probs, scores, proposal.steered)
    choice = _choose(guided, rows, rule)
    at = choice[:, None]
    tokens = ids.gather(1, at)
    cut = log_probs.gather(1, at) - log_probs.logsumexp(-1, keepdim=True)
    finite = log_probs.max(-1, keepdim=True).values.isfinite()
    columns = [tokens, proposal.whole.gather(1, tokens), guided.gather(1, at), cut, finite]
    if scores is not None:
        scored = torch.ones_like(choice, dtype=torch.bool) if proposal.steered is None else proposal.steered
        columns += [scores.gather(1, at), scores.isfinite().all(-1, keepdim=True), scored[:, None]]
    figures = torch.cat([column.double() for column in columns], 1).tolist()
    for i, (row, chosen) in enumerate(zip(rows, figures, strict=True)):
        mine = scores[i] if scores is not None and chosen[7] else None
        _record(row, chosen, scored=mine is not None)
        if rule.trace:
            row.trace.append(step_trace(row.token_ids[-1], ids[i], log_probs[i], mine, guided[i]))
            if mine is not None and each is not None:
                row.trace[-1].scores_of_each = each[:, i].tolist()
    sound = [scores is None or bool(chosen[6]) for chosen in figures]
    return Drawn(ids, choice, tokens, [bool(chosen[4]) for chosen in figures], sound)


def _choose(guided: Tensor, active: Sequence[Request], rule: TokenRule) -> Tensor:
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


def _record(row: Request, chosen: list[float], *, scored: bool) -> None:
    """Write one step's figures into a row."""
    row.token_ids.append(int(chosen[0]))
    row.policy_log_prob += chosen[1]
    row.guided_log_prob += chosen[2]
    row.candidates_log_prob += chosen[3]
    row.policy_calls += 1
    if scored:
        row.score = chosen[5]
        row.scorer_calls += 1


def step_trace(token: int, ids: Tensor, log_probs: Tensor, scores: Tensor | None, guided: Tensor) -> StepTrace:
    """The public record of one row's step; tensors (K,)."""
    return StepTrace(
        token_id=token,
        candidate_ids=ids.tolist(),
        policy_log_probs=log_probs.tolist(),
        scores=scores.tolist() if scores is not None else None,
        guided_log_probs=guided.tolist(),
    )
