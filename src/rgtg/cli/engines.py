"""``rgtg engines``: which engines are installed, and what each can carry."""

from typing import TYPE_CHECKING, Any

from rgtg.cli.common import AsJson, Invocation, Quiet, verb

if TYPE_CHECKING:
    from rgtg.config.engines import Engine


@verb
def run(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the engines that can run a policy, and which methods, scorers and features each carries.

    [bold]Example[/bold]: rgtg engines --json
    """
    from rgtg.config.engines import ENGINES

    Invocation(None, as_json, quiet).emit({"engines": [_record(one) for one in ENGINES.values()]}, _show)


def carried() -> dict[str, tuple[str, ...]]:
    """Everything that an engine may carry, by heading."""
    from rgtg.config.engines import FEATURES, SCORERS
    from rgtg.decoding.methods import METHODS

    return {"methods": tuple(METHODS), "scorers": SCORERS, "features": FEATURES}


def _record(engine: "Engine") -> dict[str, Any]:
    about = {"name": engine.name, "runs": engine.runs, "installed": engine.installed, "install": engine.install}
    return about | {"chosen": engine.chosen} | {
        heading: {name: engine.lacks.get(name, "yes") for name in names} for heading, names in carried().items()
    }  # fmt: skip


def _show() -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rgtg.config.engines import ENGINES

    console = Console()
    about = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("engine", "installed", "runs", "chosen by"):
        about.add_column(heading)
    for one in ENGINES.values():
        about.add_row(one.name, "yes" if one.installed else f"no: {escape(one.install)}", one.runs, one.chosen)
    console.print(about)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("carries")
    for name in ENGINES:
        table.add_column(name)
    for heading, names in carried().items():
        table.add_section()
        table.add_row(f"[bold]{heading}[/bold]")
        for name in names:
            table.add_row(name, *("no" if name in one.lacks else "yes" for one in ENGINES.values()))
    console.print(table)
    console.print("The reason for each no: docs/engines.md, or rgtg engines --json.", style="dim")
