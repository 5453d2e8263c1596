"""The engine: takes jobs in, steps whatever runs, one thread for all models; requests join and leave at any step."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from rgtg.config import EngineSettings
from rgtg.errors import BusyError, DeadlineError, NotServingError, RgtgError, StoppedError, UsageError
from rgtg.serving.jobs import Failed, Job, Listener, Ticket
from rgtg.serving.models import ServedModels
from rgtg.serving.seats import Seat, Solo, rows_of

T = TypeVar("T")
_log = logging.getLogger("rgtg.serving")
# How long the thread sleeps when there is nothing to do and nobody wakes it.
_IDLE_SECONDS = 0.5


@dataclass(frozen=True)
class Snapshot:
    """What the engine is doing now, and what it has done since it started."""

    running: int
    waiting: int
    draining: bool


class Engine:
    """Admission, scheduling and the one thread that runs the models.

    Example:
        >>> engine = Engine(models, EngineSettings())  # doctest: +SKIP
        >>> engine.start()  # doctest: +SKIP
        >>> ticket = engine.submit(job, print)  # doctest: +SKIP
    """

    def __init__(self, models: ServedModels, settings: EngineSettings) -> None:
        self.models, self.settings = models, settings
        self._wake = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._solos: list[Solo] = []
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="rgtg-engine", daemon=True)

    # -- any thread ------------------------------------------------------------------------------------------------

    def check(self, job: Job) -> None:
        """Refuse a job that cannot be done.

        Raises:
            UsageError: unusable settings, an unknown method or scorer, more rows than are ever decoded at once.
            DataError: a prompt that is empty or does not fit a context.
        """
        if not job.rows:
            raise UsageError("a job has at least one row")
        if (rows := sum(rows_of(row.settings) for row in job.rows)) > self.settings.max_batch:
            raise UsageError(f"{rows} completions at once; this server decodes at most {self.settings.max_batch}")
        for row in job.rows:
            Seat(Ticket(job, lambda event: None), 0, row, self.models, self.settings)

    def submit(self, job: Job, listener: Listener) -> Ticket:
        """Take a job in; its events go to ``listener``, in the engine's thread.

        Raises:
            BusyError: the queue is full.
            NotServingError: the engine is draining or has stopped.
            UsageError, DataError: as ``check``.
        """
        self.check(job)
        ticket = Ticket(job, listener)
        with self._wake:
            self._require_room()
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    def run(self, work: Callable[[], T]) -> "Future[T]":
        """Run something on the models between two steps.

        Raises:
            BusyError, NotServingError: as ``submit``.
        """
        future: Future[T] = Future()
        with self._wake:
            self._require_room()
            self._calls.append((future, work))
            self._wake.notify()
        return future

    def _require_room(self) -> None:
        if self._draining or self._stopping or not self._thread.is_alive():
            raise NotServingError("the server is not taking in requests: it is about to stop")
        waiting = len(self._waiting) + len(self._calls)
        idle = not self._solos
        if waiting >= max(self.settings.max_queue, int(idle)):
            raise BusyError(f"{waiting} requests wait already; try again in a moment")

    def cancel(self, ticket: Ticket) -> None:
        """Give a job up; its rows leave with the next step."""
        with self._wake:
            ticket.cancelled = True
            self._wake.notify()

    def snapshot(self) -> Snapshot:
        """What runs and waits."""
        with self._wake:
            waiting = sum(len(ticket.job.rows) for ticket in self._waiting) + len(self._calls)
            return Snapshot(len(self._solos), waiting, self._draining)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Take nothing more in, and wait until what was taken in is done; whether it was, within ``seconds``."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(self._is_idle, seconds)

    def stop(self) -> None:
        """End the thread; what has not finished fails with ``StoppedError``."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        return not (self._waiting or self._calls or self._solos)

    def _serve(self) -> None:
        while not self._stopping:
            with self._wake:
                if self._is_idle():
                    self._wake.notify_all()  # whoever drains
                    self._wake.wait(_IDLE_SECONDS)
            self._turn()
        self._fail_all(StoppedError("the server was stopped"))

    def _turn(self) -> None:
        """One step of everything."""
        self._run_calls()
        self._drop_given_up()
        self._admit()
        for solo in list(self._solos):
            solo.step()
        self._solos = [solo for solo in self._solos if not solo.done]

    def _run_calls(self) -> None:
        while self._calls:
            with self._wake:
                future, work = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except Exception as error:  # the caller's to handle
                future.set_exception(error)

    def _drop_given_up(self) -> None:
        """Jobs that were cancelled, or whose time is over."""
        now = time.monotonic()
        with self._wake:
            waiting = list(self._waiting)
            self._waiting = deque(ticket for ticket in waiting if _given_up(ticket, now) is None)
        for ticket in waiting:
            if (why := _given_up(ticket, now)) is not None:
                for row in range(len(ticket.job.rows)):
                    ticket.listener(Failed(row, why))
        for solo in self._solos:
            if (why := _given_up(solo.seat.ticket, now)) is not None:
                solo.fail(why)
        self._solos = [solo for solo in self._solos if not solo.done]

    def _admit(self) -> None:
        """Start jobs in their order while there is room for their rows."""
        while self._waiting:
            ticket = self._waiting[0]
            rows = sum(rows_of(row.settings) for row in ticket.job.rows)
            if sum(solo.rows for solo in self._solos) + rows > self.settings.max_batch:
                return
            with self._wake:
                self._waiting.popleft()
            seats = [Seat(ticket, i, row, self.models, self.settings) for i, row in enumerate(ticket.job.rows)]
            self._solos += [Solo(seat) for seat in seats]

    def _fail_all(self, why: RgtgError) -> None:
        for solo in self._solos:
            solo.fail(why)
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
            calls, self._calls = list(self._calls), deque()
        for ticket in waiting:
            for row in range(len(ticket.job.rows)):
                ticket.listener(Failed(row, why))
        for future, _ in calls:
            future.set_exception(why)
        self._solos = []


def _given_up(ticket: Ticket, now: float) -> RgtgError | None:
    """Why a job is not continued."""
    if ticket.cancelled:
        return StoppedError("the request was cancelled")
    if ticket.job.deadline is not None and now > ticket.job.deadline:
        return DeadlineError("the request was not finished in its time")
    return None
