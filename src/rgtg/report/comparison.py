"""The sections on a comparison: rewards, reward against KL and cost, differences, over-optimisation, strengths."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rgtg.evaluation.compare.controls import greedy_control, is_greedy
from rgtg.report.document import Block, Cell, Figure, Paragraph, Points, Section, Table, interval_cell
from rgtg.report.figures import Marks, draw_costs, draw_frontier, legend_height
from rgtg.report.number_format import NOTHING, number, p_value, signed, spread
from rgtg.types.base import Interval
from rgtg.types.comparison import ComparisonResult, MethodResult, OverOptimisation, PairedDifference, Recommendation

SIGNIFICANT = 0.05
_LONG = 12  # a table of differences with this many rows is folded away
_SAME_COST = 1.2  # up to this ratio, the strengths of a method cost the same
# Metrics that the table leaves out; results.json has them.
_LEFT_OUT = frozenset({"reward", "distinct_1", "distinct_3", "kl_bound_nats"})
RECOMMENDED, OVER_OPTIMISED, BASELINE = "recommended", "over-optimised", "baseline"
_HEADINGS = {
    "kl_nats": "KL to the policy, nats", "kl_cut_nats": "KL to the same candidates, nats",
    "perplexity": "perplexity", "distinct_2": "distinct\u20112", "self_rouge_l": "self\u2011ROUGE\u2011L",
    "length_tokens": "length, tokens",
}  # fmt: skip


def by_reward(methods: Sequence[MethodResult]) -> list[MethodResult]:
    """Runs by mean reward, highest first; those without a reward last."""
    return sorted(methods, key=lambda run: (math.isnan(_reward(run).mean), -_reward(run).mean))


@dataclass(frozen=True)
class Kind:
    """Runs to compare with each other: their name, their unguided control, and the runs themselves."""

    title: str
    control: str | None
    runs: list[MethodResult]


def kinds(result: ComparisonResult, runs: Sequence[MethodResult]) -> list[Kind]:
    """Sampled and greedy runs, if there are both and both have a control; else all runs as one kind without a name."""
    control = greedy_control(result.methods)
    greedy = [run for run in runs if is_greedy(run)]
    sampled = [run for run in runs if not is_greedy(run)]
    if control is None or not greedy or not sampled or control == result.baseline:
        return [Kind("", result.baseline, list(runs))]
    return [
        Kind("Sampled", result.baseline, sampled),
        Kind("Greedy: the likeliest token at each step", control, greedy),
    ]


def curve_of(run: MethodResult) -> str:
    """Name of a run's curve; results of version 1 have it only as part of the label."""
    return run.curve or run.label.partition(" β=")[0]


def representatives(result: ComparisonResult, at_most: int = 8) -> list[MethodResult]:
    """Runs for sections that cannot show all: every run if there are few, else the baseline and one of each curve.

    That is the curve's recommended run or, without a recommendation, the run with the highest reward.
    """
    if len(result.methods) <= at_most:
        return list(result.methods)
    controls = {result.baseline, greedy_control(result.methods)}
    chosen = {choice.label for choice in result.recommended} | controls
    best: dict[str, MethodResult] = {}
    for run in by_reward(result.methods):
        held = best.setdefault(curve_of(run), run)
        if run.label in chosen and held.label not in chosen:
            best[curve_of(run)] = run
    shown = {run.label for run in best.values()} | controls
    return [run for run in result.methods if run.label in shown]


def summary(result: ComparisonResult) -> Section:
    """The findings in a few lines."""
    ranked = [run for run in by_reward(result.methods) if not math.isnan(_reward(run).mean)]
    points = []
    for kind in kinds(result, ranked):
        if kind.runs:
            best = kind.runs[0]
            reward = f"{number(_reward(best).mean)} ({spread(_reward(best))})"
            lead = f"Highest {result.reward}" + (f", {kind.title.partition(':')[0].lower()}" if kind.title else "")
            points.append((lead, f"{best.label}: {reward}{_over_baseline(result, best)}"))
    if result.recommended:
        points.append(("Strengths to use", ", ".join(choice.label for choice in result.recommended)))
    if result.over_optimised:
        points.append((OVER_OPTIMISED.capitalize(), ", ".join(dict.fromkeys(m.at for m in result.over_optimised))))
    if result.budget_statement:
        points.append(("Budgets", result.budget_statement))
    return Section("glance", "At a glance", [Points(points)] if points else [])


