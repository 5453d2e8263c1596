"""The models of a comparison, each loaded once, and the refusal of a reward that any row used."""

import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rgtg.config import EvaluationSettings
from rgtg.decoding.loading import laid_out, load_for_method
from rgtg.decoding.methods import METHODS, find_method
from rgtg.errors import UsageError
from rgtg.evaluation.compare.generate import NamedReward, RewardFunction
from rgtg.evaluation.compare.grid import MethodRun
from rgtg.models.loading.device_map import Placement
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import cast_fingerprints, fingerprint_weights
from rgtg.models.scorers.base import AnyScorer, load_scorer, trunk_of, weights_of
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.types.generation import Completion


class ScorerKey(NamedTuple):
    """A scorer as it is loaded; where the rest does not matter to it, two rows of one name share it."""

    name: str
    policy: str | None  # that a head or an adapter steers, where it is not the comparison's
    joined: bool  # an adapter that is read in one pass with its policy
    language_model: bool  # read by its log-probabilities, whatever it was trained for


@dataclass
class ComparisonModels:
    """Everything a comparison runs with.

    ``proxies`` are the rewards beside gold; ``names`` are short ones of models; ``given`` are scorers that came loaded.
    """

    policy: Policy
    reward: NamedReward
    policies: dict[str, Policy] = field(default_factory=dict)
    scorers: dict[ScorerKey, AnyScorer] = field(default_factory=dict)
    proxies: dict[str, NamedReward] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gold_model: Any = None
    given: Mapping[str, AnyScorer] = field(default_factory=dict)

    def policy_of(self, row: MethodRun) -> Policy:
        """The row's own policy, or the one that all are measured against."""
        return self.policy if row.policy is None else self.policies[row.policy]

    def scorers_of(self, row: MethodRun) -> list[AnyScorer]:
        """What steers or selects in a row."""
        return [self.scorers[key] for key in keys_of(row, self.given)]

    def guided_by(self, row: MethodRun) -> list[str]:
        """The row's scorers by their names as proxies, those that can score finished completions."""
        named = dict.fromkeys(self.names[key.name] for key in keys_of(row, self.given))
        return [name for name in named if name in self.proxies]

    def modules(self) -> dict[str, Any]:
        """Role → module, for provenance."""
        gold = {} if self.gold_model is None else {"reward": self.gold_model}
        others = {name: policy.model for name, policy in self.policies.items()}
        others |= {name: weights_of(scorer) for (name, *_), scorer in self.scorers.items()}
        return {"policy": self.policy.model} | gold | {self.names[name]: module for name, module in others.items()}


def load_comparison_models(
    settings: EvaluationSettings,
    rows: Sequence[MethodRun],
    *,
    policy: Policy | None = None,
    scorers: Mapping[str, AnyScorer] | None = None,
    reward: RewardFunction | None = None,
    proxies: Mapping[str, RewardFunction] | None = None,
) -> ComparisonModels:
    """Load each model once; what is given loaded is taken as it is. Arguments: those of ``compare``.

    Raises:
        UsageError: no reward, no policy, a row without its scorer, or a reward model that a row uses.
        ModelNotFoundError: nothing loadable under a name.
    """
    given = scorers or {}
    _require_scorers(rows, given)
    where = {"dtype": settings.dtype, "device": settings.device}
    adapters = any(key.joined for row in rows for key in keys_of(row, given))
    if policy is None:
        name = _name_of(settings.policy, "policy", "causal language model")
        policy = laid_out(load_policy(name, **where), grouped=adapters)
    judge = None
    if reward is None:
        judge = PrefixScorer.from_pretrained(_name_of(settings.reward, "reward", "held-out reward model"), **where)
    found = ComparisonModels(
        policy, _gold(settings, judge, reward), gold_model=judge.model if judge else None, given=given
    )
    found.policies = {name: laid_out(load_policy(name, **where), grouped=adapters) for name in _own_policies(rows)}
    for row in rows:
        for key in keys_of(row, given):
            if key not in found.scorers:
                found.scorers[key] = _load_scorer(key, row, found, where)
    found.names = short_names(list(dict.fromkeys([*found.policies, *(key.name for key in found.scorers)])))
    found.proxies, models = _proxies(settings, found, proxies or {}, where)
    if judge is not None:
        names = dict.fromkeys(name for row in rows for name in row.trained_with)
        taught = {name: PrefixScorer.from_pretrained(name, **where) for name in names}
        for key, scorer in found.scorers.items():
            require_held_out(judge, {key.name: scorer})
        require_held_out(judge, {}, models, taught)
    return found


def keys_of(row: MethodRun, given: Container[str] = ()) -> list[ScorerKey]:
    """A row's scorers, none where its method reads none; those ``given`` need no look at their files."""
    method = METHODS[row.method]
    keys = []
    for name in row.scorers if method.scorer else ():
        trunk = "separate" if name in given else trunk_of(name)
        joined = trunk == "shared" and method.unit == "token"
        own = None if trunk == "separate" else row.policy
        keys.append(ScorerKey(name, own, joined, method.scorer == "autoregressive"))
    return keys


def reward_of(judge: Any) -> RewardFunction:
    """A reward model as a function of completions: those that ended are closed, those cut off are left open."""

    def reward(done: Sequence[Completion]) -> list[float]:
        finished = [completion.finish_reason == "stop" for completion in done]
        values: list[float] = judge.score([c.prompt for c in done], [c.text for c in done], finished=finished)
        return values

    return reward


