"""``rgtg compare``: methods on the same prompts, measured by a reward that none of them used."""

from pathlib import Path
from typing import TYPE_CHECKING

from rgtg.cli.common import Invocation, command, hush_libraries, resumable, save_settings, write_json
from rgtg.config import CompareSettings
from rgtg.utils.files import make_folder, refuse_overwriting

if TYPE_CHECKING:
    from rgtg.types.comparison import ComparisonResult

_WRITTEN = ("completions.jsonl", "results.json", "settings.json", "report.html", "report.md")


@command(CompareSettings, "policy prompts reward output limit baseline engine threads chat_template_kwargs force")
def run(settings: CompareSettings, invocation: Invocation) -> None:
    """Compare methods; the YAML names them under "methods" (see docs/compare.md).

    After Ctrl-C or SIGTERM, the same command resumes.
    """
    hush_libraries()
    from rich.console import Console

    from rgtg.evaluation.compare.comparison import compare
    from rgtg.evaluation.plots import new_figure
    from rgtg.report import write_report

    new_figure()  # a missing extra, and a folder that cannot be written, are errors before the work
    make_folder(settings.output)
    refuse_overwriting([("--prompts", settings.prompts)], [settings.output / name for name in _WRITTEN])
    errors = Console(stderr=True, quiet=invocation.silent)
    with resumable("the same command resumes from the finished parts"):
        result = compare(settings, lambda label, i, total: errors.print(f"[dim]{i + 1}/{total}[/dim] {label}"))
    write_json(settings.output / "results.json", result)
    save_settings(settings.output, settings)
    write_report(result, settings.output / "report.html")
    invocation.emit(result, lambda: show(result, settings.output))


def show(result: "ComparisonResult", output: Path | None = None) -> None:
    """Print the comparison as a table, best reward first, then the results of tests and checks."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", f"{result.reward} (95 %)", "less baseline", "p (Holm)", "KL (nats)", "tokens", "tokens/s")
    against = {d.a: d for d in result.differences if d.family == "baseline" and d.metric == "reward"}
    for row in sorted(result.methods, key=lambda r: -r.metrics["reward"].mean):
        reward, less = row.metrics["reward"], against.get(row.label)
        paired = [f"{less.difference.mean:+.3g}", f"{less.p_adjusted:.2g}"] if less else ["", ""]
        figures = [f"{row.metrics[name].mean:.3g}" for name in ("kl_nats", "length_tokens")]
        spread = f"{reward.mean:.3g} ({reward.low:.3g} to {reward.high:.3g})"
        table.add_row(row.label, spread, *paired, *figures, f"{row.tokens_per_second:.0f}")
    console = Console()
    console.print(table)
    if result.baseline:
        console.print(f"baseline: {result.baseline}. {result.budget_statement}")
    for mark in result.over_optimised:
        console.print(f"[yellow]over-optimised[/yellow]: {mark.at} (gold below {mark.best}, {mark.proxy} above)")
    for choice in result.recommended:
        console.print(f"recommended: {choice.label}: {choice.reason}")
    if output:
        console.print(f"written to {output}")
