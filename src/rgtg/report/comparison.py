"""What a comparison says: rewards, the frontier, costs, differences, over-optimisation, the strength to use."""

import math
from collections.abc import Mapping, Sequence

from rgtg.report.document import Block, Cell, Figure, Paragraph, Points, Section, Table
from rgtg.report.figures import Marks, draw_costs, draw_frontier, legend_height
from rgtg.report.number_format import NOTHING, number, p_value, signed, spread
from rgtg.types.base import Interval
from rgtg.types.comparison import ComparisonResult, MethodResult, OverOptimisation, PairedDifference, Recommendation

SIGNIFICANT = 0.05
_LONG = 12  # rows from which a table of differences is folded away
_SAME_COST = 1.2  # largest over smallest; below it, strengths of one method cost the same
_LEFT_OUT = frozenset({"reward", "distinct_1", "distinct_3", "kl_bound_nats"})  # of the table; results.json has them
RECOMMENDED, OVER_OPTIMISED, BASELINE = "recommended", "over-optimised", "baseline"
_HEADINGS = {
    "kl_nats": "KL to the policy, nats", "kl_cut_nats": "KL to the same candidates, nats",
    "perplexity": "perplexity", "distinct_2": "distinct\u20112", "self_rouge_l": "self\u2011ROUGE\u2011L",
    "length_tokens": "length, tokens",
}  # fmt: skip


def by_reward(methods: Sequence[MethodResult]) -> list[MethodResult]:
    """Highest mean reward first; those without one last."""
    return sorted(methods, key=lambda row: (math.isnan(_reward(row).mean), -_reward(row).mean))


def curve_of(row: MethodResult) -> str:
    """Name of the curve that a row lies on; results of version 1 only tell by the label."""
    return row.curve or row.label.partition(" β=")[0]


def representatives(result: ComparisonResult, at_most: int = 8) -> list[MethodResult]:
    """Rows for what cannot show all: every row where they are few, else the baseline and one row of each curve.

    Of a curve, that is the recommended row, or the one of the highest reward where none is.
    """
    if len(result.methods) <= at_most:
        return list(result.methods)
    chosen = {choice.label for choice in result.recommended} | {result.baseline}
    best: dict[str, MethodResult] = {}
    for row in by_reward(result.methods):
        held = best.setdefault(curve_of(row), row)
        if row.label in chosen and held.label not in chosen:
            best[curve_of(row)] = row
    kept = {row.label for row in best.values()} | {result.baseline}
    return [row for row in result.methods if row.label in kept]


def glance(result: ComparisonResult) -> Section:
    """The findings in a few lines."""
    ranked = [row for row in by_reward(result.methods) if not math.isnan(_reward(row).mean)]
    points = []
    if ranked:
        best = ranked[0]
        points.append(
            (f"Highest {result.reward}", f"{best.label}: {_value(_reward(best))}{_over_baseline(result, best)}")
        )
    if result.recommended:
        points.append(("Strengths to use", ", ".join(choice.label for choice in result.recommended)))
    if result.over_optimised:
        points.append((OVER_OPTIMISED.capitalize(), ", ".join(dict.fromkeys(m.at for m in result.over_optimised))))
    if result.budget_statement:
        points.append(("Budgets", result.budget_statement))
    return Section("glance", "At a glance", [Points(points)] if points else [])


def rewards(result: ComparisonResult) -> Section:
    """Every row with its figures; what it costs is told apart."""
    against = {d.a: d for d in result.differences if d.family == "baseline" and d.metric == "reward"}
    metrics = [
        name for name in dict.fromkeys(n for row in result.methods for n in row.metrics) if name not in _LEFT_OUT
    ]
    less = [f"less {result.baseline}", "p (Holm)"] if against else []
    ordered = by_reward(result.methods)
    rows = [
        [
            Cell(row.label, marks=_marks(result, row)),
            _cell(_reward(row)),
            *(_difference_cells(against.get(row.label)) if against else []),
            *(Cell(number(row.metrics[name].mean)) if name in row.metrics else Cell(NOTHING) for name in metrics),
        ]
        for row in ordered
    ]
    strong = frozenset(i for i, row in enumerate(ordered) if RECOMMENDED in _marks(result, row))
    headings = ["method", result.reward, *less, *(_heading(name) for name in metrics)]
    note = "In small print: 95 % bootstrap intervals over prompts."
    return Section(
        "rewards", f"Rewards on {result.prompts} prompts", [Table(headings, rows, strong), Paragraph(note, soft=True)]
    )


