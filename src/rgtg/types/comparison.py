"""Results of ``rgtg compare`` and ``rgtg sweep``."""

from typing import Any, Literal

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, Interval, Provenance, Record
from rgtg.types.generation import Completion

COMPARISON_VERSION = 2


class ComparedCompletion(Completion):
    """A line of a comparison's completions.jsonl: a completion, its run, and its rewards."""

    row: str = Field(description="label of the run")
    run_seed: int = Field(description="one of the run's seeds; ``seed`` is derived from it and the prompt")
    prompt_index: int
    reward: float
    proxy_rewards: dict[str, float] = Field(default_factory=dict)


class MethodResult(Record):
    """One run of a comparison: a method with its settings, over all its seeds.

    ``rewards`` and ``proxy_rewards`` are seeds × prompts, in the order of ``seeds`` and of the prompts. ``metrics`` are
    means over both, with 95 % intervals that resample prompts together with all their seeds. The runs of a ``curve``
    differ only in their ``strength`` (beta, or n of best-of-n).
    """

    label: str
    method: str
    beta: float | list[float] | None = Field(description="one per scorer if there are several")
    n: int | None = None
    curve: str | None = Field(default=None, description="label without the strength; None: belongs to no curve")
    strength: float | None = Field(default=None, description="beta (the first of several), or n of best-of-n")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="all that decides the completions, without the seed"
    )
    seeds: list[int] = Field(default_factory=list, description="a run without randomness has one")
    metrics: dict[str, Interval]
    rewards: list[list[float]] = Field(default_factory=list, description="gold: seeds × prompts")
    proxy_rewards: dict[str, list[list[float]]] = Field(default_factory=dict, description="name → seeds × prompts")
    guided_by: list[str] = Field(default_factory=list, description="proxies that guided or selected completions")
    tokens: int | None = Field(default=None, description="of the returned completions, summed over seeds")
    seconds: float
    tokens_per_second: float
    policy_calls: int
    scorer_calls: int
    samples: list[dict[str, Any]] = Field(default_factory=list)


class PairedDifference(Record):
    """Mean of a − b over the same prompts with a sign-flip test; ``p_adjusted`` is Holm's within its ``family``."""

    a: str
    b: str
    metric: str = Field(description="a key of metrics: reward, or proxy:NAME")
    difference: Interval
    p_value: float
    p_adjusted: float
    family: Literal["baseline", "methods"]


class OverOptimisation(Record):
    """More strength raised a proxy and lowered gold: ``at`` minus ``best``, the best gold at less strength."""

    curve: str
    at: str
    best: str
    proxy: str
    gold_difference: Interval
    proxy_difference: Interval
    p_adjusted: float


class Recommendation(Record):
    """The run of a curve to use, and why."""

    curve: str
    label: str
    beta: float | list[float] | None
    n: int | None = None
    reason: str


class Budget(Record):
    """Model calls per output token of a run; scoring all candidates of a step is one call."""

    label: str
    policy_calls_per_token: float
    scorer_calls_per_token: float
    tokens_per_completion: float


class WinRate(Record):
    """How often one run's completion was preferred to another's; a tie counts ½."""

    rate: Interval
    wins: int
    losses: int
    ties: int


class WinRates(Record):
    """Judged pairs of runs: ``rates[a][b]`` is how often a beat b."""

    judged_by: str
    rates: dict[str, dict[str, WinRate]]


class ComparisonResult(Record):
    """results.json of ``rgtg compare``. Version 1, without seeds and single rewards, can be read too."""

    version: int = COMPARISON_VERSION
    reward: str
    prompts: int
    methods: list[MethodResult]
    baseline: str | None = Field(default=None, description="label of the run that the others are compared with")
    proxies: list[str] = Field(default_factory=list)
    differences: list[PairedDifference] = Field(default_factory=list)
    over_optimised: list[OverOptimisation] = Field(default_factory=list)
    recommended: list[Recommendation] = Field(default_factory=list)
    budgets: list[Budget] = Field(default_factory=list)
    budget_statement: str = Field(default="", description="whether the runs cost the same, in words")
    win_rates: WinRates | None = Field(default=None, description="of a judge; rgtg report --judge reads judge.json")
    provenance: Provenance


class SweepTry(Record):
    """One evaluation of a sweep; ``factor`` multiplies the given betas."""

    factor: float
    beta: float | list[float]
    value: Interval
    metrics: dict[str, Interval]


class SweepResult(Record):
    """Result of ``rgtg sweep``: the beta that meets a target, and every beta tried."""

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
