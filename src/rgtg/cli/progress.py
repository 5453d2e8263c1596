"""Progress on stderr: a bar on a terminal, a line every half minute elsewhere, nothing with --quiet."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rgtg.batch.run import JobProgress

_EVERY = 30.0  # seconds between two lines without a terminal


@contextmanager
def reading_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how much of a source is read; yields the reader's progress function."""
    with _bar(what, quiet=quiet) as show:
        yield lambda done, total: show(done, total, "")


@contextmanager
def job_bar(what: str, *, quiet: bool) -> Iterator[Callable[["JobProgress"], None]]:
    """Show rows, tokens per second and remaining time of a job; yields its progress function."""
    speed = JobSpeed()
    with _bar(what, quiet=quiet) as show:
        yield lambda state: show(state.cost, max(state.total_cost, 1), speed.text(state))


@dataclass
class JobSpeed:
    """Rows and tokens per second of a job.

    >>> from rgtg.batch.run import JobProgress
    >>> JobSpeed(clock=iter([0.0, 2.0]).__next__).text(JobProgress(rows=9, before=4, done=5, failed=1, tokens=30))
    '5/9 rows, 1 failed, 15 tokens/s, 0.5 rows/s'
    """

    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    def text(self, state: "JobProgress") -> str:
        """One line, without the remaining time."""
        elapsed = max(self.clock() - self.start, 1e-3)
        failed = [f"{state.failed} failed"] if state.failed else []
        speed = [f"{state.tokens / elapsed:.0f} tokens/s", f"{(state.done - state.before) / elapsed:.3g} rows/s"]
        return ", ".join([f"{state.done}/{state.rows} rows", *failed, *(speed if state.tokens else [])])


@contextmanager
def _bar(what: str, *, quiet: bool) -> Iterator[Callable[[float, float, str], None]]:
    """Yield a function of how much is done, of how much, and a text."""
    from rich.console import Console

    console = Console(stderr=True)  # stdout is for results
    if quiet:
        yield lambda done, total, text: None
    elif not console.is_terminal:
        yield LogLines(what).update
    else:
        yield from _rich(what, console)


def _rich(what: str, console: Any) -> Iterator[Callable[[float, float, str], None]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, text="")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, text=text)


@dataclass
class LogLines:
    """A line every half minute, for logs.

    >>> import sys; from unittest.mock import patch
    >>> with patch("sys.stderr", sys.stdout):
    ...     LogLines("checking", clock=iter([0.0, 10.0, 40.0]).__next__).update(1, 4, "")
    ...     LogLines("checking", clock=iter([0.0, 40.0]).__next__).update(1, 4, "so far so good")
    checking: 25 %, about 2 min left, so far so good
    """

    what: str
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.last = self.clock()

    def update(self, done: float, total: float, text: str) -> None:
        """Print a line if half a minute has passed."""
        now = self.clock()
        if now - self.last < _EVERY or not done or not total:
            return
        self.last = now
        left = (now - self.start) * (total - done) / done
        parts = [f"{done / total:.0%}".replace("%", " %"), f"about {duration(left)} left", *([text] if text else [])]
        sys.stderr.write(f"{self.what}: {', '.join(parts)}\n")


def duration(seconds: float) -> str:
    """Format seconds.

    >>> duration(12), duration(120), duration(4000), duration(200_000)
    ('12 s', '2 min', '1 h 7 min', '55 h 33 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
