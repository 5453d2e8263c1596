"""The table of decoding methods: what each reads, which candidates it considers, how it decides, who proposed it."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from rgtg.config import DecodingSettings
from rgtg.errors import UsageError

Objective = Literal["prefix-bt", "full-bt", "value", "cumulative-mse", "farma", "autoregressive"]
# What a score decides on, and how one of several is chosen.
Unit = Literal["token", "segment", "completion"]
Rule = Literal["sample", "greedy", "accept", "best", "resample", "filter", "beam"]

# Settings that only some methods have; every other one belongs to all.
_STEERED = ("beta", "entropy_gate", "abstain_below")
_SAMPLED = (*_STEERED, "kl_budget")
_CARDS = (
    "beta", "reward_threshold", "threshold_start", "entropy_threshold", "segment_length", "min_segment", "retries",
)  # fmt: skip
_BEAMS = ("beta", "n", "segment_length")
_FILTERED = ("value_threshold", "abstain_below")
_SMC = ("beta", "n", "proposal", "segment_length", "resample_finished")
_OWN = dict.fromkeys([*_SAMPLED, *_CARDS, *_SMC, *_FILTERED])


@dataclass(frozen=True)
class Method:
    """One row: what a method reads and how it decides.

    Attributes:
        name: of the method.
        unit: what a score decides on.
        scorer: the objective the method was proposed with; None needs no scorer.
        rule: how one of several is chosen.
        paper: who proposed it.
        candidates: next tokens considered: V_k of the policy, all, or the k largest sums log π + β·r.
        top_k: k where the user gives none; None is the whole vocabulary.
        vocabulary: needs a scorer that gives every next token its score in one call.
        clip: scores are cut to [0, 1].
        takes: settings that only some methods have, and this one does.
    """

    name: str
    unit: Unit
    scorer: Objective | None
    rule: Rule
    paper: str
    candidates: Literal["policy", "all", "sum"] = "policy"
    top_k: int | None = 10
    vocabulary: bool = False
    clip: bool = False
    takes: tuple[str, ...] = _STEERED

    @cached_property
    def scores_tokens(self) -> bool:
        """Whether its scorers score next tokens, and not segments or finished completions only."""
        return self.unit == "token" or self.grows_together

    @cached_property
    def grows_together(self) -> bool:
        """Whether n completions of a prompt grow together and take each other's places."""
        return self.rule in ("resample", "beam")

    @cached_property
    def random(self) -> bool:
        """Whether the result depends on random numbers, at a temperature above 0."""
        return self.rule not in ("greedy", "beam")


METHODS = {
    row.name: row
    for row in (
        Method("policy", "token", None, "sample", "the unguided baseline", takes=()),
        Method("pargs", "token", "prefix-bt", "sample", "arXiv 2406.07780", takes=_SAMPLED),
        Method("pargs-greedy", "token", "prefix-bt", "greedy", "arXiv 2406.07780"),
        Method("args", "token", "full-bt", "greedy", "arXiv 2402.01694"),
        Method("args-sample", "token", "full-bt", "sample", "arXiv 2402.01694", takes=_SAMPLED),
        Method("cd", "token", "value", "sample", "arXiv 2310.17022", takes=_SAMPLED),
        Method("cd-blockwise", "segment", "value", "best", "arXiv 2310.17022", takes=("n", "segment_length")),
        Method("rad", "token", "cumulative-mse", "sample", "arXiv 2310.09520", top_k=20, clip=True, takes=_SAMPLED),
        Method("farma", "token", "farma", "sample", "arXiv 2502.04517", "sum", vocabulary=True),
        Method(
            "genarm",
            "token",
            "autoregressive",
            "sample",
            "arXiv 2410.08193",
            "all",
            None,
            vocabulary=True,
            takes=_SAMPLED,
        ),
        Method("vfd", "token", "value", "filter", "arXiv 2605.14746", takes=_FILTERED),
        Method("cards", "segment", "full-bt", "accept", "arXiv 2406.16306", top_k=40, takes=_CARDS),
        Method("best-of-n", "completion", "full-bt", "best", "arXiv 2009.01325", takes=("n",)),
        Method("smc", "completion", "prefix-bt", "resample", "arXiv 2404.17546", takes=_SMC),
        Method("beam", "completion", "prefix-bt", "beam", "arXiv 2408.03314", takes=_BEAMS),
    )
}

# Objectives whose scorers have been asked about unfinished texts while they were trained.
_OF_PREFIXES = {"prefix-bt", "farma", "autoregressive", "value", "cumulative-mse", "tcrm"}


