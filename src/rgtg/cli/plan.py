"""``rgtg plan``: predict the memory and time of a job."""

from typing import TYPE_CHECKING, Literal

from rgtg.cli.common import Invocation, command
from rgtg.config import PlanSettings

if TYPE_CHECKING:
    from rgtg.planning.plan import PlanResult


@command(
    PlanSettings,
    "policy scorer hardware save_hardware prompts prompt_tokens new_tokens k n batch_size tensor_parallel dtype",
)
def run(settings: PlanSettings, invocation: Invocation) -> None:
    """Memory, tokens per second and device-hours of every method, with all assumptions. No model is loaded.

    [bold]Example[/bold]: rgtg plan --policy 70B --scorer 8B --k 10 --hardware h200x8 --prompts 1e6

    [bold]Example[/bold]: rgtg plan --policy policy --scorer scorer --hardware cpu
    """
    from rgtg.planning.plan import make_plan

    result = make_plan(settings)
    invocation.emit(result, lambda: _show(result))


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
