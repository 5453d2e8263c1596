"""The file formats of the audit of candidates: roll-outs, and what a scorer makes of them."""

from typing import Literal

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, Interval, Provenance, Record


class RolloutHeader(Record):
    """First line of a roll-outs file: all that its figures depend on. Files of another header are never mixed."""

    version: int = FORMAT_VERSION
    kind: Literal["rollouts"] = "rollouts"
    policy: str = Field(description="fingerprint of the policy's weights")
    tokenizer: str = Field(description="hash of what the policy's tokenizer does")
    reward: str = Field(description="name of the held-out reward")
    reward_fingerprint: str = Field(description="of its weights, or of the source of a Python function")
    prompts: str = Field(description="fingerprint of the prompts and their order")
    seed: int
    candidates: int = Field(description="next tokens tried at each prefix: the policy's likeliest")
    per_candidate: int = Field(description="roll-outs of each candidate")
    max_new_tokens: int = Field(description="of a whole completion, the prefix included")
    provenance: Provenance


class PrefixRollouts(Record):
    """A further line: one prefix, its K candidates, and the policy's m ways on from each. Ids are the policy's."""

    index: int
    prompt: str
    prompt_ids: list[int]
    written_ids: list[int] = Field(description="the completion so far; it may be empty")
    fraction: float = Field(description="of the completion it was cut from that was written, in [0, 1)")
    candidate_ids: list[int]
    policy_log_probs: list[float] = Field(description="(K,) nats, over the whole vocabulary")
    candidate_texts: list[str] = Field(description="(K,) the completion so far with the candidate")
    ended: list[bool] = Field(description="(K,) nothing was left to roll out: EOS, or max_new_tokens")
    texts: list[list[str]] = Field(description="(K, m) finished completions; one, where the candidate ended it")
    finished: list[list[bool]] = Field(description="(K, m) whether each ended, or was cut off at max_new_tokens")
    rewards: list[list[float]] = Field(description="(K, m) held-out reward of each finished completion")


class ChoiceFigures(Record):
    """One way to choose among candidates, in reward per choice; the best candidate's value is only known within bounds.

    ``regret`` takes the largest estimate for the best, which noise makes too large; ``regret_low`` picks the best on
    one half of the roll-outs and reads it on the other, which makes it too small.
    """

    gain: Interval = Field(description="over sampling from the policy (cut to the candidates); unbiased")
    regret: Interval
    regret_low: Interval
    normalised_regret: Interval = Field(description="regret over that of sampling from the policy: 1 is no better")


class CandidateFigures(Record):
    """How a scorer orders and chooses the candidates of one prefix, over a set of prefixes."""

    position: float | None = Field(default=None, description="prefixes below this fraction of their completion; or all")
    tokens: float = Field(description="mean number of tokens written")
    prefixes: int
    tied: int = Field(description="prefixes whose candidates all have the same estimate; no correlation there")
    spearman: Interval
    kendall: Interval
    reliability: float = Field(description="of the estimated order: split-half Spearman, stepped up to all roll-outs")
    ceiling: float = Field(description="Spearman that a perfect scorer could show against these estimates")
    steering: Interval = Field(description="policy-weighted correlation with the true values, noise taken off")
    best_gain: Interval = Field(description="gain of the best candidate, too high")
    best_gain_low: Interval = Field(description="the same, too low")
    scorer: ChoiceFigures = Field(description="the scorer's candidate of highest score")
    guided: ChoiceFigures = Field(description="sampling from the guided distribution")
    policy: ChoiceFigures = Field(description="sampling from the policy, cut to the candidates")
    policy_greedy: ChoiceFigures = Field(description="the policy's likeliest token")


class RolloutAuditResult(Record):
    """What ``rgtg audit --rollouts`` writes as rollout-audit.json."""

    version: int = FORMAT_VERSION
    scorer: str
    objective: str
    reward: str
    prompts: int
    prefixes: int
    candidates: int
    per_candidate: int
    beta: float = Field(description="of the guided figures")
    kl_nats: float = Field(description="mean KL per token that this beta costs, to the policy cut to the candidates")
    standard_error: float = Field(description="root mean square Monte-Carlo error of one candidate's value")
    overall: CandidateFigures
    by_position: list[CandidateFigures]
    verdict: str
    provenance: Provenance
