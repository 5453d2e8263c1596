"""Results of ``rgtg judge``."""

from typing import Literal

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, Interval, Provenance, Record


class JudgedPair(Record):
    """A line of verdicts.jsonl: two completions of one prompt, shown to the judge in both orders."""

    a: str
    b: str
    prompt: str
    text_a: str
    text_b: str
    verdicts: list[Literal["a", "b", "tie"] | None] = Field(description="with a shown first, with b shown first")
    answers: list[str] = Field(description="of the judge, in the same order; empty if the texts are identical")
    score: float | None = Field(description="of a: mean of win 1, tie ½, loss 0 over both orders; None: one is missing")


class JudgeFailure(Record):
    """A call that gave no usable verdict after all retries."""

    a: str
    b: str
    prompt: str
    shown_first: str
    reason: str
    answer: str = Field(default="", description="the judge's last answer, if any")


class JudgeMatch(Record):
    """How often ``a`` is preferred to ``b``, without pairs that have a failed call. Intervals resample prompts."""

    a: str
    b: str
    win_rate: Interval = Field(description="of a; a tie, and a verdict that changes with the order, count ½")
    length_controlled: Interval = Field(description="win rate of a at equal lengths, by a logistic fit")
    by_length: dict[str, Interval] = Field(description="win rate of a if it is shorter, similar (10 %) or longer")
    wins: int = Field(description="a preferred over both orders together")
    ties: int
    losses: int
    consistent: Interval = Field(description="share of the judged pairs with the same verdict in both orders")
    first_preferred: Interval = Field(description="share of decided calls won by the side shown first; ½ is no bias")
    identical: int = Field(description="pairs of identical texts, which are ties without a call")
    failed: int = Field(description="pairs without a verdict in one order or both")


class JudgeUsage(Record):
    """What the answers cost. Tokens as the server counts them, or a quarter of the characters if it does not."""

    calls: int = Field(description="answers of this run")
    cached: int = Field(description="answers of earlier runs")
    retries: int = Field(description="calls that were repeated")
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    cached_completion_tokens: int
    estimated: int = Field(description="answers whose tokens are estimated")
    cost: float | None = Field(description="of this run, in the unit of the prices; None without prices")
    total_cost: float | None = Field(description="with earlier runs")


class JudgeResult(Record):
    """judge.json of ``rgtg judge``; ``agreement`` compares what humans chose with what they rejected."""

    version: int = FORMAT_VERSION
    kind: Literal["win-rate", "agreement"]
    model: str
    base_url: str
    prompt_fingerprint: str = Field(description="start of the SHA-256 of the judge's prompt")
    matches: list[JudgeMatch]
    failures: list[JudgeFailure]
    usage: JudgeUsage
    provenance: Provenance
