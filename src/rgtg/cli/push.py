"""``rgtg push``: publish a scorer on the hub."""

from typing import TYPE_CHECKING

import typer

from rgtg.cli.common import Invocation, command, hush_libraries
from rgtg.config import PushSettings

if TYPE_CHECKING:
    from rgtg.publishing.push import PushReport


@command(PushSettings, "folder repo revision private audit base_model exclude message dry_run")
def run(settings: PushSettings, invocation: Invocation) -> None:
    """Publish a scorer as one commit: weights, tokenizer, rgtg.json, and a card with its audit.

    The token is the one of hf auth login, or HF_TOKEN; HF_ENDPOINT names another hub.

    [bold]Example[/bold]: rgtg push scorer owner/name --private --audit audit --dry-run
    """
    hush_libraries()
    from rgtg.publishing.push import push_scorer

    report = push_scorer(settings)
    invocation.emit(report, lambda: _show(report))


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
