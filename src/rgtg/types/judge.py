"""Results of `rgtg judge`."""

from typing import Literal

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, Interval, Provenance, Record


class JudgedPair(Record):
    """Two completions of one prompt, shown to a judge in both orders; a line of verdicts.jsonl."""

    a: str
    b: str
    prompt: str
    text_a: str
    text_b: str
    verdicts: list[Literal["a", "b", "tie"] | None] = Field(description="with a shown first, with b shown first")
    answers: list[str] = Field(description="the judge's words, in the same order; none where the texts are identical")
    score: float | None = Field(description="of a: mean of win 1, tie ½, loss 0 over both orders; None: unanswered")


class JudgeFailure(Record):
    """A call without a usable verdict, after all retries."""

    a: str
    b: str
    prompt: str
    shown_first: str
    reason: str
    answer: str = Field(default="", description="the judge's last words, if it said any")


class JudgeMatch(Record):
    """How often ``a`` is preferred to ``b``; pairs with a failed call are left out. Intervals resample prompts."""

    a: str
    b: str
    win_rate: Interval = Field(description="of a; a tie, and a verdict that turns with the order, count one half")
    length_controlled: Interval = Field(description="win rate of a where both were of equal length, by a logistic fit")
    by_length: dict[str, Interval] = Field(description="win rate of a where it is shorter, similar (10 %) or longer")
    wins: int = Field(description="a preferred over both orders together")
    ties: int
    losses: int
    consistent: Interval = Field(description="share of the judged pairs with one verdict in both orders")
    first_preferred: Interval = Field(description="share of decided calls won by the side shown first; ½: no bias")
    identical: int = Field(description="pairs with the same text twice: ties that no judge was asked about")
    failed: int = Field(description="pairs without a verdict in one order or both")


class JudgeUsage(Record):
    """What the answers cost. Tokens as the server counts them, or a quarter of the characters where it does not."""

    calls: int = Field(description="answers paid for in this run")
    cached: int = Field(description="answers that an earlier run had paid for")
    retries: int = Field(description="calls that the client had to repeat")
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    cached_completion_tokens: int
    estimated: int = Field(description="answers whose tokens are an estimate")
    cost: float | None = Field(description="of this run, in the unit of the prices; None without prices")
    total_cost: float | None = Field(description="with the answers paid for earlier")


class JudgeResult(Record):
    """What ``rgtg judge`` writes as judge.json; in ``agreement``, human choices meet what they rejected."""

    version: int = FORMAT_VERSION
    kind: Literal["win-rate", "agreement"]
    model: str
    base_url: str
    prompt_fingerprint: str = Field(description="start of the SHA-256 of the judge's prompt")
    matches: list[JudgeMatch]
    failures: list[JudgeFailure]
    usage: JudgeUsage
    provenance: Provenance
