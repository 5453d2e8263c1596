"""All commands in one app, which ``rgtg.__main__`` runs."""

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

app = typer.Typer(
    name="rgtg",
    help="Reward-guided text generation: steer a frozen language model with a scorer trained on partial sequences.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
for _module in (
    train, audit, calibrate, generate, score, serve, compare, judge, report, push, plan, methods, sweep, theory, demo,
    engines, doctor, model,
):  # fmt: skip
    app.command(_module.__name__.rpartition(".")[2])(_module.run)