def find_method(name: str) -> Method:
    """The table's row of that name.

    Raises:
        UsageError: no such method; the text lists them.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}", setting="method")
    return METHODS[name]


def check_settings(method: Method, settings: DecodingSettings) -> None:
    """Refuse settings that the method would have to ignore, and figures that are none.

    Raises:
        UsageError: naming the setting and the method that has it.
    """
    given = settings.model_fields_set
    if not all(math.isfinite(beta) for beta in betas_of(settings)):
        raise UsageError(f"beta = {settings.beta}: beta must be a finite number", setting="beta")
    if not method.random and "temperature" in given and settings.temperature not in (0, 1):
        raise UsageError(
            f"{method.name} takes the maximum and has no temperature; sample with pargs or args-sample",
            setting="temperature",
        )
    for name in _OWN:
        if name in given and getattr(settings, name) is not None and name not in method.takes:
            raise UsageError(_refusal(method, name), setting=name)
    if method.rule == "resample" and settings.temperature == 0:
        raise UsageError(
            f"{method.name} draws its completions at random: give a temperature above 0 (it shapes the proposals only, "
            "not what is sampled)",
            setting="temperature",
        )
    if settings.kl_budget is not None:
        _check_budget(settings)
    if settings.min_new_tokens > settings.max_new_tokens:
        raise UsageError(f"min_new_tokens {settings.min_new_tokens} exceeds max_new_tokens {settings.max_new_tokens}")


def _check_budget(settings: DecodingSettings) -> None:
    """Refuse what a KL budget would overrule."""
    if "beta" in settings.model_fields_set and not isinstance(settings.beta, list):
        raise UsageError(
            "give either beta or kl_budget: a budget chooses beta at every token (with several scorers, their betas "
            "say how strong they are to each other)",
            setting="kl_budget",
        )
    if settings.temperature != 1:
        raise UsageError(
            f"kl_budget needs temperature 1, not {settings.temperature:g}: a temperature moves the policy too, at any "
            "beta",
            setting="kl_budget",
        )


def foreign_settings(method: Method) -> set[str]:
    """Settings that other methods have and this one does not."""
    return set(_OWN) - set(method.takes)


def require_complete(method: Method, settings: DecodingSettings) -> None:
    """Refuse to decode without a setting that has no default.

    Raises:
        UsageError: naming it, and how to find it.
    """
    if method.rule == "filter" and settings.value_threshold is None:
        raise UsageError(
            f"{method.name} needs value_threshold, the score that a token must reach: rgtg calibrate finds one that "
            "leaves all but a chosen share of good completions alone",
            setting="value_threshold",
        )
    if method.rule == "accept" and settings.reward_threshold is None:
        raise UsageError(
            f"{method.name} needs reward_threshold, the reward that a finished completion should reach: for example "
            "the mean reward of best-of-n's completions with the same scorer",
            setting="reward_threshold",
        )


def _refusal(method: Method, name: str) -> str:
    takers = ", ".join(row.name for row in METHODS.values() if name in row.takes)
    if name == "beta" and method.scorer is None:
        return f"{method.name} has no beta: no scorer steers it; use pargs or args"
    if name == "beta" and method.rule == "filter":
        return f"{method.name} has no beta: a token's score passes value_threshold or does not"
    if name == "beta":
        return f"{method.name} has no beta: it takes the {method.unit} of highest reward"
    return f"{name} applies to {takers}, not to {method.name}"


def segments_of(method: Method, settings: DecodingSettings) -> tuple[int, int]:
    """Of a segment-wise method: how many segments are drawn at once, and their length in tokens at most."""
    accepts = method.rule == "accept"
    return (1 if accepts else settings.n), settings.segment_length or (64 if accepts else 16)


def branch_columns(method: Method, settings: DecodingSettings) -> int:
    """Columns of the policy's cache that a row's branches take, beside those of its prompt and one completion."""
    if method.unit == "completion":
        return settings.n * (settings.max_new_tokens + 1)
    if method.unit == "segment":
        n, length = segments_of(method, settings)
        return (n + 1) * (length + 1)
    return 0


def resampling_period(settings: DecodingSettings) -> int:
    """Tokens between two resamplings: each token where it is scored anyway, else 16."""
    return settings.segment_length or (1 if settings.proposal == "pargs" else 16)


def betas_of(settings: DecodingSettings) -> list[float]:
    """Guidance strengths, one or more."""
    return settings.beta if isinstance(settings.beta, list) else [settings.beta]


def check_scorers(method: Method, scorers: Sequence[Any]) -> None:
    """Refuse scorers the method cannot use; warn once of each that was trained for something else.

    Raises:
        UsageError: no scorer where one is needed, several where one is meant, or one that cannot be read so.
    """
    if method.scorer is None:
        if scorers:
            warnings.warn(f"method {method.name} does not use the scorer that was given", stacklevel=3)
        return
    if not scorers:
        raise UsageError(f"method {method.name} needs a scorer; give one, or use method policy", setting="scorers")
    if len(scorers) > 1 and not (method.scores_tokens and "beta" in method.takes):
        raise UsageError(f"several scorers steer token by token; {method.name} takes one", setting="scorers")
    for scorer in scorers:
        if method.scores_tokens:
            _check_token_scorer(method, scorer)
        elif not hasattr(scorer, "score"):
            raise UsageError(
                f"{scorer.name} scores next tokens, not finished completions: {method.name} needs a reward",
                setting="method",
            )


def scores_vocabulary(scorer: Any) -> bool:
    """Whether one call gives the scores of all next tokens: a vocabulary scorer, or a vocabulary head."""
    from rgtg.models.scorers.token_reward import VocabularyScorer  # here: printing the table must not load torch

    return isinstance(scorer, VocabularyScorer) or getattr(scorer, "kind", None) == "vocab"


def _check_token_scorer(method: Method, scorer: Any) -> None:
    if method.vocabulary and not scores_vocabulary(scorer):
        raise UsageError(
            f"{method.name} asks for the scores of all next tokens in one call, and {scorer.name} scores one prefix at "
            f"a time: use pargs with it, or train one (rgtg train --objective {method.scorer})",
            setting="method",
        )
    objective = scorer.info.objective if scorer.info else None
    if method.clip and objective != method.scorer:
        warnings.warn(
            f"{method.name} cuts scores to [0, 1], and {scorer.name} was trained on "
            f"{objective or 'an unknown objective'}; train it with --objective {method.scorer}",
            stacklevel=4,
        )
    elif objective not in _OF_PREFIXES and not method.vocabulary:
        what = "finished completions only" if objective == "full-bt" else "an unknown objective (no rgtg.json)"
        warnings.warn(
            f"{scorer.name} was trained on {what}; its scores of partial sequences are arbitrary. "
            f"Measure the damage: rgtg audit --scorer {scorer.name} --pairs FILE",
            stacklevel=4,
        )
