"""The rewards of a comparison, held-out (gold) and proxies, and the check that no run used the held-out one."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rgtg.errors import NonFiniteError, UsageError
from rgtg.evaluation.compare.shards import Shard, ShardRewards
from rgtg.models.loading.scorer_info import cast_fingerprints, fingerprint_weights
from rgtg.models.scorers.base import weights_of
from rgtg.tokenization.conversation import template_fingerprint
from rgtg.types.generation import Completion

RewardFunction = Callable[[Sequence[Completion]], list[float]]
GOLD = "reward"  # the key of the held-out reward in a shard's scores and a run's metrics


def proxy_key(name: str) -> str:
    """The key of a proxy in a shard's scores and a run's metrics."""
    return f"proxy:{name}"


@dataclass(frozen=True)
class NamedReward:
    """A named reward of finished completions: a reward model, or any function.

    Stored rewards are reused while ``fingerprint`` is the same; with None the function is called again on every run.
    ``tokenizer`` is the model's, whose chat template renders chats.
    """

    name: str
    function: RewardFunction
    fingerprint: str | None = None
    tokenizer: Any = None

    @classmethod
    def of(cls, name: str, reward: RewardFunction) -> "NamedReward":
        """A function under that name; a NamedReward keeps its own name."""
        return reward if isinstance(reward, NamedReward) else cls(name, reward)

    def fingerprint_of(self, completions: Sequence[Completion]) -> str | None:
        """What the rewards of these completions depend on: of chats, the model's chat template too."""
        if self.fingerprint is None or all(completion.messages is None for completion in completions):
            return self.fingerprint
        return f"{self.fingerprint}-{template_fingerprint(self.tokenizer)}"

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """One finite number for each completion.

        Raises:
            NonFiniteError: NaN or an infinite number.
        """
        values = [float(value) for value in self.function(completions)]
        if len(values) != len(completions):
            raise ValueError(f"the reward {self.name} gave {len(values)} numbers for {len(completions)} completions")
        for completion, value in zip(completions, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(f"the reward {self.name} gave {value} for {completion.text[:60]!r}")
        return values


def model_reward(model: Any) -> RewardFunction:
    """A reward model as a function of completions. Completions that were cut off get no closing EOS.

    It reads chats by its own chat template, with the variables that the policy's was given as far as it has them.
    """

    def reward(completions: Sequence[Completion]) -> list[float]:
        prompts, texts = [c.source for c in completions], [c.text for c in completions]
        kwargs = next((c.chat_template_kwargs for c in completions if c.chat_template_kwargs), None)
        values: list[float] = model.score(
            prompts, texts, finished=[c.finish_reason == "stop" for c in completions],
            **({"chat_template_kwargs": kwargs} if kwargs else {}),
        )  # fmt: skip
        return values

    return reward


def keyed_rewards(gold: NamedReward, proxies: Mapping[str, NamedReward]) -> dict[str, NamedReward]:
    """All rewards by their key in a shard's scores."""
    return {GOLD: gold} | {proxy_key(name): proxy for name, proxy in proxies.items()}


def score_shard(shard: Shard, rewards: Mapping[str, NamedReward]) -> bool:
    """Compute the rewards that the shard lacks, or holds from another model; returns whether anything changed."""
    before = dict(shard.scores)
    for key, reward in rewards.items():
        held, fingerprint = before.get(key), reward.fingerprint_of(shard.completions)
        if held is None or held.fingerprint is None or held.fingerprint != fingerprint:
            shard.scores[key] = ShardRewards(fingerprint=fingerprint, values=reward(shard.completions))
    return shard.scores != before


def require_held_out(
    gold: Any,
    scorers: Mapping[str, Any],
    proxies: Mapping[str, Any] | None = None,
    trained_with: Mapping[str, Any] | None = None,
) -> None:
    """Reject a gold reward model that guides or selects, that a scorer or policy was trained with, or that is a proxy.

    The check compares weights, so that another name or folder makes no difference. It reads what a scorer was trained
    with from its rgtg.json: ``base_fingerprint``, and ``reference_fingerprint`` of the scorer that weighted its pairs.
    A gold reward model that was trained on the same pairs as a scorer gives a warning.

    Raises:
        UsageError: with the names of both models.
    """
    fingerprint = fingerprint_weights(gold.model)
    every_dtype = {fingerprint, *cast_fingerprints(gold.model).values()}
    for name, scorer in scorers.items():
        if fingerprint_weights(weights_of(scorer)) == fingerprint:
            raise UsageError(
                f"the reward {gold.name} is also the scorer {name}: a method would be measured by what it maximises. "
                "Train a reward model on other pairs (rgtg train --objective full-bt) and give that"
            )
        if every_dtype & _trained_with(scorer):
            raise UsageError(
                f"the reward {gold.name} was used to train the scorer {name}: a method would be measured by what it "
                "learnt from. Train a reward model on other pairs (rgtg train --objective full-bt) and give that"
            )
        _warn_of_shared_pairs(gold, name, scorer)
    for name, proxy in (proxies or {}).items():
        if fingerprint_weights(weights_of(proxy)) == fingerprint:
            raise UsageError(f"the reward {gold.name} is also the proxy {name}, which may be optimised: hold one out")
    for name, model in (trained_with or {}).items():
        if fingerprint_weights(weights_of(model)) == fingerprint:
            raise UsageError(f"the reward {gold.name} is {name}, which a compared method was trained with: hold it out")


def _trained_with(scorer: Any) -> set[str]:
    """Fingerprints of the weights that a scorer's description names as its base or reference."""
    info = getattr(scorer, "info", None)
    if info is None:
        return set()
    base = info.base_fingerprints if info.trunk == "separate" else set()  # a head's base is the frozen policy itself
    return (base | {info.reference_fingerprint or ""}) - {""}


def _warn_of_shared_pairs(gold: Any, name: str, scorer: Any) -> None:
    ours, theirs = (getattr(one, "info", None) for one in (gold, scorer))
    if ours and theirs and ours.data_fingerprint and ours.data_fingerprint == theirs.data_fingerprint:
        warnings.warn(
            f"the reward {gold.name} was trained on the same pairs as the scorer {name}: it shares that scorer's "
            "mistakes. Train it on other pairs",
            stacklevel=4,
        )
