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
    save_settings,
    verb,
    write_json,
    write_text,
)
from rgtg.config import CompareSettings
from rgtg.types import ComparisonResult


@verb
def command(
    policy: Annotated[str | None, typer.Option(help="Frozen language model: folder or hub id.")] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSONL of {"prompt": ...}.')] = None,
    reward: Annotated[str | None, typer.Option(help="Held-out reward model that scores everyone.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for results.json, report.html and settings.json.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first prompts.")] = None,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Compare methods; the YAML names them under "methods" (see docs/quickstart.md)."""
    flags = {k: v for k, v in locals().items() if k in CompareSettings.model_fields}
    settings = CompareSettings.resolve(config, overrides, flags)
    hush_libraries()
    from rich.console import Console

    from rgtg.evaluation.compare import compare
    from rgtg.evaluation.figures import new_figure

    new_figure()  # a missing extra is told before the work, and so is a folder that cannot be written
    make_folder(settings.output)
    errors = Console(stderr=True, quiet=quiet or as_json)
    result = compare(settings, lambda label, i, total: errors.print(f"[dim]{i + 1}/{total}[/dim] {label}"))
    write_json(settings.output / "results.json", result)
    save_settings(settings.output, settings)
    _write_report(result, settings.output / "report.html")
    emit(result, as_json=as_json, quiet=quiet, show=lambda: show(result, settings.output))


def _write_report(result: ComparisonResult, path: Path) -> None:
    from rgtg.report import html_report

    write_text(path, html_report(result, {}, title="Comparison"))


def show(result: ComparisonResult, output: Path | None = None) -> None:
    """Print the comparison as a table, best reward first."""
    from rich.console import Console
    from rich.table import Table

    names = {"reward": "reward (95 %)", "kl_nats": "KL (nats)", "distinct_2": "distinct-2", "length_tokens": "tokens"}
    table = Table("method", *(names.get(name, name) for name in result.methods[0].metrics))
    for row in sorted(result.methods, key=lambda r: -r.metrics["reward"].mean):
        reward = row.metrics["reward"]
        rest = [f"{m.mean:.3g}" for name, m in row.metrics.items() if name != "reward"]
        table.add_row(row.label, f"{reward.mean:.3g} ({reward.low:.3g} to {reward.high:.3g})", *rest)
    console = Console()
    console.print(table)
    if output:
        console.print(f"written to {output}")
