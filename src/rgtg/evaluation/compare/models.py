"""Loads the models of a comparison, each once, and rejects a held-out reward model that any run used."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from rgtg.config import EvaluationSettings
from rgtg.decoding.loading import lay_out_policy, load_for_method, set_threads
from rgtg.decoding.methods import METHODS, find_method
from rgtg.errors import UsageError
from rgtg.evaluation.compare.grid import MethodRun
from rgtg.evaluation.compare.rewards import NamedReward, RewardFunction, model_reward, require_held_out
from rgtg.models.loading.device_map import Placement
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.base import AnyScorer, load_scorer, trunk_of, weights_of
from rgtg.models.scorers.reward_model import PrefixScorer


class LoadedModels(TypedDict, total=False):
    """What a caller passes already loaded; the settings need not name it.

    ``reward`` is the held-out reward as a function of completions, one finite number each. Nothing can check that no
    method used it. A ``rgtg.evaluation.compare.rewards.NamedReward`` also gives it a name.
    """

    policy: Policy | None
    scorers: Mapping[str, AnyScorer] | None  # by the names that the runs use
    reward: RewardFunction | None
    proxies: Mapping[str, RewardFunction] | None  # by name, besides the reward models of the settings


class ScorerKey(NamedTuple):
    """How a scorer is loaded. Runs with equal keys share one scorer."""

    name: str
    policy: str | None  # the policy under a head or an adapter, where it is not the comparison's
    fused: bool  # a LoRA adapter that runs in one forward pass with its policy
    language_model: bool  # read by its log-probabilities, whatever it was trained for


@dataclass
class ComparisonModels:
    """All models of a comparison."""

    policy: Policy  # KL is measured to it, and runs without their own policy use it
    reward: NamedReward  # the held-out reward (gold)
    policies: dict[str, Policy] = field(default_factory=dict)  # the runs' own policies
    scorers: dict[ScorerKey, AnyScorer] = field(default_factory=dict)
    proxies: dict[str, NamedReward] = field(default_factory=dict)  # rewards besides gold
    names: dict[str, str] = field(default_factory=dict)  # name or path → short name
    gold_model: Any = None  # the module of the gold reward model; None for a function
    given: Mapping[str, AnyScorer] = field(default_factory=dict)  # scorers that the caller had loaded

    def policy_of(self, run: MethodRun) -> Policy:
        """The run's own policy, or the comparison's."""
        return self.policy if run.policy is None else self.policies[run.policy]

    def scorers_of(self, run: MethodRun) -> list[AnyScorer]:
        """The scorers that guide or select in a run."""
        return [self.scorers[key] for key in scorer_keys(run, self.given)]

    def guided_by(self, run: MethodRun) -> list[str]:
        """The run's scorers that are also proxies, by their names as proxies."""
        names = dict.fromkeys(self.names[key.name] for key in scorer_keys(run, self.given))
        return [name for name in names if name in self.proxies]

    def modules(self) -> dict[str, Any]:
        """Role → module, for provenance."""
        gold = {} if self.gold_model is None else {"reward": self.gold_model}
        others = {name: policy.model for name, policy in self.policies.items()}
        others |= {key.name: weights_of(scorer) for key, scorer in self.scorers.items()}
        return {"policy": self.policy.model} | gold | {self.names[name]: module for name, module in others.items()}


