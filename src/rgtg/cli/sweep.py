"""``rgtg sweep``: find the beta that meets a KL or reward target."""

from typing import TYPE_CHECKING, Any

import typer

from rgtg.cli.common import Invocation, command, hush_libraries, resumable, save_settings, write_json
from rgtg.config import SweepSettings
from rgtg.errors import UsageError
from rgtg.utils.files import make_folder, refuse_overwriting

if TYPE_CHECKING:
    from rgtg.types.comparison import SweepResult


def _pair_scorers(flags: dict[str, Any]) -> dict[str, Any]:
    """Replace --scorer and --beta by settings: one scorer, or several with one beta each."""
    scorers, betas = flags.pop("scorer", []), flags.pop("beta", [])
    if betas and len(betas) != len(scorers):
        raise UsageError(f"{len(scorers)} --scorer and {len(betas)} --beta; give one --beta for each --scorer")
    if len(scorers) == 1 and not betas:
        return flags | {"scorer": scorers[0]}
    pairs = zip(scorers, betas or [1.0] * len(scorers), strict=True)
    return flags | ({"scorers": [{"scorer": scorer, "beta": beta} for scorer, beta in pairs]} if scorers else {})


@command(
    SweepSettings,
    "policy method prompts target_kl target_reward kl_to reward tolerance tries output limit top_k max_new_tokens "
    "engine threads chat_template_kwargs force",
    lists={"scorer": "what guides the policy; repeatable", "beta": "of each scorer; the sweep multiplies them all"},
    convert=_pair_scorers,
)
def run(settings: SweepSettings, invocation: Invocation) -> None:
    """Find the beta that meets a target, by interpolated bisection on log beta with the same seeds every time.

    [bold]Example[/bold]: rgtg sweep --method pargs --scorer S --policy P --prompts F --target-kl 5 --output sweep
    """
    hush_libraries()
    from rich.console import Console

    from rgtg.evaluation.compare.sweep import sweep

    make_folder(settings.output)
    written = [settings.output / name for name in ("sweep.json", "settings.json")]
    refuse_overwriting([("--prompts", settings.prompts)], written)
    errors = Console(stderr=True, quiet=invocation.silent)
    with resumable("the same command resumes from the finished tries"):
        result = sweep(settings, lambda label, i, _: errors.print(f"[dim]{i + 1}[/dim] {label}"))
    write_json(settings.output / "sweep.json", result)
    save_settings(settings.output, settings)
    invocation.emit(result, lambda: show(result))
    if not result.reached:
        raise typer.Exit(1)


def show(result: "SweepResult") -> None:
    """Print every try, and the beta that was found."""
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
