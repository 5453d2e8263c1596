"""``audit_rollouts``: how well a scorer ranks the candidates of one prefix, against their values from roll-outs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgtg.errors import DataError, NonFiniteError, UsageError
from rgtg.evaluation.audit import ranking_metrics
from rgtg.evaluation.audit.candidate_rollouts import CandidateRollouts, read_rollouts
from rgtg.evaluation.metrics import unit_numbers
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.base import Scorer, load_scorer, weights_of
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.tokenization.conversation import encode_source
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.types.base import Interval
from rgtg.types.rollouts import CandidateFigures, ChoiceFigures, PrefixRollouts, RolloutAuditResult

# Guidance is judged at this KL (nats per token) if no beta is given, so that scorers of any scale are comparable.
KL_PER_TOKEN = 0.1
# The completion is divided into this many equal parts, each reported separately.
PARTS = 4
# A scorer steers well if it gains at least this share of what knowing every candidate's value would gain.
WELL = 0.5


@dataclass(frozen=True)
class _CandidateTable:
    """Scores and rewards of N prefixes with K candidates and m roll-outs of each; ``clusters`` numbers the prompts."""

    log_probs: Float[Tensor, "prefixes candidates"]
    scores: Float[Tensor, "prefixes candidates"]
    rewards: Float[Tensor, "prefixes candidates rollouts"]
    fractions: Float[Tensor, " prefixes"]
    tokens: Float[Tensor, " prefixes"]
    clusters: list[int]

    def select(self, chosen: Bool[Tensor, " prefixes"]) -> "_CandidateTable":
        """The prefixes for which ``chosen`` is true."""
        clusters = [cluster for cluster, keep in zip(self.clusters, chosen.tolist(), strict=True) if keep]
        return _CandidateTable(
            self.log_probs[chosen], self.scores[chosen], self.rewards[chosen], self.fractions[chosen],
            self.tokens[chosen], clusters,
        )  # fmt: skip


def audit_rollouts(
    scorer: "Scorer | str | tuple[Any, Any]",
    rollouts: "CandidateRollouts | str | Path",
    *,
    beta: float | None = None,
    kl_nats: float | None = None,
    batch_size: int = 64,
    bootstrap: int = 1000,
    seed: int = 0,
) -> RolloutAuditResult:
    """Measure how a scorer ranks and chooses the candidates of one prefix, against their values Q̂ from roll-outs.

    Token-wise guidance depends on nothing else: it compares scores within a prefix only, so that the scorer's scale and
    any function of the prefix drop out.

    Args:
        scorer: an object with ``score_prefixes``, or with ``score`` for whole texts; a folder or hub id; or a (model,
            tokenizer) pair.
        rollouts: from ``make_rollouts``, or its file.
        beta: guidance strength; None chooses the one that costs ``kl_nats`` per token.
        kl_nats: KL per token to the policy renormalised over the candidates, at which guidance is judged (default 0.1).
        batch_size: candidates per forward pass.
        bootstrap: resamples of the prompts for the 95 % intervals.
        seed: of the bootstrap.

    Raises:
        DataError: no roll-outs.
        UsageError: both beta and kl_nats, a head on another policy's states, or a scorer that is the reward.
        NonFiniteError: scores that are NaN or infinite.
    """
    if beta is not None and kl_nats is not None:
        raise UsageError("give beta, or the KL per token (kl_nats) that chooses it, not both")
    loaded = read_rollouts(rollouts) if isinstance(rollouts, str | Path) else rollouts
    header = loaded.header
    if not loaded.rows:
        raise DataError("there are no roll-outs to audit with: the file holds no prefix")
    model: Any = load_scorer(scorer) if isinstance(scorer, str | tuple) else scorer
    _require_auditable(model, loaded)
    table = _table(loaded.rows, candidate_scores(model, loaded, batch_size))
    used = beta if beta is not None else _beta(table, KL_PER_TOKEN if kl_nats is None else kl_nats)
    options = {"seed": seed, "resamples": bootstrap}
    overall = _figures(table, used, options)
    cost = ranking_metrics.mean_kl(table.log_probs, ranking_metrics.guided_weights(table.log_probs, table.scores, used))
    return RolloutAuditResult(
        scorer=Path(model.name).name, objective=model.info.objective if model.info else "unknown",
        reward=header.reward, prompts=len(set(table.clusters)), prefixes=len(loaded.rows), candidates=header.candidates,
        per_candidate=header.per_candidate, beta=used, kl_nats=cost,
        standard_error=float(ranking_metrics.standard_error(table.rewards).square().mean().sqrt()),
        overall=overall, by_position=_by_position(table, used, options), verdict=verdict(overall, cost),
        provenance=provenance(
            command="rgtg audit --rollouts",
            settings={"beta": beta, "kl_nats": kl_nats, "bootstrap": bootstrap, "rollouts": header.model_dump(
                include={"seed", "candidates", "per_candidate", "max_new_tokens"})},
            seed=seed, models={"scorer": weights_of(model)},
            data={"prompts": header.prompts, "policy": header.policy, "reward": header.reward_fingerprint},
        ),
    )  # fmt: skip


def candidate_scores(
    scorer: Any, rollouts: CandidateRollouts, batch_size: int = 64
) -> Float[Tensor, "prefixes candidates"]:
    """The scorer's score of every candidate v, (N, K) in fp32: the score of prompt ⊕ prefix ⊕ v.

    A scorer with the policy's tokenizer reads the policy's token ids, as guidance does. A scorer with another
    tokenizer or, for chats, another chat template, or one that scores texts only, reads the decoded text.

    Raises:
        NonFiniteError: NaN or infinite scores.
    """
    rows = rollouts.rows
    same = hasattr(scorer, "score_prefixes") and tokenizer_hash(scorer.tokenizer) == rollouts.header.tokenizer
    kwargs = rollouts.header.chat_template_kwargs
    if same and isinstance(scorer, PrefixScorer):  # other scorers of tokens read chats as the policy does
        same = all(_reads_alike(scorer, row, kwargs) for row in {row.prompt: row for row in rows}.values())
    flat = _score_ids(scorer, rows, batch_size) if same else _score_texts(scorer, rows, batch_size, kwargs)
    scores = torch.tensor(flat, dtype=torch.float32).reshape(len(rows), -1)
    if not bool(scores.isfinite().all()):
        raise NonFiniteError("the scorer returned NaN or infinite scores; try dtype=float32, or check its training")
    return scores


def verdict(overall: CandidateFigures, kl_nats: float) -> str:
    """Say whether guidance with this scorer gains reward, and how much of the possible gain.

    Whether it gains follows from the interval of the guided gain, which noise does not bias. The share of the possible
    gain is ``steering``. It is unknown if noise hides the differences between candidates.
    """
    share, gain = overall.steering, overall.guided.gain
    if overall.tied == overall.prefixes:
        return "No verdict: at every prefix all candidates have the same value; this reward does not distinguish them."
    figures = (
        f"at {kl_nats:.2f} nats per token one guided token gains {gain.mean:+.3g} in the reward ({gain.low:+.3g} to "
        f"{gain.high:+.3g}); always taking the best candidate gains between {overall.best_gain_low.mean:+.3g} and "
        f"{overall.best_gain.mean:+.3g}"
    )
    if gain.high < 0:
        return f"Steers away from the reward: {figures}."
    if gain.low <= 0:
        return f"No evidence that it steers: {figures}."
    if math.isnan(share.mean) or share.high - share.low > 1:
        return f"Steers, but the noise of the roll-outs hides how well (use more prefixes): {figures}."
    part = f"{share.mean:.0%} ({share.low:.0%} to {share.high:.0%}) of what knowing every candidate's value would gain"
    return f"Steers {'well' if share.mean >= WELL else 'weakly'}: {figures}; that is {part}."


def _require_auditable(model: Any, rollouts: CandidateRollouts) -> None:
    """Reject scorers that need a policy to score, heads on another policy, and the reward of the roll-outs itself."""
    header = rollouts.header
    if not hasattr(model, "score_prefixes") and not hasattr(model, "score"):
        raise UsageError(
            f"{type(model).__name__} is fused with a policy and cannot score on its own: load it by its folder"
        )
    own_state = isinstance(model, OwnStateScorer)
    if own_state and header.policy not in {fingerprint_weights(model.model), *model.info.base_fingerprints}:
        raise UsageError(
            f"the head {model.name} reads the states of {model.info.base_model}, and the roll-outs are of another "
            "policy: make roll-outs with that one"
        )
    if fingerprint_weights(weights_of(model)) == header.reward_fingerprint:
        raise UsageError(
            f"the scorer {model.name} is the reward of these roll-outs: it would be judged by itself. Make them with a "
            "reward trained on other pairs (rgtg train --objective full-bt)"
        )


def _reads_alike(scorer: PrefixScorer, row: PrefixRollouts, kwargs: dict[str, Any] | None) -> bool:
    """Whether a scorer's own chat template gives the prompt's tokens that the policy's has given."""
    if row.messages is None or not getattr(scorer.tokenizer, "chat_template", None):
        return True
    return encode_source(scorer.tokenizer, row.messages, template_kwargs=kwargs)[1] == row.prompt_ids


