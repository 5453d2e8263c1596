"""``rgtg audit``: is a scorer fit for token-wise guidance?"""

from pathlib import Path
from typing import Annotated

import typer

from rgtg.cli.common import (
    AsJson,
    Config,
    Overrides,
    Quiet,
    Seed,
    atomic_write,
    emit,
    hush_libraries,
    make_folder,
    save_settings,
    verb,
    write_json,
)
from rgtg.config import AuditSettings
from rgtg.types import AuditPoint, AuditResult


@verb
def command(
    scorer: Annotated[str | None, typer.Option(help="Scorer to audit: folder or hub id.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Held-out preference pairs.")] = None,
    policy: Annotated[str | None, typer.Option(help="Of a head on its states, where that policy has moved.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for audit.json, audit.png, settings.json, rejects.jsonl.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Completions per forward. Default 8.")] = None,
    bootstrap: Annotated[int | None, typer.Option(help="Resamples for the intervals. Default 1000.")] = None,
    on_bad: Annotated[str | None, typer.Option(help="error or skip: what to do with bad rows.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Measure a scorer on partial sequences: pairwise accuracy by prefix length, calibration, a verdict in words."""
    flags = {k: v for k, v in locals().items() if k in AuditSettings.model_fields}
    settings = AuditSettings.resolve(config, overrides, flags)
    hush_libraries()
    from rgtg.evaluation.figures import new_figure
    from rgtg.evaluation.prefix_audit import audit_prefixes
    from rgtg.models.scorer import load_named_scorer

    if settings.output:
        new_figure()  # a missing extra is told before the work, and so is a folder that cannot be written
        make_folder(settings.output)
    model = load_named_scorer(settings.scorer, settings.policy, dtype=settings.dtype, device=settings.device)
    result = audit_prefixes(
        model,
        settings.pairs,
        batch_size=settings.batch_size,
        bootstrap=settings.bootstrap,
        seed=settings.seed,
        on_bad=settings.on_bad,
        rejects=settings.output / "rejects.jsonl" if settings.output and settings.on_bad == "skip" else None,
    )
    if settings.output:
        _write(result, settings)
    emit(result, as_json=as_json, quiet=quiet, show=lambda: show(result))


def _write(result: AuditResult, settings: AuditSettings) -> None:
    from rgtg.evaluation.figures import plot_audit

    assert settings.output is not None, "called with an output only"
    with atomic_write(settings.output / "audit.png") as partial:
        plot_audit({result.scorer: result}, partial, format="png")
    save_settings(settings.output, settings)
    write_json(settings.output / "audit.json", result)


def show(result: AuditResult) -> None:
    """Print the audit as two tables and its verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table("prefix", "accuracy", "95 % interval", "margin", "ties", "pairs", title=f"audit of {result.scorer}")
    for point in result.by_tokens:
        table.add_row(f"{point.position:.0f} tokens", *_cells(point))
    table.add_section()
    for point in result.by_fraction:
        table.add_row(f"{point.position:.0%}", *_cells(point))
    console = Console()
    console.print(table)
    console.print(f"calibration error {result.calibration_error:.3f}; objective {result.objective}")
    console.print(result.verdict)


def _cells(point: AuditPoint) -> list[str]:
    a, m = point.accuracy, point.margin
    return [f"{a.mean:.3f}", f"{a.low:.3f}–{a.high:.3f}", f"{m.mean:+.3f}", str(point.ties), str(point.pairs)]
