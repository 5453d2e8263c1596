"""``rgtg methods``: every decoding method, its scorer, candidates, rule and paper."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rgtg.cli.common import AsJson, Invocation, Quiet, verb

if TYPE_CHECKING:
    from rgtg.decoding.methods import Method


@verb
def run(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the methods of rgtg generate; docs/methods.md has an entry for each.

    [bold]Example[/bold]: rgtg methods --json
    """
    from rgtg.decoding.methods import METHODS

    rows = {"methods": [asdict(method) for method in METHODS.values()]}
    Invocation(None, as_json, quiet).emit(rows, lambda: _show(list(METHODS.values())))


def _show(methods: "list[Method]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("method", "scorer", "reads each", "candidates", "choice", "source"):
        table.add_column(heading, no_wrap=True)
    for row in methods:
        table.add_row(row.name, row.scorer or "none", _reads(row), _candidates(row), row.rule, row.paper.split()[-1])
    console = Console()
    console.print(table)
    console.print(
        "scorer: the objective of rgtg train that it was proposed with; candidates: the policy's most likely tokens, "
        "or the largest sums of log-probability and beta times score; source: arXiv.",
        style="dim",
    )


def _reads(row: "Method") -> str:
    """What the scorer scores."""
    if row.scorer is None:
        return "–"
    return "prefix" if row.vocabulary else {"token": "candidate"}.get(row.unit, row.unit)


def _candidates(row: "Method") -> str:
    k = "all" if row.top_k is None else str(row.top_k)
    return f"{k} (sums)" if row.candidates == "sum" else k