def _score_ids(scorer: Any, rows: Sequence[PrefixRollouts], batch_size: int) -> list[float]:
    """Scores of all candidates, prefix by prefix, from the policy's token ids."""
    prefixes = [[*row.prompt_ids, *row.written_ids] for row in rows for _ in row.candidate_ids]
    candidates = [[token] for row in rows for token in row.candidate_ids]
    return [float(s[-1]) for s in scorer.score_prefixes(prefixes, candidates, batch_size=batch_size)]


def _score_texts(
    scorer: Any, rows: Sequence[PrefixRollouts], batch_size: int, kwargs: dict[str, Any] | None
) -> list[float]:
    """Scores of all candidates, prefix by prefix, from the decoded texts."""
    texts = [text for row in rows for text in row.candidate_texts]
    prompts = [row.source for row in rows for _ in row.candidate_texts]
    finished = [end and of[0] for row in rows for end, of in zip(row.ended, row.finished, strict=True)]
    more = {"chat_template_kwargs": kwargs} if kwargs else {}
    scores: list[float] = scorer.score(prompts, texts, finished=finished, batch_size=batch_size, **more)
    return scores


def _table(rows: Sequence[PrefixRollouts], scores: Float[Tensor, "prefixes candidates"]) -> _CandidateTable:
    return _CandidateTable(
        log_probs=torch.tensor([row.policy_log_probs for row in rows], dtype=torch.float64),
        scores=scores.double(),
        rewards=torch.tensor([row.rewards for row in rows], dtype=torch.float64),
        fractions=torch.tensor([row.fraction for row in rows], dtype=torch.float64),
        tokens=torch.tensor([len(row.written_ids) for row in rows], dtype=torch.float64),
        clusters=unit_numbers([row.prompt for row in rows]).tolist(),
    )


