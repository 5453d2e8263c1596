"""``rgtg report``: the results of other commands as one page."""

from pathlib import Path
from typing import Annotated

import typer

from rgtg.cli.common import AsJson, Invocation, Quiet, verb
from rgtg.errors import UsageError
from rgtg.utils.files import refuse_overwriting


@verb
def run(
    source: Annotated[Path, typer.Argument(help="output folder of rgtg compare, or its results.json")],
    audit: Annotated[
        list[str] | None, typer.Option(help="audit.json or rollout-audit.json, as FILE or NAME=FILE; repeatable")
    ] = None,
    judge: Annotated[Path | None, typer.Option(help="judge.json of the same runs, or its folder")] = None,
    output: Annotated[
        Path | None, typer.Option(help="file of the page; default: report.html beside the results")
    ] = None,
    title: Annotated[str, typer.Option(help="heading of the page")] = "Comparison",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a self-contained page, and the same in Markdown beside it. No model is loaded."""
    from rgtg.data.sources import named_path
    from rgtg.report import write_report
    from rgtg.report.read import read_audits, read_comparison, read_judged

    page = output or (source if source.is_dir() else source.parent) / "report.html"
    read = [("the comparison", source), ("--judge", judge), *(("--audit", named_path(each)[1]) for each in audit or [])]
    if page.suffix == ".md":
        raise UsageError(f"--output {page}: name the page (.html); its Markdown is written beside it")
    refuse_overwriting(read, [page, page.with_suffix(".md")])
    result = read_comparison(source)
    audits, rollouts = read_audits(audit or [])
    judged = read_judged(judge) if judge else None
    written = write_report(result, page, audits=audits, rollouts=rollouts, judged=judged, title=title)
    names = [str(path) for path in written]
    Invocation(None, as_json, quiet).emit({"written": names}, lambda: typer.echo(f"written: {', '.join(names)}"))
