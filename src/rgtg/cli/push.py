"""``rgtg push``: publish a scorer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgtg.cli.common import AsJson, Config, Overrides, Quiet, emit, hush_libraries, verb
from rgtg.config import PushSettings

if TYPE_CHECKING:
    from rgtg.publishing.push import PushReport


@verb
def command(
    folder: Annotated[Path | None, typer.Argument(help="A scorer that rgtg train wrote.")] = None,
    repo: Annotated[str | None, typer.Argument(help="owner/name on the hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made where it is missing. Default main.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it private; refuse a public one.")] = False,
    audit: Annotated[Path | None, typer.Option(help="Output of rgtg audit. Default: in the folder.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of what a head or adapter reads.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="File or pattern that stays here; repeatable.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files; send nothing.")] = False,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Publish a scorer as one commit: weights, tokenizer, rgtg.json, and a card with its audit.

    The token is the one of hf auth login, or HF_TOKEN; HF_ENDPOINT names another hub.

    [bold]Example[/bold]: rgtg push scorer owner/name --private --audit audit --dry-run
    """
    given = {k: v for k, v in locals().items() if k in PushSettings.model_fields and v is not False}
    settings = PushSettings.resolve(config, overrides, given)
    hush_libraries()
    from rgtg.publishing.push import push_scorer

    report = push_scorer(settings)
    emit(report, as_json=as_json, quiet=quiet, show=lambda: _show(report))


def _show(report: "PushReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "bytes", title=f"{report.repo}@{report.revision}")
    for name, size in report.files.items():
        table.add_row(name, f"{size:,}")
    Console().print(table)
    if report.left_out:
        typer.echo(f"left here: {', '.join(report.left_out)}")
    if report.removed:
        typer.echo(f"removed from the repository: {', '.join(report.removed)}")
    if not report.audited:
        typer.echo("no audit: rgtg audit --output FOLDER, then --audit FOLDER, puts its figures on the card")
    if report.commit is None:
        typer.echo("dry run: nothing was sent")
    else:
        typer.echo(f"published: {report.url} ({'private' if report.private else 'public'}), commit {report.commit}")