def load_comparison_models(
    settings: EvaluationSettings, runs: Sequence[MethodRun], **loaded: Unpack[LoadedModels]
) -> ComparisonModels:
    """Load each model once. Models that are already loaded are used as they are.

    Raises:
        UsageError: no reward, no policy, a run without its scorer, or a reward model that a run uses.
        ModelNotFoundError: a name without a model that can be loaded.
    """
    policy, reward, given = loaded.get("policy"), loaded.get("reward"), loaded.get("scorers") or {}
    for run in runs:
        if find_method(run.method).scorer and not run.scorers:
            raise UsageError(f"{run.label} needs a scorer: give one for all (scorer) or one per method")
    where: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device}
    fused = any(key.fused for run in runs for key in scorer_keys(run, given))
    set_threads(settings.threads)
    # 1. The policy, and the held-out reward model.
    if policy is None:
        name = _required(settings.policy, "policy", "causal language model")
        policy = lay_out_policy(load_policy(name, **where, engine=settings.engine), grouped=fused)
    gold = None
    if reward is None:
        gold = PrefixScorer.from_pretrained(_required(settings.reward, "reward", "held-out reward model"), **where)
        name = Path(settings.reward or gold.name).name
        named = NamedReward(name, model_reward(gold), fingerprint_weights(gold.model), gold.tokenizer)
    else:
        named = NamedReward.of(settings.reward or str(getattr(reward, "__name__", "gold")), reward)
    models = ComparisonModels(policy, named, gold_model=gold.model if gold else None, given=given)
    # 2. The runs' own policies and their scorers.
    for run in runs:
        if run.policy is not None and run.policy not in models.policies:
            own = load_policy(run.policy, **where, engine=settings.engine)
            models.policies[run.policy] = lay_out_policy(own, grouped=fused)
    for run in runs:
        for key in scorer_keys(run, given):
            if key not in models.scorers:
                models.scorers[key] = given[key.name] if key.name in given else load_for_method(
                    key.name, models.policy_of(run), run.method, Placement(**where), pack=True
                )  # fmt: skip
    models.names = short_names(list(dict.fromkeys([*models.policies, *(key.name for key in models.scorers)])))
    # 3. The proxies, and the check that nobody used the held-out reward model.
    models.proxies, proxy_models = _proxies(settings, models, loaded.get("proxies") or {}, where)
    if gold is not None:
        for key, scorer in models.scorers.items():
            require_held_out(gold, {key.name: scorer})
        names = dict.fromkeys(name for run in runs for name in run.trained_with)
        trained_with = {name: PrefixScorer.from_pretrained(name, **where) for name in names}
        require_held_out(gold, {}, proxy_models, trained_with)
    return models


def scorer_keys(run: MethodRun, given: Container[str] = ()) -> list[ScorerKey]:
    """The keys of a run's scorers; the files of scorers that are ``given`` are not read."""
    method = METHODS[run.method]
    keys = []
    for name in run.scorers if method.scorer else ():
        trunk = "separate" if name in given else trunk_of(name)
        fused = trunk == "shared" and method.scores_tokens
        own = None if trunk == "separate" else run.policy
        keys.append(ScorerKey(name, own, fused, method.scorer == "autoregressive"))
    return keys


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The shortest unique endings of paths: a result must not name the machine it was made on.

    >>> short_names(["runs/a/scorer", "runs/b/scorer", "judge"])
    {'runs/a/scorer': 'a/scorer', 'runs/b/scorer': 'b/scorer', 'judge': 'judge'}
    """
    parts = {name: Path(name).parts for name in names}
    short = {}
    for name, mine in parts.items():
        lengths = range(1, len(mine) + 1)
        short[name] = next(
            ("/".join(mine[-k:]) for k in lengths if sum(other[-k:] == mine[-k:] for other in parts.values()) == 1),
            name,
        )
    return short


def _proxies(
    settings: EvaluationSettings, models: ComparisonModels, given: Mapping[str, RewardFunction], where: dict[str, Any]
) -> tuple[dict[str, NamedReward], dict[str, Any]]:
    """All rewards besides gold (functions, named models, scorers of finished completions), and the named models."""
    rewards = {name: NamedReward.of(name, function) for name, function in given.items()}
    named = {name: load_scorer(source, policy=models.policy, **where) for name, source in settings.proxies.items()}
    own: dict[str, Any] = {}
    for key, scorer in models.scorers.items():
        if not hasattr(scorer, "score") and key.name not in models.given and trunk_of(key.name) == "shared":
            # a fused adapter scores candidates only; loaded separately, it is a reward model
            scorer = load_scorer(key.name, **where)
        if hasattr(scorer, "score"):
            own[models.names[key.name]] = scorer
    for name, model in (named | own).items():
        if name in rewards or (name in named and name in own):
            raise UsageError(f"two rewards are called {name!r}: give the proxy another name")
        fingerprint = fingerprint_weights(weights_of(model))
        rewards[name] = NamedReward(name, model_reward(model), fingerprint, model.tokenizer)
    return rewards, named


def _required(given: str | None, setting: str, what: str) -> str:
    if given is None:
        raise UsageError(f"{setting} is required: a folder or hub id of a {what}")
    return given
