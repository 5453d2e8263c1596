"""The file formats of the audit of candidates: roll-outs, and the results of a scorer on them."""

from typing import Any, Literal

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, Interval, Provenance, Record, is_none


class RolloutHeader(Record):
    """First line of a file of roll-outs: everything that its numbers depend on."""

    version: int = FORMAT_VERSION
    kind: Literal["rollouts"] = "rollouts"
    policy: str = Field(description="fingerprint of the policy's weights")
    tokenizer: str = Field(description="hash of the policy's tokenizer")
    reward: str = Field(description="name of the held-out reward")
    reward_fingerprint: str = Field(description="of its weights, or of the source of a Python function")
    prompts: str = Field(description="fingerprint of the prompts and their order")
    seed: int
    candidates: int = Field(description="next tokens tried at each prefix: the policy's most likely")
    per_candidate: int = Field(description="roll-outs of each candidate")
    max_new_tokens: int = Field(description="of a whole completion, with the prefix")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, exclude_if=is_none, description="variables of the chat template, if some were given"
    )
    chat_templates: list[str | None] | None = Field(
        default=None, exclude_if=is_none, description="hashes, of the policy's and the reward's, if there are chats"
    )
    provenance: Provenance


class PrefixRollouts(Record):
    """A further line: one prefix, its K candidates, and m roll-outs of each. Ids are the policy's."""

    index: int
    prompt: str = Field(description="of a chat: as the policy's chat template writes it")
    messages: list[dict[str, Any]] | None = Field(default=None, exclude_if=is_none, description="of a chat")
    prompt_ids: list[int]
    written_ids: list[int] = Field(description="the completion so far; it may be empty")
    fraction: float = Field(description="of its completion that the prefix holds, in [0, 1)")
    candidate_ids: list[int]
    policy_log_probs: list[float] = Field(description="(K,) nats, over the whole vocabulary")
    candidate_texts: list[str] = Field(description="(K,) the completion so far with the candidate")
    ended: list[bool] = Field(description="(K,) no roll-out is needed: EOS, or max_new_tokens")
    texts: list[list[str]] = Field(description="(K, m) finished completions; a single one if the candidate ends it")
    finished: list[list[bool]] = Field(description="(K, m) false: cut off at max_new_tokens")
    rewards: list[list[float]] = Field(description="(K, m) held-out reward of each finished completion")

    @property
    def source(self) -> str | list[dict[str, Any]]:
        """The prompt for a model with a chat template of its own: the messages of a chat, else the text."""
        return self.prompt if self.messages is None else self.messages


class ChoiceFigures(Record):
    """One way to choose among candidates, in reward per choice. The best candidate's value is only known within bounds.

    ``regret`` takes the largest estimate as the best, which is too large because of noise. ``regret_low`` picks the
    best on one half of the roll-outs and evaluates it on the other, which is too small.
    """

    gain: Interval = Field(description="over sampling from the policy, renormalised over the candidates; unbiased")
    regret: Interval
    regret_low: Interval
    normalised_regret: Interval = Field(description="regret / that of sampling from the policy; 1 is no better")


class CandidateFigures(Record):
    """How well a scorer ranks the candidates of a prefix, over a set of prefixes."""

    position: float | None = Field(default=None, description="upper limit of the prefixes' fraction; None: all")
    tokens: float = Field(description="mean length of the prefixes")
    prefixes: int
    tied: int = Field(description="prefixes whose candidates all have the same estimate, without a correlation")
    spearman: Interval
    kendall: Interval
    reliability: float = Field(description="of the estimated ranking: split-half Spearman, for all roll-outs")
    ceiling: float = Field(description="Spearman of a perfect scorer against these estimates")
    steering: Interval = Field(description="policy-weighted correlation with the true values, corrected for noise")
    best_gain: Interval = Field(description="gain of the best candidate, biased upwards")
    best_gain_low: Interval = Field(description="the same, biased downwards")
    scorer: ChoiceFigures = Field(description="the candidate with the highest score")
    guided: ChoiceFigures = Field(description="sampling from the guided distribution")
    policy: ChoiceFigures = Field(description="sampling from the policy, renormalised over the candidates")
    policy_greedy: ChoiceFigures = Field(description="the policy's most likely token")


class RolloutAuditResult(Record):
    """rollout-audit.json of ``rgtg audit --rollouts``."""

    version: int = FORMAT_VERSION
    scorer: str
    objective: str
    reward: str
    prompts: int
    prefixes: int
    candidates: int
    per_candidate: int
    beta: float = Field(description="of the guided policy")
    kl_nats: float = Field(description="mean KL per token at this beta, to the policy renormalised over the candidates")
    standard_error: float = Field(description="root mean square Monte-Carlo error of one candidate's value")
    overall: CandidateFigures
    by_position: list[CandidateFigures]
    verdict: str
    provenance: Provenance
