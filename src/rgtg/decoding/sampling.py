"""How a token or a segment is chosen: propose candidates, guide them, draw one. Tensors in, tensors out."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Which ids can be candidates: those that the tokenizer has a token for and the model an embedding.

    Output layers are often padded beyond the tokenizer: Qwen2.5 has 151,936 or 152,064 rows for 151,665 tokens. Padding
    has no text, and a scorer may have no embedding for it.

    Attributes:
        size: ids from here on are no tokens.
        missing: ids below ``size`` that are no tokens either.
    """

    size: int
    missing: tuple[int, ...] = ()

    def restrict(self, log_probs: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows tokens"]:
        """Log-probabilities of tokens only: a view of the first ``size`` ids, -inf at those that are missing.

        >>> Vocabulary(3, missing=(1,)).restrict(torch.zeros(5))
        tensor([0., -inf, 0.])
        """
        if log_probs.shape[-1] > self.size:
            log_probs = log_probs[..., : self.size]
        if self.missing:
            at = torch.tensor(self.missing, device=log_probs.device)
            log_probs = log_probs.index_fill(-1, at[at < log_probs.shape[-1]], -torch.inf)
        return log_probs


# Errors of a step, whoever decodes.
NO_FINITE_PROBABILITY = (
    "the policy gives no finite probability to any next token: its logits are NaN or infinite, or every token is "
    "banned. Try dtype=float32, or relax the bans"
)
SCORES_NOT_FINITE = "the scorer returned NaN or infinite scores; try dtype=float32, or check its training"

# So few candidates are drawn from in Python's floats: forty operations on small tensors take ten times as long.
_FEW = 64

# Newton's steps towards a KL, at most (five are usual), and the relative error that is good enough: later steps of a
# completion make up for it.
_KL_STEPS, _KL_ERROR = 40, 1e-3


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen: π(v)·exp(β·r(prefix⊕v)) over the candidates, sampled or maximised.

    Attributes:
        beta: multiplies the score.
        top_k: number of candidates; None is the whole vocabulary.
        top_p: nucleus of the candidates.
        temperature: of the guided distribution.
        greedy: take the maximum.
        clip: clip scores to [0, 1] (RAD).
        top_k_of_sums: ``top_k`` counts the largest log π + β·r instead of the policy's most likely tokens (FaRMA).
        entropy_gate: steer a row only where the policy's entropy exceeds this many nats.
        kl_budget: nats per completion, by which beta is chosen in each step in place of ``beta``; None keeps ``beta``.
        value_threshold: filter tokens whose score is below it, instead of guiding by beta.
        vocabulary: the ids that can be candidates; None is all.
    """

    beta: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    temperature: float = 1.0
    greedy: bool = False
    clip: bool = False
    top_k_of_sums: bool = False
    entropy_gate: float | None = None
    kl_budget: float | None = None
    value_threshold: float | None = None
    vocabulary: Vocabulary | None = None


@dataclass(frozen=True)
class Candidates:
    """Candidates of the next token, for rows that share their sampling parameters.

    Attributes:
        policy_log_probs: (B, V) the policy's log-probabilities, in nats.
        ids: (B, K) candidate tokens.
        log_probs: (B, K) their log-probabilities after the row's processors; -inf excludes a token from a row.
        steered: (B,) whether a row is steered in this step; None steers all rows.
    """

    policy_log_probs: Tensor
    ids: Tensor
    log_probs: Tensor
    steered: Tensor | None

    def any_steered(self) -> bool:
        """Whether any row needs scores."""
        return self.steered is None or bool(self.steered.any())

    def steered_rows(self) -> list[int]:
        """Rows that need scores."""
        if self.steered is None:
            return list(range(len(self.ids)))
        rows: list[int] = self.steered.nonzero()[:, 0].tolist()
        return rows


@dataclass(frozen=True)
class Draws:
    """The tokens that were drawn, and the figures of the draw.

    Attributes:
        tokens: (B, 1).
        choice: (B,) column of each drawn token among the candidates that were proposed.
        ids: (B, K) candidates that were drawn from: the proposed ones, or of them those with the largest sums.
        log_probs: (B, K) their policy log-probabilities.
        guided: (B, K) their guided log-probabilities.
        scores: (B, K) their scores; None where nothing was scored.
        scores_each: (S, B, K) scores of each of several scorers.
        figures: for each row, on the host: token, policy log-probability (over the whole vocabulary), guided
            log-probability, policy log-probability among the candidates, whether the policy is finite, and, where
            scores were given: the score, whether all scores are finite, whether the row was steered. With a KL budget,
            the last one is the step's KL; with a threshold, whether the policy's own draw stands.
        finite: whether all rows' policies and scores are finite.
    """

    tokens: Tensor
    choice: Tensor
    ids: Tensor
    log_probs: Tensor
    guided: Tensor
    scores: Tensor | None
    scores_each: Tensor | None
    figures: list[list[float]]
    finite: bool


def propose_candidates(
    log_probs: Float[Tensor, "batch vocab"], allowed: Float[Tensor, "batch vocab"], params: SamplingParams
) -> Candidates:
    """Candidates of rows that share their sampling parameters.

    Args:
        log_probs: (B, V) the policy's log-probabilities, in nats.
        allowed: (B, V) the same after each row's processors.
        params: say which tokens are candidates, and which rows are steered.
    """
    ids, candidate_log_probs = propose(
        allowed, top_k=None if params.top_k_of_sums else params.top_k, top_p=params.top_p, vocabulary=params.vocabulary
    )
    steered = None if params.entropy_gate is None else entropy(log_probs) > params.entropy_gate
    return Candidates(log_probs, ids, candidate_log_probs, steered)


def propose(
    policy_log_probs: Float[Tensor, "batch vocab"],
    *,
    top_k: int | None,
    top_p: float = 1.0,
    vocabulary: Vocabulary | None = None,
) -> tuple[Int[Tensor, "batch candidates"], Float[Tensor, "batch candidates"]]:
    """The k most likely next tokens V_k, cut to their nucleus.

    Of the top k, the smallest leading set whose probability, renormalised over the k, reaches ``top_p`` is kept (always
    the first); the others get a log-probability of -inf, so that rows stay rectangular.

    Args:
        policy_log_probs: (B, V) in nats; -inf for banned tokens.
        top_k: candidates per row; None, or at least V, takes all V, unsorted where nothing is cut.
        top_p: in (0, 1]; 1 keeps all k.
        vocabulary: the ids that can be candidates; None is all.

    Returns:
        Token ids and policy log-probabilities (nats, over all rows of the output layer), both (B, K), likeliest first
        (all V without a nucleus: in the order of their ids).

    >>> ids, log_probs = propose(torch.tensor([[0.1, 0.6, 0.3]]).log(), top_k=2)
    >>> ids.tolist()
    [[1, 2]]
    """
    if vocabulary is not None and (vocabulary.missing or policy_log_probs.shape[-1] > vocabulary.size):
        policy_log_probs = vocabulary.restrict(policy_log_probs)
    k = policy_log_probs.shape[-1] if top_k is None else min(top_k, policy_log_probs.shape[-1])
    if k == policy_log_probs.shape[-1] and top_p == 1:
        ids = torch.arange(k, device=policy_log_probs.device).expand_as(policy_log_probs)
        return ids, policy_log_probs
    log_probs, ids = policy_log_probs.topk(k, dim=-1)
    if top_p < 1:
        probabilities = torch.softmax(log_probs.float(), -1)
        before = probabilities.cumsum(-1) - probabilities
        outside = before >= top_p
        outside[..., 0] = False
        log_probs = log_probs.masked_fill(outside, -torch.inf)
    return ids, log_probs


def guided_log_probs(
    candidate_log_probs: Float[Tensor, "batch candidates"],
    scores: Float[Tensor, "batch candidates"],
    beta: float | Float[Tensor, "batch 1"],
    temperature: float = 1.0,
) -> Float[Tensor, "batch candidates"]:
    """Log-probabilities of π̃(v) ∝ [π(v)·exp(β·r(prefix⊕v))]^{1/T} over the candidates.

    Source: PARGS, arXiv 2406.07780, eq. 5 with a temperature on the guided distribution. At T = 0 all mass is on
    the first maximum of log π + β·r.

    Args:
        candidate_log_probs: (B, K) policy log-probabilities in nats; -inf excludes a candidate.
        scores: (B, K) scorer's scores; those of excluded candidates do not matter.
        beta: guidance strength, for all rows or one each; 0 is the policy cut to the candidates.
        temperature: ≥ 0.

    Returns:
        (B, K) fp32, in nats, each row summing to 1 in probability.

    >>> guided_log_probs(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]]), beta=1.0).exp()
    tensor([[0.2689, 0.7311]])
    """
    # float64, and the maximum at 0 before dividing: a huge beta or a tiny temperature must not overflow to NaN
    excluded = candidate_log_probs == -torch.inf
    combined = candidate_log_probs.double() + beta * scores.double().masked_fill(excluded, 0.0)
    if temperature == 0:
        best = combined.argmax(-1, keepdim=True)
        return torch.full_like(combined, -torch.inf, dtype=torch.float32).scatter(-1, best, 0.0)
    below_best = combined - combined.amax(-1, keepdim=True)
    return torch.log_softmax(below_best / temperature, -1).float()


def step_kl(
    guided: Float[Tensor, "batch candidates"], policy_log_probs: Float[Tensor, "batch candidates"]
) -> Float[Tensor, " batch"]:
    """KL Σ_v π̃(v)·log(π̃(v)/π(v)) of one step in nats, fp64: its expectation, whatever is drawn.

    Args:
        guided: (B, K) log π̃ of the candidates; -inf has no part.
        policy_log_probs: (B, K) log π of the same tokens over the whole vocabulary, so that the cut to the candidates
            counts: it alone takes −log Σ_v π(v).

    >>> step_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.25]]).log())
    tensor([0.6931], dtype=torch.float64)
    """
    log_ratio = (guided.double() - policy_log_probs.double()).masked_fill(guided == -torch.inf, 0.0)
    return (guided.double().exp() * log_ratio).sum(-1)


def beta_within_kl(
    candidate_log_probs: Float[Tensor, "batch candidates"],
    policy_log_probs: Float[Tensor, "batch candidates"],
    scores: Float[Tensor, "batch candidates"],
    allowed: Float[Tensor, " batch"],
) -> Float[Tensor, "batch 1"]:
    """The β of each row at which one step's KL is what is allowed, from 0 to 60/(max r − min r).

    The KL of π·exp(β·r)/Z rises with β, by β·Var(r): Newton's steps, kept within a bracket. No model is called.

    Args:
        candidate_log_probs: (B, K) after the row's processors, in nats; -inf excludes a candidate.
        policy_log_probs: (B, K) log π of the same tokens over the whole vocabulary.
        scores: (B, K) those of excluded candidates do not matter.
        allowed: (B,) nats of this step.

    >>> log_probs, scores = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]])
    >>> beta = beta_within_kl(log_probs, log_probs, scores, torch.tensor([0.1]))
    >>> step_kl(guided_log_probs(log_probs, scores, beta), log_probs).round(decimals=4)
    tensor([0.1000], dtype=torch.float64)
    """
    excluded = candidate_log_probs == -torch.inf
    lowest = scores.double().masked_fill(excluded, torch.inf).amin(-1, keepdim=True)
    r = (scores.double() - lowest).masked_fill(excluded, 0.0)
    target = allowed.double()[:, None].to(r.device)
    largest = 60 / r.amax(-1, keepdim=True)  # infinite where all candidates score the same
    steerable = largest.isfinite()

    def at(beta: Tensor) -> tuple[Tensor, Tensor]:
        """KL (B, 1), and the variance of r (B, 1)."""
        log_p = torch.log_softmax(candidate_log_probs.double() + beta * r, -1)
        p = log_p.exp()
        variance = (p * (r - (p * r).sum(-1, keepdim=True)).square()).sum(-1, keepdim=True)
        return step_kl(log_p, policy_log_probs)[:, None], variance.clamp(min=1e-300)

    low, high = torch.zeros_like(target), largest.where(steerable, 0.0)
    unguided, variance = at(low)
    strongest, _ = at(high)
    # 1. a small KL is β²·Var(r)/2 more than that of no guidance
    beta = torch.sqrt(2 * (target - unguided).clamp(min=0) / variance).minimum(high)
    # 2. Newton's steps; one that leaves the bracket halves it
    settled = ~steerable | (unguided >= target) | (strongest <= target)
    for _ in range(_KL_STEPS):
        kl, variance = at(beta)
        if bool((settled | ((kl - target).abs() <= _KL_ERROR * (target - unguided))).all()):
            break
        low, high = beta.where(kl <= target, low), beta.where(kl > target, high)
        step = beta - (kl - target) / (beta * variance).clamp(min=1e-300)
        beta = step.where((step > low) & (step < high), (low + high) / 2)
    beta = largest.where(strongest <= target, beta)
    return beta.where(steerable & (unguided < target), 0.0)


def filtered_log_probs(
    candidate_log_probs: Float[Tensor, "batch candidates"],
    scores: Float[Tensor, "batch candidates"],
    threshold: float,
    temperature: float = 1.0,
) -> Float[Tensor, "batch candidates"]:
    """Log-probabilities of the policy restricted to good candidates, π̃(v) ∝ π(v)^{1/T}·1[r(prefix⊕v) ≥ c].

    Where no candidate is good, the one of highest score has all the mass. Source: value-filtered decoding,
    arXiv 2605.14746, with the k candidates in place of repeated draws.

    Args:
        candidate_log_probs: (B, K) in nats; -inf excludes a candidate.
        scores: (B, K) those of excluded candidates do not matter.
        threshold: c.
        temperature: ≥ 0, of the policy.

    >>> log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> filtered_log_probs(log_probs, torch.tensor([[-1.0, 0.0, 2.0]]), 0.0).exp()
    tensor([[0.0000, 0.5000, 0.5000]])
    """
    excluded = candidate_log_probs == -torch.inf
    good = (scores >= threshold) & ~excluded
    best = scores.masked_fill(excluded, -torch.inf).argmax(-1, keepdim=True)
    fallback = torch.zeros_like(good).scatter(-1, best, True) & ~good.any(-1, keepdim=True)
    kept = candidate_log_probs.masked_fill(~(good | fallback), -torch.inf)
    return guided_log_probs(kept, torch.zeros_like(kept), 0.0, temperature)


def keep_or_draw_again(
    own: Float[Tensor, "batch candidates"],
    filtered: Float[Tensor, "batch candidates"],
    uniforms: Float[Tensor, " batch"],
) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Draw from the policy, keep the draw if the filter lets it pass, else draw from what is left.

    If ``filtered`` is ``own`` restricted to some candidates, the result has distribution ``filtered``, and equals the
    policy's own draw as often as it can. One uniform number serves both draws: what the first leaves of it is uniform.

    Args:
        own: (B, K) log-probabilities of the policy over the candidates, in nats.
        filtered: (B, K) of the filtered policy.
        uniforms: (B,) in [0, 1).

    Returns:
        Index (B,) of the drawn candidate, and whether (B,) it is the policy's own draw.

    >>> own, filtered = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]]).log()
    >>> keep_or_draw_again(own, filtered, torch.tensor([0.7]))
    (tensor([1]), tensor([True]))
    >>> keep_or_draw_again(own, filtered, torch.tensor([0.2]))
    (tensor([1]), tensor([False]))
    """
    first = sample(own, uniforms)
    at = first[:, None]
    kept = (filtered.gather(1, at) > -torch.inf)[:, 0]
    p = own.double().exp()
    total = p.sum(-1)
    below = p.cumsum(-1).gather(1, at)[:, 0] - p.gather(1, at)[:, 0]
    rest = (uniforms.to(p) * total - below) / p.gather(1, at)[:, 0]
    again = sample(filtered, rest.clamp(0, 1 - 2**-53))
    return first.where(kept, again), kept


