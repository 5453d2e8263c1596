"""``rgtg plan``: what a job will take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rgtg.cli.common import AsJson, Config, Overrides, Quiet, emit, verb
from rgtg.config import PlanSettings

if TYPE_CHECKING:
    from rgtg.planning.plan import PlanResult


@verb
def command(
    policy: Annotated[str | None, typer.Option(help="A size (70B), or a folder or hub id.")] = None,
    scorer: Annotated[str | None, typer.Option(help="The same, of a scorer that is a model of its own.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="h200x8 …; cpu (default) or cuda measures this machine, in some seconds; or a file."),
    ] = None,
    save_hardware: Annotated[Path | None, typer.Option(help="Keep what was measured, for --hardware FILE.")] = None,
    prompts: Annotated[str | None, typer.Option(help="How many, for example 1e6. Default 1000.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Of a prompt, on average. Default 256.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Of a completion, on average. Default 256.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Candidates per step. Default: the method's own.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Of best-of-n and cd-blockwise. Default 10.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts together. Default: what costs least, to 64.")] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Devices for one copy. Default: what costs least.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default bfloat16.")] = None,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Memory, tokens per second and device-hours of every method, with what is assumed. No model is loaded.

    [bold]Example[/bold]: rgtg plan --policy 70B --scorer 8B --k 10 --hardware h200x8 --prompts 1e6

    [bold]Example[/bold]: rgtg plan --policy policy --scorer scorer --hardware cpu
    """
    flags = {name: value for name, value in locals().items() if name in PlanSettings.model_fields}
    settings = PlanSettings.resolve(config, overrides, flags)
    from rgtg.planning.plan import make_plan

    result = make_plan(settings)
    emit(result, as_json=as_json, quiet=quiet, show=lambda: _show(result))


def _show(result: "PlanResult") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = (
        f"policy {result.policy.name}, scorer {result.scorer.name if result.scorer else 'none'}: "
        f"{result.settings['prompts']:,} prompts on {result.devices} × {result.device.name}"
    )
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("method", "scorer", "batch", "split", "GB", "ms (limit)", "tok/s", "device-h"):
        side: Literal["left", "right"] = "left" if heading in ("method", "scorer") else "right"
        table.add_column(heading, justify=side, no_wrap=True)
    for row in result.rows:
        held = f"{row.weights_gb + row.caches_gb + row.work_gb:.1f}"
        speed = f"{row.ms_per_token:.1f} ({row.limit_ms:.1f})"
        shown = [str(row.batch), str(row.tensor_parallel), held, speed, f"{row.tokens_per_second:,.0f}"]
        unfit = [str(row.batch), str(row.tensor_parallel), held, "too large", "", ""]
        table.add_row(row.method, row.scorer, *([*shown, f"{row.device_hours:,.3g}"] if row.fits else unfit))
    console = Console()
    console.print(table)
    console.print(
        "batch: prompts together; split: devices that share a copy; GB: on each device; ms: one token of every row of "
        "a batch (and if only weights and caches were read); tok/s: on all devices, prompts included",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for assumption in result.assumptions:
        console.print(f"· {assumption}", highlight=False, soft_wrap=True)