def rewards(result: ComparisonResult) -> Section:
    """Every run with its metrics; the costs have their own section."""
    blocks: list[Block] = []
    for kind in kinds(result, result.methods):
        blocks += [Paragraph("", lead=kind.title)] if kind.title else []
        blocks.append(_reward_table(result, by_reward(kind.runs)))
    note = "In small print: 95 % bootstrap intervals over prompts."
    return Section("rewards", f"Rewards on {result.prompts} prompts", [*blocks, Paragraph(note, soft=True)])


def _reward_table(result: ComparisonResult, ordered: Sequence[MethodResult]) -> Table:
    labels = {run.label for run in ordered}
    against = {d.a: d for d in result.differences if d.family == "baseline" and d.metric == "reward" and d.a in labels}
    metrics = [
        name for name in dict.fromkeys(n for run in result.methods for n in run.metrics) if name not in _LEFT_OUT
    ]
    controls = list(dict.fromkeys(d.b for d in against.values()))
    less = [f"minus {' or '.join(controls)}", "p (Holm)"] if against else []
    rows = [
        [
            Cell(run.label, marks=_marks(result, run)),
            interval_cell(_reward(run)),
            *(_difference_cells(against.get(run.label)) if against else []),
            *(Cell(number(run.metrics[name].mean)) if name in run.metrics else Cell(NOTHING) for name in metrics),
        ]
        for run in ordered
    ]
    strong = frozenset(i for i, run in enumerate(ordered) if RECOMMENDED in _marks(result, run))
    headings = ["method", result.reward, *less, *(_heading(name) for name in metrics)]
    return Table(headings, rows, strong)


def frontier(result: ComparisonResult) -> Section:
    """Reward against KL to the policy."""
    drawn = [run for run in result.methods if _drawable(run)]
    if not drawn:
        return Section("frontier", "", [])
    cut = [run for run in drawn if "kl_cut_nats" in run.metrics]
    figure = Figure(
        "frontier",
        "Reward against distance from the policy, with 95 % intervals",
        lambda figure, axes: draw_frontier(figure, axes, drawn, result.reward, curve_of, _figure_marks(result)),
        columns=2 if cut else 1,
        height=4.0 + legend_height(len({curve_of(run) for run in drawn}) + 2),
    )
    note = (
        "Up is better, right is farther from the policy: a method above another at the same distance steers better. "
        "A greedy method's KL is minus the log-probability of its completion; best-of-n's is an estimate or a "
        "bound."
    )
    return Section("frontier", "Reward against KL", [figure, Paragraph(note, soft=True)])


def cost(result: ComparisonResult) -> Section:
    """Reward against calls and against time, with one run of each method whose strengths all cost the same."""
    calls = {run.label: calls_per_token(run) for run in result.methods}
    measured = [run for run in result.methods if math.isfinite(sum(calls[run.label]) + _reward(run).mean)]
    drawn = _one_per_cost(result, measured, calls)
    if not drawn:
        return Section("cost", "", [])
    total = {label: sum(of_both) for label, of_both in calls.items()}
    figure = Figure(
        "cost",
        "Reward against cost, with 95 % intervals",
        lambda figure, axes: draw_costs(figure, axes, drawn, result.reward, curve_of, total),
        columns=2,
        height=4.0 + legend_height(len({curve_of(run) for run in drawn})),
    )
    headings = ["method", "policy calls per token", "scorer calls per token", "ms per token", "tokens/s", result.reward]
    rows = [
        [Cell(run.label), *(Cell(number(value)) for value in (
            *calls[run.label], 1000 / run.tokens_per_second, run.tokens_per_second, _reward(run).mean))]
        for run in by_reward(drawn)
    ]  # fmt: skip
    note = (
        "Calls per output token. A method whose strengths all cost the same has one row: the recommended one, or else "
        "the best. Times are those of whole batches on the machine that ran them; other machines differ."
    )
    notes = Paragraph(f"{result.budget_statement} {note}".strip(), soft=True)
    return Section("cost", "Reward against cost", [figure, Table(headings, rows), notes])


def _one_per_cost(
    result: ComparisonResult, runs: Sequence[MethodResult], calls: Mapping[str, tuple[float, float]]
) -> list[MethodResult]:
    chosen = {run.label for run in representatives(result, at_most=0)}
    costs: dict[str, list[float]] = {}
    for run in runs:
        costs.setdefault(curve_of(run), []).append(sum(calls[run.label]))
    return [
        run for run in runs if run.label in chosen or max(costs[curve_of(run)]) > _SAME_COST * min(costs[curve_of(run)])
    ]


