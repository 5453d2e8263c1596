"""``rgtg judge``: win rates by a language model behind an OpenAI-compatible endpoint."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rgtg.cli.common import Invocation, command, resumable, save_settings, write_json
from rgtg.config import JudgeSettings
from rgtg.types.base import Interval
from rgtg.utils.files import make_folder, refuse_overwriting, write_text

if TYPE_CHECKING:
    from rgtg.evaluation.judge.run import CallEstimate, Judgement
    from rgtg.types.judge import JudgeMatch, JudgeResult, JudgeUsage

_SHOWN_FAILURES = 5


@command(
    JudgeSettings,
    "model base_url a b completions pairs output baseline limit prompt_file concurrency cache price_in price_out "
    "on_bad dry_run",
)
def run(settings: JudgeSettings, invocation: Invocation) -> None:
    """Win rates by a judge, each pair in both orders; the key comes from OPENAI_API_KEY and is never written."""
    from rgtg.evaluation.judge.run import estimate_calls, judge

    if settings.dry_run:
        planned = estimate_calls(settings)
        invocation.emit(vars(planned), lambda: _show_plan(planned))
        return
    _check_outputs(settings)
    make_folder(settings.output)
    save_settings(settings.output, settings)
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, quiet=invocation.silent)
    kept = f"the answers are kept in {settings.answers}; the same command resumes from them"
    with resumable(kept), Progress(console=console, disable=not console.is_terminal or invocation.silent) as bar:
        task = bar.add_task(f"asking {settings.model}", total=None)
        found = judge(settings, lambda done, total: bar.update(task, completed=done, total=total))
    _write(found, settings.output)
    invocation.emit(found.result, lambda: show(found.result, settings.output))


def _check_outputs(settings: JudgeSettings) -> None:
    from rgtg.data.sources import named_path

    named = [("--a", settings.a), ("--b", settings.b), *(("--completions", each) for each in settings.completions)]
    read = [(option, named_path(source)[1]) for option, source in named if source is not None]
    written = [settings.output / name for name in ("judge.json", "verdicts.jsonl", "settings.json")]
    refuse_overwriting(
        [*read, ("--pairs", settings.pairs), ("--prompt-file", settings.prompt_file)], [*written, settings.answers]
    )


def _write(found: "Judgement", output: Path) -> None:
    write_text(output / "verdicts.jsonl", "".join(pair.model_dump_json() + "\n" for pair in found.pairs))
    write_json(output / "judge.json", found.result)


def _show_plan(planned: "CallEstimate") -> None:
    written = planned.completion_tokens_at_most
    typer.echo(
        f"{planned.pairs} pairs ({planned.identical} of identical texts, which no judge is asked about): "
        f"{planned.calls} calls to make, {planned.cached} answers already there\n"
        f"about {planned.prompt_tokens:,} tokens to read and "
        + (f"at most {written:,} to write" if written is not None else "no limit on those written")
        + (f"; costs at most {planned.cost_at_most:.4g}" if planned.cost_at_most is not None else "")
    )


def show(result: "JudgeResult", output: Path | None = None) -> None:
    """Print the matches as a table, then failures and costs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rate = "agrees with humans" if result.kind == "agreement" else "win rate of a"
    figures = (f"{rate} (95 %)", "at equal length", "a / tie / b", "same in both orders", "first preferred")
    table = Table("a", "b", *figures)
    for match in result.matches:
        table.add_row(Text(match.a), Text(match.b), *_cells(match))
    console = Console()
    console.print(table)
    for failure in result.failures[:_SHOWN_FAILURES]:
        who = f"{failure.a} against {failure.b}, {failure.prompt[:40]!r}"
        console.print(f"no verdict: {who}: {failure.reason}", style="yellow", markup=False)
    if result.failures:
        console.print(
            f"{len(result.failures)} questions without a verdict: see judge.json; a rerun makes failed calls again"
        )
    console.print(_usage(result.usage), markup=False)
    if output:
        console.print(f"written to {output}", markup=False)


def _cells(match: "JudgeMatch") -> list[str]:
    return [
        _percent(match.win_rate, interval=True),
        _percent(match.length_controlled, interval=True),
        f"{match.wins} / {match.ties} / {match.losses}",
        _percent(match.consistent),
        _percent(match.first_preferred),
    ]


def _percent(value: Interval, *, interval: bool = False) -> str:
    if math.isnan(value.mean):
        return "–"
    return f"{value.mean:.1%}" + (f" ({value.low:.1%} to {value.high:.1%})" if interval else "")


def _usage(usage: "JudgeUsage") -> str:
    text = (
        f"{usage.calls} calls ({usage.cached} answers from the cache, {usage.retries} calls repeated): "
        f"{usage.prompt_tokens:,} tokens read, {usage.completion_tokens:,} written"
    )
    if usage.cost is not None and usage.total_cost is not None:
        text += f"; cost {usage.cost:.4g}, with what was paid earlier {usage.total_cost:.4g}"
    return text + (f"; {usage.estimated} answers had no token count, theirs is estimated" if usage.estimated else "")
