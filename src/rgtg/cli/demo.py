"""``rgtg demo``: steer a real chat model, or train, compare and report everything in a small world."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgtg.cli.common import Invocation, command, hush_libraries
from rgtg.config import DemoSettings
from rgtg.errors import MissingExtraError, RgtgError

if TYPE_CHECKING:
    from rgtg.demo.run import DemoOutput
    from rgtg.models.loading.policy import Policy

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


REAL_INTRO = """\
{source}, a chat model of 135 million weights, is the policy; it stays frozen. It was asked what to say to somebody to \
whom something had happened, and answered {seen} prompts four times each. A rule gave every answer points for \
friendliness, and two small heads on the policy's own hidden states learned from noisy pairs of answers: full-bt from \
whole ones, prefix-bt from every prefix. Each method then answered {unseen} prompts about other happenings. No method \
reads the rule (docs/demo.md has its table).
{equal}
KL measures how far a method moves away from the policy. Intervals (95 %) cover the choice of prompts and the \
sampling, not the training: run other seeds for that."""


@command(DemoSettings, "output world policy prompts")
def run(settings: DemoSettings, invocation: Invocation) -> None:
    """Steer a real chat model with heads trained on the spot, compare all methods, write a report; a few minutes.

    Without a network it says so and does the same in a small world, whose models are trained from scratch.
    """
    start = time.perf_counter()
    hush_libraries()
    _require_extras()
    stages = _stages(not invocation.silent)
    source = None if settings.chosen_world == "small" else _chat_model(settings, invocation)
    if source is None:
        from rgtg.demo.run import run_demo

        demo, title, intro = run_demo(settings, stages), "rgtg demo: a support desk", INTRO
    else:
        from rgtg.demo.real import PROMPTS, SEEN_PROMPTS, at_equal_kl, run_real_demo

        demo = run_real_demo(settings, _load_policy(source), source, stages)
        title = "rgtg demo: friendlier replies"
        intro = REAL_INTRO.format(
            source=Path(source).name, seen=settings.seen_prompts or SEEN_PROMPTS, unseen=settings.prompts or PROMPTS,
            equal=at_equal_kl(demo.result),
        )  # fmt: skip
    report = _write_report(settings, demo, title, intro)
    seconds = time.perf_counter() - start
    plain = {"report": str(report), "seconds": seconds, "result": demo.result.model_dump(mode="json")}
    plain["audits"] = {name: audit.verdict for name, audit in demo.audits.items()}
    invocation.emit(plain, lambda: _show(demo, report, seconds))


def _load_policy(source: str) -> "Policy":
    """The chat model, laid out for decoding."""
    from rgtg.decoding.loading import lay_out_policy
    from rgtg.models.loading.policy import load_policy

    return lay_out_policy(load_policy(source), grouped=False)


def _chat_model(settings: DemoSettings, invocation: Invocation) -> str | None:
    """The folder of the chat model, which is brought to a cache first; None if the small world has to do.

    Raises:
        RgtgError: it cannot be had, and the world smollm was asked for.
    """
    if settings.policy is not None:
        return settings.policy
    from rgtg.demo.friendliness import friendliness
    from rgtg.models.loading.known_models import fetch_model

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rgtg" / "smollm2-135m"
    try:
        friendliness("", "", finished=True)
        fetch_model("smollm2-135m", cache, tell=invocation.tell)
    except RgtgError as error:
        if settings.chosen_world == "smollm":
            raise
        print(f"note: the small world stands in for the real model: {error}", file=sys.stderr)  # noqa: T201
        return None
    return str(cache)


def _require_extras() -> None:
    """Raise an error for a missing extra now rather than after two minutes."""
    import importlib.util

    for module in ("trl", "datasets", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(f"the demo needs {module}: pip install 'rgtg[train,report]'")


def _write_report(settings: DemoSettings, demo: "DemoOutput", title: str, intro: str) -> Path:
    from rgtg.report import write_report

    page = settings.output / "report.html"
    write_report(demo.result, page, audits=demo.audits, title=title, intro=intro)
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

    from rgtg.evaluation.compare.controls import is_greedy

    table = Table("method", title=f"{demo.result.reward} on unseen prompts (mean, 95 % interval)")
    for heading in ("reward", "KL, nats", "tokens/s", "scorer calls"):
        table.add_column(heading, justify="right")
    for row in sorted(demo.result.methods, key=lambda row: (is_greedy(row), -row.metrics["reward"].mean)):
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