def calls_per_token(run: MethodResult) -> tuple[float, float]:
    """Policy and scorer calls per output token; NaN if the result does not contain them."""
    tokens = run.tokens or run.tokens_per_second * run.seconds
    return (run.policy_calls / tokens, run.scorer_calls / tokens) if tokens > 0 else (math.nan, math.nan)


def differences(result: ComparisonResult) -> Section:
    """Paired differences with their tests, one table for each family."""
    controls = dict.fromkeys(d.b for d in result.differences if d.family == "baseline")
    titles = {
        "baseline": f"Every row minus {', greedy rows minus '.join(controls)}",
        "methods": "Methods against each other, each at its recommended strength",
    }
    blocks: list[Block] = []
    for family, title in titles.items():
        some = [d for d in result.differences if d.family == family]
        if some:
            blocks += [Paragraph("", lead=title), _difference_table(some, result.reward)]
    if blocks:
        note = (
            "Over the same prompts; the seeds of a prompt are averaged first. p: two-sided sign-flip test, adjusted by "
            "Holm within each family and metric. Rows in bold: adjusted p below 0.05. Strengths that were chosen on "
            "these same prompts favour their methods: for a claim, choose them on other prompts."
        )
        blocks.append(Paragraph(note, soft=True))
    return Section("differences", "Paired differences", blocks)


def strengths(result: ComparisonResult) -> Section:
    """Where more strength lowered the gold reward, and which strength to use."""
    blocks: list[Block] = []
    if result.over_optimised:
        headings = ["row", "below", "gold", "p (Holm)", "while this proxy", "rose by"]
        rows = [_over_optimised_cells(mark) for mark in result.over_optimised]
        note = (
            "Gold is significantly lower than at less strength of the method, while the proxy that steered is higher."
        )
        blocks += [Paragraph(note, lead="Over-optimised."), Table(headings, rows)]
    if result.recommended:
        blocks.append(Table(["method", "use", "strength", "why"], [_recommended_cells(c) for c in result.recommended]))
    return Section("strengths", "Over-optimisation and the strength to use", blocks)


def _heading(metric: str) -> str:
    return _HEADINGS.get(metric, metric.removeprefix("proxy:"))


def _reward(run: MethodResult) -> Interval:
    return run.metrics["reward"]


def _drawable(run: MethodResult) -> bool:
    return "kl_nats" in run.metrics and math.isfinite(run.metrics["kl_nats"].mean + _reward(run).mean)


def _marks(result: ComparisonResult, run: MethodResult) -> tuple[str, ...]:
    found = {
        BASELINE: any(run.label == kind.control for kind in kinds(result, result.methods)),
        RECOMMENDED: any(choice.label == run.label for choice in result.recommended),
        OVER_OPTIMISED: any(mark.at == run.label for mark in result.over_optimised),
    }
    return tuple(name for name, holds in found.items() if holds)


def _figure_marks(result: ComparisonResult) -> Marks:
    return {
        RECOMMENDED: {choice.label for choice in result.recommended},
        OVER_OPTIMISED: {mark.at for mark in result.over_optimised},
    }


def _over_baseline(result: ComparisonResult, run: MethodResult) -> str:
    for d in result.differences:
        if (d.a, d.metric, d.family) == (run.label, "reward", "baseline"):
            return f"; {signed(d.difference.mean)} over {d.b} (p {_p_phrase(d.p_adjusted)} after Holm)"
    return ""


def _p_phrase(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _difference_cells(found: PairedDifference | None) -> list[Cell]:
    if found is None:
        return [Cell(""), Cell("")]
    return [interval_cell(found.difference, signed), Cell(p_value(found.p_adjusted))]


def _difference_table(some: Sequence[PairedDifference], reward: str) -> Table:
    rows = [
        [
            Cell(f"{d.a} minus {d.b}"),
            Cell(reward if d.metric == "reward" else d.metric.removeprefix("proxy:")),
            interval_cell(d.difference, signed),
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
        interval_cell(mark.gold_difference, signed),
        Cell(p_value(mark.p_adjusted)),
        Cell(mark.proxy),
        interval_cell(mark.proxy_difference, signed),
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
