"""``rgtg sweep``: the beta that meets a KL or reward target."""

from pathlib import Path
from typing import Annotated, Any

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
from rgtg.config import SweepSettings
from rgtg.errors import UsageError
from rgtg.types.comparison import SweepResult


@verb
def command(
    policy: Annotated[str | None, typer.Option(help="Frozen language model: folder or hub id.")] = None,
    scorer: Annotated[list[str] | None, typer.Option(help="What steers it; repeatable, each with its --beta.")] = None,
    beta: Annotated[list[float] | None, typer.Option(help="Of each scorer; the sweep multiplies them all.")] = None,
    method: Annotated[str | None, typer.Option(help="A method with a beta. Default pargs.")] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSONL of {"prompt": ...}; not those of the comparison.')] = None,
    target_kl: Annotated[float | None, typer.Option(help="Nats.")] = None,
    target_reward: Annotated[float | None, typer.Option(help="Of the held-out reward on these prompts.")] = None,
    kl_to: Annotated[str | None, typer.Option(help="policy, or candidates: the policy cut to them.")] = None,
    reward: Annotated[str | None, typer.Option(help="Held-out reward model.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="In the target's unit. Default 5 % of it.")] = None,
    tries: Annotated[int | None, typer.Option(help="Betas tried at most. Default 12.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for sweep.json and the tries.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first prompts.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Candidates per step. Default 10.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default 64.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Make anew what other settings or models made.")] = False,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Find the beta that meets a target, by interpolated bisection on log beta with the same seeds every time.

    [bold]Example[/bold]: rgtg sweep --method pargs --scorer S --policy P --prompts F --target-kl 5 --output sweep
    """
    given = locals()
    names = set(SweepSettings.model_fields) - {"scorer"}
    flags = {k: v for k, v in given.items() if k in names and v is not False}
    settings = SweepSettings.resolve(config, overrides, flags | _steering(scorer, beta))
    hush_libraries()
    from rich.console import Console

    from rgtg.evaluation.compare.sweep import sweep

    make_folder(settings.output)
    written = [settings.output / name for name in ("sweep.json", "settings.json")]
    refuse_overwriting([("--prompts", settings.prompts)], written)
    errors = Console(stderr=True, quiet=quiet or as_json)
    with resumable("the same command goes on from the tries that are finished"):
        result = sweep(settings, lambda label, i, _: errors.print(f"[dim]{i + 1}[/dim] {label}"))
    write_json(settings.output / "sweep.json", result)
    save_settings(settings.output, settings)
    emit(result, as_json=as_json, quiet=quiet, show=lambda: show(result))
    if not result.reached:
        raise typer.Exit(1)


def _steering(scorers: list[str] | None, betas: list[float] | None) -> dict[str, Any]:
    """One scorer, or several with one beta each."""
    if betas and len(betas) != len(scorers or []):
        raise UsageError(f"{len(scorers or [])} --scorer and {len(betas)} --beta; give one --beta for each --scorer")
    if not scorers:
        return {}
    if len(scorers) == 1 and not betas:
        return {"scorer": scorers[0]}
    return {"scorers": [{"scorer": s, "beta": b} for s, b in zip(scorers, betas or [1.0] * len(scorers), strict=True)]}


def show(result: SweepResult) -> None:
    """Print every try, and the one that was found."""
    from rich.console import Console
    from rich.table import Table

    table = Table("beta", f"{result.metric} (95 %)", "KL (nats)", "length")
    for one in sorted(result.tries, key=lambda one: one.factor):
        value, rest = one.value, [f"{one.metrics[name].mean:.3g}" for name in ("kl_nats", "length_tokens")]
        table.add_row(str(one.beta), f"{value.mean:.4g} ({value.low:.4g} to {value.high:.4g})", *rest)
    console = Console()
    console.print(table)
    console.print(
        f"{result.metric} {result.target:g}: beta {result.beta} gives {result.value.mean:.4g}, {result.verdict}"
    )
