"""Expands the ``methods`` of a settings file into method runs: one for each combination of values given as lists."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_origin

from rgtg.config import CompareRun, DecodingSettings, EvaluationSettings, GuidingScorer, validate
from rgtg.decoding.methods import METHODS, check_settings, find_method, require_complete
from rgtg.errors import UsageError

_SHORT = {"top_k": "k", "temperature": "T", "kl_budget": "KL"}
# Settings whose value is itself a list (stop). A list of them is one value, not several.
_LISTS = {name for name, about in DecodingSettings.model_fields.items() if get_origin(about.annotation) is list}

Beta = float | list[float] | None


@dataclass(frozen=True)
class MethodRun:
    """One run of a comparison, which becomes one row of its tables: a method, its scorers and its decoding settings."""

    label: str  # unique in a comparison
    curve: str  # the label without the strength; runs of one curve differ only in their strength
    method: str
    scorers: tuple[str, ...] = ()  # names of what guides or selects
    beta: Beta = None  # one number, or one for each scorer
    policy: str | None = None  # the run's own policy, where it is not the comparison's
    trained_with: tuple[str, ...] = ()  # reward models that its policy or scorers were trained with
    given: dict[str, Any] = field(default_factory=dict)  # decoding settings of the settings file, without beta

    @property
    def scorer(self) -> str | None:
        """The first scorer, if there is one."""
        return self.scorers[0] if self.scorers else None

    @property
    def strength(self) -> float | None:
        """The KL budget, beta (the first of several), or n for a method without beta; None if it has none of them."""
        if self.given.get("kl_budget") is not None:
            return float(self.given["kl_budget"])
        beta = self.beta[0] if isinstance(self.beta, list) else self.beta
        if has_setting(self.method, "beta"):
            return 1.0 if beta is None else beta
        return float(self.given.get("n", DecodingSettings().n)) if has_setting(self.method, "n") else None

    def decoding(self) -> dict[str, Any]:
        """The decoding settings that were given, with beta."""
        return self.given | ({} if self.beta is None else {"beta": self.beta})


def expand_runs(entries: Sequence[CompareRun], shared: EvaluationSettings | None = None) -> list[MethodRun]:
    """One run for each combination of the settings given as lists, each with its own label.

    Args:
        entries: ``methods`` of the settings file.
        shared: settings of the whole comparison. Its scorer and decoding settings apply where an entry gives none.

    Raises:
        UsageError: an unknown method, a setting that the method would ignore, or two runs with the same label.
    """
    runs = [run for entry in entries for run in _expand(entry, shared.scorer if shared else None)]
    if shared is not None:
        runs = [with_shared_settings(run, shared) for run in runs]
    for run in runs:
        _require_usable(run)
    duplicates = [label for label, count in Counter(run.label for run in runs).items() if count > 1]
    if duplicates:
        raise UsageError(f"two rows are called {duplicates[0]!r}: give one of them a label")
    return runs


def with_shared_settings(run: MethodRun, shared: EvaluationSettings) -> MethodRun:
    """The run with the comparison's decoding settings that its method accepts; its own settings take precedence."""
    common = shared.model_dump(include={"max_new_tokens", "temperature", "chat_template_kwargs"}) | shared.decoding
    if "top_k" in shared.model_fields_set:  # otherwise the method's own default applies
        common["top_k"] = shared.top_k
    accepted = {name: value for name, value in common.items() if has_setting(run.method, name, value)}
    return replace(run, given=accepted | run.given)


def has_setting(method: str, name: str, value: Any = ...) -> bool:
    """Whether a method accepts a decoding setting (with this value, if one is given), by the methods table."""
    given = DecodingSettings.model_fields[name].get_default() if value is ... else value
    settings = validate(DecodingSettings, {"method": method, name: given})
    try:
        check_settings(find_method(method), settings)
    except UsageError:
        return False
    return True


