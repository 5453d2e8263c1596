"""THE loop: propose → score → rule → commit, one token for every row of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rgtg.decoding.candidates import propose
from rgtg.decoding.requests import Request, Stopping, process
from rgtg.decoding.rules import greedy, guided_log_probs, sample
from rgtg.decoding.steps import Stepper
from rgtg.errors import NonFiniteError
from rgtg.types import StepTrace


@dataclass(frozen=True)
class TokenRule:
    """How a token is chosen: π(v)·exp(β·r(prefix⊕v)) over the candidates, sampled or maximised."""

    beta: float
    top_k: int | None
    top_p: float
    temperature: float
    greedy: bool
    trace: bool = False


@torch.inference_mode()
def decode(
    requests: list[Request], stepper: Stepper, rule: TokenRule, stopping: Stopping, logits: Tensor | None = None
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
        allowed = process(active, logits, whole)
        candidate_ids, candidate_log_probs = propose(allowed, top_k=rule.top_k, top_p=rule.top_p)
        # 2. score: every candidate, in the stepper's way
        scores = stepper.score(candidate_ids)
        # 3. rule
        beta_scores = torch.zeros_like(candidate_log_probs) if scores is None else scores
        guided = guided_log_probs(candidate_log_probs, beta_scores, rule.beta, 0.0 if rule.greedy else rule.temperature)
        choice = _choose(guided, active, rule)
        # 4. commit
        tokens = candidate_ids.gather(1, choice[:, None])
        _record(active, tokens, choice, whole, candidate_ids, candidate_log_probs, scores, guided, rule.trace)
        for row in active:
            stopping.update(row)
        yield active
        going = [i for i, row in enumerate(active) if row.finish_reason is None]
        if going:
            stepper.keep(candidate_ids, choice)
            if len(going) < len(active):
                stepper.select_rows(torch.tensor(going, device=tokens.device))
                active = [active[i] for i in going]
            logits = stepper.advance()
        else:
            active = []


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


def _record(
    active: list[Request],
    tokens: Tensor,
    choice: Tensor,
    whole: Tensor,
    candidate_ids: Tensor,
    candidate_log_probs: Tensor,
    scores: Tensor | None,
    guided: Tensor,
    trace: bool,
) -> None:
    """Write what was chosen into each row. All figures come to the host in one transfer, the step's only wait."""
    at = choice[:, None]
    cut = candidate_log_probs.gather(1, at) - candidate_log_probs.logsumexp(-1, keepdim=True)
    columns = [tokens, whole.gather(1, tokens), guided.gather(1, at), cut, candidate_log_probs[:, :1].isfinite()]
    if scores is not None:
        columns += [scores.gather(1, at), scores.isfinite().all(-1, keepdim=True)]
    figures = torch.cat([column.double() for column in columns], 1).tolist()
    require_finite(all(row[4] for row in figures), scores is None or all(row[6] for row in figures))
    for i, (row, chosen) in enumerate(zip(active, figures, strict=True)):
        row.token_ids.append(int(chosen[0]))
        row.policy_log_prob += chosen[1]
        row.guided_log_prob += chosen[2]
        row.candidates_log_prob += chosen[3]
        row.policy_calls += 1
        if scores is not None:
            row.score = chosen[5]
            row.scorer_calls += 1
        if trace:
            mine = scores[i] if scores is not None else None
            row.trace.append(step_trace(row.token_ids[-1], candidate_ids[i], candidate_log_probs[i], mine, guided[i]))


def step_trace(token: int, ids: Tensor, log_probs: Tensor, scores: Tensor | None, guided: Tensor) -> StepTrace:
    """The public record of one row's step; tensors (K,)."""
    return StepTrace(
        token_id=token,
        candidate_ids=ids.tolist(),
        policy_log_probs=log_probs.tolist(),
        scores=scores.tolist() if scores is not None else None,
        guided_log_probs=guided.tolist(),
    )