def best_sums(
    candidate_log_probs: Float[Tensor, "batch candidates"],
    scores: Float[Tensor, "batch candidates"],
    beta: float | Float[Tensor, "batch 1"],
    k: int,
) -> Int[Tensor, "batch kept"]:
    """Indices (B, k) of the k largest log π(v) + β·r(v), largest first: FaRMA's candidates (arXiv 2502.04517).

    >>> best_sums(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.0, 0.0, 2.0]]), beta=1.0, k=2)
    tensor([[2, 0]])
    """
    excluded = candidate_log_probs == -torch.inf
    combined = candidate_log_probs.double() + beta * scores.double().masked_fill(excluded, 0.0)
    return combined.topk(min(k, combined.shape[-1]), -1).indices


def entropy(log_probs: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    """Entropy −Σ p·log p of each row in nats; what has probability zero adds nothing.

    >>> entropy(torch.tensor([[0.5, 0.5, 0.0]]).log())
    tensor([0.6931])
    """
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def greedy(log_probs: Float[Tensor, "batch candidates"]) -> Int[Tensor, " batch"]:
    """Index (B,) of the first maximum of each row."""
    return log_probs.argmax(-1)


def sample(log_probs: Float[Tensor, "batch candidates"], uniforms: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Draw one candidate per row by inverse CDF, from one uniform number per row.

    The j with F(j-1) ≤ u·F(K) < F(j), in float64; a candidate of probability zero is never drawn, and the same
    uniform gives the same draw on every device.

    Args:
        log_probs: (B, K) in nats.
        uniforms: (B,) in [0, 1), each from its row's own generator.
    """
    cumulative = log_probs.double().exp().cumsum(-1)
    reached = (uniforms.to(cumulative)[:, None] * cumulative[:, -1:]).contiguous()
    drawn = torch.searchsorted(cumulative, reached, right=True)[:, 0]
    # u·F(K) can round up to F(K) itself: take the last candidate that has any probability.
    last = (log_probs > -torch.inf).long().cumsum(-1).argmax(-1)
    return torch.minimum(drawn, last)


def draw(
    candidates: Candidates,
    scores: Float[Tensor, "batch candidates"] | None,
    uniforms: Sequence[float],
    params: SamplingParams,
    scores_each: Float[Tensor, "scorers batch candidates"] | None = None,
    allowed: Sequence[float] | None = None,
) -> Draws:
    """Draw one token per row from the guided distribution.

    All figures are copied to the host in one transfer, which is the step's only synchronisation with a device.

    Args:
        candidates: of B rows.
        scores: (B, K) what steers; None leaves the policy as it is.
        uniforms: one number in [0, 1) per row, each from its row's own generator.
        params: shared by the rows.
        scores_each: (S, B, K) of several scorers, for the trace.
        allowed: nats of this step, one number per row, with a KL budget.
    """
    ids, log_probs = candidates.ids, candidates.log_probs
    plain = params.value_threshold is None and allowed is None and not params.top_k_of_sums
    if plain and ids.shape[1] <= _FEW and ids.device.type == "cpu":
        drawn = draw_few(candidates, scores, uniforms, params, scores_each)
        if drawn.finite:
            return drawn
    # 1. what multiplies the scores: β, given or found for a KL, or 0 in rows whose entropy gate is closed
    beta: float | Tensor = params.beta
    used = torch.zeros_like(log_probs) if scores is None else scores
    if params.clip and scores is not None:
        used = scores.clamp(0, 1)
    unguided = candidates.policy_log_probs.gather(1, ids) if allowed is not None else log_probs
    if allowed is not None:
        beta = beta_within_kl(log_probs, unguided, used, torch.tensor(allowed, dtype=torch.float64))
    if scores is not None and candidates.steered is not None:
        beta = beta * candidates.steered[:, None]
    # 2. FaRMA: the k largest sums are the candidates
    best = None
    if params.top_k_of_sums:
        best = best_sums(log_probs, used, beta, params.top_k or log_probs.shape[-1])
        ids, log_probs, used = ids.gather(1, best), log_probs.gather(1, best), used.gather(1, best)
        scores = None if scores is None else scores.gather(1, best)
        if scores_each is not None:
            scores_each = scores_each.gather(2, best.expand(len(scores_each), -1, -1))
    # 3. the guided distribution, and one draw from it
    temperature = 0.0 if params.greedy else params.temperature
    kept = None
    if params.value_threshold is not None:
        own = guided = guided_log_probs(log_probs, torch.zeros_like(log_probs), 0.0, temperature)
        if scores is not None:
            guided = filtered_log_probs(log_probs, used, params.value_threshold, temperature)
            if candidates.steered is not None:
                guided = guided.where(candidates.steered[:, None], own)
    else:
        guided = guided_log_probs(log_probs, used, beta, temperature)
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=guided.device)
    if params.value_threshold is not None:
        choice, kept = keep_or_draw_again(own, guided, numbers)
    elif temperature == 0:
        choice = greedy(guided)
    else:
        choice = sample(guided, numbers)
    # 4. its figures
    at = choice[:, None]
    tokens = ids.gather(1, at)
    among = log_probs.gather(1, at) - log_probs.logsumexp(-1, keepdim=True)
    finite = log_probs.max(-1, keepdim=True).values.isfinite()
    columns = [tokens.double(), candidates.policy_log_probs.gather(1, tokens).double(), guided.gather(1, at).double()]
    columns += [among.double(), finite.double()]
    if scores is not None:
        steered = torch.ones_like(choice) if candidates.steered is None else candidates.steered
        columns += [scores.gather(1, at).double(), scores.isfinite().all(-1, keepdim=True).double()]
        columns.append(steered[:, None].double())
    if kept is not None:
        columns.append(kept[:, None].double())
    if allowed is not None:
        columns.append(step_kl(guided, unguided)[:, None])
    figures = torch.cat(columns, 1).tolist()
    all_finite = True
    for row in figures:
        all_finite = all_finite and bool(row[4]) and (scores is None or bool(row[6]))
    proposed = choice if best is None else best.gather(1, at)[:, 0]
    return Draws(tokens, proposed, ids, log_probs, guided, scores, scores_each, figures, all_finite)


def draw_few(
    candidates: Candidates,
    scores: Float[Tensor, "batch candidates"] | None,
    uniforms: Sequence[float],
    params: SamplingParams,
    scores_each: Float[Tensor, "scorers batch candidates"] | None = None,
) -> Draws:
    """`draw` for few candidates on the host, row by row, in Python's floats: the same tokens in a tenth of the time.

    π̃(v) ∝ [π(v)·exp(β·r(prefix⊕v))]^{1/T} as in `guided_log_probs`, and the draw as in `sample` or `greedy`. Without a
    KL budget, a value threshold or candidates of the largest sums. ``finite`` is False where a row has no distribution
    to draw from; then nothing else in the result is meant.

    Args:
        candidates: of B rows.
        scores: (B, K) what steers; None leaves the policy as it is.
        uniforms: one number in [0, 1) per row.
        params: shared by the rows.
        scores_each: (S, B, K) of several scorers, for the trace.
    """
    ids, log_probs = candidates.ids.tolist(), candidates.log_probs.tolist()
    rewards = [[0.0] * len(row) for row in log_probs] if scores is None else scores.tolist()
    steered = [scores is not None] * len(ids) if candidates.steered is None else candidates.steered.tolist()
    temperature = 0.0 if params.greedy else params.temperature
    # 1. the guided distribution of each row
    distributions: list[list[float]] = []
    normalisers: list[float] = []  # of the policy's own distribution over the candidates
    for row, (given, used) in enumerate(zip(log_probs, rewards, strict=True)):
        likeliest = max(given)
        if not (math.isfinite(likeliest) and all(map(math.isfinite, used))):
            none = candidates.ids[:, :0]
            return Draws(none, none, none, candidates.log_probs, candidates.log_probs, scores, scores_each, [], False)
        beta = params.beta if steered[row] else 0.0
        if params.clip:
            used = [min(max(score, 0.0), 1.0) for score in used]
        sums, mass = [], 0.0
        for log_prob, score in zip(given, used, strict=True):
            sums.append(log_prob + beta * score)
            mass += math.exp(log_prob - likeliest)
        normalisers.append(likeliest + math.log(mass))
        best = max(sums)
        if temperature == 0:
            distributions.append([-math.inf] * len(sums))
            distributions[row][sums.index(best)] = 0.0
        else:
            scaled = [(total - best) / temperature for total in sums]
            normaliser = math.log(sum(map(math.exp, scaled)))
            distributions.append([total - normaliser for total in scaled])
    guided = torch.tensor(distributions)  # fp32, as `guided_log_probs` gives them
    # 2. one draw of each
    choice, tokens = [], []
    for row, log_ps in enumerate(guided.tolist()):
        cumulative = list(accumulate(map(math.exp, log_ps)))
        column = bisect_right(cumulative, uniforms[row] * cumulative[-1])
        if temperature == 0 or column == len(log_ps):  # u·F(K) can round up to F(K): the first that reaches it
            column = cumulative.index(cumulative[-1])
        choice.append(column)
        tokens.append([ids[row][column]])
    # 3. its figures
    drawn = torch.tensor(tokens)
    own, chosen = candidates.policy_log_probs.gather(1, drawn).tolist(), torch.tensor(choice)
    figures = []
    for row, log_ps in enumerate(guided.gather(1, chosen[:, None]).tolist()):
        among = log_probs[row][choice[row]] - normalisers[row]
        figures.append([float(tokens[row][0]), *own[row], *log_ps, among, 1.0])
        if scores is not None:
            figures[row] += [rewards[row][choice[row]], 1.0, float(steered[row])]
    return Draws(drawn, chosen, candidates.ids, candidates.log_probs, guided, scores, scores_each, figures, True)


def take(
    candidates: Candidates,
    choice: Int[Tensor, " batch"],
    scores: Float[Tensor, "batch candidates"] | None,
) -> Draws:
    """The figures of tokens that were chosen without a draw, as `draw` gives them: they have probability 1.

    Args:
        candidates: of B rows.
        choice: (B,) column of each row's token.
        scores: (B, K) of the candidates; those of rows that are not steered do not matter.
    """
    ids, log_probs, at = candidates.ids, candidates.log_probs, choice[:, None]
    tokens = ids.gather(1, at)
    guided = torch.full(log_probs.shape, -torch.inf, device=log_probs.device).scatter(-1, at, 0.0)
    among = log_probs.gather(1, at) - log_probs.logsumexp(-1, keepdim=True)
    certain = torch.zeros_like(among).double()
    columns = [tokens.double(), candidates.policy_log_probs.gather(1, tokens).double(), certain, among.double()]
    columns.append(torch.ones_like(certain))
    if scores is not None:
        steered = torch.ones_like(choice) if candidates.steered is None else candidates.steered
        columns += [scores.gather(1, at).double(), torch.ones_like(certain), steered[:, None].double()]
    return Draws(tokens, choice, ids, log_probs, guided, scores, None, torch.cat(columns, 1).tolist(), True)


def accept_draft(
    target: Float[Tensor, "batch candidates"],
    draft: Float[Tensor, "batch candidates"],
    drafted: Int[Tensor, " batch"],
    uniforms: Float[Tensor, " batch"],
) -> tuple[Bool[Tensor, " batch"], Float[Tensor, "batch candidates"]]:
    """Accept a drafted candidate with probability min(1, p(d)/q(d)), and what to draw from where it is rejected.

    Accepted or else drawn from (p − q)₊ / Σ(p − q)₊, a token has distribution p exactly, whatever q. Source: Leviathan
    et al. 2023, arXiv 2211.17192, algorithm 1; here p is the *guided* distribution.

    Args:
        target: (B, K) log-probabilities of p in nats, normalised over the candidates.
        draft: (B, K) log-probabilities of q on the same candidates; what q gives to other tokens does not matter.
        drafted: (B,) index of the drafted candidate, or -1 for a token that is no candidate (p = 0).
        uniforms: (B,) in [0, 1).

    Returns:
        Whether each draft is accepted, and log-probabilities (B, K) of the recovered token where it is not.

    >>> p, q = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    >>> accept_draft(p, q, torch.tensor([0]), torch.tensor([0.4]))[0], accept_draft(p, q, torch.tensor([0]),
    ...     torch.tensor([0.6]))[1].exp()
    (tensor([True]), tensor([[0., 1.]]))
    """
    p, q = target.double().exp(), draft.double().exp()
    at = drafted.clamp(min=0)[:, None]
    accepted = (uniforms.to(q) * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]) & (drafted >= 0)
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    # p = q up to rounding: nothing is ever rejected there but by rounding, and p itself is right
    rest = torch.where(total > 0, rest / total.clamp(min=torch.finfo(torch.float64).tiny), p)
    return accepted, rest.log().float()


def segment_threshold(
    prompt_reward: Float[Tensor, " batch"], target: float, start: float, share: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """The reward τ that a segment should reach: it rises from its start to the target as the completion grows.

    τ = r_0 + share·(r* − r_0), at most r*, with r_0 = (1 − start)·r(x) + start·r*. Source: CARDS, arXiv 2406.16306.

    Args:
        prompt_reward: (B,) r(x), of the prompt alone.
        target: r*, the reward of a finished completion.
        start: in [0, 1].
        share: (B,) tokens of the completion so far, the segment included, of all allowed.

    >>> segment_threshold(torch.tensor([0.0]), 4.0, 0.5, torch.tensor([0.25]))
    tensor([2.5000])
    """
    first = (1 - start) * prompt_reward + start * target
    return (first + share * (target - first)).clamp(max=target)


def accept_segment(
    rewards: Float[Tensor, " batch"],
    thresholds: Float[Tensor, " batch"],
    beta: float,
    uniforms: Float[Tensor, " batch"],
) -> Bool[Tensor, " batch"]:
    """Accept each row's segment with probability min(1, exp(β·(r − τ))). Source: CARDS, arXiv 2406.16306.

    The paper divides by its β, ours multiplies. Each row has its own reward, threshold and uniform number.

    >>> accept_segment(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0]), 1.0, torch.tensor([0.9, 0.4]))
    tensor([ True, False])
    """
    return uniforms.double().log() < beta * (rewards.double() - thresholds.double())


def best_of_n_kl(n: int) -> float:
    """Upper bound ln n − (n−1)/n on the KL, in nats, of best-of-n to what it samples from (Beirami et al. 2024).

    >>> best_of_n_kl(1)
    0.0
    """
    return math.log(n) - (n - 1) / n


def effective_sample_size(log_weights: Float[Tensor, " particles"]) -> float:
    """Effective number (Σw)²/Σw² of weighted particles: n where all weigh the same, 1 where one has all the weight.

    Source: Kong, Liu and Wong 1994; the usual measure of when to resample.

    >>> round(effective_sample_size(torch.tensor([0.5, 0.25, 0.25]).log()), 3)
    2.667
    """
    weights = torch.softmax(log_weights.double(), 0)
    return float(1 / (weights * weights).sum())


def systematic_resample(log_weights: Float[Tensor, " particles"], uniform: float) -> Int[Tensor, " particles"]:
    """Ancestor of each of n particles after systematic resampling, by one uniform number.

    Particle i is copied floor(n·w_i) or ceil(n·w_i) times, n·w_i on average (w normalised). A particle that survives
    keeps its own place, so that as few rows as possible move. Source: Carpenter, Clifford and Fearnhead 1999.

    Args:
        log_weights: (n,) in nats, not normalised; not all of them -inf.
        uniform: in [0, 1).

    >>> systematic_resample(torch.tensor([0.05, 0.05, 0.65, 0.25]).log(), 0.5).tolist()
    [2, 2, 2, 3]
    """
    n = len(log_weights)
    cumulative = torch.softmax(log_weights.double(), 0).cumsum(0)
    points = (torch.arange(n, dtype=torch.float64) + uniform) / n * cumulative[-1]
    drawn = torch.searchsorted(cumulative, points, right=True).clamp(max=n - 1)
    copies = torch.bincount(drawn, minlength=n).tolist()
    extra = [i for i, count in enumerate(copies) for _ in range(count - 1)]
    return torch.tensor([i if count else extra.pop(0) for i, count in enumerate(copies)])
