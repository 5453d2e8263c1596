"""The metrics of a run's completions, and what the completions cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rgtg.config import EvaluationSettings
from rgtg.decoding.methods import METHODS
from rgtg.decoding.sampling import best_of_n_kl
from rgtg.evaluation.compare.grid import MethodRun, has_setting
from rgtg.evaluation.compare.rewards import GOLD, proxy_key
from rgtg.evaluation.compare.shards import Shard
from rgtg.evaluation.compare.traces import decision_rule, sample_steps
from rgtg.evaluation.metrics import best_of_n_kl_estimate, bootstrap_interval, distinct_n, self_rouge_l
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.base import Interval
from rgtg.types.comparison import Budget, MethodResult
from rgtg.types.generation import Completion

# The completions of this many prompts are kept in the results, for reading them side by side.
SAMPLES = 5
_SAME_COST = 0.01  # relative


def measure(
    completions: Sequence[Sequence[Completion]],
    rewards: Sequence[Sequence[float]],
    *,
    proxies: Mapping[str, Sequence[Sequence[float]]] | None = None,
    reference: Sequence[Sequence[float]] | None = None,
    n: int | None = None,
    bounded: bool = False,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Interval]:
    """Every metric of one run: a mean with its 95 % bootstrap interval over prompts.

    The seeds of a prompt are resampled together. KL is a Monte Carlo estimate from the completions, the mean of
    log π̃(y) − log π(y) in nats. Methods that choose among several texts add ``selection_nats``, the bound or estimate
    that decoding recorded. For best-of-n an estimate replaces it (Beirami et al. 2024), and the bound is given too.

    Args:
        completions: seeds × prompts, with the prompts in one order.
        rewards: held-out rewards, seeds × prompts.
        proxies: name → rewards, seeds × prompts.
        reference: log-probabilities of the completions in nats, seeds × prompts, under the policy of KL and perplexity;
            None if the completions were generated with that policy.
        n: completions drawn by best-of-n; None for other methods.
        bounded: whether ``selection_nats`` is a bound.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        ``reward``, ``proxy:NAME`` …, ``kl_nats``, ``kl_cut_nats`` (to the policy renormalised over the candidates),
        ``kl_bound_nats`` (best-of-n and cd-blockwise), ``perplexity``, ``distinct_1`` to ``distinct_3``,
        ``self_rouge_l`` (with several seeds), ``length_tokens``.
    """
    prompts = list(range(len(completions[0]))) * len(completions)

    def interval(values: Sequence[float]) -> Interval:
        return bootstrap_interval(values, seed=seed, resamples=resamples, clusters=prompts)

    done = _flat(completions)
    reference_nats = _flat(reference) if reference is not None else [c.policy_log_prob for c in done]
    per_token = interval([-nats / len(c.token_ids) for c, nats in zip(done, reference_nats, strict=True)])
    metrics = {"reward": interval(_flat(rewards))}
    metrics |= {proxy_key(name): interval(_flat(values)) for name, values in (proxies or {}).items()}
    divergences = _divergences(done, reference_nats, n, same_policy=reference is None, bounded=bounded)
    metrics |= {name: interval(values) for name, values in divergences.items()}
    metrics["perplexity"] = Interval(
        mean=math.exp(per_token.mean), low=math.exp(per_token.low), high=math.exp(per_token.high), n=per_token.n
    )
    metrics |= {f"distinct_{k}": interval([distinct_n([c.token_ids], k) for c in done]) for k in (1, 2, 3)}
    if len(completions) > 1:
        alike = [self_rouge_l([of_seed[i].text for of_seed in completions]) for i in range(len(completions[0]))]
        metrics["self_rouge_l"] = bootstrap_interval(alike, seed=seed, resamples=resamples)
    metrics["length_tokens"] = interval([float(len(c.token_ids)) for c in done])
    return metrics


def run_result(
    run: MethodRun,
    shards: Sequence[Shard],
    settings: EvaluationSettings,
    *,
    full: dict[str, Any],
    proxies: Sequence[str] = (),
    guided_by: Sequence[str] = (),
    token_bytes: TokenBytes | None = None,
) -> MethodResult:
    """The result of a run from its shards.

    Args:
        run: the run.
        shards: one for each seed, with their rewards.
        settings: of the comparison: bootstrap and its seed.
        full: every decoding setting of the run.
        proxies: names of the rewards besides gold.
        guided_by: those of them that steered or selected.
        token_bytes: of the policy's tokenizer, for the traces of samples.
    """
    done = [completion for shard in shards for completion in shard.completions]
    gold = [shard.scores[GOLD].values for shard in shards]
    others = {name: [shard.scores[proxy_key(name)].values for shard in shards] for name in proxies}
    reference = [shard.reference_log_probs for shard in shards if shard.reference_log_probs is not None]
    tokens, seconds = sum(len(c.token_ids) for c in done), sum(shard.seconds for shard in shards)
    method = METHODS[run.method]
    return MethodResult(
        label=run.label, method=run.method, beta=full["beta"] if _has_beta(run, full) else None,
        n=int(full["n"]) if has_setting(run.method, "n") else None, curve=run.curve, strength=run.strength,
        settings=full, seeds=[shard.seed for shard in shards],
        metrics=measure(
            [shard.completions for shard in shards], gold, proxies=others, reference=reference or None,
            n=int(full["n"]) if (method.unit, method.rule) == ("completion", "best") else None,
            bounded=method.rule == "best", seed=settings.seed, resamples=settings.bootstrap,
        ),
        rewards=gold, proxy_rewards=others, guided_by=list(guided_by), tokens=tokens, seconds=seconds,
        tokens_per_second=tokens / seconds, policy_calls=sum(c.policy_calls for c in done),
        scorer_calls=sum(c.scorer_calls for c in done),
        samples=_samples(shards[0], decision_rule(run.method, full), token_bytes),
    )  # fmt: skip


def _has_beta(run: MethodRun, full: Mapping[str, Any]) -> bool:
    """Whether one beta steers all steps: not with a KL budget, which chooses one for each."""
    return has_setting(run.method, "beta") and full.get("kl_budget") is None


def budgets_of(results: Sequence[MethodResult]) -> tuple[list[Budget], str]:
    """What an output token of each run cost, and a sentence that says whether all runs cost the same."""
    budgets = [
        Budget(
            label=result.label, policy_calls_per_token=result.policy_calls / result.tokens,
            scorer_calls_per_token=result.scorer_calls / result.tokens,
            tokens_per_completion=result.metrics["length_tokens"].mean,
        )
        for result in results
        if result.tokens
    ]  # fmt: skip
    if not budgets:
        return [], ""
    policy, scorer = [b.policy_calls_per_token for b in budgets], [b.scorer_calls_per_token for b in budgets]
    ranges = f"policy calls per token {_range(policy)}, scorer calls per token {_range(scorer)}"
    equal = all(max(calls) - min(calls) <= _SAME_COST * max(calls) for calls in (policy, scorer))
    statement = f"Budgets are {'equal' if equal else 'not equal'}: {ranges}. Scoring a step's candidates is one call."
    return budgets, statement


def _divergences(
    done: Sequence[Completion], reference_nats: Sequence[float], n: int | None, *, same_policy: bool, bounded: bool
) -> dict[str, list[float]]:
    """KL of each completion in nats: to the policy, to the policy renormalised over the candidates, and its bound."""
    selection = [best_of_n_kl_estimate(n, c.guided_log_prob) if n else c.selection_nats for c in done]
    nats = {
        "kl_nats": [c.guided_log_prob - p + extra for c, p, extra in zip(done, reference_nats, selection, strict=True)]
    }
    if same_policy and all(c.candidates_log_prob is not None for c in done):
        nats["kl_cut_nats"] = [
            c.guided_log_prob - (c.candidates_log_prob or 0.0) + extra for c, extra in zip(done, selection, strict=True)
        ]
    if bounded:
        nats["kl_bound_nats"] = [
            c.guided_log_prob - p + (best_of_n_kl(n) if n else c.selection_nats)
            for c, p in zip(done, reference_nats, strict=True)
        ]
    return nats


def _samples(shard: Shard, rule: dict[str, Any], token_bytes: TokenBytes | None) -> list[dict[str, Any]]:
    found = []
    for completion, reward in list(zip(shard.completions, shard.scores[GOLD].values, strict=True))[:SAMPLES]:
        sample = completion.model_dump(exclude={"trace"}) | {"reward": reward}
        steps = sample_steps(completion, token_bytes) if token_bytes else None
        found.append(sample if steps is None else sample | {"rule": rule, "steps": steps})
    return found


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _flat(rows: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for row in rows for value in row]
