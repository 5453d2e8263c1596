"""``rgtg train``: train a scorer on preference pairs or rollouts."""

from typing import TYPE_CHECKING

from rgtg.cli.common import Invocation, command, hush_libraries
from rgtg.config import TrainSettings

if TYPE_CHECKING:
    from rich.table import Table

    from rgtg.training.report import TrainReport


@command(
    TrainSettings,
    "pairs rollouts base objective output trunk head layer engine states eval_pairs eval_rollouts reference_scorer "
    "max_length chat_template_kwargs on_bad resume force",
)
def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train a scorer on pairs or rollouts; training arguments keep their names: --set train.num_train_epochs=3."""
    hush_libraries()
    try:
        from rgtg.models.loading.tensor_parallel import is_main_process
        from rgtg.training.train import train_scorer
    except ModuleNotFoundError as error:
        from rgtg.errors import MissingExtraError

        raise MissingExtraError(f"training needs {error.name}: pip install 'rgtg[train]'") from error
    report = train_scorer(settings, show=not invocation.silent)
    if is_main_process():
        invocation.emit(report, lambda: _show(report))


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
    """Table of the heads that were tried, with the number that decides between them."""
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
