"""What the audits say of the scorers: curves over partial completions, choices among candidates, and the verdicts."""

import math
from collections.abc import Mapping

from rgtg.report.document import Block, Cell, Figure, Paragraph, Section, Table
from rgtg.report.figures import draw_choices, draw_prefix_audits, legend_height
from rgtg.report.number_format import NOTHING, number, spread
from rgtg.report.number_format import signed as _signed
from rgtg.types.audit import AuditResult
from rgtg.types.base import Interval
from rgtg.types.rollouts import RolloutAuditResult


def audits(found: Mapping[str, AuditResult]) -> Section:
    """Accuracy by share of the completion read, one column per scorer."""
    if not found:
        return Section("audits", "", [])
    figure = Figure(
        "audit",
        "Accuracy by share of the completion read, with 95 % intervals",
        lambda figure, axes: draw_prefix_audits(figure, axes, found),
        height=3.6 + legend_height(len(found) + 1),
    )
    first = next(iter(found.values()))
    rows = [
        [Cell(f"{point.position:.0%}"), *(_at(audit, point.position) for audit in found.values())]
        for point in first.by_fraction
    ]
    note = (
        "Share of pairs whose preferred side has the higher score when both are read that far; pairs still identical "
        "there are left out."
    )
    blocks: list[Block] = [
        figure,
        *(Paragraph(audit.verdict, lead=f"{name}:") for name, audit in found.items()),
        Table(["share read", *found], rows, summary="The same in numbers"),
        Paragraph(note, soft=True),
    ]
    return Section("audits", "Scorers on partial completions", blocks)


def rollout_audits(found: Mapping[str, RolloutAuditResult]) -> Section:
    """How each scorer orders the candidates of one prefix, against roll-outs of the policy."""
    if not found:
        return Section("choices", "", [])
    figure = Figure(
        "choices",
        "Rank correlation within a prefix, and what one guided token gains, with 95 % bands",
        lambda figure, axes: draw_choices(figure, axes, found),
        columns=2,
        height=3.6 + legend_height(len(found) + 2),
    )
    rows = [
        [
            Cell(name),
            _interval(audit.overall.spearman),
            Cell(number(audit.overall.ceiling)),
            _interval(audit.overall.steering),
            _interval(audit.overall.guided.gain, signed=True),
            _interval(audit.overall.scorer.normalised_regret),
        ]
        for name, audit in found.items()
    ]
    headings = ["scorer", "rank correlation", "its ceiling", "steering", "gain of a guided token", "regret, policy = 1"]
    blocks: list[Block] = [
        figure,
        *(Paragraph(audit.verdict, lead=f"{name}:") for name, audit in found.items()),
        Table(headings, rows),
        Paragraph(
            "Over all prefixes. Token-wise guidance compares the candidates of one prefix, and nothing else.", soft=True
        ),
    ]
    return Section("choices", "Scorers among the candidates of one prefix", blocks)


def _interval(value: Interval, *, signed: bool = False) -> Cell:
    return Cell(_signed(value.mean) if signed else number(value.mean), detail=spread(value))


def _at(audit: AuditResult, position: float) -> Cell:
    for point in audit.by_fraction:
        if math.isclose(point.position, position) and point.accuracy.n:
            return Cell(number(point.accuracy.mean), detail=spread(point.accuracy))
    return Cell(NOTHING)
