"""``compare``: runs several methods on the same prompts and measures them with a reward that none of them used."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from rgtg.config import CompareSettings, EvaluationSettings
from rgtg.data.prompts import read_prompts
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.request import Prompt, any_chat
from rgtg.errors import UsageError
from rgtg.evaluation.compare.controls import find_baseline, greedy_control
from rgtg.evaluation.compare.generate import full_settings, make_guided_policy, run_shard
from rgtg.evaluation.compare.grid import MethodRun, expand_runs, is_random, with_shared_settings
from rgtg.evaluation.compare.measure import budgets_of, run_result
from rgtg.evaluation.compare.models import ComparisonModels, LoadedModels, load_comparison_models
from rgtg.evaluation.compare.rewards import GOLD, NamedReward, RewardFunction, keyed_rewards, proxy_key, score_shard
from rgtg.evaluation.compare.shards import Shard, ShardFolder, fingerprint_prompts
from rgtg.evaluation.compare.significance import Resampling, differences, over_optimised, recommend
from rgtg.evaluation.compare.traces import trace_shard
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.base import AnyScorer, weights_of
from rgtg.tokenization.conversation import check_template_kwargs, require_chat_template, template_fingerprint
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.base import Provenance
from rgtg.types.comparison import ComparedCompletion, ComparisonResult, MethodResult
from rgtg.utils.files import atomic_write

Progress = Callable[[str, int, int], None]


def compare(
    settings: CompareSettings,
    progress: Progress | None = None,
    *,
    prompts: Sequence[Prompt] | None = None,
    **loaded: Unpack[LoadedModels],
) -> ComparisonResult:
    """Complete every prompt with every run and seed, and measure all completions alike.

    Finished shards are kept in ``settings.output/parts``. A comparison that was stopped continues from there and gives
    the same result as one that was not, except for times. completions.jsonl is written beside them.

    Args:
        settings: of the comparison.
        progress: called with a run's label and seed, the number of finished shards, and the number of all shards.
        prompts: texts or lists of chat messages, in place of the file that the settings name. Each model reads a chat
            by its own chat template.
        **loaded: models that are already loaded (``LoadedModels``); the settings need not name them.

    Raises:
        UsageError: a reward model that a method used, unusable settings, or shards of another comparison.
        DataError: bad prompts.
        NonFiniteError: a reward that is NaN or infinite.
    """
    runs = expand_runs(settings.methods, settings)
    baseline = settings.baseline
    if baseline is not None and baseline not in {run.label for run in runs}:
        raise UsageError(f"baseline {baseline!r} is no row; rows: {', '.join(run.label for run in runs)}")
    runner = ComparisonRunner.load(settings, runs, progress, prompts=prompts, **loaded)
    runner.check(runs)
    results = [runner.run(run) for run in runs]
    runner.write_completions(runs)
    return assemble(
        results, reward=runner.models.reward.name, prompts=len(runner.prompts), made=runner.provenance("rgtg compare"),
        baseline=baseline, how=Resampling(settings.seed, settings.bootstrap, settings.permutations),
    )  # fmt: skip


@dataclass
class ComparisonRunner:
    """Runs methods on the same prompts with models that are loaded once; finished shards are read from disk."""

    models: ComparisonModels
    prompts: Sequence[Prompt]
    settings: EvaluationSettings
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self._done = self._total = 0
        self.shards = ShardFolder(self.settings.output / "parts", force=self.settings.force)
        self._rewards = keyed_rewards(self.models.reward, self.models.proxies)
        self._prepared: dict[str, tuple[GuidedPolicy, dict[str, Any]]] = {}

    @classmethod
    def load(
        cls,
        settings: EvaluationSettings,
        runs: Sequence[MethodRun],
        progress: Progress | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **loaded: Unpack[LoadedModels],
    ) -> "ComparisonRunner":
        """Read the prompts and load the models; the arguments are those of ``compare``."""
        given = (read_prompts(settings.prompts) if prompts is None else list(prompts))[: settings.limit]
        return cls(load_comparison_models(settings, runs, **loaded), given, settings, progress)

    def check(self, runs: Sequence[MethodRun]) -> None:
        """Reject runs that cannot be made, and shards of another comparison, before any work."""
        self._check_rewards()
        for run in runs:
            _, made_with = self._prepare(run)
            for seed in seeds_of(run, self.settings):
                self.shards.find(run.label, seed, made_with)
                self._total += 1

    def _check_rewards(self) -> None:
        """Refuse reward models that cannot read the prompts."""
        for reward in self._rewards.values():
            if reward.tokenizer is not None and any_chat(self.prompts):
                require_chat_template(reward.tokenizer, f"the reward {reward.name}")

    def run(self, run: MethodRun) -> MethodResult:
        """The result of a run over all its seeds."""
        shards = []
        for seed in seeds_of(run, self.settings):
            if self.progress:
                self.progress(f"{run.label}, seed {seed}", self._done, self._total)
            shards.append(self._shard(run, seed))
            self._done += 1
        guided, _ = self._prepare(run)
        return run_result(
            run, shards, self.settings, full=full_settings(guided, run, self.models.names),
            proxies=list(self.models.proxies), guided_by=self.models.guided_by(run),
            token_bytes=TokenBytes(guided.policy.tokenizer),
        )  # fmt: skip

    def write_completions(self, runs: Iterable[MethodRun]) -> None:
        """Write completions.jsonl: every completion of every run and seed, with its rewards."""
        path = self.settings.output / "completions.jsonl"
        with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
            for run in runs:
                for seed in seeds_of(run, self.settings):
                    shard = self.shards.find(run.label, seed, self._prepare(run)[1])
                    assert shard is not None, "run() has made and scored it"
                    file.writelines(line.model_dump_json() + "\n" for line in self._lines(shard))

    def provenance(self, command: str) -> Provenance:
        """Settings, seed, and fingerprints of the models and prompts."""
        return provenance(
            command=command, settings=self.settings.model_dump(mode="json", exclude={"force"}), seed=self.settings.seed,
            models=self.models.modules(), data={"prompts": fingerprint_prompts(self.prompts)},
        )  # fmt: skip

    def _prepare(self, run: MethodRun) -> tuple[GuidedPolicy, dict[str, Any]]:
        """The run's guided policy, and everything that its completions depend on, except the seed; made once."""
        if run.label not in self._prepared:
            scorers = self.models.scorers_of(run)
            guided = make_guided_policy(self.models.policy_of(run), scorers, run)
            reference = {} if run.policy is None else {"reference": fingerprint_weights(self.models.policy.model)}
            made_with = full_settings(guided, run) | reference | {
                "policy": fingerprint_weights(guided.policy.model),
                "scorers": [fingerprint_weights(weights_of(scorer)) for scorer in scorers],
                "prompts": fingerprint_prompts(self.prompts),
                "batch_size": self.settings.batch_size,
            }  # fmt: skip
            if any_chat(self.prompts):
                tokenizer = guided.policy.tokenizer
                require_chat_template(tokenizer, f"the policy of {run.label}")
                check_template_kwargs(tokenizer, run.given.get("chat_template_kwargs"))
                readers = [guided.policy, *guided.used, *([self.models.policy] if run.policy is not None else [])]
                made_with["chat_templates"] = [template_fingerprint(getattr(one, "tokenizer", None)) for one in readers]
            self._prepared[run.label] = guided, made_with
        return self._prepared[run.label]

    def _shard(self, run: MethodRun, seed: int) -> Shard:
        """The completions of one run and seed with their rewards, from disk if they are finished."""
        guided, made_with = self._prepare(run)
        shard = self.shards.find(run.label, seed, made_with)
        # 1. Generate. The shard is saved before any reward is computed: a reward that fails must not lose completions.
        if shard is None:
            shard = run_shard(
                guided, run, self.prompts, seed=seed, batch_size=self.settings.batch_size, made_with=made_with,
                reference=None if run.policy is None else self.models.policy,
            )  # fmt: skip
            self.shards.save(shard)
        # 2. Compute the rewards that it lacks. 3. Trace the first completions of the first seed.
        changed = score_shard(shard, self._rewards)
        if seed == self.settings.run_seeds[0]:
            changed |= trace_shard(shard, guided, run, self.prompts, _traces(self.settings))
        if changed:
            self.shards.save(shard)
        return shard

    def _lines(self, shard: Shard) -> Iterator[ComparedCompletion]:
        for i, completion in enumerate(shard.completions):
            yield ComparedCompletion(
                **completion.model_dump(exclude={"trace"}), row=shard.label, run_seed=shard.seed, prompt_index=i,
                reward=shard.scores[GOLD].values[i],
                proxy_rewards={name: shard.scores[proxy_key(name)].values[i] for name in self.models.proxies},
            )  # fmt: skip


