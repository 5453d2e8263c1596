"""``rgtg data``: check preference data before training on it."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rgtg.cli.common import Invocation, command, hush_libraries, save_settings
from rgtg.cli.progress import reading_bar
from rgtg.config import DataCheckSettings
from rgtg.errors import UsageError

if TYPE_CHECKING:
    from rgtg.data.pairs import PairReader

app = typer.Typer(help="Preference data: check it before training on it.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep ``check`` a sub-command, though it is the only one."""


@app.command("check")
@command(DataCheckSettings, "file tokenizer max_length chat_template_kwargs on_bad output rejects")
def check(settings: DataCheckSettings, invocation: Invocation) -> None:
    """Check preference pairs row by row, and show sizes, lengths, length bias and what is wrong."""
    for name, given in (("--rejects", settings.rejects), ("--output", settings.output)):
        if settings.on_bad == "error" and given is not None:
            raise UsageError(f"{name} is for the rows that --on-bad skip leaves out; it has no use with --on-bad error")
    folder = settings.output or Path()
    target = settings.rejects or folder / "rejects.jsonl" if settings.on_bad == "skip" else None
    pairs = _read(settings, target, quiet=invocation.silent)
    if target is not None:
        save_settings(target, settings)
    plain = {"file": settings.file, "fingerprint": pairs.fingerprint, **pairs.summary.model_dump()}
    plain["rejects"] = None if target is None else str(target)
    invocation.emit(plain, lambda: _show(settings.file, pairs, target))


def _read(settings: DataCheckSettings, rejects: Path | None, *, quiet: bool) -> "PairReader":
    """Read every row once, with one pair in memory at a time."""
    from rgtg.data.pairs import PairReader

    tokenizer = None
    if settings.tokenizer is not None:
        from rgtg.models.loading.pretrained import load_tokenizer

        hush_libraries(forks=False)
        tokenizer = load_tokenizer(settings.tokenizer, "data check")
    with reading_bar("checking", quiet=quiet) as progress:
        reader = PairReader(
            settings.file, tokenizer=tokenizer, max_length=settings.max_length, on_bad=settings.on_bad,
            rejects=rejects, progress=progress, chat_template_kwargs=settings.chat_template_kwargs,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*: left out ")  # the table counts them
            for _ in reader:
                pass
    return reader


def _show(source: str, pairs: "PairReader", rejects: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    summary, console = pairs.summary, Console()
    lengths = Table("length", "mean", "median", "95 %")
    for name in ("prompt", "chosen", "rejected"):
        stats = getattr(summary, name)
        lengths.add_row(f"{name} ({summary.unit})", f"{stats.mean:.1f}", f"{stats.median:.0f}", f"{stats.p95:.0f}")
    rows = Table("rows", "count")
    rows.add_row("read", str(summary.rows))
    rows.add_row("kept", str(summary.kept))
    for reason, count in summary.rejects_by_reason.items():
        rows.add_row(f"left out: {reason}", str(count))
    console.print(f"{escape(source)}: {summary.kept} pairs", soft_wrap=True)
    console.print(lengths, rows)
    console.print(
        f"chosen is longer in {summary.chosen_longer:.1%}, equal in {summary.chosen_equal:.1%}, "
        f"shorter in {summary.chosen_shorter:.1%} of the pairs",
        f"fingerprint {pairs.fingerprint}",
        sep="\n",
    )
    if summary.run_together_example is not None:
        console.print(
            f"warning: prompt and completion run together without a space in {summary.run_together:.1%} of the pairs, "
            f"for example {escape(summary.run_together_example)}; end the prompts, or begin the completions, with a "
            "space or a new line",
            soft_wrap=True,
        )
    if rejects is not None:
        console.print(f"rows left out, with reasons: {escape(str(rejects))}", soft_wrap=True)
