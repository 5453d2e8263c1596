"""What token-wise guidance does, by exact enumeration in a world small enough to list.

A world has V tokens and completions of exactly T tokens, so that all V^T completions and all prefixes can be listed.
Prefixes of length i are numbered in base V: the children of prefix p are p·V … p·V + V − 1. Decoding and losses are the
library's own (`rgtg.decoding.sampling`, `rgtg.losses`) in fp32, so that results are exact to about 1e-6.

The claims are those of PARGS (arXiv 2406.07780); docs/theory.md explains what each exhibit shows.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgtg.decoding.sampling import greedy, guided_log_probs
from rgtg.errors import UsageError
from rgtg.losses import bradley_terry_loss, prefix_bradley_terry_loss, prefix_bradley_terry_pair_losses
from rgtg.types.base import FORMAT_VERSION, Record

# Entry i − 1 holds r(y_{1:i}) of every prefix of length i, in nats: shape (V^i,).
PrefixScores = list[Tensor]

RANDOM_DRAWS = 100


@dataclass(frozen=True)
class World:
    """A policy over completions of T tokens and the reward of each.

    Attributes:
        log_policy: entry i holds log π(v | prefix) of every prefix of length i, in nats: shape (V^i, V).
        reward: r(y) of every completion, in nats of Bradley–Terry log-odds: shape (V^T,).
    """

    log_policy: list[Tensor]
    reward: Tensor

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens."""
        return self.log_policy[0].shape[1]

    @property
    def length(self) -> int:
        """T, tokens of a completion."""
        return len(self.log_policy)


class EqualLoss(Record):
    """Exhibit 1: two scorers that full-sequence training cannot distinguish, and what decoding does with each."""

    full_loss: tuple[float, float]
    prefix_loss: tuple[float, float]
    prefix_comparisons: int
    opposite: int
    policy_reward: float
    sampled_reward: tuple[float, float]
    greedy_tokens: tuple[list[int], list[int]]
    greedy_reward: tuple[float, float]
    best_reward: float


class LargestDifference(Record):
    """Exhibits 2 and 3: the largest difference between two ways to compute the guided probabilities."""

    largest: float
    probabilities: int


class RlhfDistance(Record):
    """Exhibit 4: KL(guided ‖ π·exp(β·r)/Z) in nats and expected reward of token-wise guidance with one scorer."""

    scorer: str
    kl_nats: float
    reward: float


class TheoryResult(Record):
    """What ``rgtg theory`` prints."""

    version: int = FORMAT_VERSION
    seed: int
    vocabulary: int
    length: int
    beta: float
    equal_loss: EqualLoss
    ratio: LargestDifference
    prefix_function: LargestDifference
    guidance: list[RlhfDistance]


def exhibits(*, seed: int = 0, vocabulary: int = 3, length: int = 3, beta: float = 2.0) -> TheoryResult:
    """All four exhibits in one random world.

    Raises:
        UsageError: a world too small to compare prefixes in, too large to enumerate, or β ≤ 0.
    """
    if vocabulary < 2 or length < 2 or vocabulary**length > 300:
        raise UsageError(
            f"a world of {vocabulary} tokens and length {length}: expected at least 2 of each, "
            "and at most 300 completions"
        )
    if not 0 < beta < float("inf"):
        raise UsageError(f"beta = {beta}: expected a finite number above 0")
    world = random_world(vocabulary, length, seed)
    return TheoryResult(
        seed=seed, vocabulary=vocabulary, length=length, beta=beta,
        equal_loss=equal_loss_opposite_prefixes(world, beta),
        ratio=ratio_of_rlhf_policies(world, random_scores(world, seed + 1), beta),
        prefix_function=functions_of_the_prefix(world, random_scores(world, seed + 1), beta, seed + 2),
        guidance=distance_to_rlhf(world, beta, seed + 3),
    )  # fmt: skip


def random_world(vocabulary: int, length: int, seed: int) -> World:
    """Standard normal policy logits and rewards."""
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(vocabulary**i, vocabulary, generator=draw) for i in range(length)]
    return World([torch.log_softmax(x, -1) for x in logits], torch.randn(vocabulary**length, generator=draw))


