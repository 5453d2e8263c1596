"""The table of decoding methods: what each reads, which candidates it considers, how it decides, who proposed it."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from rgtg.config import DecodingSettings
from rgtg.errors import UsageError


@dataclass(frozen=True)
class Method:
    """One row: ``scorer`` is the objective the method was proposed with; None needs no scorer."""

    name: str
    unit: Literal["token", "completion"]
    scorer: Literal["prefix-bt", "full-bt"] | None
    rule: Literal["sample", "greedy", "best"]
    paper: str


METHODS = {
    row.name: row
    for row in (
        Method("policy", "token", None, "sample", "the unguided baseline"),
        Method("pargs", "token", "prefix-bt", "sample", "arXiv 2406.07780"),
        Method("pargs-greedy", "token", "prefix-bt", "greedy", "arXiv 2406.07780"),
        Method("args", "token", "full-bt", "greedy", "arXiv 2402.01694"),
        Method("args-sample", "token", "full-bt", "sample", "arXiv 2402.01694"),
        Method("best-of-n", "completion", "full-bt", "best", "arXiv 2009.01325"),
    )
}


def find_method(name: str) -> Method:
    """The table's row of that name.

    Raises:
        UsageError: no such method; the text lists them.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def check_settings(method: Method, settings: DecodingSettings) -> None:
    """Refuse settings that the method would have to ignore, and figures that are none.

    Raises:
        UsageError: naming the setting and the method that has it.
    """
    given = settings.model_fields_set
    if not math.isfinite(settings.beta):
        raise UsageError(f"beta = {settings.beta}: beta must be a finite number")
    if method.rule == "greedy" and "temperature" in given and settings.temperature not in (0, 1):
        raise UsageError(f"{method.name} takes the maximum and has no temperature; sample with pargs or args-sample")
    if "n" in given and method.rule != "best":
        raise UsageError(f"n applies to best-of-n, not to {method.name}")
    if "beta" in given and method.unit == "completion":
        raise UsageError(f"{method.name} has no beta: it takes the completion of highest reward")
    if "beta" in given and method.scorer is None:
        raise UsageError(f"{method.name} has no beta: no scorer steers it; use pargs or args")
    if settings.min_new_tokens > settings.max_new_tokens:
        raise UsageError(f"min_new_tokens {settings.min_new_tokens} exceeds max_new_tokens {settings.max_new_tokens}")


def check_scorer(method: Method, scorer: Any) -> None:
    """Refuse a scorer the method cannot use; warn once of one that was trained for something else.

    Raises:
        UsageError: no scorer where one is needed, or one that cannot read every position.
    """
    if method.scorer is None:
        if scorer is not None:
            warnings.warn(f"method {method.name} does not use the scorer that was given", stacklevel=3)
        return
    if scorer is None:
        raise UsageError(f"method {method.name} needs a scorer; give one, or use method policy")
    if method.unit != "token":
        if not hasattr(scorer, "score_prefixes"):
            raise UsageError(
                f"{scorer.name} scores next tokens, not finished completions: {method.name} needs a reward"
            )
        return
    if not scorer.causal:
        raise UsageError(
            f"{scorer.name} is an encoder, which cannot score candidates over a cache: use best-of-n with it, or train "
            "a causal scorer (rgtg train --base POLICY)"
        )
    objective = scorer.info.objective if scorer.info else None
    if objective != "prefix-bt":
        what = "finished completions only" if objective == "full-bt" else "an unknown objective (no rgtg.json)"
        warnings.warn(
            f"{scorer.name} was trained on {what}; its scores of partial sequences are arbitrary. "
            f"Measure the damage: rgtg audit --scorer {scorer.name} --pairs FILE",
            stacklevel=3,
        )
