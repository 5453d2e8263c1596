"""``rgtg train``: preference pairs in, a scorer out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgtg.cli.common import AsJson, Config, Overrides, Quiet, Seed, emit, hush_libraries, verb
from rgtg.config import TrainSettings

if TYPE_CHECKING:
    from rich.table import Table

    from rgtg.training.report import TrainReport


@verb
def command(
    pairs: Annotated[str | None, typer.Option(help="Preference pairs: a file or a hub id.")] = None,
    rollouts: Annotated[
        str | None, typer.Option(help="Completions with rewards, of rgtg generate and score: value, cumulative-mse.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model to start from: usually the policy itself.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="prefix-bt (token-wise guidance), full-bt, farma, autoregressive, value, cumulative-mse or tcrm."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New folder for the scorer.")] = None,
    trunk: Annotated[
        str | None,
        typer.Option(help="separate, shared (an adapter on the policy) or own (a head on the policy's states)."),
    ] = None,
    head: Annotated[str | None, typer.Option(help="With --trunk own: state or vocab.")] = None,
    eval_pairs: Annotated[str | None, typer.Option(help="Held-out pairs; default: a part of --pairs.")] = None,
    eval_rollouts: Annotated[str | None, typer.Option(help="Held-out rollouts; default: a part of --rollouts.")] = None,
    reference_scorer: Annotated[
        str | None, typer.Option(help="With prefix-bt: trust pairs as far as this full-sequence scorer agrees.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt + completion, in tokens.")] = None,
    on_bad: Annotated[str | None, typer.Option(help="error or skip unusable rows.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Save checkpoints, and go on from the newest.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: although data or settings have changed.")
    ] = False,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Train a scorer on pairs or rollouts; training arguments keep their names: --set train.num_train_epochs=3."""
    flags = {
        "pairs": pairs, "base": base, "objective": objective, "output": output, "eval_pairs": eval_pairs,
        "max_length": max_length, "on_bad": on_bad, "resume": resume or None, "force": force or None, "seed": seed,
        "trunk": trunk, "head": head, "rollouts": rollouts, "eval_rollouts": eval_rollouts,
        "reference_scorer": reference_scorer,
    }  # fmt: skip
    settings = TrainSettings.resolve(config, overrides, flags)
    hush_libraries()
    try:
        from rgtg.models.loading.tensor_parallel import is_main_process
        from rgtg.training.train import train_scorer
    except ModuleNotFoundError as error:
        from rgtg.errors import MissingExtraError

        raise MissingExtraError(f"training needs {error.name}: pip install 'rgtg[train]'") from error
    report = train_scorer(settings, show=not (quiet or as_json))
    if is_main_process():
        emit(report, as_json=as_json, quiet=quiet, show=lambda: _show(report))


def _show(report: "TrainReport") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if len(report.choices) > 1:
        console.print(_choices(report))
    table = Table(title=f"{report.objective} scorer in {report.output}")
    kind = "rollouts" if report.rollouts else "pairs"
    counts = report.counts()
    table.add_column(f"held-out {kind}" if report.evaluation else "training")
    table.add_column("value", justify="right")
    for name, value in report.evaluation.items():
        table.add_row(_label(name), f"{value:.3f}")
    table.add_row("training loss (mean)", f"{report.loss:.3f}")
    table.add_row(f"{kind} trained on, held out", f"{counts[kind]}, {counts[f'eval_{kind}']}")
    table.add_row("steps", str(report.steps))
    table.add_row(f"{kind} per second", f"{report.pairs_per_second:.1f}")
    if report.states_seconds is not None:
        table.add_row("layer, width", f"{report.layer}, {report.width}")
        table.add_row("seconds, of which for states", f"{report.seconds:.1f}, {report.states_seconds:.1f}")
    console.print(table)


def _choices(report: "TrainReport") -> "Table":
    """Heads that were tried, by what decides between them."""
    from rich.table import Table

    figure = "explained_50" if report.rollouts else "prefix_accuracy"
    table = Table(title=f"heads tried, on held-out {'rollouts' if report.rollouts else 'pairs'}")
    for column in ("layer", "width", "loss", _label(figure), "seconds"):
        table.add_column(column, justify="right")
    for choice in report.choices:
        kept = (choice.layer, choice.width) == (report.layer, report.width)
        figures = [f"{choice.evaluation.get(name, float('nan')):.4f}" for name in ("loss", figure)]
        row = (str(choice.layer), str(choice.width), *figures, f"{choice.seconds:.1f}")
        table.add_row(*row, style="bold" if kept else None)
    return table


def _label(name: str) -> str:
    label, _, percent = name.partition("_")
    label = {"mse": "squared error", "explained": "share of variance explained"}.get(label, label)
    return f"{label} at {percent} % of the completion" if percent.isdigit() else name.replace("_", " ")