def random_scores(world: World, seed: int) -> PrefixScores:
    """An arbitrary scorer: standard normal scores of every prefix, including whole completions."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(world.vocabulary**i, generator=draw) for i in range(1, world.length + 1)]


def guided_steps(world: World, scores: PrefixScores, beta: float) -> list[Tensor]:
    """Log π̃(v | prefix) in nats, by the library's rule at every prefix: entry i has shape (V^i, V)."""
    return [
        guided_log_probs(step, score.view(step.shape), beta)
        for step, score in zip(world.log_policy, scores, strict=True)
    ]


def sequence_log_probs(steps: Sequence[Tensor]) -> Float[Tensor, " completions"]:
    """Log p(y) of every completion in nats: Σ_i log p(y_i | y_{<i}). ``steps`` are as in ``guided_steps``."""
    return prefix_log_probs(steps)[-1]


def prefix_log_probs(steps: Sequence[Tensor]) -> PrefixScores:
    """Log p(y_{1:i}) of every prefix in nats, i = 1 … T."""
    partial, found = torch.zeros(1), []
    for step in steps:
        partial = (partial[:, None] + step).flatten()
        found.append(partial)
    return found


def rlhf_log_probs(world: World, beta: float) -> Float[Tensor, " completions"]:
    """Log of π(y)·exp(β·r(y)) / Z: the optimum of KL-regularised RLHF."""
    return torch.log_softmax(sequence_log_probs(world.log_policy) + beta * world.reward, -1)


def mean_scores(world: World) -> PrefixScores:
    """E_π[r(y) | y_{1:i}] of every prefix: the value function of controlled decoding."""
    return _backwards(world, lambda below, step: (step.exp() * below).sum(-1))


def soft_value_scores(world: World, beta: float) -> PrefixScores:
    """(1/β)·log E_π[exp(β·r(y)) | y_{1:i}] of every prefix: guidance with this scorer equals RLHF."""
    return _backwards(world, lambda below, step: (step + beta * below).logsumexp(-1) / beta)


def prefix_bt_scores(world: World) -> PrefixScores:
    """The minimiser of `prefix_bradley_terry_loss` with unlimited data and capacity.

    The population is all pairs (y, y') drawn from π, where y is preferred with probability σ(r(y) − r(y')). Each
    prefix's score is a free parameter, optimised by L-BFGS in fp32: accurate to about 0.003 for prefixes, and less for
    the rarest completions.
    """
    compared = _Comparisons.of(world)
    log_prob = sequence_log_probs(world.log_policy)
    wins = torch.sigmoid(world.reward[compared.first] - world.reward[compared.second])
    weight = log_prob[compared.first].exp() * log_prob[compared.second].exp() * wins
    scores = [torch.zeros(world.vocabulary**i, requires_grad=True) for i in range(1, world.length + 1)]

    def population_loss() -> Tensor:
        pair_losses, _ = prefix_bradley_terry_pair_losses(*compared.tensors(scores))
        return (weight * pair_losses).sum()

    _minimise(population_loss, scores)
    return [score.detach() - score.detach().mean() for score in scores]


def equal_loss_opposite_prefixes(world: World, beta: float) -> EqualLoss:
    """Exhibit 1: full-sequence Bradley–Terry training does not determine the scores of prefixes.

    Scorer A gives a prefix its expected reward, and scorer B the negative of that. Both give every completion its
    reward, so that no set of whole completions distinguishes them. Losses are means over all pairs, in which the
    completion with the higher reward is chosen.
    """
    a = [*mean_scores(world)[:-1], world.reward]
    b = [*(-score for score in a[:-1]), world.reward]
    steps = guided_steps(world, a, beta), guided_steps(world, b, beta)
    decoded = _greedy(world, a, beta), _greedy(world, b, beta)
    compared, opposite = _opposite(a[:-1], b[:-1])
    return EqualLoss(
        full_loss=(_full_loss(world, a), _full_loss(world, b)),
        prefix_loss=(_prefix_loss(world, a), _prefix_loss(world, b)),
        prefix_comparisons=compared, opposite=opposite, policy_reward=_expected_reward(world, world.log_policy),
        sampled_reward=(_expected_reward(world, steps[0]), _expected_reward(world, steps[1])),
        greedy_tokens=(_tokens(world, decoded[0]), _tokens(world, decoded[1])),
        greedy_reward=(float(world.reward[decoded[0]]), float(world.reward[decoded[1]])),
        best_reward=float(world.reward.max()),
    )  # fmt: skip