def _beta(table: _CandidateTable, kl_nats: float) -> float:
    if not (math.isfinite(kl_nats) and kl_nats > 0):
        raise UsageError(f"kl_nats = {kl_nats}: expected a positive number of nats per token, such as {KL_PER_TOKEN}")
    return ranking_metrics.beta_for_kl(table.log_probs, table.scores, kl_nats)


def _by_position(table: _CandidateTable, beta: float, options: dict[str, Any]) -> list[CandidateFigures]:
    """Figures of each part of the completion that has prefixes, from first to last."""
    part = (table.fractions * PARTS).long()
    return [
        _figures(table.select(part == i), beta, options, (i + 1) / PARTS)
        for i in range(PARTS)
        if bool((part == i).any())
    ]


def _figures(
    table: _CandidateTable, beta: float, options: dict[str, Any], position: float | None = None
) -> CandidateFigures:
    def interval(columns: Tensor, statistic: Callable[[Tensor], Tensor] = lambda means: means[..., 0]) -> Interval:
        stacked = columns[:, None] if columns.dim() == 1 else columns
        return ranking_metrics.clustered_interval(stacked, statistic, table.clusters, **options)

    rewards = table.rewards - table.rewards[:, :1].mean(-1, keepdim=True)  # only differences within a prefix matter
    q, policy = rewards.mean(-1), torch.softmax(table.log_probs, -1)  # (N, K) both
    order = ranking_metrics.with_ties(q)
    # value per prefix (N,) of sampling from the policy, and of the best candidate: too high, and too low
    drawn, best, split = (policy * q).sum(-1), q.amax(-1), ranking_metrics.split_best(rewards)
    tied = (order == order[:, :1]).all(-1)
    reliability = _reliability(rewards)

    def choice(weights: Tensor) -> ChoiceFigures:  # (N, K)
        value = (weights * q).sum(-1)  # (N,)
        normalised = interval(torch.stack([best - value, best - drawn], -1), ranking_metrics.ratio)
        return ChoiceFigures(
            gain=interval(value - drawn), regret=interval(best - value), regret_low=interval(split - value),
            normalised_regret=normalised,
        )  # fmt: skip

    return CandidateFigures(
        position=position, tokens=float(table.tokens.mean()), prefixes=len(q), tied=int(tied.sum()),
        spearman=interval(_rank_correlation(ranking_metrics.spearman, table.scores, order, tied)),
        kendall=interval(_rank_correlation(ranking_metrics.kendall, table.scores, order, tied)),
        reliability=reliability, ceiling=math.sqrt(reliability) if reliability >= 0 else math.nan,
        steering=interval(ranking_metrics.moments(table.log_probs, table.scores, rewards), ranking_metrics.correlation),
        best_gain=interval(best - drawn), best_gain_low=interval(split - drawn),
        scorer=choice(ranking_metrics.argmax_weights(table.log_probs, table.scores)),
        guided=choice(ranking_metrics.guided_weights(table.log_probs, table.scores, beta)),
        policy=choice(policy), policy_greedy=choice(ranking_metrics.argmax_weights(table.log_probs, table.log_probs)),
    )  # fmt: skip


def _rank_correlation(
    measure: Callable[[Tensor, Tensor], Tensor],
    scores: Float[Tensor, "prefixes candidates"],
    q: Float[Tensor, "prefixes candidates"],
    tied: Bool[Tensor, " prefixes"],
) -> Float[Tensor, " prefixes"]:
    """Rank correlation: NaN if the values tie (there is no order), 0 if only the scores tie (the scorer has none)."""
    return measure(scores, q).nan_to_num(0.0).masked_fill(tied, math.nan)


def _reliability(rewards: Float[Tensor, "prefixes candidates rollouts"]) -> float:
    """Spearman–Brown 2r/(1+r) of the mean split-half rank correlation r; NaN with one roll-out, or if all tie."""
    if rewards.shape[-1] < 2:
        return math.nan
    one, other = ranking_metrics.halves(rewards)
    r = float(ranking_metrics.spearman(ranking_metrics.with_ties(one), ranking_metrics.with_ties(other)).nanmean())
    return 2 * r / (1 + r) if r > -1 else -math.inf
