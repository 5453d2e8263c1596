"""The table of compared methods, one line for each. ``grid`` has the values that are tried on the tuning prompts."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StudyRow:
    """A method with a scorer; ``grid`` holds values of the setting ``knob``, which is tuned on separate prompts."""

    name: str
    method: str
    scorer: str | tuple[str, ...] | None = None
    grid: tuple[Any, ...] = (None,)
    real_grid: tuple[Any, ...] | None = None  # on a real chat model, if it needs others
    knob: str = "beta"
    settings: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False  # the grid holds names of fine-tuned policies
    group: str = "guided"

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of its scorers."""
        return self.scorer if isinstance(self.scorer, tuple) else (self.scorer,) if self.scorer else ()

    def grid_of(self, track: str) -> tuple[Any, ...]:
        """The values that are tried on a track."""
        return self.real_grid if track in REAL and self.real_grid else self.grid


REAL = ("human", "attributes")  # tracks on a real chat model, whose texts are not published
FINE = {"dpo": (0.05, 0.1), "rloo": (0.1, 0.2)}  # TRL's KL coefficients: two tries, since each is a training
# Four values each, for about 2 to 20 nats of guidance, found in a first run whose parts are not used.
BETAS = (1.0, 2.0, 4.0, 8.0)
SMALL = (0.25, 0.5, 1.0, 2.0)  # for scores that are log-probabilities, which are large
GREEDY = (0.5, 1.0, 2.0, 4.0)
HEADS = (2.0, 4.0, 8.0, 16.0)
# On SmolLM2, whose heads and scorers are trained with less noise: about 1 to 30 nats.
REAL_BETAS = (0.5, 1.0, 2.0, 4.0)
FULL = {"top_k": None}
ROWS = [
    StudyRow("policy", "policy", group="policy"),
    StudyRow("policy, whole vocabulary", "policy", settings=FULL, group="policy"),
    StudyRow("policy, greedy", "policy", settings={"temperature": 0.0}, group="policy"),
    StudyRow("best-of-n", "best-of-n", "full-bt", (2, 4, 10), (4,), knob="n", group="best-of-n"),
    StudyRow("best-of-n, prefix-bt", "best-of-n", "prefix-bt", (2, 10), (4,), knob="n", group="best-of-n"),
    StudyRow("best-of-n, full-bt head", "best-of-n", "full-bt-head", (4,), knob="n", group="best-of-n"),
    StudyRow("best-of-n, state head", "best-of-n", "state-head", (4,), knob="n", group="best-of-n"),
    StudyRow("pargs", "pargs", "prefix-bt", BETAS, REAL_BETAS),
    StudyRow("args-sample", "args-sample", "full-bt", GREEDY),
    StudyRow("pargs, state head", "pargs", "state-head", HEADS, REAL_BETAS, group="heads"),
    StudyRow("pargs, vocabulary head", "pargs", "vocab-head", HEADS, REAL_BETAS, group="heads"),
    StudyRow("args-sample, state head", "args-sample", "full-bt-head", HEADS, REAL_BETAS, group="heads"),
    StudyRow("sft", "policy", None, ("sft",), knob="policy", tuned=True, group="fine-tuned"),
    StudyRow("dpo", "policy", None, tuple(f"dpo β={b}" for b in FINE["dpo"]), ("dpo β=0.1",), knob="policy",
             tuned=True, group="fine-tuned"),
    StudyRow("rloo", "policy", None, tuple(f"rloo β={b}" for b in FINE["rloo"]), knob="policy", tuned=True,
             group="fine-tuned"),
    StudyRow("pargs-greedy", "pargs-greedy", "prefix-bt", GREEDY, group="greedy"),
    StudyRow("args", "args", "full-bt", GREEDY, group="greedy"),
    StudyRow("pargs-greedy, vocabulary head", "pargs-greedy", "vocab-head", GREEDY, group="greedy"),
    StudyRow("farma", "farma", "farma", SMALL, group="newer"),
    StudyRow("genarm", "genarm", "autoregressive", SMALL, settings=FULL, group="newer"),
    StudyRow("cd", "cd", "value", HEADS, group="newer"),
    StudyRow("farma, vocabulary head", "farma", "farma-head", SMALL, group="heads"),
    StudyRow("cd, vocabulary head", "cd", "value-head", HEADS, group="heads"),
    StudyRow("cd-blockwise", "cd-blockwise", "value", (4,), knob="n", group="newer"),
    StudyRow("rad", "rad", "cumulative-mse", (5.0, 10.0, 20.0, 40.0), settings={"top_k": 20}, group="newer"),
    StudyRow("cards", "cards", "full-bt", BETAS, settings={"reward_threshold": "best-of-n"}, group="newer"),
    StudyRow("pargs, entropy gate", "pargs", "prefix-bt", BETAS, settings={"entropy_gate": 1.0}, group="options"),
    StudyRow("pargs, two scorers", "pargs", ("prefix-bt", "state-head"), BETAS, group="options"),
    StudyRow("pargs, tcrm", "pargs", "tcrm", BETAS, group="options"),
    StudyRow("pargs, adapter", "pargs", "adapter", BETAS, REAL_BETAS, group="options"),
    StudyRow("args-sample, adapter", "args-sample", "full-bt-adapter", GREEDY, group="options"),
    StudyRow("smc", "smc", "prefix-bt", BETAS, settings={"n": 8}, group="options"),
    StudyRow("beam", "beam", "prefix-bt", GREEDY, settings={"n": 4}, group="options"),
    StudyRow("vfd", "vfd", "value", (-1.0, 0.0, 1.0), knob="value_threshold", group="options"),
]  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
# Rows of the first pass; the others are optional.
CORE = [row.name for row in ROWS if row.group != "options" and row.name not in {
    "best-of-n, full-bt head", "best-of-n, state head", "pargs-greedy, vocabulary head",
    "farma, vocabulary head", "cd, vocabulary head",
}]  # fmt: skip
# On a real model every row of the first pass is a head: those cost no forward pass of a second model.
REAL_CORE = [
    "policy", "policy, greedy", "pargs, state head", "args-sample, state head", "pargs, vocabulary head",
    "best-of-n, full-bt head", "best-of-n, state head", "pargs-greedy, vocabulary head",
]  # fmt: skip