def ratio_of_rlhf_policies(world: World, scores: PrefixScores, beta: float) -> LargestDifference:
    """Exhibit 2: the guided policy is a ratio of two RLHF policies over prefixes.

    π_i(y_{1:i}) ∝ π(y_{1:i})·exp(β·r(y_{1:i})) is the RLHF policy over prefixes of length i, and

        π̃(y_i | y_{<i}) ∝ π_i(y_{1:i}) / π_{i−1}(y_{1:i−1}),   π_0 = 1.
    """
    rlhf = [torch.zeros(1)] + [
        torch.log_softmax(log_prob + beta * score, -1)
        for log_prob, score in zip(prefix_log_probs(world.log_policy), scores, strict=True)
    ]
    ratios = [
        torch.log_softmax(after.view(len(before), -1) - before[:, None], -1)
        for before, after in itertools.pairwise(rlhf)
    ]
    return _difference(guided_steps(world, scores, beta), ratios)


def functions_of_the_prefix(world: World, scores: PrefixScores, beta: float, seed: int) -> LargestDifference:
    """Exhibit 3: r(y_{1:i}) + f(y_{<i}) steers exactly as r(y_{1:i}), for any f (here normal with deviation 10)."""
    draw = torch.Generator().manual_seed(seed)
    shifted = []
    for step, score in zip(world.log_policy, scores, strict=True):
        f = 10 * torch.randn(len(step), 1, generator=draw)  # one number per prefix y_{<i}
        shifted.append((score.view(step.shape) + f).flatten())
    return _difference(guided_steps(world, scores, beta), guided_steps(world, shifted, beta))


def distance_to_rlhf(world: World, beta: float, seed: int) -> list[RlhfDistance]:
    """Exhibit 4: the KL in nats from token-wise guidance with several scorers to the RLHF policy π·exp(β·r)/Z.

    All scorers give whole completions their reward, and differ on prefixes. A full-sequence scorer is arbitrary there:
    its row is the mean over random draws, normal with the mean and standard deviation of the rewards.
    """
    reward = world.reward
    scorers = {
        "prefix-bt: minimum of its loss": [*prefix_bt_scores(world)[:-1], reward],
        "value: E[r | prefix]": mean_scores(world),
        "soft value: log E[exp(β·r) | prefix] / β": soft_value_scores(world, beta),
    }
    drawn = [
        _distance("", world, guided_steps(world, _unconstrained(world, seed + i), beta), beta)
        for i in range(RANDOM_DRAWS)
    ]
    arbitrary = RlhfDistance(
        scorer=f"full-bt: arbitrary on prefixes (mean of {RANDOM_DRAWS})",
        kl_nats=sum(row.kl_nats for row in drawn) / RANDOM_DRAWS,
        reward=sum(row.reward for row in drawn) / RANDOM_DRAWS,
    )
    rows = [_distance(name, world, guided_steps(world, scores, beta), beta) for name, scores in scorers.items()]
    return [_distance("none: the policy itself", world, world.log_policy, beta), arbitrary, *rows]


def _unconstrained(world: World, seed: int) -> PrefixScores:
    spread, middle = world.reward.std(), world.reward.mean()
    return [*(spread * score + middle for score in random_scores(world, seed)[:-1]), world.reward]


def _distance(name: str, world: World, steps: Sequence[Tensor], beta: float) -> RlhfDistance:
    guided = sequence_log_probs(steps)
    kl = (guided.exp() * (guided - rlhf_log_probs(world, beta))).sum()
    return RlhfDistance(scorer=name, kl_nats=float(kl), reward=_expected_reward(world, steps))