def frontier(result: ComparisonResult) -> Section:
    """Reward against distance from the policy."""
    drawn = [row for row in result.methods if _drawable(row)]
    if not drawn:
        return Section("frontier", "", [])
    cut = [row for row in drawn if "kl_cut_nats" in row.metrics]
    figure = Figure(
        "frontier",
        "Reward against distance from the policy, with 95 % intervals",
        lambda figure, axes: draw_frontier(figure, axes, drawn, result.reward, curve_of, _figure_marks(result)),
        columns=2 if cut else 1,
        height=4.0 + legend_height(len({curve_of(row) for row in drawn}) + 2),
    )
    note = (
        "Up is better, right is farther from the policy; a method that lies above another at the same distance steers "
        "better. A greedy method's KL is minus the log-probability of its completion; best-of-n's is an estimate or a "
        "bound."
    )
    return Section("frontier", "Reward against KL", [figure, Paragraph(note, soft=True)])


def cost(result: ComparisonResult) -> Section:
    """Reward against calls and against time; one row of each method whose strengths all cost the same."""
    calls = {row.label: calls_per_token(row) for row in result.methods}
    known = [row for row in result.methods if math.isfinite(sum(calls[row.label]) + _reward(row).mean)]
    drawn = _one_per_cost(result, known, calls)
    if not drawn:
        return Section("cost", "", [])
    figure = Figure(
        "cost",
        "Reward against cost, with 95 % intervals",
        lambda figure, axes: draw_costs(
            figure, axes, drawn, result.reward, curve_of, {label: sum(c) for label, c in calls.items()}
        ),
        columns=2,
        height=4.0 + legend_height(len({curve_of(row) for row in drawn})),
    )
    headings = ["method", "policy calls per token", "scorer calls per token", "ms per token", "tokens/s", result.reward]
    rows = [
        [
            Cell(row.label),
            *(Cell(number(value)) for value in (*calls[row.label], 1000 / row.tokens_per_second)),
            Cell(number(row.tokens_per_second)),
            Cell(number(_reward(row).mean)),
        ]
        for row in by_reward(drawn)
    ]
    note = (
        "Calls per token of output. Of a method whose strengths all cost the same, one row: the recommended one, or "
        "else the best. Times are of the whole batch on the machine that ran it, and say nothing of another."
    )
    said = Paragraph(f"{result.budget_statement} {note}".strip(), soft=True)
    return Section("cost", "Reward against cost", [figure, Table(headings, rows), said])


def _one_per_cost(
    result: ComparisonResult, rows: Sequence[MethodResult], calls: Mapping[str, tuple[float, float]]
) -> list[MethodResult]:
    chosen = {row.label for row in representatives(result, at_most=0)}
    costs: dict[str, list[float]] = {}
    for row in rows:
        costs.setdefault(curve_of(row), []).append(sum(calls[row.label]))
    return [
        row for row in rows if row.label in chosen or max(costs[curve_of(row)]) > _SAME_COST * min(costs[curve_of(row)])
    ]


def calls_per_token(row: MethodResult) -> tuple[float, float]:
    """Policy and scorer calls per token of output; empty where the result does not tell."""
    tokens = row.tokens or row.tokens_per_second * row.seconds
    return (row.policy_calls / tokens, row.scorer_calls / tokens) if tokens > 0 else (math.nan, math.nan)


def differences(result: ComparisonResult) -> Section:
    """Paired differences with their tests, one table per family."""
    titles = {
        "baseline": f"Every row less {result.baseline}",
        "methods": "Methods against each other, each at its recommended strength",
    }
    blocks: list[Block] = []
    for family, title in titles.items():
        some = [d for d in result.differences if d.family == family]
        if some:
            blocks += [Paragraph("", lead=title), _difference_table(some, result.reward)]
    if blocks:
        note = (
            "Over the same prompts, the seeds of a prompt averaged first. p: two-sided sign-flip test, adjusted by "
            "Holm within each family and metric. Rows in bold: adjusted p below 0.05. Strengths recommended on these "
            "very prompts flatter their methods: choose them on others for a claim."
        )
        blocks.append(Paragraph(note, soft=True))
    return Section("differences", "Paired differences", blocks)


