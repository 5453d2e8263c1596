"""``rgtg demo``: train, compare and report everything in a small world, in about two minutes."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgtg.cli.common import Invocation, command, hush_libraries
from rgtg.config import DemoSettings
from rgtg.errors import MissingExtraError

if TYPE_CHECKING:
    from rgtg.demo.run import DemoOutput

INTRO = """\
A support desk answers customers. A small language model (the policy) was trained on the desk's past replies, good \
and bad; it is frozen. Two scorers were trained from its weights on the same noisy preferences: full-bt on finished \
replies, prefix-bt on every prefix. Each method below then answered the same messages, none of them seen in training.
The reward is a rule that reads finished replies (from -9 or so to 5 points; docs/demo.md has the table). No scorer \
has seen it. The settings of the authors' code are beta 2 for pargs and 1 for pargs-greedy and args.
Compare like with like: pargs and args-sample are sampled, as policy is; pargs-greedy and args take the best token, \
as policy (greedy) does.
Everything was trained and drawn by this run. Intervals (95 %) cover the choice of messages and the sampling, not the \
training: run other seeds for that."""


@command(DemoSettings, "output prompts")
def run(settings: DemoSettings, invocation: Invocation) -> None:
    """Train a policy and two scorers in a small world, compare all methods, write a report; about two minutes."""
    start = time.perf_counter()
    hush_libraries()
    _require_extras()
    from rgtg.demo.run import run_demo

    demo = run_demo(settings, _stages(not invocation.silent))
    report = _write_report(settings, demo)
    seconds = time.perf_counter() - start
    plain = {"report": str(report), "seconds": seconds, "result": demo.result.model_dump(mode="json")}
    plain["audits"] = {name: audit.verdict for name, audit in demo.audits.items()}
    invocation.emit(plain, lambda: _show(demo, report, seconds))


def _require_extras() -> None:
    """Raise an error for a missing extra now rather than after two minutes."""
    import importlib.util

    for module in ("trl", "datasets", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(f"the demo needs {module}: pip install 'rgtg[train,report]'")


def _write_report(settings: DemoSettings, demo: "DemoOutput") -> Path:
    from rgtg.report import write_report

    page = settings.output / "report.html"
    write_report(demo.result, page, audits=demo.audits, title="rgtg demo: a support desk", intro=INTRO)
    return page


def _stages(show: bool) -> Callable[[str, int], AbstractContextManager[Callable[[], None]]]:
    """Stages with a progress bar and the time of each, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, quiet=not show)

    @contextmanager
    def stage(name: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not show) as progress:
            task = progress.add_task(name, total=total)
            yield lambda: progress.advance(task)

    return stage


def _show(demo: "DemoOutput", report: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", title="gold points on unseen messages (mean, 95 % interval)")
    for heading in ("reward", "KL, nats", "tokens/s", "scorer calls"):
        table.add_column(heading, justify="right")
    for row in sorted(demo.result.methods, key=lambda row: -row.metrics["reward"].mean):
        reward, kl = row.metrics["reward"], row.metrics["kl_nats"]
        table.add_row(
            row.label, _interval(reward), f"{kl.mean:.2f}", f"{row.tokens_per_second:.0f}", str(row.scorer_calls)
        )
    console = Console()
    console.print(table)
    for name, audit in demo.audits.items():
        console.print(f"[bold]{name}[/bold]: {audit.verdict}")
    console.print(f"{seconds:.0f} s; the report is in {report}", soft_wrap=True)


def _interval(value: Any) -> str:
    return f"{value.mean:.2f} [dim]{value.low:.2f} to {value.high:.2f}[/dim]"
