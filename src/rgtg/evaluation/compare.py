"""Run several methods on the same prompts and score them with a reward that none of them used."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rgtg.config import CompareRun, CompareSettings, DecodingSettings, validate
from rgtg.data import read_prompts
from rgtg.decoding.guided import GuidedPolicy
from rgtg.decoding.join import AnyScorer
from rgtg.decoding.methods import check_settings, find_method
from rgtg.errors import UsageError
from rgtg.evaluation.metrics import best_of_n_kl, bootstrap_interval, distinct_n
from rgtg.evaluation.provenance import provenance
from rgtg.models.checkpoint import fingerprint_weights
from rgtg.models.packed import pack_linears
from rgtg.models.policy import Policy, load_policy
from rgtg.models.prefix_scorer import PrefixScorer
from rgtg.models.scorer import load_scorer, weights_of
from rgtg.types import ComparisonResult, Completion, Interval, MethodResult

# How many completions of each method are kept in the results for reading side by side.
SAMPLES = 5

Progress = Callable[[str, int, int], None]


def compare(settings: CompareSettings, progress: Progress | None = None) -> ComparisonResult:
    """Complete every prompt with every method and measure all of them alike.

    Raises:
        UsageError: a reward model that guides or selects in one of the methods, or unusable settings.
        DataError: bad prompts.
    """
    runs = expand_runs(settings.methods)
    policy = load_policy(_policy_of(settings), dtype=settings.dtype, device=settings.device)
    judge = PrefixScorer.from_pretrained(settings.reward, dtype=settings.dtype, device=settings.device)
    policy.model = pack_linears(policy.model)
    scorers = _load_scorers(runs, settings, policy)
    _require_held_out(judge, scorers)
    prompts = read_prompts(settings.prompts)[: settings.limit]
    results = []
    for index, run in enumerate(runs):
        if progress:
            progress(run.label or run.method, index, len(runs))
        scorer = scorers[_scorer_key(run, settings)] if find_method(run.method).scorer else None
        results.append(run_method(policy, scorer, run, prompts, settings, _reward_of(judge)))
    models = {"policy": policy.model, "reward": judge.model} | {name: weights_of(s) for (name, _), s in scorers.items()}
    return ComparisonResult(
        reward=Path(settings.reward).name,
        prompts=len(prompts),
        methods=results,
        provenance=provenance(command="rgtg compare", settings=settings.model_dump(mode="json"), seed=settings.seed,
                              models=models, data={}),
    )  # fmt: skip


def expand_runs(runs: Sequence[CompareRun]) -> list[CompareRun]:
    """One run per beta, each with a label.

    Raises:
        UsageError: an unknown method, or a setting that the method would have to ignore.
    """
    expanded = []
    for run in runs:
        betas = run.beta if isinstance(run.beta, list) else [run.beta]
        if not betas:
            raise UsageError(f"beta of {run.label or run.method} is an empty list; give at least one number")
        for beta in betas:
            label = run.label or run.method
            named = label if beta is None else f"{label} β={beta:g}"  # 0 is a beta too: the unguided policy
            one = run.model_copy(update={"beta": beta, "label": named})
            given = one.model_dump(include={"beta", "n", "top_k", "temperature"}, exclude_none=True)
            check_settings(find_method(run.method), validate(DecodingSettings, given))
            expanded.append(one)
    return expanded


def run_method(
    policy: Policy,
    scorer: AnyScorer | None,
    run: CompareRun,
    prompts: Sequence[str],
    settings: CompareSettings,
    reward: Callable[[Sequence[Completion]], list[float]],
) -> MethodResult:
    """Complete the prompts with one method and measure the completions."""
    beta = run.beta if isinstance(run.beta, int | float) else None
    guided = GuidedPolicy(
        policy,
        scorer,
        method=run.method,
        beta=beta,
        n=run.n,
        top_k=settings.top_k if run.top_k is None else run.top_k,
    )
    start = time.perf_counter()
    temperature = run.temperature if run.temperature is not None else settings.temperature
    sampled: dict[str, Any] = {} if guided.method.rule == "greedy" else {"temperature": temperature}
    done = guided.generate(
        list(prompts),
        seed=settings.seed,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        **sampled,
    )
    seconds = time.perf_counter() - start
    rewards = reward(done)
    n = (run.n or 10) if guided.method.rule == "best" else None
    return MethodResult(
        label=run.label or run.method,
        method=run.method,
        beta=beta if guided.method.scorer and guided.method.unit == "token" else None,
        n=n,
        metrics=measure(done, rewards, n=n, seed=settings.seed, resamples=settings.bootstrap),
        seconds=seconds,
        tokens_per_second=sum(len(c.token_ids) for c in done) / seconds,
        policy_calls=sum(c.policy_calls for c in done),
        scorer_calls=sum(c.scorer_calls for c in done),
        samples=[
            c.model_dump(exclude={"trace"}) | {"reward": r} for c, r in list(zip(done, rewards, strict=True))[:SAMPLES]
        ],
    )


def measure(
    done: Sequence[Completion], rewards: Sequence[float], *, n: int | None, seed: int, resamples: int = 1000
) -> dict[str, Interval]:
    """Reward, KL to the policy in nats (Monte Carlo), perplexity under the policy, distinct bigrams, length in tokens.

    For best-of-n the KL is that of its samples plus ln n − (n−1)/n, an upper bound. Intervals resample prompts.
    """

    def interval(values: Sequence[float]) -> Interval:
        return bootstrap_interval(list(values), seed=seed, resamples=resamples)

    extra = best_of_n_kl(n) if n else 0.0
    per_token = interval([-c.policy_log_prob / len(c.token_ids) for c in done])
    return {
        "reward": interval(rewards),
        "kl_nats": interval([c.guided_log_prob - c.policy_log_prob + extra for c in done]),
        "perplexity": Interval(
            mean=math.exp(per_token.mean), low=math.exp(per_token.low), high=math.exp(per_token.high), n=per_token.n
        ),
        "distinct_2": interval([distinct_n([c.token_ids], 2) for c in done]),
        "length_tokens": interval([float(len(c.token_ids)) for c in done]),
    }


def _reward_of(judge: PrefixScorer) -> Callable[[Sequence[Completion]], list[float]]:
    def reward(done: Sequence[Completion]) -> list[float]:
        finished = [completion.finish_reason == "stop" for completion in done]
        return judge.score([c.prompt for c in done], [c.text for c in done], finished=finished)

    return reward


def _policy_of(settings: CompareSettings) -> str:
    if settings.policy is None:
        raise UsageError("policy is required: a folder or hub id of a causal language model")
    return settings.policy


def _scorer_key(run: CompareRun, settings: CompareSettings) -> tuple[str, bool]:
    """Name of a run's scorer, and whether it is read token by token (an adapter then joins the policy's pass)."""
    name = run.scorer or settings.scorer
    if name is None:
        raise UsageError("a compared method needs a scorer: give one for all (scorer) or one per method")
    return name, find_method(run.method).unit == "token"


def _load_scorers(
    runs: Sequence[CompareRun], settings: CompareSettings, policy: Policy
) -> dict[tuple[str, bool], AnyScorer]:
    keys = dict.fromkeys(_scorer_key(run, settings) for run in runs if find_method(run.method).scorer)
    scorers: dict[tuple[str, bool], AnyScorer] = {}
    for name, join in keys:
        scorer = load_scorer(name, policy=policy, dtype=settings.dtype, device=settings.device, join=join)
        if isinstance(scorer, PrefixScorer):
            scorer.model = pack_linears(scorer.model)
        scorers[name, join] = scorer
    return scorers


def _require_held_out(judge: PrefixScorer, scorers: dict[tuple[str, bool], AnyScorer]) -> None:
    """Refuse a judge that guides or selects: a method would be measured by what it maximised."""
    verdict = fingerprint_weights(judge.model)
    for (name, _), scorer in scorers.items():
        if fingerprint_weights(weights_of(scorer)) == verdict:
            raise UsageError(
                f"the reward {judge.name} is also the scorer {name}: a method would be measured by what it maximises. "
                "Train a reward model on other pairs (rgtg train --objective full-bt) and give that"
            )
