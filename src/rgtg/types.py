"""The file formats: what commands hand each other, as pydantic models with a version in them."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rgtg.errors import DataError

FORMAT_VERSION = 1
COMPARISON_VERSION = 2


class Record(BaseModel):
    """A line or file that rgtg writes; unknown fields are refused when it is read back.

    JSON knows no infinity: an excluded candidate's log-probability is the text "-Infinity", and reads back as a number.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")

    @classmethod
    def from_file(cls, path: Path, what: str, writer: str) -> Self:
        """Read a file that ``writer`` wrote.

        Raises:
            DataError: it cannot be read, or is not what it should be.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read the {what} {path}: {error.strerror}") from error
        except ValidationError as error:
            raise DataError(f"{path} is not what {writer} writes: {error.errors()[0]['msg']}") from error


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


class ComparedCompletion(Completion):
    """A line of a comparison's completions.jsonl: a completion, whose it is, and what it was worth."""

    row: str = Field(description="label of the row")
    run_seed: int = Field(description="one of the row's seeds; ``seed`` is derived from it and the prompt")
    prompt_index: int
    reward: float
    proxy_rewards: dict[str, float] = Field(default_factory=dict)


class Interval(Record):
    """A mean with its bootstrap interval; ``n`` is the number of independent units that were resampled."""

    mean: float
    low: float
    high: float
    n: int


class FileSum(Record):
    """Size and hash of one file."""

    bytes: int
    sha256: str


class Provenance(Record):
    """What every written result carries, so that it can be made again."""

    version: str
    git_commit: str | None = None
    command: str
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None
    models: dict[str, str] = Field(default_factory=dict, description="role → fingerprint of the weights")
    data: dict[str, str] = Field(default_factory=dict, description="role → fingerprint of the data")


class AuditPoint(Record):
    """Pairwise accuracy and margin of a scorer at one prefix length."""

    position: float = Field(description="tokens, or fraction of the completion")
    accuracy: Interval
    margin: Interval
    ties: int
    pairs: int


class AuditResult(Record):
    """What ``rgtg audit`` writes as audit.json."""

    version: int = FORMAT_VERSION
    scorer: str
    objective: str
    pairs: int
    by_tokens: list[AuditPoint]
    by_fraction: list[AuditPoint]
    full_accuracy: Interval
    calibration_error: float = Field(description="expected calibration error of σ(r_w − r_l), prefixes of all lengths")
    verdict: str
    provenance: Provenance


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


class MethodResult(Record):
    """One row of a comparison: a method with its settings, over all its seeds.

    ``rewards`` and ``proxy_rewards`` are seeds × prompts, in the order of ``seeds`` and of the prompts; ``metrics`` are
    means over them with 95 % intervals that resample prompts, the seeds of a prompt kept together. Rows of one
    ``curve`` differ in their ``strength`` alone (beta, or n of best-of-n).
    """

    label: str
    method: str
    beta: float | list[float] | None = Field(description="one per scorer where there are several")
    n: int | None = None
    curve: str | None = Field(default=None, description="label without the strength; None: a row of its own")
    strength: float | None = Field(default=None, description="beta (the first of several), or n of best-of-n")
    settings: dict[str, Any] = Field(default_factory=dict, description="all that decided the completions but the seed")
    seeds: list[int] = Field(default_factory=list, description="a row without randomness has one")
    metrics: dict[str, Interval]
    rewards: list[list[float]] = Field(default_factory=list, description="gold: seeds × prompts")
    proxy_rewards: dict[str, list[list[float]]] = Field(default_factory=dict, description="name → seeds × prompts")
    guided_by: list[str] = Field(default_factory=list, description="those proxies that steered or selected here")
    tokens: int | None = Field(default=None, description="of the completions that were returned, all seeds together")
    seconds: float
    tokens_per_second: float
    policy_calls: int
    scorer_calls: int
    samples: list[dict[str, Any]] = Field(default_factory=list)


class PairedDifference(Record):
    """Mean of a − b over the same prompts, with a sign-flip test; ``p_adjusted`` is Holm's within its ``family``."""

    a: str
    b: str
    metric: str = Field(description="a key of metrics: reward, or proxy:NAME")
    difference: Interval
    p_value: float
    p_adjusted: float
    family: Literal["baseline", "methods"]


class OverOptimisation(Record):
    """Where more strength raised a proxy and lowered gold: ``at`` less ``best``, the best gold at less strength."""

    curve: str
    at: str
    best: str
    proxy: str
    gold_difference: Interval
    proxy_difference: Interval
    p_adjusted: float


class Recommendation(Record):
    """The row of a curve to use, and why."""

    curve: str
    label: str
    beta: float | list[float] | None
    n: int | None = None
    reason: str


class Budget(Record):
    """What one token of a row's output cost; scoring all candidates of a step is one call."""

    label: str
    policy_calls_per_token: float
    scorer_calls_per_token: float
    tokens_per_completion: float


class WinRate(Record):
    """How often the row's completion was preferred to the column's; a tie counts one half."""

    rate: Interval
    wins: int
    losses: int
    ties: int


class WinRates(Record):
    """Judged pairs of rows: ``rates[a][b]`` is how often a beat b."""

    judged_by: str
    rates: dict[str, dict[str, WinRate]]


class ComparisonResult(Record):
    """What ``rgtg compare`` writes as results.json. Version 1 had neither seeds nor single rewards; it is read too."""

    version: int = COMPARISON_VERSION
    reward: str
    prompts: int
    methods: list[MethodResult]
    baseline: str | None = Field(default=None, description="label of the row that the others are compared with")
    proxies: list[str] = Field(default_factory=list)
    differences: list[PairedDifference] = Field(default_factory=list)
    over_optimised: list[OverOptimisation] = Field(default_factory=list)
    recommended: list[Recommendation] = Field(default_factory=list)
    budgets: list[Budget] = Field(default_factory=list)
    budget_statement: str = Field(default="", description="whether the rows paid the same, in words")
    win_rates: WinRates | None = Field(default=None, description="of a judge; rgtg report --judge reads judge.json")
    provenance: Provenance


class SweepTry(Record):
    """One evaluation of a sweep; ``factor`` multiplied the given betas."""

    factor: float
    beta: float | list[float]
    value: Interval
    metrics: dict[str, Interval]


class SweepResult(Record):
    """What ``rgtg sweep`` writes: the beta that meets a target, and every one that was tried."""

    version: int = FORMAT_VERSION
    method: str
    metric: str
    target: float
    tolerance: float
    beta: float | list[float]
    value: Interval
    reached: bool
    verdict: str
    tries: list[SweepTry]
    provenance: Provenance
