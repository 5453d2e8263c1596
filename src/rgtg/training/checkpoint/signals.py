"""SIGTERM and Ctrl-C during a run: finish the step, save, leave; where nothing can be saved, leave at once."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from rgtg.errors import StoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether a run was asked to stop, while the block runs; outside of the main thread signals are left alone.

    A signal raises KeyboardInterrupt, which the block turns into ``StoppedError``; while ``deferred``, it is only noted
    in ``asked``. A second Ctrl-C (not the same one, passed on by a launcher) ends what was deferred.
    """

    def __init__(self, how_to_go_on: str) -> None:
        self.how_to_go_on = how_to_go_on
        self.asked = self.deferred = False
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt):
            raise StoppedError(f"stopped; {self.how_to_go_on}") from error

    def _note(self, number: int, _frame: Any) -> None:
        impatient = self.asked and number == signal.SIGINT and time.monotonic() - self._since > 1
        if not self.deferred or impatient:
            raise KeyboardInterrupt  # no library's "except Exception" catches it
        if not self.asked:
            self.asked, self._since = True, time.monotonic()

    @contextmanager
    def defer(self) -> Iterator[None]:
        """While the block runs, a signal waits: it is not to be cut short."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