def is_random(run: MethodRun) -> bool:
    """Whether another seed can give other completions."""
    method = METHODS[run.method]
    plain = method.unit == "token" and method.rule == "sample"
    return method.random and not (plain and run.given.get("temperature") == 0)


def _expand(entry: CompareRun, scorer: str | None) -> Iterator[MethodRun]:
    find_method(entry.method)
    base = entry.label or entry.method
    given = entry.model_dump(include={"n", "top_k", "temperature"}, exclude_unset=True) | (entry.model_extra or {})
    swept = {name: value for name, value in given.items() if isinstance(value, list) and name not in _LISTS}
    for name, values in swept.items():
        _require_values(name, values, base)
    by_n = not has_setting(entry.method, "beta")  # then n is the strength, and the curve's name leaves it out
    for chosen in itertools.product(*swept.values()):
        settings = given | dict(zip(swept, chosen, strict=True))
        shown = {name: f"{_SHORT.get(name, name)}={_show(settings[name])}" for name in swept}
        curve = " ".join(
            [base, *(text for name, text in shown.items() if name != "kl_budget" and not (by_n and name == "n"))]
        )
        for names, beta in _betas(entry, scorer, base):
            label = " ".join([base, *([] if beta is None else [f"β={_show(beta)}"]), *shown.values()])
            others = [f"β=*+{_show(beta[1:])}"] if isinstance(beta, list) else []
            yield MethodRun(
                label, " ".join([curve, *others]), entry.method, names, beta, entry.policy, tuple(entry.trained_with),
                settings,
            )  # fmt: skip


def _betas(entry: CompareRun, scorer: str | None, base: str) -> Iterator[tuple[tuple[str, ...], Beta]]:
    """The scorers' names, with each beta (or each combination of one beta per scorer)."""
    if entry.scorers:
        for betas in itertools.product(*(_values(one.beta, base) for one in entry.scorers)):
            yield tuple(one.scorer for one in entry.scorers), list(betas) if len(betas) > 1 else betas[0]
        return
    name = entry.scorer or (scorer if METHODS[entry.method].scorer else None)
    for beta in _values(entry.beta, base):
        yield (() if name is None else (name,)), beta


def _values(beta: Beta, base: str) -> Sequence[Any]:
    if not isinstance(beta, list):
        return [beta]
    _require_values("beta", beta, base)
    return beta


def _require_values(name: str, values: list[Any], base: str) -> None:
    if not values:
        raise UsageError(f"{name} of {base} is an empty list; give at least one value")


def _show(value: Any) -> str:
    """A value in a label. A beta of 0 is shown too: it is the unguided policy."""
    if isinstance(value, list):
        return "+".join(map(_show, value))
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _require_usable(run: MethodRun) -> None:
    method = METHODS[run.method]
    settings = validate(DecodingSettings, {"method": run.method} | run.decoding())
    check_settings(method, settings)
    require_complete(method, settings)
    if has_setting(run.method, "n") and settings.n > 1 and (settings.temperature == 0 or settings.top_k == 1):
        raise UsageError(
            f"{run.label} would draw {settings.n} times the same: a baseline that samples needs a temperature above 0 "
            "and more than one candidate"
        )
    if method.scorer is None and run.scorers:
        raise UsageError(f"{run.label}: {run.method} takes no scorer; leave it out, or choose a guided method")
    if run.policy is not None and method.scorer is not None and not run.scorers:
        raise UsageError(f"{run.label} has its own policy and needs its own scorer too")


def with_betas(run: MethodRun, factor: float, scorers: Sequence[GuidingScorer]) -> MethodRun:
    """The run with its scorers' betas (1 where none is given) multiplied by a factor."""
    betas = [factor * float(one.beta) for one in scorers if not isinstance(one.beta, list)] or [factor]
    beta: Beta = betas if len(betas) > 1 else betas[0]
    return replace(run, beta=beta, label=f"{run.method} β={_show(beta)}")
