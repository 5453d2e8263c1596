"""Run several methods on the same prompts and measure them with a reward that none of them used."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rgtg.config import CompareSettings, EvaluationSettings
from rgtg.data.prompts import read_prompts
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.errors import UsageError
from rgtg.evaluation.compare.generate import (
    NamedReward,
    RewardFunction,
    full_settings,
    make_guided_policy,
    run_shard,
    score_shard,
)
from rgtg.evaluation.compare.grid import MethodRun as MethodRun
from rgtg.evaluation.compare.grid import expand_runs as expand_runs
from rgtg.evaluation.compare.grid import is_random, with_shared_settings
from rgtg.evaluation.compare.measure import GOLD, budgets_of, proxy_key, run_result
from rgtg.evaluation.compare.models import ComparisonModels, load_comparison_models
from rgtg.evaluation.compare.shards import Shard, ShardFolder, fingerprint_texts
from rgtg.evaluation.compare.significance import Resampling, differences, find_baseline, over_optimised, recommend
from rgtg.evaluation.compare.traces import trace_shard
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.base import AnyScorer, weights_of
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.base import Provenance
from rgtg.types.comparison import ComparedCompletion, ComparisonResult, MethodResult
from rgtg.utils.files import atomic_write

Progress = Callable[[str, int, int], None]


def compare(
    settings: CompareSettings,
    progress: Progress | None = None,
    *,
    policy: Policy | None = None,
    scorers: Mapping[str, AnyScorer] | None = None,
    reward: RewardFunction | None = None,
    proxies: Mapping[str, RewardFunction] | None = None,
    prompts: Sequence[str] | None = None,
) -> ComparisonResult:
    """Complete every prompt with every row and seed, and measure all of them alike.

    Finished parts are kept in ``settings.output/parts``: a comparison that was stopped goes on from there, and gives
    the same result as one that was not (but for the time it took). completions.jsonl is written beside them.

    Args:
        settings: of the comparison; what is given loaded below need not be named there.
        progress: called with a row's label and seed, the number of parts done, and of all.
        policy: loaded already.
        scorers: name, as in the rows → loaded scorer.
        reward: gold as a rule: takes completions, gives one finite number each. Nothing can check that no method used
            it. A ``rgtg.evaluation.compare.generate.NamedReward`` also names it.
        proxies: name → rule, beside the reward models that the settings name.
        prompts: in place of the file that the settings name.

    Raises:
        UsageError: a reward model that a method used, unusable settings, or parts of another comparison.
        DataError: bad prompts.
        NonFiniteError: a reward that is no number.
    """
    rows = expand_runs(settings.methods, settings)
    baseline = settings.baseline
    if baseline is not None and baseline not in {row.label for row in rows}:
        raise UsageError(f"baseline {baseline!r} is no row; rows: {', '.join(row.label for row in rows)}")
    texts = (read_prompts(settings.prompts) if prompts is None else list(prompts))[: settings.limit]
    models = load_comparison_models(settings, rows, policy=policy, scorers=scorers, reward=reward, proxies=proxies)
    bench = ComparisonRunner(models, texts, settings, progress)
    bench.check(rows)
    results = [bench.run(row) for row in rows]
    bench.write_completions(rows)
    made = provenance(
        command="rgtg compare", settings=settings.model_dump(mode="json", exclude={"force"}), seed=settings.seed,
        models=models.modules(), data={"prompts": fingerprint_texts(texts)},
    )  # fmt: skip
    return assemble(
        results, reward=models.reward.name, prompts=len(texts), made=made, baseline=baseline,
        how=Resampling(settings.seed, settings.bootstrap, settings.permutations),
    )  # fmt: skip


@dataclass
class ComparisonRunner:
    """Models, prompts and finished parts; runs rows one by one."""

    models: ComparisonModels
    prompts: Sequence[str]
    settings: EvaluationSettings
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self._done = self._total = 0
        self.parts = ShardFolder(self.settings.output / "parts", force=self.settings.force)
        self._rewards = _keyed(self.models.reward, self.models.proxies)
        self._joined: dict[str, tuple[GuidedPolicy, dict[str, Any]]] = {}

    def check(self, rows: Sequence[MethodRun]) -> None:
        """Refuse rows that cannot be run, and parts of another comparison, before any work."""
        for row in rows:
            _, made_with = self._join(row)
            for seed in seeds_of(row, self.settings):
                self.parts.find(row.label, seed, made_with)
                self._total += 1

    def run(self, row: MethodRun) -> MethodResult:
        """The row over all its seeds; parts that are finished are read."""
        parts = []
        for seed in seeds_of(row, self.settings):
            if self.progress:
                self.progress(f"{row.label}, seed {seed}", self._done, self._total)
            parts.append(self._part(row, seed))
            self._done += 1
        return run_result(
            row, parts, self.settings, full=full_settings(self._join(row)[0], row, self.models.names),
            proxies=list(self.models.proxies), guided_by=self.models.guided_by(row),
            texts=TokenBytes(self._join(row)[0].policy.tokenizer),
        )  # fmt: skip

    def write_completions(self, rows: Iterable[MethodRun]) -> None:
        """completions.jsonl: every completion of every row and seed, with its rewards."""
        path = self.settings.output / "completions.jsonl"
        with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
            for row in rows:
                for seed in seeds_of(row, self.settings):
                    part = self.parts.find(row.label, seed, self._join(row)[1])
                    assert part is not None, "run() has made and scored it"
                    file.writelines(line.model_dump_json() + "\n" for line in self._lines(part))

    def _join(self, row: MethodRun) -> tuple[GuidedPolicy, dict[str, Any]]:
        """The row's policy with its scorers, and all that its completions depend on but for the seed; made once."""
        if row.label not in self._joined:
            guided = make_guided_policy(self.models.policy_of(row), self.models.scorers_of(row), row)
            self._joined[row.label] = guided, self._made_with(guided, row)
        return self._joined[row.label]

    def _part(self, row: MethodRun, seed: int) -> Shard:
        """One row and seed, scored: read where it is finished, else made and written."""
        guided, made_with = self._join(row)
        kept = self.parts.find(row.label, seed, made_with)
        part = kept or run_shard(
            guided, row, self.prompts, seed=seed, batch_size=self.settings.batch_size, made_with=made_with,
            reference=None if row.policy is None else self.models.policy,
        )  # fmt: skip
        if kept is None:
            self.parts.save(part)  # before any reward is asked: one that fails must not cost the completions
        changed = score_shard(part, self._rewards)
        if seed == self.settings.run_seeds[0]:
            changed |= trace_shard(part, guided, row, self.prompts, _traces(self.settings))
        if changed:
            self.parts.save(part)
        return part

    def _lines(self, part: Shard) -> Iterator[ComparedCompletion]:
        proxies = self.models.proxies
        for i, completion in enumerate(part.completions):
            yield ComparedCompletion(
                **completion.model_dump(exclude={"trace"}), row=part.label, run_seed=part.seed, prompt_index=i,
                reward=part.scores[GOLD].values[i],
                proxy_rewards={name: part.scores[proxy_key(name)].values[i] for name in proxies},
            )  # fmt: skip

    def _made_with(self, guided: GuidedPolicy, row: MethodRun) -> dict[str, Any]:
        """All that a part's completions depend on, but for the seed."""
        own = {} if row.policy is None else {"reference": fingerprint_weights(self.models.policy.model)}
        return full_settings(guided, row) | own | {
            "policy": fingerprint_weights(guided.policy.model),
            "scorers": [fingerprint_weights(weights_of(scorer)) for scorer in self.models.scorers_of(row)],
            "prompts": fingerprint_texts(self.prompts),
            "batch_size": self.settings.batch_size,
        }  # fmt: skip


