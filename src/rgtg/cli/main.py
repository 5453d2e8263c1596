"""All commands in one app, which ``rgtg.__main__`` runs."""

from typing import Annotated

import typer

from rgtg.cli import (
    audit,
    calibrate,
    compare,
    data,
    demo,
    doctor,
    engines,
    generate,
    judge,
    methods,
    model,
    plan,
    push,
    report,
    score,
    serve,
    sweep,
    theory,
    train,
)
from rgtg.version import __version__

app = typer.Typer(
    name="rgtg",
    help="Reward-guided text generation: steer a frozen language model with a scorer trained on partial sequences.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rgtg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What holds for every command."""


app.add_typer(data.app, name="data")
for _module in (
    train, audit, calibrate, generate, score, serve, compare, judge, report, push, plan, methods, sweep, theory, demo,
    engines, doctor, model,
):  # fmt: skip
    app.command(_module.__name__.rpartition(".")[2])(_module.run)
