"""The section of win rates: a matrix from a judge or, without one, from each prompt's gold rewards."""

import itertools
from collections.abc import Mapping, Sequence

from rgtg.report.comparison import by_reward, representatives
from rgtg.report.document import Block, Cell, Paragraph, Section, Table
from rgtg.report.number_format import NOTHING, percent
from rgtg.types.base import Interval
from rgtg.types.comparison import ComparisonResult, MethodResult, WinRate, WinRates
from rgtg.types.judge import JudgeMatch, JudgeResult


def win_rates(result: ComparisonResult, judged: JudgeResult | None = None) -> Section:
    """The matrix of win rates; with a judge, also its agreement between orders and the win rates at equal length."""
    found = judge_win_rates(judged) if judged else result.win_rates
    if found is None:
        found = gold_win_rates(representatives(result), result.reward, seed=result.provenance.seed or 0)
    if not found.rates:
        return Section("wins", "", [])
    blocks: list[Block] = [_matrix(found, [run.label for run in by_reward(result.methods)])]
    if judged:
        blocks += [_matches(judged.matches), Paragraph(_judge_note(judged), soft=True)]
    else:
        note = "How often the row beats the column on a prompt, by " + found.judged_by + "; a tie counts one half."
        blocks.append(Paragraph(note, soft=True))
    return Section("wins", f"Win rates, by {found.judged_by}", blocks)


def judge_win_rates(judged: JudgeResult) -> WinRates:
    """A judge's matches as a matrix, in both directions."""
    rates: dict[str, dict[str, WinRate]] = {}
    for match in judged.matches:
        rate = WinRate(rate=match.win_rate, wins=match.wins, losses=match.losses, ties=match.ties)
        rates.setdefault(match.a, {})[match.b] = rate
        rates.setdefault(match.b, {})[match.a] = _turned(rate)
    return WinRates(judged_by=judged.model, rates=rates)


def gold_win_rates(runs: Sequence[MethodResult], reward: str, *, seed: int = 0) -> WinRates:
    """Share of prompts on which one run's reward is higher than another's, with ties as one half.

    Runs with the same number of seeds are compared seed by seed, others with all combinations of seeds. The intervals
    are over prompts.
    """
    rates: dict[str, dict[str, WinRate]] = {}
    for a, b in itertools.combinations([run for run in runs if run.rewards], 2):
        rate = _win_rate(a.rewards, b.rewards, seed)
        rates.setdefault(a.label, {})[b.label] = rate
        rates.setdefault(b.label, {})[a.label] = _turned(rate)
    return WinRates(judged_by=reward, rates=rates)


def _win_rate(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int) -> WinRate:
    from rgtg.evaluation.metrics import bootstrap_interval  # loads torch, which a judge's win rates do not need

    compared = list(zip(a, b, strict=True)) if len(a) == len(b) else list(itertools.product(a, b))
    points = [
        sum((mine[i] > theirs[i]) + 0.5 * (mine[i] == theirs[i]) for mine, theirs in compared) / len(compared)
        for i in range(len(a[0]))
    ]
    wins, losses = sum(p > 0.5 for p in points), sum(p < 0.5 for p in points)
    return WinRate(
        rate=bootstrap_interval(points, seed=seed), wins=wins, losses=losses, ties=len(points) - wins - losses
    )


def _turned(rate: WinRate) -> WinRate:
    mean, low, high = (1 - value for value in (rate.rate.mean, rate.rate.high, rate.rate.low))
    turned = Interval(mean=mean, low=low, high=high, n=rate.rate.n)
    return WinRate(rate=turned, wins=rate.losses, losses=rate.wins, ties=rate.ties)


def _matrix(found: WinRates, order: Sequence[str]) -> Table:
    labels = [label for label in order if label in found.rates]
    labels += [label for label in found.rates if label not in labels]
    rows = [[Cell(a), *(_win_cell(found.rates[a], b) for b in labels)] for a in labels]
    return Table(["beats →", *labels], rows)


def _win_cell(rates: Mapping[str, WinRate], other: str) -> Cell:
    if other not in rates:
        return Cell("")
    rate = rates[other].rate
    if rate.n == 0:
        return Cell(NOTHING)
    return Cell(percent(rate.mean), detail=_range(rate), shade=rate.mean)


def _matches(matches: Sequence[JudgeMatch]) -> Table:
    headings = ["pair", "win rate", "at equal length", "won / tied / lost", "same in both orders", "first preferred"]
    rows = [
        [
            Cell(f"{match.a} against {match.b}"), _share(match.win_rate), _share(match.length_controlled),
            Cell(f"{match.wins} / {match.ties} / {match.losses}"), Cell(percent(match.consistent.mean)),
            Cell(percent(match.first_preferred.mean)),
        ]
        for match in matches
    ]  # fmt: skip
    return Table(headings, rows)


def _share(value: Interval) -> Cell:
    return Cell(percent(value.mean), detail=_range(value) if value.n else "")


def _range(value: Interval) -> str:
    return f"{100 * value.low:.0f}–{percent(value.high)}"


def _judge_note(judged: JudgeResult) -> str:
    failed = sum(match.failed for match in judged.matches)
    missing = f" Pairs without a verdict, left out: {failed}." if failed else ""
    return (
        f"Judged by {judged.model} at {judged.base_url}, every pair in both orders; a verdict that changes with the "
        f"order counts one half. First preferred: 50\u00a0% is no position bias.{missing}"
    )
