"""``rgtg compare``: several methods, the same prompts, a reward that none of them used."""

from pathlib import Path
from typing import Annotated

import typer

from rgtg.cli.common import (
    AsJson,
    Config,
    Overrides,
    Quiet,
    Seed,
    emit,
    hush_libraries,
    make_folder,
    refuse_overwriting,
    resumable,
    save_settings,
    verb,
    write_json,
)
from rgtg.config import CompareSettings
from rgtg.types.comparison import ComparisonResult

_WRITTEN = ("completions.jsonl", "results.json", "settings.json", "report.html", "report.md")


@verb
def command(
    policy: Annotated[str | None, typer.Option(help="Frozen language model: folder or hub id.")] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSONL of {"prompt": ...}.')] = None,
    reward: Annotated[str | None, typer.Option(help="Held-out reward model that scores everyone.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for results.json, the report and the rest.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first prompts.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Row to compare with. Default: the unguided policy.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Make anew what other settings or models made.")] = False,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Compare methods; the YAML names them under "methods" (see docs/compare.md).

    Stopped with Ctrl-C or SIGTERM, it goes on where it was when the same command is given again.
    """
    flags = {k: v for k, v in locals().items() if k in CompareSettings.model_fields and v is not False}
    settings = CompareSettings.resolve(config, overrides, flags)
    hush_libraries()
    from rich.console import Console

    from rgtg.evaluation.compare.comparison import compare
    from rgtg.evaluation.plots import new_figure
    from rgtg.report import write_report

    new_figure()  # a missing extra is told before the work, and so is a folder that cannot be written
    make_folder(settings.output)
    refuse_overwriting([("--prompts", settings.prompts)], [settings.output / name for name in _WRITTEN])
    errors = Console(stderr=True, quiet=quiet or as_json)
    with resumable("the same command goes on from the parts that are finished"):
        result = compare(settings, lambda label, i, total: errors.print(f"[dim]{i + 1}/{total}[/dim] {label}"))
    write_json(settings.output / "results.json", result)
    save_settings(settings.output, settings)
    write_report(result, settings.output / "report.html")
    emit(result, as_json=as_json, quiet=quiet, show=lambda: show(result, settings.output))


def show(result: ComparisonResult, output: Path | None = None) -> None:
    """Print the comparison as a table, best reward first, and what the tests and checks say."""
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
