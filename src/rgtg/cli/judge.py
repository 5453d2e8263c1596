"""``rgtg judge``: win rates by a language model behind any OpenAI-compatible endpoint."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgtg.cli.common import (
    AsJson,
    Config,
    Overrides,
    Quiet,
    Seed,
    emit,
    make_folder,
    refuse_overwriting,
    resumable,
    save_settings,
    verb,
    write_json,
    write_text,
)
from rgtg.config import JudgeSettings
from rgtg.types.base import Interval
from rgtg.types.judge import JudgeMatch, JudgeResult, JudgeUsage

if TYPE_CHECKING:
    from rgtg.evaluation.judge.run import CallEstimate, Judgement

_SHOWN_FAILURES = 5


@verb
def command(
    model: Annotated[str | None, typer.Option(help="Name of the judge at the endpoint.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Endpoint. Default: OPENAI_BASE_URL, else OpenAI's.")] = None,
    a: Annotated[str | None, typer.Option("--a", help="Completions: FILE or NAME=FILE.")] = None,
    b: Annotated[str | None, typer.Option("--b", help="Completions of the same prompts.")] = None,
    completions: Annotated[
        list[str] | None, typer.Option(help="Several: FILE, NAME=FILE, or a folder of rgtg compare; every two meet.")
    ] = None,
    pairs: Annotated[str | None, typer.Option(help="Preference pairs: how often does the judge agree?")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for judge.json, verdicts.jsonl, answers.jsonl, settings.json.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Judge the others against this one only.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first prompts.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Your own prompt, with {prompt}, {first}, {second}.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Calls under way at once. Default 8.")] = None,
    cache: Annotated[Path | None, typer.Option(help="File of paid answers. Default: OUTPUT/answers.jsonl.")] = None,
    price_in: Annotated[float | None, typer.Option(help="Price of a million tokens read.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of a million tokens written.")] = None,
    on_bad: Annotated[str | None, typer.Option(help="error or skip: what to do with bad rows of --pairs.")] = None,
    dry_run: Annotated[bool | None, typer.Option("--dry-run", help="Count the calls and tokens; make none.")] = None,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Win rates by a judge, each pair in both orders; the key comes from OPENAI_API_KEY and is never written."""
    flags = {k: v or None if k == "completions" else v for k, v in locals().items() if k in JudgeSettings.model_fields}
    settings = JudgeSettings.resolve(config, overrides, flags)
    from rgtg.evaluation.judge.run import estimate_calls, judge

    if settings.dry_run:
        planned = estimate_calls(settings)
        emit(vars(planned), as_json=as_json, quiet=quiet, show=lambda: _show_plan(planned))
        return
    _keep_inputs(settings)
    make_folder(settings.output)
    save_settings(settings.output, settings)
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, quiet=quiet or as_json)
    kept = f"the answers are kept in {settings.answers}; the same command goes on from there"
    with resumable(kept), Progress(console=console, disable=not console.is_terminal or quiet or as_json) as bar:
        task = bar.add_task(f"asking {settings.model}", total=None)
        found = judge(settings, lambda done, total: bar.update(task, completed=done, total=total))
    _write(found, settings.output)
    emit(found.result, as_json=as_json, quiet=quiet, show=lambda: show(found.result, settings.output))


def _keep_inputs(settings: JudgeSettings) -> None:
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


def show(result: JudgeResult, output: Path | None = None) -> None:
    """Print the matches as a table, then what failed and what it cost."""
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


def _cells(match: JudgeMatch) -> list[str]:
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


def _usage(usage: JudgeUsage) -> str:
    text = (
        f"{usage.calls} calls ({usage.cached} answers from the cache, {usage.retries} calls repeated): "
        f"{usage.prompt_tokens:,} tokens read, {usage.completion_tokens:,} written"
    )
    if usage.cost is not None and usage.total_cost is not None:
        text += f"; cost {usage.cost:.4g}, with what was paid earlier {usage.total_cost:.4g}"
    return text + (f"; {usage.estimated} answers had no token count, theirs is estimated" if usage.estimated else "")
