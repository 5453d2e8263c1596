"""The file formats: what commands hand each other, as pydantic models with a version in them."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 1


class Record(BaseModel):
    """A line or file that rgtg writes; unknown fields are refused when it is read back.

    JSON knows no infinity: an excluded candidate's log-probability is the text "-Infinity", and reads back as a number.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")


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
    scores: list[float] | None = Field(default=None, description="one per candidate; None when no scorer ran")
    guided_log_probs: list[float]


class Completion(Record):
    """One generated completion; a line of the file ``rgtg generate --output`` writes."""

    version: int = FORMAT_VERSION
    prompt: str
    text: str
    token_ids: list[int] = Field(description="of the completion only, the closing EOS included")
    finish_reason: Literal["stop", "length"]
    method: str
    seed: int = Field(description="seed of this row's own generator")
    policy_log_prob: float = Field(description="nats, of token_ids under the policy (its whole vocabulary, T=1)")
    guided_log_prob: float = Field(description="nats, of token_ids under the distribution they were drawn from")
    score: float | None = Field(default=None, description="the scorer's last score, or the reward that chose it")
    policy_calls: int = 0
    scorer_calls: int = 0
    drafted: int = Field(default=0, description="tokens drafted ahead for verification (speculative decoding)")
    accepted: int = Field(default=0, description="of those, how many were accepted")
    trace: list[StepTrace] | None = None


class Interval(Record):
    """A mean with its bootstrap interval; ``n`` is the number of independent units that were resampled."""

    mean: float
    low: float
    high: float
    n: int


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


class MethodResult(Record):
    """One method's row in a comparison; every figure a mean over prompts with a 95 % interval."""

    label: str
    method: str
    beta: float | None
    n: int | None = None
    metrics: dict[str, Interval]
    seconds: float
    tokens_per_second: float
    policy_calls: int
    scorer_calls: int
    samples: list[dict[str, Any]] = Field(default_factory=list)


class ComparisonResult(Record):
    """What ``rgtg compare`` writes as results.json."""

    version: int = FORMAT_VERSION
    reward: str
    prompts: int
    methods: list[MethodResult]
    provenance: Provenance
