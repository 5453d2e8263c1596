"""What is measured of a row's completions, and what they cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rgtg.config import EvaluationSettings
from rgtg.decoding.methods import METHODS
from rgtg.decoding.sampling import best_of_n_kl
from rgtg.evaluation.compare.grid import MethodRun, has_setting
from rgtg.evaluation.compare.shards import Shard
from rgtg.evaluation.compare.traces import rule_of, sample_steps
from rgtg.evaluation.metrics import (
    best_of_n_kl_estimate,
    bootstrap_interval,
    distinct_n,
    self_rouge_l,
)
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.base import Interval
from rgtg.types.comparison import Budget, MethodResult
from rgtg.types.generation import Completion

# How many prompts' completions of each row are kept in the results for reading side by side.
SAMPLES = 5
GOLD = "reward"  # the key of the held-out reward among a part's scores
_SAME_COST = 0.01  # relative


def measure(
    runs: Sequence[Sequence[Completion]],
    rewards: Sequence[Sequence[float]],
    *,
    proxies: Mapping[str, Sequence[Sequence[float]]] | None = None,
    reference: Sequence[Sequence[float]] | None = None,
    n: int | None = None,
    bounded: bool = False,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Interval]:
    """Every figure of one row, a mean with its 95 % bootstrap interval over prompts.

    The seeds of a prompt are resampled together. KL is Monte Carlo from the completions: mean of log π̃(y) − log π(y),
    in nats. Methods that choose among drawn texts add ``selection_nats``, the bound or estimate that decoding recorded;
    a best-of-n row adds an estimate in its place (Beirami et al. 2024), and states the bound too.

    Args:
        runs: seeds × prompts completions, prompts in one order.
        rewards: seeds × prompts, gold.
        proxies: name → seeds × prompts.
        reference: seeds × prompts log-probabilities of the completions under the policy that KL and perplexity are
            measured with; None where the row was generated with it.
        n: completions that best-of-n drew; None for other methods.
        bounded: ``selection_nats`` is a bound.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        ``reward``, ``proxy:NAME`` …, ``kl_nats``, ``kl_cut_nats`` (to the policy cut to the same candidates),
        ``kl_bound_nats`` (best-of-n and cd-blockwise), ``perplexity``, ``distinct_1`` to ``distinct_3``,
        ``self_rouge_l`` (of several seeds), ``length_tokens``.
    """
    prompts = list(range(len(runs[0]))) * len(runs)

    def interval(values: Sequence[float]) -> Interval:
        return bootstrap_interval(values, seed=seed, resamples=resamples, clusters=prompts)

    done = _flat(runs)
    under = _flat(reference) if reference is not None else [c.policy_log_prob for c in done]
    per_token = interval([-log_prob / len(c.token_ids) for c, log_prob in zip(done, under, strict=True)])
    figures = {"reward": interval(_flat(rewards))}
    figures |= {proxy_key(name): interval(_flat(values)) for name, values in (proxies or {}).items()}
    nats = _divergences(done, under, n, cut=reference is None, bounded=bounded)
    figures |= {name: interval(values) for name, values in nats.items()}
    figures["perplexity"] = Interval(
        mean=math.exp(per_token.mean), low=math.exp(per_token.low), high=math.exp(per_token.high), n=per_token.n
    )
    figures |= {f"distinct_{k}": interval([distinct_n([c.token_ids], k) for c in done]) for k in (1, 2, 3)}
    if len(runs) > 1:
        alike = [self_rouge_l([run[i].text for run in runs]) for i in range(len(runs[0]))]
        figures["self_rouge_l"] = bootstrap_interval(alike, seed=seed, resamples=resamples)
    figures["length_tokens"] = interval([float(len(c.token_ids)) for c in done])
    return figures


def run_result(
    row: MethodRun,
    parts: Sequence[Shard],
    settings: EvaluationSettings,
    *,
    full: dict[str, Any],
    proxies: Sequence[str] = (),
    guided_by: Sequence[str] = (),
    texts: TokenBytes | None = None,
) -> MethodResult:
    """A row's parts, one per seed and already scored, as its result.

    Args:
        row: what was run.
        parts: in the order of the seeds.
        settings: of the comparison: bootstrap and its seed.
        full: every decoding setting of the row.
        proxies: names of the rewards beside gold.
        guided_by: those of them that steered or selected.
        texts: of the policy's tokens, for the steps of samples that have a trace.
    """
    done = [completion for part in parts for completion in part.completions]
    gold = [part.scores[GOLD].values for part in parts]
    others = {name: [part.scores[proxy_key(name)].values for part in parts] for name in proxies}
    known = [part.reference_log_probs for part in parts]
    tokens, seconds = sum(len(c.token_ids) for c in done), sum(part.seconds for part in parts)
    method = METHODS[row.method]
    return MethodResult(
        label=row.label,
        method=row.method,
        beta=full["beta"] if has_setting(row.method, "beta") else None,
        n=int(full["n"]) if has_setting(row.method, "n") else None,
        curve=row.curve,
        strength=row.strength,
        settings=full,
        seeds=[part.seed for part in parts],
        metrics=measure(
            [part.completions for part in parts], gold, proxies=others, seed=settings.seed,
            n=int(full["n"]) if method.unit == "completion" else None, bounded=method.rule == "best",
            reference=[k for k in known if k is not None] or None, resamples=settings.bootstrap,
        ),
        rewards=gold,
        proxy_rewards=others,
        guided_by=list(guided_by),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        policy_calls=sum(c.policy_calls for c in done),
        scorer_calls=sum(c.scorer_calls for c in done),
        samples=_samples(parts[0], rule_of(row.method, full), texts),
    )  # fmt: skip


def proxy_key(name: str) -> str:
    """Where a proxy is found among a part's scores and a row's metrics."""
    return f"proxy:{name}"


def budgets_of(results: Sequence[MethodResult]) -> tuple[list[Budget], str]:
    """What a token of each row cost, and whether all paid the same, in words."""
    budgets = [
        Budget(
            label=row.label,
            policy_calls_per_token=row.policy_calls / row.tokens,
            scorer_calls_per_token=row.scorer_calls / row.tokens,
            tokens_per_completion=row.metrics["length_tokens"].mean,
        )
        for row in results
        if row.tokens
    ]
    policy, scorer = [b.policy_calls_per_token for b in budgets], [b.scorer_calls_per_token for b in budgets]
    if not budgets:
        return [], ""
    ranges = f"policy calls per token {_span(policy)}, scorer calls per token {_span(scorer)}"
    same = all(max(calls) - min(calls) <= _SAME_COST * max(calls) for calls in (policy, scorer))
    return (
        budgets,
        f"Budgets are {'equal' if same else 'not equal'}: {ranges}. Scoring a step's candidates is one call.",
    )


def _divergences(
    done: Sequence[Completion], under: Sequence[float], n: int | None, *, cut: bool, bounded: bool
) -> dict[str, list[float]]:
    """KL of each completion in nats: to the policy, to the policy cut to the same candidates, and its bound."""
    chosen = [best_of_n_kl_estimate(n, c.guided_log_prob) if n else c.selection_nats for c in done]
    drawn = [c.guided_log_prob for c in done]
    found = {"kl_nats": [g - p + extra for g, p, extra in zip(drawn, under, chosen, strict=True)]}
    if cut and all(c.candidates_log_prob is not None for c in done):
        found["kl_cut_nats"] = [
            g - (c.candidates_log_prob or 0.0) + extra for c, g, extra in zip(done, drawn, chosen, strict=True)
        ]
    if bounded:
        found["kl_bound_nats"] = [
            g - p + (best_of_n_kl(n) if n else c.selection_nats) for c, g, p in zip(done, drawn, under, strict=True)
        ]
    return found


def _samples(part: Shard, rule: dict[str, Any], texts: TokenBytes | None) -> list[dict[str, Any]]:
    found = []
    for completion, reward in list(zip(part.completions, part.scores[GOLD].values, strict=True))[:SAMPLES]:
        sample = completion.model_dump(exclude={"trace"}) | {"reward": reward}
        steps = sample_steps(completion, texts) if texts else None
        found.append(sample if steps is None else sample | {"rule": rule, "steps": steps})
    return found


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def _flat(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for row in rows for value in row]