def run_method(
    policy: Policy,
    scorer: AnyScorer | Sequence[AnyScorer] | None,
    row: MethodRun,
    prompts: Sequence[str],
    settings: EvaluationSettings,
    reward: RewardFunction,
    *,
    proxies: Mapping[str, RewardFunction] | None = None,
    reference: Policy | None = None,
) -> MethodResult:
    """One row over the settings' seeds, with everything loaded already; nothing is written.

    Args:
        policy: that is steered.
        scorer: what steers or selects; several as a list, in the order of the row's betas.
        row: from ``expand_runs``; settings it does not give are those of ``settings``.
        prompts: texts.
        settings: seeds, batch size, bootstrap, and decoding.
        reward: gold: takes completions, gives one finite number each. It must be held out; only ``compare`` checks.
        proxies: name → further rewards.
        reference: the policy that KL is measured to, where it is not ``policy``.

    Example, with a rule as gold:
        >>> rows = expand_runs([CompareRun(method="pargs", beta=[1, 2])])  # doctest: +SKIP
        >>> shared = CompareSettings(prompts="-", output="-", methods=[...], seeds=[0, 1])  # doctest: +SKIP
        >>> run_method(policy, scorer, rows[0], prompts, shared, lambda done: [len(c.text) for c in done])
        ... # doctest: +SKIP
    """
    row = with_shared_settings(row, settings)
    scorers = list(scorer) if isinstance(scorer, Sequence) else [] if scorer is None else [scorer]
    guided = make_guided_policy(policy, scorers, row)
    named = {name: NamedReward.of(name, one) for name, one in (proxies or {}).items()}
    gold = NamedReward.of("gold", reward)
    parts = []
    for seed in seeds_of(row, settings):
        part = run_shard(guided, row, prompts, seed=seed, batch_size=settings.batch_size, reference=reference)
        score_shard(part, _keyed(gold, named))
        parts.append(part)
    trace_shard(parts[0], guided, row, prompts, _traces(settings))
    texts = TokenBytes(policy.tokenizer)
    return run_result(row, parts, settings, full=full_settings(guided, row), proxies=list(named), texts=texts)


