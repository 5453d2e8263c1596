"""The sections on audits: accuracy on partial completions, ranking of candidates, and the verdicts."""

import math
from collections.abc import Mapping

from rgtg.report.document import Block, Cell, Figure, Paragraph, Section, Table, interval_cell
from rgtg.report.figures import draw_candidate_audits, draw_prefix_audits, legend_height
from rgtg.report.number_format import NOTHING, number, signed, spread
from rgtg.types.audit import AuditResult
from rgtg.types.rollouts import RolloutAuditResult


def audits(found: Mapping[str, AuditResult]) -> Section:
    """Accuracy by share of the completion read, with one column for each scorer."""
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
        "Share of pairs whose preferred side has the higher score when both are read up to there. Pairs that are still "
        "identical are left out."
    )
    blocks: list[Block] = [
        figure,
        *(Paragraph(audit.verdict, lead=f"{name}:") for name, audit in found.items()),
        Table(["share read", *found], rows, summary="The same in numbers"),
        Paragraph(note, soft=True),
    ]
    return Section("audits", "Scorers on partial completions", blocks)


def rollout_audits(found: Mapping[str, RolloutAuditResult]) -> Section:
    """How each scorer ranks the candidates of one prefix, against roll-outs of the policy."""
    if not found:
        return Section("choices", "", [])
    figure = Figure(
        "choices",
        "Rank correlation within a prefix, and what one guided token gains, with 95 % bands",
        lambda figure, axes: draw_candidate_audits(figure, axes, found),
        columns=2,
        height=3.6 + legend_height(len(found) + 2),
    )
    rows = [
        [
            Cell(name), interval_cell(of.spearman), Cell(number(of.ceiling)), interval_cell(of.steering),
            Cell(signed(of.guided.gain.mean), detail=spread(of.guided.gain)),
            interval_cell(of.scorer.normalised_regret),
        ]
        for name, of in ((name, audit.overall) for name, audit in found.items())
    ]  # fmt: skip
    headings = ["scorer", "rank correlation", "its ceiling", "steering", "gain of a guided token", "regret, policy = 1"]
    blocks: list[Block] = [
        figure,
        *(Paragraph(audit.verdict, lead=f"{name}:") for name, audit in found.items()),
        Table(headings, rows),
        Paragraph("Over all prefixes. Token-wise guidance compares only the candidates of one prefix.", soft=True),
    ]
    return Section("choices", "Scorers among the candidates of one prefix", blocks)


def _at(audit: AuditResult, position: float) -> Cell:
    for point in audit.by_fraction:
        if math.isclose(point.position, position) and point.accuracy.n:
            return interval_cell(point.accuracy)
    return Cell(NOTHING)
