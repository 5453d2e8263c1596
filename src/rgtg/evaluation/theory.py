"""What token-wise guidance does, by exact enumeration of a world small enough to write down.

A world has V tokens and completions of exactly T tokens, so that all V^T completions and all prefixes can be listed.
Prefixes of length i are numbered in base V: the children of prefix p are p·V … p·V + V − 1. Decoding and loss are the
library's own (`rgtg.decoding.sampling`, `rgtg.losses`), both in fp32: figures are exact to about 1e-6.

The claims are those of PARGS (arXiv 2406.07780); docs/theory.md tells what each exhibit shows.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgtg.decoding.sampling import greedy, guided_log_probs
from rgtg.errors import UsageError
from rgtg.losses import bradley_terry_loss, prefix_bradley_terry_loss, prefix_bradley_terry_pair_losses
from rgtg.types.base import FORMAT_VERSION, Record

PrefixScores = list[Tensor]
"""Entry i − 1 holds r(y_{1:i}) of every prefix of length i, in nats: shape (V^i,)."""

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
    """Exhibit 1: two scorers that full-sequence training cannot tell apart, and what decoding does with each."""

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
    """Exhibits 2 and 3: the largest difference of two ways to compute the guided probabilities, over all prefixes."""

    largest: float
    probabilities: int


class RlhfDistance(Record):
    """One row of exhibit 4: token-wise guidance with one scorer. KL(guided ‖ π·exp(β·r)/Z) in nats."""

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
        seed=seed,
        vocabulary=vocabulary,
        length=length,
        beta=beta,
        equal_loss=equal_loss_opposite_prefixes(world, beta),
        ratio=ratio_of_rlhf_policies(world, random_scores(world, seed + 1), beta),
        prefix_function=functions_of_the_prefix(world, random_scores(world, seed + 1), beta, seed + 2),
        guidance=distance_to_rlhf(world, beta, seed + 3),
    )


def random_world(vocabulary: int, length: int, seed: int) -> World:
    """Standard normal policy logits and rewards."""
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(vocabulary**i, vocabulary, generator=draw) for i in range(length)]
    return World([torch.log_softmax(x, -1) for x in logits], torch.randn(vocabulary**length, generator=draw))


def random_scores(world: World, seed: int) -> PrefixScores:
    """Standard normal scores of every prefix, whole completions included: an arbitrary scorer."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(world.vocabulary**i, generator=draw) for i in range(1, world.length + 1)]


def guided_steps(world: World, scores: PrefixScores, beta: float) -> list[Tensor]:
    """Log π̃(v | prefix), the library's rule at every prefix: entry i has shape (V^i, V)."""
    return [
        guided_log_probs(step, score.view(step.shape), beta)
        for step, score in zip(world.log_policy, scores, strict=True)
    ]


def sequence_log_probs(steps: Sequence[Tensor]) -> Float[Tensor, " completions"]:
    """Log p(y) of every completion from its conditionals, in nats: Σ_i log p(y_i | y_{<i})."""
    return prefix_log_probs(steps)[-1]


def prefix_log_probs(steps: Sequence[Tensor]) -> PrefixScores:
    """Log p(y_{1:i}) of every prefix, i = 1 … T."""
    partial, found = torch.zeros(1), []
    for step in steps:
        partial = (partial[:, None] + step).flatten()
        found.append(partial)
    return found


def rlhf_log_probs(world: World, beta: float) -> Float[Tensor, " completions"]:
    """Log of π(y)·exp(β·r(y)) / Z: the policy that KL-regularised RLHF would train."""
    return torch.log_softmax(sequence_log_probs(world.log_policy) + beta * world.reward, -1)


def mean_scores(world: World) -> PrefixScores:
    """E_π[r(y) | y_{1:i}] of every prefix: the value that controlled decoding learns."""
    return _backwards(world, lambda below, step: (step.exp() * below).sum(-1))


def soft_value_scores(world: World, beta: float) -> PrefixScores:
    """(1/β)·log E_π[exp(β·r(y)) | y_{1:i}] of every prefix: the scorer with which guidance *is* RLHF."""
    return _backwards(world, lambda below, step: (step + beta * below).logsumexp(-1) / beta)


