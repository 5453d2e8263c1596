"""``write_report``: combines results, audits and verdicts into sections and writes them as HTML and Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgtg.report import comparison
from rgtg.report.audits import audits as audit_section
from rgtg.report.audits import rollout_audits as rollout_section
from rgtg.report.document import Facts, Section
from rgtg.report.figures import write_png
from rgtg.report.html import render_html
from rgtg.report.markdown import figures_of, render_markdown
from rgtg.report.samples import samples
from rgtg.report.win_rates import win_rates
from rgtg.types.audit import AuditResult
from rgtg.types.base import Provenance
from rgtg.types.comparison import ComparisonResult
from rgtg.types.judge import JudgeResult
from rgtg.types.rollouts import RolloutAuditResult
from rgtg.utils.files import atomic_write, write_text


def report_sections(
    result: ComparisonResult,
    audits: Mapping[str, AuditResult] | None = None,
    *,
    rollouts: Mapping[str, RolloutAuditResult] | None = None,
    judged: JudgeResult | None = None,
) -> list[Section]:
    """All sections that have content, in reading order. A judge's win rates replace those by gold reward."""
    parts = [
        comparison.summary(result),
        comparison.rewards(result),
        samples(result),
        comparison.frontier(result),
        comparison.cost(result),
        comparison.differences(result),
        comparison.strengths(result),
        win_rates(result, judged),
        audit_section(audits or {}),
        rollout_section(rollouts or {}),
        _provenance(result.provenance, (audits or {}, rollouts or {}), judged),
    ]
    return [part for part in parts if part.blocks]


def html_report(
    result: ComparisonResult,
    audits: Mapping[str, AuditResult] | None = None,
    *,
    rollouts: Mapping[str, RolloutAuditResult] | None = None,
    judged: JudgeResult | None = None,
    title: str,
    intro: str = "",
) -> str:
    """One HTML page: rewards, reward against KL and cost, differences, win rates, audits, samples, provenance.

    The page loads nothing from outside, and every text in it is escaped.

    Args:
        result: from ``rgtg compare`` or ``rgtg demo``.
        audits: name of a scorer → its audit on pairs.
        rollouts: name of a scorer → its audit by roll-outs.
        judged: from ``rgtg judge`` on the same rows; without it, win rates are by gold reward.
        title: heading of the page.
        intro: plain text; each line becomes a paragraph.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return render_html(title, intro, report_sections(result, audits, rollouts=rollouts, judged=judged))


def write_report(
    result: ComparisonResult,
    output: Path,
    *,
    audits: Mapping[str, AuditResult] | None = None,
    rollouts: Mapping[str, RolloutAuditResult] | None = None,
    judged: JudgeResult | None = None,
    title: str = "Comparison",
    intro: str = "",
) -> list[Path]:
    """Write the page, and the same report in Markdown with a folder of figures. Each file is written atomically.

    Returns:
        The page and the Markdown file: ``report.html`` and ``report.md``. The figures are in ``report-figures``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    sections = report_sections(result, audits, rollouts=rollouts, judged=judged)
    folder, markdown = output.with_name(f"{output.stem}-figures"), output.with_suffix(".md")
    page = render_html(title, intro, sections)
    for figure in figures_of(sections):
        with atomic_write(folder / f"{figure.name}.png") as partial:
            write_png(figure, partial)
    write_text(markdown, render_markdown(title, intro, sections, folder.name))
    write_text(output, page)  # last, so that a page means that everything is written
    return [output, markdown]


def _provenance(
    of: Provenance,
    audits: tuple[Mapping[str, AuditResult], Mapping[str, RolloutAuditResult]],
    judged: JudgeResult | None,
) -> Section:
    """The provenance of everything in the report."""
    facts: dict[str, Any] = {
        "command": of.command, "rgtg": of.version, "git commit": of.git_commit, "seed": of.seed, "dtype": of.dtype,
        "device": of.device, "models": _pairs(of.models), "data": _pairs(of.data), "settings": _pairs(of.settings),
    }  # fmt: skip
    facts |= {f"audit of {name}": f"{a.pairs} pairs, {_pairs(a.provenance.data)}" for name, a in audits[0].items()}
    facts |= {f"roll-outs for {name}": f"{a.prefixes} prefixes, reward {a.reward}" for name, a in audits[1].items()}
    if judged:
        facts["judge"] = (
            f"{judged.model} at {judged.base_url}, prompt {judged.prompt_fingerprint}, {_pairs(judged.provenance.data)}"
        )
    present = [(name, str(value)) for name, value in facts.items() if value not in (None, "")]
    return Section("made", "Where this comes from", [Facts(present)])


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
