"""``rgtg train``: preference pairs in, a scorer out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgtg.cli.common import AsJson, Config, Overrides, Quiet, Seed, emit, hush_libraries, verb
from rgtg.config import TrainSettings

if TYPE_CHECKING:
    from rgtg.training.run import TrainReport


@verb
def command(
    pairs: Annotated[str | None, typer.Option(help="Preference pairs: a file or a hub id.")] = None,
    base: Annotated[str | None, typer.Option(help="Model to start from: usually the policy itself.")] = None,
    objective: Annotated[str | None, typer.Option(help="prefix-bt (token-wise guidance) or full-bt.")] = None,
    output: Annotated[Path | None, typer.Option(help="New folder for the scorer.")] = None,
    eval_pairs: Annotated[str | None, typer.Option(help="Held-out pairs; default: a part of --pairs.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt + completion, in tokens.")] = None,
    on_bad: Annotated[str | None, typer.Option(help="error or skip unusable rows.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Save checkpoints, and go on from the newest.")] = False,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Train a scorer on preference pairs; training arguments keep their names: --set train.num_train_epochs=3."""
    flags = {
        "pairs": pairs, "base": base, "objective": objective, "output": output, "eval_pairs": eval_pairs,
        "max_length": max_length, "on_bad": on_bad, "resume": resume or None, "seed": seed,
    }  # fmt: skip
    settings = TrainSettings.resolve(config, overrides, flags)
    hush_libraries()
    try:
        from rgtg.training.run import is_main_process, train_scorer
    except ModuleNotFoundError as error:
        from rgtg.errors import MissingExtraError

        raise MissingExtraError(f"training needs {error.name}: pip install 'rgtg[train]'") from error
    report = train_scorer(settings, show=not (quiet or as_json))
    if is_main_process():
        emit(report, as_json=as_json, quiet=quiet, show=lambda: _show(report))


def _show(report: "TrainReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.objective} scorer in {report.output}")
    table.add_column("held-out pairs" if report.evaluation else "training")
    table.add_column("value", justify="right")
    for name, value in report.evaluation.items():
        label, _, percent = name.partition("_")
        table.add_row(f"{label} at {percent} % of the completion" if percent else label, f"{value:.3f}")
    table.add_row("training loss (mean)", f"{report.loss:.3f}")
    table.add_row("pairs trained on, held out", f"{report.pairs}, {report.eval_pairs}")
    table.add_row("steps", str(report.steps))
    table.add_row("pairs per second", f"{report.pairs_per_second:.1f}")
    Console().print(table)
