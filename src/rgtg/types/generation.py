"""Pairs to train on, and completions with their traces."""

from typing import Literal

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, Record


class PreferencePair(Record):
    """One human (or synthetic) choice between two completions of one prompt, as plain text.

    ``prompt_templated`` is true when the prompt went through a chat template, which already wrote the special tokens.
    """

    prompt: str
    chosen: str
    rejected: str
    prompt_templated: bool = False


class StepTrace(Record):
    """One decoding step: every candidate with what policy and scorer said of it. Log-probabilities in nats."""

    token_id: int
    candidate_ids: list[int]
    policy_log_probs: list[float]
    scores: list[float] | None = Field(
        default=None, description="one per candidate; None where nothing steered; Σ β_j·r_j of several scorers"
    )
    scores_of_each: list[list[float]] | None = Field(default=None, description="of several scorers: one list for each")
    guided_log_probs: list[float]


class Completion(Record):
    """One generated completion; a line of the file ``rgtg generate --output`` writes."""

    version: int = FORMAT_VERSION
    id: str | None = Field(default=None, description="of its row in a file of prompts; row-NUMBER where it has none")
    prompt: str
    text: str
    token_ids: list[int] = Field(description="of the completion only, the closing EOS included")
    finish_reason: Literal["stop", "length"]
    method: str
    seed: int = Field(description="seed of this row's own generator")
    policy_log_prob: float = Field(description="nats, of token_ids under the policy (its whole vocabulary, T=1)")
    guided_log_prob: float = Field(description="nats, of token_ids under the distribution they were drawn from")
    candidates_log_prob: float | None = Field(
        default=None, description="nats, of token_ids under the policy renormalised over each step's candidates, T=1"
    )
    selection_nats: float = Field(
        default=0.0,
        description="what choosing among drawn texts adds to guided − policy: a bound (best-of-n, cd-blockwise), an "
        "estimate (cards)",
    )
    score: float | None = Field(default=None, description="the scorer's last score, or the reward that chose it")
    policy_calls: int = 0
    scorer_calls: int = 0
    drafted: int = Field(default=0, description="tokens drafted ahead for verification (speculative decoding)")
    accepted: int = Field(default=0, description="of those, how many were accepted")
    candidates: int = Field(default=0, description="next tokens that a scorer with another tokenizer scored, EOS aside")
    retokenised: int = Field(default=0, description="of those, how many were not exactly one token of the scorer's")
    unscored: int = Field(default=0, description="tokens that such a scorer did not read, since its context was full")
    trace: list[StepTrace] | None = None