def require_held_out(
    judge: Any,
    scorers: Mapping[str, Any],
    proxies: Mapping[str, Any] | None = None,
    taught: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a gold reward model that guides or selects, that a scorer or policy was trained with, or that is a proxy.

    Weights are compared, so another name or folder does not help. What a scorer was trained with is what its rgtg.json
    says: ``base_fingerprint``, and ``reference_fingerprint`` of what said how far its pairs were trusted. A reward
    model trained on the very pairs of a scorer is warned of.

    Raises:
        UsageError: naming both.
    """
    verdict = fingerprint_weights(judge.model)
    mine = {verdict, *cast_fingerprints(judge.model).values()}
    for name, scorer in scorers.items():
        if fingerprint_weights(weights_of(scorer)) == verdict:
            raise UsageError(
                f"the reward {judge.name} is also the scorer {name}: a method would be measured by what it maximises. "
                "Train a reward model on other pairs (rgtg train --objective full-bt) and give that"
            )
        used = mine & _trained_with(scorer)
        if used:
            raise UsageError(
                f"the reward {judge.name} was used to train the scorer {name}: a method would be measured by what it "
                "learnt from. Train a reward model on other pairs (rgtg train --objective full-bt) and give that"
            )
        _warn_of_shared_pairs(judge, name, scorer)
    for name, proxy in (proxies or {}).items():
        if fingerprint_weights(weights_of(proxy)) == verdict:
            raise UsageError(f"the reward {judge.name} is also the proxy {name}, which may be optimised: hold one out")
    for name, teacher in (taught or {}).items():
        if fingerprint_weights(weights_of(teacher)) == verdict:
            raise UsageError(
                f"the reward {judge.name} is {name}, which a compared method was trained with: hold it out"
            )


def _trained_with(scorer: Any) -> set[str]:
    """Fingerprints of the weights that a scorer's description names as its origin or reference."""
    info = getattr(scorer, "info", None)
    if info is None:
        return set()
    origin = info.base_fingerprints if info.trunk == "separate" else set()
    return (origin | {info.reference_fingerprint or ""}) - {""}  # a head's base is the frozen policy itself


def _warn_of_shared_pairs(judge: Any, name: str, scorer: Any) -> None:
    ours, theirs = (getattr(one, "info", None) for one in (judge, scorer))
    if ours and theirs and ours.data_fingerprint and ours.data_fingerprint == theirs.data_fingerprint:
        warnings.warn(
            f"the reward {judge.name} was trained on the very pairs of the scorer {name}: it shares that scorer's "
            "mistakes. Train it on other pairs",
            stacklevel=4,
        )


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last parts of paths, as many as tell them apart: a result must not name the machine.

    >>> short_names(["runs/a/scorer", "runs/b/scorer", "judge"])
    {'runs/a/scorer': 'a/scorer', 'runs/b/scorer': 'b/scorer', 'judge': 'judge'}
    """
    parts = {name: Path(name).parts for name in names}
    short = {}
    for name, mine in parts.items():
        tails = range(1, len(mine) + 1)
        short[name] = next(
            ("/".join(mine[-k:]) for k in tails if sum(other[-k:] == mine[-k:] for other in parts.values()) == 1), name
        )
    return short


def _gold(settings: EvaluationSettings, judge: PrefixScorer | None, reward: RewardFunction | None) -> NamedReward:
    if judge is not None:
        return NamedReward(Path(settings.reward or judge.name).name, reward_of(judge), fingerprint_weights(judge.model))
    assert reward is not None, "either is given"
    return NamedReward.of(settings.reward or str(getattr(reward, "__name__", "gold")), reward)


def _proxies(
    settings: EvaluationSettings, found: ComparisonModels, given: Mapping[str, RewardFunction], where: dict[str, Any]
) -> tuple[dict[str, NamedReward], dict[str, Any]]:
    """Rewards beside gold: rules given, models named, and every scorer that can read finished completions."""
    rewards = {name: NamedReward.of(name, one) for name, one in given.items()}
    models: dict[str, Any] = {}
    for name, source in settings.proxies.items():
        models[name] = load_scorer(source, policy=found.policy, **where)
    own: dict[str, Any] = {}
    for (name, *_), scorer in found.scorers.items():
        if not hasattr(scorer, "score") and name not in found.given and trunk_of(name) == "shared":
            scorer = load_scorer(name, **where)  # as a reward model of its own: joined, it reads candidates only
        if hasattr(scorer, "score"):
            own[found.names[name]] = scorer
    for name, model in (models | own).items():
        if name in rewards or (name in models and name in own):
            raise UsageError(f"two rewards are called {name!r}: give the proxy another name")
        rewards[name] = NamedReward(name, reward_of(model), fingerprint_weights(weights_of(model)))
    return rewards, models


def _load_scorer(key: ScorerKey, row: MethodRun, found: ComparisonModels, where: dict[str, Any]) -> AnyScorer:
    if key.name in found.given:
        return found.given[key.name]
    return load_for_method(key.name, found.policy_of(row), row.method, Placement(**where), pack=True)


def _own_policies(rows: Sequence[MethodRun]) -> list[str]:
    return list(dict.fromkeys(row.policy for row in rows if row.policy is not None))


def _name_of(given: str | None, setting: str, what: str) -> str:
    if given is None:
        raise UsageError(f"{setting} is required: a folder or hub id of a {what}")
    return given


def _require_scorers(rows: Sequence[MethodRun], given: Mapping[str, AnyScorer]) -> None:
    for row in rows:
        if find_method(row.method).scorer and not row.scorers:
            raise UsageError(f"{row.label} needs a scorer: give one for all (scorer) or one per method")