# Tuning without a bound rewards degenerate texts: lexicon's best value was 88 nats from the policy, one word repeated.
# The first cell of a first run showed that. The bound is counted from the policy renormalised over ten candidates: the
# cut alone costs a flat policy many nats (5 on track A, 24 on track B). Every row may go equally far beyond it.
MOST_NATS = 15.0


def chosen(row, parts, cut):
    """The value with the highest gold reward on the tuning prompts within ``MOST_NATS`` of the cut policy.

    If no value is that near (as for all that take the maximum), greedy rows are chosen by reward, others by KL.

    Args:
        row: the row.
        parts: value → figures per prompt, with ``kl`` to the policy's whole distribution.
        cut: the unguided row's part on the same prompts: the policy renormalised over ten candidates.
    """
    tried = {value: parts[value] for value in sorted(parts)}  # so that the first of ties is chosen
    mean = {value: {k: sum(p[k]) / len(p[k]) for k in ("rewards", "kl")} for value, p in tried.items()}
    most = MOST_NATS + sum(cut["kl"]) / len(cut["kl"])
    near = {value: m for value, m in mean.items() if m["kl"] <= most}
    if near or row.group == "greedy":
        near = near or mean
        return max(near, key=lambda value: near[value]["rewards"])
    return min(mean, key=lambda value: mean[value]["kl"])


def key_of(row, value):
    """Name of a row at one value."""
    if value is None:
        return row.name
    if row.tuned:
        return str(value)
    return f"{row.name} {'β' if row.knob == 'beta' else row.knob}={value:g}"