def prefix_bt_scores(world: World) -> PrefixScores:
    """The scorer that `prefix_bradley_terry_loss` has its minimum at, with unlimited data and capacity.

    The population is every pair (y, y') drawn from π, y preferred with probability σ(r(y) − r(y')); each prefix's score
    is a free number, found by L-BFGS in fp32: to about 0.003 for prefixes, less well for the rarest completions.
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
    """Exhibit 1: full-sequence Bradley–Terry training leaves the scores of prefixes free.

    Scorer A gives a prefix its expected reward; B gives it the opposite. Both give every completion its reward, so no
    set of whole completions tells them apart. Losses are means over all pairs, the higher reward being chosen.
    """
    a = [*mean_scores(world)[:-1], world.reward]
    b = [*(-score for score in a[:-1]), world.reward]
    steps = guided_steps(world, a, beta), guided_steps(world, b, beta)
    written = _greedy(world, a, beta), _greedy(world, b, beta)
    compared, opposite = _opposite(a[:-1], b[:-1])
    return EqualLoss(
        full_loss=(_full_loss(world, a), _full_loss(world, b)),
        prefix_loss=(_prefix_loss(world, a), _prefix_loss(world, b)),
        prefix_comparisons=compared,
        opposite=opposite,
        policy_reward=_expected_reward(world, world.log_policy),
        sampled_reward=(_expected_reward(world, steps[0]), _expected_reward(world, steps[1])),
        greedy_tokens=(_tokens(world, written[0]), _tokens(world, written[1])),
        greedy_reward=(float(world.reward[written[0]]), float(world.reward[written[1]])),
        best_reward=float(world.reward.max()),
    )


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
    """Exhibit 3: r(y_{1:i}) + f(y_{<i}) steers exactly as r(y_{1:i}) does, whatever f is (here normal, ten wide)."""
    draw = torch.Generator().manual_seed(seed)
    shifted = []
    for step, score in zip(world.log_policy, scores, strict=True):
        f = 10 * torch.randn(len(step), 1, generator=draw)  # one number per prefix y_{<i}
        shifted.append((score.view(step.shape) + f).flatten())
    return _difference(guided_steps(world, scores, beta), guided_steps(world, shifted, beta))


def distance_to_rlhf(world: World, beta: float, seed: int) -> list[RlhfDistance]:
    """Exhibit 4: how far token-wise guidance with several scorers is from the RLHF policy π·exp(β·r)/Z, in nats.

    All give whole completions their reward; they differ in what they say of prefixes. A full-sequence scorer may say
    anything there, so its row is the mean over draws: normal, with the rewards' own mean and spread.
    """
    reward = world.reward
    known = {
        "prefix-bt: minimum of its loss": [*prefix_bt_scores(world)[:-1], reward],
        "value: E[r | prefix]": mean_scores(world),
        "soft value: log E[exp(β·r) | prefix] / β": soft_value_scores(world, beta),
    }
    drawn = [
        _guidance("", world, guided_steps(world, _unconstrained(world, seed + i), beta), beta)
        for i in range(RANDOM_DRAWS)
    ]
    arbitrary = RlhfDistance(
        scorer=f"full-bt: arbitrary on prefixes (mean of {RANDOM_DRAWS})",
        kl_nats=sum(row.kl_nats for row in drawn) / RANDOM_DRAWS,
        reward=sum(row.reward for row in drawn) / RANDOM_DRAWS,
    )
    rows = [_guidance(name, world, guided_steps(world, scores, beta), beta) for name, scores in known.items()]
    return [_guidance("none: the policy itself", world, world.log_policy, beta), arbitrary, *rows]


def _unconstrained(world: World, seed: int) -> PrefixScores:
    spread, middle = world.reward.std(), world.reward.mean()
    return [*(spread * score + middle for score in random_scores(world, seed)[:-1]), world.reward]


def _guidance(name: str, world: World, steps: Sequence[Tensor], beta: float) -> RlhfDistance:
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
    """Scores of all prefixes from the reward of whole completions, one token back at a time."""
    scores = [world.reward]
    for step in reversed(world.log_policy[1:]):
        scores.insert(0, rule(scores[0].view(step.shape), step))
    return scores


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> LargestDifference:
    gaps = torch.cat([(a.exp() - b.exp()).abs().flatten() for a, b in zip(ours, theirs, strict=True)])
    return LargestDifference(largest=float(gaps.max()), probabilities=len(gaps))


def _expected_reward(world: World, steps: Sequence[Tensor]) -> float:
    return float((sequence_log_probs(steps).exp() * world.reward).sum())


def _greedy(world: World, scores: PrefixScores, beta: float) -> int:
    """Number of the completion that greedy guided decoding writes."""
    prefix = 0
    for step, score in zip(world.log_policy, scores, strict=True):
        row = slice(prefix, prefix + 1)
        guided = guided_log_probs(step[row], score.view(step.shape)[row], beta, temperature=0.0)
        prefix = prefix * world.vocabulary + int(greedy(guided))
    return prefix


def _tokens(world: World, completion: int) -> list[int]:
    return [completion // world.vocabulary**i % world.vocabulary for i in reversed(range(world.length))]


def _opposite(a: PrefixScores, b: PrefixScores) -> tuple[int, int]:
    """Pairs of prefixes of one length, and how many of them two scorers order in opposite ways."""
    compared = opposite = 0
    for ours, theirs in zip(a, b, strict=True):
        i, j = torch.triu_indices(len(ours), len(ours), offset=1)
        compared += len(i)
        opposite += int(((ours[i] - ours[j]) * (theirs[i] - theirs[j]) < 0).sum())
    return compared, opposite


@dataclass(frozen=True)
class _Comparisons:
    """Pairs of different completions, and the prefixes that each consists of."""

    first: Tensor  # (N,) completions
    second: Tensor
    first_prefixes: Tensor  # (N, T); entry i − 1 numbers the prefix of length i
    second_prefixes: Tensor

    @classmethod
    def of(cls, world: World, *, chosen_first: bool = False) -> "_Comparisons":
        """Every ordered pair, or only those whose first has the higher reward."""
        count = len(world.reward)
        first, second = torch.cartesian_prod(torch.arange(count), torch.arange(count)).unbind(-1)
        keep = world.reward[first] > world.reward[second] if chosen_first else first != second
        first, second = first[keep], second[keep]
        beyond = world.vocabulary ** torch.arange(world.length - 1, -1, -1)  # completions below a prefix of length i
        return cls(first, second, first[:, None] // beyond, second[:, None] // beyond)

    def tensors(self, scores: PrefixScores) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `prefix_bradley_terry_loss` takes: scores of both sides, their masks, and where they differ."""
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