def run_method(
    policy: Policy,
    scorer: AnyScorer | Sequence[AnyScorer] | None,
    run: MethodRun,
    prompts: Sequence[Prompt],
    settings: EvaluationSettings,
    reward: RewardFunction,
    *,
    proxies: Mapping[str, RewardFunction] | None = None,
    reference: Policy | None = None,
) -> MethodResult:
    """One run over the settings' seeds, with models that are already loaded; nothing is written.

    Args:
        policy: the policy that is steered.
        scorer: what guides or selects; several as a list, in the order of the run's betas.
        run: from ``expand_runs``; settings that it does not give are those of ``settings``.
        prompts: texts, or lists of chat messages.
        settings: seeds, batch size, bootstrap, and decoding.
        reward: the held-out reward as a function of completions, one finite number each; a completion's ``source`` is
            its prompt, text or messages. Only ``compare`` checks that
            it is held out.
        proxies: further rewards by name.
        reference: the policy that KL is measured to, where it is not ``policy``.

    Example, with a Python function as the held-out reward:
        >>> runs = expand_runs([CompareRun(method="pargs", beta=[1, 2])])  # doctest: +SKIP
        >>> shared = CompareSettings(prompts="-", output="-", methods=[...], seeds=[0, 1])  # doctest: +SKIP
        >>> run_method(policy, scorer, runs[0], prompts, shared, lambda done: [len(c.text) for c in done])
        ... # doctest: +SKIP
    """
    run = with_shared_settings(run, settings)
    scorers = list(scorer) if isinstance(scorer, Sequence) else [] if scorer is None else [scorer]
    guided = make_guided_policy(policy, scorers, run)
    named = {name: NamedReward.of(name, function) for name, function in (proxies or {}).items()}
    rewards = keyed_rewards(NamedReward.of("gold", reward), named)
    shards = []
    for seed in seeds_of(run, settings):
        shard = run_shard(guided, run, prompts, seed=seed, batch_size=settings.batch_size, reference=reference)
        score_shard(shard, rewards)
        shards.append(shard)
    trace_shard(shards[0], guided, run, prompts, _traces(settings))
    return run_result(
        run, shards, settings, full=full_settings(guided, run), proxies=list(named),
        token_bytes=TokenBytes(policy.tokenizer),
    )  # fmt: skip


