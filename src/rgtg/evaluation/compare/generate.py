"""Run one row of a comparison: complete the prompts, ask the rewards, read the reference's log-probabilities."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rgtg.config import DecodingSettings, validate
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.errors import NonFiniteError
from rgtg.evaluation.compare.grid import MethodRun
from rgtg.evaluation.compare.shards import Shard, ShardRewards
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.base import AnyScorer
from rgtg.tokenization.encoding import encode_prompt, require_same_tokenizer
from rgtg.tokenization.padding import batches_by_length
from rgtg.types.generation import Completion

RewardFunction = Callable[[Sequence[Completion]], list[float]]


@dataclass(frozen=True)
class NamedReward:
    """A named reward of finished completions: a model's, or any rule.

    ``fingerprint`` says when stored rewards still hold; with None the rule is asked again on every run.
    """

    name: str
    function: RewardFunction
    fingerprint: str | None = None

    @classmethod
    def of(cls, name: str, one: RewardFunction) -> "NamedReward":
        """A function as a reward of that name; what is a reward already keeps its own."""
        return one if isinstance(one, NamedReward) else cls(name, one)

    def __call__(self, done: Sequence[Completion]) -> list[float]:
        """One finite number per completion.

        Raises:
            NonFiniteError: NaN or an infinite number.
        """
        values = [float(value) for value in self.function(done)]
        if len(values) != len(done):
            raise ValueError(f"the reward {self.name} gave {len(values)} numbers for {len(done)} completions")
        for completion, value in zip(done, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(f"the reward {self.name} gave {value} for {completion.text[:60]!r}")
        return values


def make_guided_policy(policy: Policy, scorers: Sequence[AnyScorer], row: MethodRun) -> GuidedPolicy:
    """The row's policy and scorers, joined by its method."""
    scorer: Any = None if not scorers else scorers[0] if len(scorers) == 1 else list(scorers)
    given = {name: row.given[name] for name in ("top_k", "n") if name in row.given}
    beta: Any = row.beta
    return GuidedPolicy(policy, scorer, method=row.method, beta=beta, **given)


def full_settings(guided: GuidedPolicy, row: MethodRun, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Every decoding setting of a row, those left at their defaults too; models by their short names."""
    short = names or {}
    resolved = validate(DecodingSettings, guided.defaults | row.decoding())
    named = {"scorers": [short.get(name, name) for name in row.scorers]} if row.scorers else {}
    own = {} if row.policy is None else {"policy": short.get(row.policy, row.policy)}
    return resolved.model_dump(mode="json", exclude={"seed"}) | named | own


def complete(
    guided: GuidedPolicy, row: MethodRun, prompts: Sequence[str], *, seed: int, batch_size: int
) -> tuple[list[Completion], float]:
    """One completion per prompt, and the seconds they took. Rows of one seed share their random numbers."""
    rest = {name: value for name, value in row.given.items() if name not in ("top_k", "n")}
    start = time.perf_counter()
    done = guided.generate(list(prompts), seed=seed, batch_size=batch_size, **rest)
    return done, time.perf_counter() - start


def run_shard(
    guided: GuidedPolicy,
    row: MethodRun,
    prompts: Sequence[str],
    *,
    seed: int,
    batch_size: int,
    reference: Policy | None = None,
    made_with: dict[str, Any] | None = None,
) -> Shard:
    """Complete the prompts with one seed; ``reference`` is what KL is measured to where it is not the row's policy."""
    done, seconds = complete(guided, row, prompts, seed=seed, batch_size=batch_size)
    log_probs = None if reference is None else reference_log_probs(reference, guided.policy, done, batch_size)
    return Shard(
        label=row.label, seed=seed, made_with=made_with or {}, seconds=seconds, completions=done,
        reference_log_probs=log_probs,
    )  # fmt: skip


def score_shard(part: Shard, rewards: Mapping[str, NamedReward]) -> bool:
    """Ask the rewards that the part does not hold yet, or holds from another model; whether anything changed."""
    before = dict(part.scores)
    for key, reward in rewards.items():
        held = before.get(key)
        if held is None or held.fingerprint is None or held.fingerprint != reward.fingerprint:
            part.scores[key] = ShardRewards(fingerprint=reward.fingerprint, values=reward(part.completions))
    return part.scores != before


@torch.inference_mode()
def reference_log_probs(
    reference: Policy, policy: Policy, done: Sequence[Completion], batch_size: int = 8
) -> list[float]:
    """Log-probability in nats of each completion's tokens under another policy of the same tokenizer, in one pass each.

    Raises:
        TokenizerMismatchError: a policy that reads text differently.
    """
    require_same_tokenizer(reference.tokenizer, policy.tokenizer)
    rows = [(encode_prompt(policy.tokenizer, c.prompt), c.token_ids) for c in done]
    totals = [0.0] * len(rows)
    for part, ids, mask in batches_by_length(rows, batch_size, reference.model.device):
        logits = reference.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        taken = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0].double()
        for at, i in enumerate(part):
            first, last = len(rows[i][0]) - 1, len(rows[i][0]) + len(rows[i][1]) - 1
            totals[i] = float(taken[at, first:last].sum())
    return totals