def seeds_of(row: MethodRun, settings: EvaluationSettings) -> list[int]:
    """The seeds of a row; one, where another would give the same completions."""
    return settings.run_seeds if is_random(row) else settings.run_seeds[:1]


def _traces(settings: EvaluationSettings) -> int:
    """How many prompts are shown token by token; a sweep shows none."""
    return settings.traces if isinstance(settings, CompareSettings) else 0


def _keyed(reward: NamedReward, proxies: Mapping[str, NamedReward]) -> dict[str, NamedReward]:
    return {GOLD: reward} | {proxy_key(name): proxy for name, proxy in proxies.items()}


def assemble(
    results: Sequence[MethodResult],
    *,
    reward: str,
    prompts: int,
    made: Provenance,
    baseline: str | None = None,
    how: Resampling | None = None,
) -> ComparisonResult:
    """Rows to one result: differences and their tests, over-optimisation, recommended strengths, budgets.

    Args:
        results: of ``run_method``, over the same prompts.
        reward: name of gold.
        prompts: how many.
        made: provenance of the whole.
        baseline: label of the row to compare with; None takes the unguided policy.
        how: of the intervals and tests.
    """
    against = find_baseline(results, baseline)
    budgets, statement = budgets_of(results)
    return ComparisonResult(
        reward=reward,
        prompts=prompts,
        methods=list(results),
        baseline=against,
        proxies=list(dict.fromkeys(name for row in results for name in row.proxy_rewards)),
        differences=differences(results, against, how) if against is not None else [],
        over_optimised=over_optimised(results, how),
        recommended=recommend(results),
        budgets=budgets,
        budget_statement=statement,
        provenance=made,
    )