def seeds_of(run: MethodRun, settings: EvaluationSettings) -> list[int]:
    """The seeds of a run; only the first, if other seeds would give the same completions."""
    return settings.run_seeds if is_random(run) else settings.run_seeds[:1]


def _traces(settings: EvaluationSettings) -> int:
    """How many prompts get a token-by-token trace; none in a sweep."""
    return settings.traces if isinstance(settings, CompareSettings) else 0


def assemble(
    results: Sequence[MethodResult],
    *,
    reward: str,
    prompts: int,
    made: Provenance,
    baseline: str | None = None,
    how: Resampling | None = None,
) -> ComparisonResult:
    """Combine the results of all runs: paired differences and tests, over-optimisation, recommended strengths, budgets.

    Args:
        results: from ``run_method``, over the same prompts.
        reward: name of the held-out reward.
        prompts: how many there are.
        made: provenance of the whole comparison.
        baseline: label of the run to compare with; None takes the unguided policy, for greedy runs the greedy one.
        how: seeds and counts of the intervals and tests.
    """
    against = find_baseline(results, baseline)
    greedy = greedy_control(results) if baseline is None else None
    budgets, statement = budgets_of(results)
    return ComparisonResult(
        reward=reward, prompts=prompts, methods=list(results), baseline=against,
        proxies=list(dict.fromkeys(name for result in results for name in result.proxy_rewards)),
        differences=[] if against is None else differences(results, against, how, greedy_baseline=greedy),
        over_optimised=over_optimised(results, how), recommended=recommend(results), budgets=budgets,
        budget_statement=statement, provenance=made,
    )  # fmt: skip