def _minimise(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    solver = torch.optim.LBFGS(
        parameters, max_iter=200, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-9, tolerance_change=1e-12,
    )  # fmt: skip

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss()
        torch.autograd.backward(value)
        return value

    solver.step(closure)  # type: ignore[no-untyped-call]


def _backwards(world: World, rule: Callable[[Tensor, Tensor], Tensor]) -> PrefixScores:
    """Scores of all prefixes, computed backwards from the rewards of whole completions, one token at a time."""
    scores = [world.reward]
    for step in reversed(world.log_policy[1:]):
        scores.insert(0, rule(scores[0].view(step.shape), step))
    return scores


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> LargestDifference:
    """Compare two sets of log-probabilities, entry i of shape (V^i, V)."""
    gaps = torch.cat([(a.exp() - b.exp()).abs().flatten() for a, b in zip(ours, theirs, strict=True)])
    return LargestDifference(largest=float(gaps.max()), probabilities=len(gaps))


def _expected_reward(world: World, steps: Sequence[Tensor]) -> float:
    return float((sequence_log_probs(steps).exp() * world.reward).sum())


def _greedy(world: World, scores: PrefixScores, beta: float) -> int:
    """The number of the completion that greedy guided decoding generates."""
    prefix = 0
    for step, score in zip(world.log_policy, scores, strict=True):  # (V^i, V) and (V^(i+1),)
        row = slice(prefix, prefix + 1)
        guided = guided_log_probs(step[row], score.view(step.shape)[row], beta, temperature=0.0)
        prefix = prefix * world.vocabulary + int(greedy(guided))
    return prefix


def _tokens(world: World, completion: int) -> list[int]:
    return [completion // world.vocabulary**i % world.vocabulary for i in reversed(range(world.length))]


def _opposite(a: PrefixScores, b: PrefixScores) -> tuple[int, int]:
    """The number of pairs of prefixes of equal length, and of those that two scorers order oppositely."""
    compared = opposite = 0
    for ours, theirs in zip(a, b, strict=True):
        i, j = torch.triu_indices(len(ours), len(ours), offset=1)
        compared += len(i)
        opposite += int(((ours[i] - ours[j]) * (theirs[i] - theirs[j]) < 0).sum())
    return compared, opposite


@dataclass(frozen=True)
class _Comparisons:
    """Pairs of different completions, and the prefixes of each."""

    first: Int[Tensor, " pairs"]  # numbers of completions
    second: Int[Tensor, " pairs"]
    first_prefixes: Int[Tensor, "pairs length"]  # entry i − 1 is the number of the prefix of length i
    second_prefixes: Int[Tensor, "pairs length"]

    @classmethod
    def of(cls, world: World, *, chosen_first: bool = False) -> "_Comparisons":
        """Every ordered pair, or only those whose first completion has the higher reward."""
        count = len(world.reward)
        first, second = torch.cartesian_prod(torch.arange(count), torch.arange(count)).unbind(-1)
        keep = world.reward[first] > world.reward[second] if chosen_first else first != second
        first, second = first[keep], second[keep]
        beyond = world.vocabulary ** torch.arange(world.length - 1, -1, -1)  # completions below a prefix of length i
        return cls(first, second, first[:, None] // beyond, second[:, None] // beyond)

    def tensors(self, scores: PrefixScores) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Arguments of `prefix_bradley_terry_loss`, (N, T) each: both scores, both masks, and where they differ."""
        chosen, rejected = (
            torch.stack([score[at] for score, at in zip(scores, side.unbind(-1), strict=True)], -1)
            for side in (self.first_prefixes, self.second_prefixes)
        )
        mask: Bool[Tensor, "pairs length"] = torch.ones_like(chosen, dtype=torch.bool)
        return chosen, rejected, mask, mask, self.first_prefixes != self.second_prefixes


def _full_loss(world: World, scores: PrefixScores) -> float:
    compared = _Comparisons.of(world, chosen_first=True)
    return float(bradley_terry_loss(scores[-1][compared.first], scores[-1][compared.second]))


def _prefix_loss(world: World, scores: PrefixScores) -> float:
    compared = _Comparisons.of(world, chosen_first=True)
    return float(prefix_bradley_terry_loss(*compared.tensors(scores)))
