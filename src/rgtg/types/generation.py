"""Preference pairs, and completions with their traces."""

from typing import Any, Literal

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, Record, is_none


class PreferencePair(Record):
    """One human (or synthetic) choice between two completions of one prompt, as text.

    ``prompt_templated`` is true if a chat template rendered the prompt: the text then holds the special tokens already.
    """

    prompt: str
    chosen: str
    rejected: str
    prompt_templated: bool = False


class StepTrace(Record):
    """One decoding step: every candidate with its log-probabilities (nats) and score."""

    token_id: int
    candidate_ids: list[int]
    policy_log_probs: list[float]
    scores: list[float] | None = Field(
        default=None, description="one per candidate; None without guidance; Σ β_j·r_j of several scorers"
    )
    scores_of_each: list[list[float]] | None = Field(default=None, description="one list for each of several scorers")
    guided_log_probs: list[float]


# OpenAI has no word for a text that was abandoned because of its score; content_filter is the nearest.
OpenAIFinishReason = Literal["stop", "length", "content_filter"]
OPENAI_FINISH_REASONS: dict[str, OpenAIFinishReason] = {
    "stop": "stop", "length": "length", "abstained": "content_filter",
}  # fmt: skip


class Completion(Record):
    """One generated completion: a line of the output of ``rgtg generate``."""

    version: int = FORMAT_VERSION
    id: str | None = Field(default=None, description="of its row in a file of prompts; row-NUMBER if the row has none")
    prompt: str = Field(description="of a chat: as the policy's chat template writes it")
    messages: list[dict[str, Any]] | None = Field(
        default=None, exclude_if=is_none, description="of a chat; other models render them by their own chat template"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, exclude_if=is_none, description="variables of the chat template, if some were given"
    )
    text: str
    token_ids: list[int] = Field(description="of the completion without the prompt, with the final EOS")
    finish_reason: Literal["stop", "length", "abstained"] = Field(
        description="EOS or a stop text; max_new_tokens; a score below abstain_below"
    )
    method: str
    seed: int = Field(description="of this completion's own generator")
    policy_log_prob: float = Field(description="nats, of token_ids under the policy (its whole output layer, T=1)")
    guided_log_prob: float = Field(description="nats, of token_ids under the distribution they were sampled from")
    candidates_log_prob: float | None = Field(
        default=None, description="nats, of token_ids under the policy renormalised over each step's candidates, T=1"
    )
    selection_nats: float = Field(
        default=0.0,
        description="nats that selecting among samples adds to guided − policy: a bound (best-of-n, cd-blockwise) or "
        "an estimate (cards, smc)",
    )
    score: float | None = Field(default=None, description="the last score, or the reward that selected it")
    touched: int | None = Field(default=None, description="vfd: tokens that replace the policy's own draw")
    expected_kl_nats: float | None = Field(
        default=None,
        description="with kl_budget: nats, sum over the steps of the KL of the guided distribution to the policy",
    )
    log_normaliser: float | None = Field(
        default=None, description="smc: estimate of log Σ π(y)·exp(β·r(y)) over all completions, in nats"
    )
    weight: float | None = Field(default=None, description="of one of several weighted completions; they sum to 1")
    policy_calls: int = 0
    scorer_calls: int = 0
    drafted: int = Field(default=0, description="tokens proposed by speculative decoding")
    accepted: int = Field(default=0, description="of those, how many were accepted")
    candidates: int = Field(default=0, description="next tokens scored by a scorer with another tokenizer, without EOS")
    retokenised: int = Field(default=0, description="of those, how many are not exactly one token of the scorer")
    unscored: int = Field(default=0, description="tokens that such a scorer did not read because its context was full")
    trace: list[StepTrace] | None = None

    @property
    def source(self) -> str | list[dict[str, Any]]:
        """The prompt for a model with a chat template of its own: the messages of a chat, else the text."""
        return self.prompt if self.messages is None else self.messages