def strengths(result: ComparisonResult) -> Section:
    """Where more strength did harm, and how much to use."""
    blocks: list[Block] = []
    if result.over_optimised:
        headings = ["row", "below", "gold", "p (Holm)", "while this proxy", "rose by"]
        rows = [_over_optimised_cells(mark) for mark in result.over_optimised]
        note = (
            "Gold fell significantly below that of the same method at less strength while the proxy that steered rose."
        )
        blocks += [Paragraph(note, lead="Over-optimised."), Table(headings, rows)]
    if result.recommended:
        blocks.append(Table(["method", "use", "strength", "why"], [_recommended_cells(c) for c in result.recommended]))
    return Section("strengths", "Over-optimisation and the strength to use", blocks)


def _heading(metric: str) -> str:
    return _HEADINGS.get(metric, metric.removeprefix("proxy:"))


def _reward(row: MethodResult) -> Interval:
    return row.metrics["reward"]


def _drawable(row: MethodResult) -> bool:
    return "kl_nats" in row.metrics and math.isfinite(row.metrics["kl_nats"].mean + _reward(row).mean)


def _marks(result: ComparisonResult, row: MethodResult) -> tuple[str, ...]:
    found = {
        BASELINE: row.label == result.baseline,
        RECOMMENDED: any(choice.label == row.label for choice in result.recommended),
        OVER_OPTIMISED: any(mark.at == row.label for mark in result.over_optimised),
    }
    return tuple(name for name, holds in found.items() if holds)


def _figure_marks(result: ComparisonResult) -> Marks:
    return {
        RECOMMENDED: {choice.label for choice in result.recommended},
        OVER_OPTIMISED: {mark.at for mark in result.over_optimised},
    }


def _over_baseline(result: ComparisonResult, row: MethodResult) -> str:
    for d in result.differences:
        if (d.a, d.b, d.metric, d.family) == (row.label, result.baseline, "reward", "baseline"):
            return f"; {signed(d.difference.mean)} over {d.b} (p {_p_phrase(d.p_adjusted)} after Holm)"
    return ""


def _p_phrase(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _value(value: Interval) -> str:
    return f"{number(value.mean)} ({spread(value)})"


def _cell(value: Interval) -> Cell:
    return Cell(number(value.mean), detail=spread(value))


def _difference_cells(found: PairedDifference | None) -> list[Cell]:
    if found is None:
        return [Cell(""), Cell("")]
    return [
        Cell(signed(found.difference.mean), detail=_signed_spread(found.difference)),
        Cell(p_value(found.p_adjusted)),
    ]


def _signed_spread(value: Interval) -> str:
    return "" if math.isnan(value.mean) else f"{signed(value.low)} to {signed(value.high)}"


def _difference_table(some: Sequence[PairedDifference], reward: str) -> Table:
    rows = [
        [
            Cell(f"{d.a} less {d.b}"),
            Cell(reward if d.metric == "reward" else d.metric.removeprefix("proxy:")),
            Cell(signed(d.difference.mean), detail=_signed_spread(d.difference)),
            Cell(p_value(d.p_value)),
            Cell(p_value(d.p_adjusted)),
        ]
        for d in some
    ]
    strong = frozenset(i for i, d in enumerate(some) if d.p_adjusted < SIGNIFICANT)
    summary = f"{len(some)} differences, {len(strong)} of them with an adjusted p below {SIGNIFICANT}"
    headings = ["rows", "reward", "difference", "p", "p (Holm)"]
    return Table(headings, rows, strong, summary if len(some) >= _LONG else "")


def _over_optimised_cells(mark: OverOptimisation) -> list[Cell]:
    return [
        Cell(mark.at, marks=(OVER_OPTIMISED,)),
        Cell(mark.best),
        Cell(signed(mark.gold_difference.mean), detail=_signed_spread(mark.gold_difference)),
        Cell(p_value(mark.p_adjusted)),
        Cell(mark.proxy),
        Cell(signed(mark.proxy_difference.mean), detail=_signed_spread(mark.proxy_difference)),
    ]


def _recommended_cells(choice: Recommendation) -> list[Cell]:
    betas = choice.beta if isinstance(choice.beta, list) else [choice.beta]
    strength = ", ".join(f"β = {beta:g}" for beta in betas if beta is not None)
    if choice.n is not None and not strength:
        strength = f"n = {choice.n}"
    return [
        Cell(choice.curve),
        Cell(choice.label, marks=(RECOMMENDED,)),
        Cell(strength or NOTHING),
        Cell(choice.reason),
    ]
