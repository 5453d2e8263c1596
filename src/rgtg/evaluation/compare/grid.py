"""From the rows of a settings file to single runs: one per combination of what is given as a list."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_origin

from rgtg.config import CompareRun, DecodingSettings, EvaluationSettings, GuidingScorer, validate
from rgtg.decoding.methods import METHODS, check_settings, find_method, require_complete
from rgtg.errors import UsageError

_SHORT = {"top_k": "k", "temperature": "T"}
# A stop text is one of several at once, not one row each.
_LISTS = {name for name, about in DecodingSettings.model_fields.items() if get_origin(about.annotation) is list}

Beta = float | list[float] | None


@dataclass(frozen=True)
class MethodRun:
    """One row of a comparison: a method, what steers it, and the settings it was given.

    ``curve`` is the label without the strength (beta; n where the method has no beta), which orders a curve's rows.
    """

    label: str
    curve: str
    method: str
    scorers: tuple[str, ...] = ()
    beta: Beta = None
    policy: str | None = None
    trained_with: tuple[str, ...] = ()
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def scorer(self) -> str | None:
        """The only scorer, or the first."""
        return self.scorers[0] if self.scorers else None

    @property
    def strength(self) -> float | None:
        """Beta (the first of several), else n; None where the method has neither."""
        beta = self.beta[0] if isinstance(self.beta, list) else self.beta
        if has_setting(self.method, "beta"):
            return 1.0 if beta is None else beta
        return float(self.given.get("n", DecodingSettings().n)) if has_setting(self.method, "n") else None

    def decoding(self) -> dict[str, Any]:
        """What was given, beta included."""
        return self.given | ({} if self.beta is None else {"beta": self.beta})


def expand_runs(runs: Sequence[CompareRun], shared: EvaluationSettings | None = None) -> list[MethodRun]:
    """One row per combination of the settings given as lists, each with a label of its own.

    Args:
        runs: as in the settings file.
        shared: settings of the whole comparison: scorer and decoding of rows that do not give them themselves.

    Raises:
        UsageError: an unknown method, a setting that the method would have to ignore, or two rows of one label.
    """
    rows = [row for run in runs for row in _expand(run, shared.scorer if shared else None)]
    if shared is not None:
        rows = [with_shared_settings(row, shared) for row in rows]
    for row in rows:
        _require_usable(row)
    twice = [label for label, count in Counter(row.label for row in rows).items() if count > 1]
    if twice:
        raise UsageError(f"two rows are called {twice[0]!r}: give one of them a label")
    return rows


def with_shared_settings(row: MethodRun, shared: EvaluationSettings) -> MethodRun:
    """The row with the comparison's own decoding settings, as far as its method has them; its own stay."""
    common = shared.model_dump(include={"max_new_tokens", "temperature"}) | shared.decoding
    if "top_k" in shared.model_fields_set:  # else the method's own default holds
        common["top_k"] = shared.top_k
    applying = {name: value for name, value in common.items() if has_setting(row.method, name, value)}
    return replace(row, given=applying | row.given)


_ABSENT = object()


def has_setting(method: str, name: str, value: Any = _ABSENT) -> bool:
    """Whether a method has a setting (and can be given this value of it): the table's own check says so."""
    given = DecodingSettings.model_fields[name].get_default() if value is _ABSENT else value
    settings = validate(DecodingSettings, {"method": method, name: given})
    try:
        check_settings(find_method(method), settings)
    except UsageError:
        return False
    return True


def is_random(row: MethodRun) -> bool:
    """Whether another seed can give other completions."""
    method = METHODS[row.method]
    plain = method.unit == "token" and method.rule == "sample"
    return method.rule != "greedy" and not (plain and row.given.get("temperature") == 0)


def _expand(run: CompareRun, scorer: str | None) -> Iterator[MethodRun]:
    find_method(run.method)
    base = run.label or run.method
    given = run.model_dump(include={"n", "top_k", "temperature"}, exclude_unset=True) | (run.model_extra or {})
    swept = {name: value for name, value in given.items() if isinstance(value, list) and name not in _LISTS}
    for name, values in swept.items():
        _require_values(name, values, base)
    for chosen in itertools.product(*swept.values()):
        mine = given | dict(zip(swept, chosen, strict=True))
        by_n = not has_setting(run.method, "beta")  # then n is the strength, and no part of the curve's name
        shown = [f"{_SHORT.get(name, name)}={_show(mine[name])}" for name in swept]
        curve = " ".join([base, *(s for s, name in zip(shown, swept, strict=True) if not (by_n and name == "n"))])
        for names, beta in _betas(run, scorer, base):
            label = " ".join([base, *([] if beta is None else [f"β={_show(beta)}"]), *shown])
            others = [f"β=*+{_show(beta[1:])}"] if isinstance(beta, list) else []
            yield MethodRun(
                label, " ".join([curve, *others]), run.method, names, beta, run.policy, tuple(run.trained_with), mine
            )


def _betas(run: CompareRun, scorer: str | None, base: str) -> Iterator[tuple[tuple[str, ...], Beta]]:
    """Scorers, and each beta (or one per scorer) they are given."""
    if run.scorers:
        for betas in itertools.product(*(_values(one.beta, base) for one in run.scorers)):
            yield tuple(one.scorer for one in run.scorers), list(betas) if len(betas) > 1 else betas[0]
        return
    name = run.scorer or (scorer if METHODS[run.method].scorer else None)
    for beta in _values(run.beta, base):
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
    """A value in a label: 0 is a beta too, the unguided policy."""
    if isinstance(value, list):
        return "+".join(map(_show, value))
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _require_usable(row: MethodRun) -> None:
    method = METHODS[row.method]
    settings = validate(DecodingSettings, {"method": row.method} | row.decoding())
    check_settings(method, settings)
    require_complete(method, settings)
    if has_setting(row.method, "n") and settings.n > 1 and (settings.temperature == 0 or settings.top_k == 1):
        raise UsageError(
            f"{row.label} would draw {settings.n} times the same: a baseline that samples needs a temperature above 0 "
            "and more than one candidate"
        )
    if method.scorer is None and row.scorers:
        raise UsageError(f"{row.label}: no scorer steers {row.method}; leave it out, or choose a guided method")
    if row.policy is not None and method.scorer is not None and not row.scorers:
        raise UsageError(f"{row.label} has a policy of its own and needs a scorer of its own too")


def with_betas(row: MethodRun, factor: float, scorers: Sequence[GuidingScorer]) -> MethodRun:
    """The row with its scorers' betas (1 where none is given) times a factor."""
    betas = [factor * float(one.beta) for one in scorers if not isinstance(one.beta, list)] or [factor]
    beta: Beta = betas if len(betas) > 1 else betas[0]
    return replace(row, beta=beta, label=f"{row.method} β={_show(beta)}")
