"""The engine: takes jobs in, steps whatever runs, one thread for all models; requests join and leave at any step."""

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from rgtg.config import EngineSettings
from rgtg.decoding.engine.batch import Lane, Member
from rgtg.decoding.engine.batches import LaneKey, make_lane, make_prefill
from rgtg.decoding.engine.prefix_cache import PrefixStore
from rgtg.errors import BusyError, NonFiniteError, NotServingError, RgtgError, StoppedError, UsageError
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.engine.prompts import Prompts
from rgtg.serving.engine.request import Job, Listener, Ticket
from rgtg.serving.engine.sequence import Arrival, Seat, Solo, as_ours, given_up, refuse, rows_of, unsound

T = TypeVar("T")
Calls = deque[tuple[Future[Any], Callable[[], Any]]]  # of one request, in their order
_log = logging.getLogger("rgtg.serving")
# How long the thread sleeps when there is nothing to do and nobody wakes it.
_IDLE_SECONDS = 0.5


@dataclass(frozen=True)
class Snapshot:
    """What the engine is doing now, and what it has done since it started.

    Attributes:
        running: completions that are decoded or whose prompt is read.
        waiting: completions that wait for a place.
        draining: whether nothing more is taken in.
        cache_bytes: of keys and values of what runs.
        prefix_bytes: of texts kept for others that begin alike.
        prompt_tokens: tokens of prompts that were looked up there.
        cached_tokens: of those, how many were found.
        scorer_seconds: spent by each scorer on candidates.
        nan: rows that ended, and tokens that were left to the policy, because of NaN.
    """

    running: int
    waiting: int
    draining: bool
    cache_bytes: int
    prefix_bytes: int
    prompt_tokens: int
    cached_tokens: int
    scorer_seconds: dict[str, float]
    nan: int


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
        self._calls: deque[Calls] = deque()
        self._lanes: dict[LaneKey, Lane] = {}
        self._seats: dict[Member, Seat] = {}
        self._solos: list[Solo] = []
        self._store = PrefixStore(settings.prefix_cache_mib * 2**20)
        self._prompts = Prompts(settings.prefill_chunk, self._store)
        self._seconds: dict[str, float] = defaultdict(float)  # of lanes that are gone
        self._nan = 0
        self._draining = self._stopping = False
        self._idle = True  # as the engine's thread last found it, with nothing in its hands
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
            raise UsageError(
                f"{rows} completions at once; this server decodes at most {self.settings.max_batch}",
                setting="n" if rows > len(job.rows) else None,
            )
        for row in job.rows:
            Seat(Ticket(job, lambda event: None), 0, row, self.models, self.settings)

    def submit(self, job: Job, listener: Listener) -> Ticket:
        """Take a job in; its events go to ``listener``, in the engine's thread.

        Raises:
            BusyError, NotServingError, UsageError, DataError: as ``submit_all``.
        """
        (ticket,) = self.submit_all([(job, listener)])
        return ticket

    def submit_all(self, jobs: Sequence[tuple[Job, Listener]]) -> list[Ticket]:
        """Take several jobs in, or none of them; the events of each go to its listener, in the engine's thread.

        Raises:
            BusyError: the queue is too full for them.
            NotServingError: the engine is draining or has stopped.
            UsageError: as ``check``, or more jobs than there is ever room for.
            DataError: as ``check``.
        """
        if len(jobs) > (most := self.settings.max_queue + self.settings.max_batch):
            raise UsageError(f"{len(jobs)} prompts in one request; this server takes at most {most}", setting="prompt")
        for job, _ in jobs:
            self.check(job)
        tickets = [Ticket(job, listener) for job, listener in jobs]
        with self._wake:
            self._require_room(len(jobs))
            self._waiting += tickets
            self._rouse()
        return tickets

    def run(self, work: Callable[[], T]) -> "Future[T]":
        """Run something on the models between two steps.

        Raises:
            BusyError, NotServingError: as ``submit``.
        """
        (future,) = self.run_all([work])
        return future

    def run_all(self, works: Sequence[Callable[[], T]]) -> "list[Future[T]]":
        """Run several things, each between two steps; they are taken in, or refused, together.

        Raises:
            BusyError, NotServingError: as ``submit``.
        """
        calls: Calls = deque((Future(), work) for work in works)
        futures = [future for future, _ in calls]
        if not futures:
            return []
        with self._wake:
            self._require_room()
            self._calls.append(calls)
            self._rouse()
        return futures

    def _rouse(self) -> None:
        """There is work; the lock is held."""
        self._idle = False
        self._wake.notify_all()

    def _require_room(self, more: int = 1) -> None:
        if self._draining or not self.alive:
            raise NotServingError("the server is not taking in requests: it is about to stop")
        waiting = len(self._waiting) + len(self._calls)
        if waiting + more > self.settings.max_queue + max(self.settings.max_batch - self._running(), 0):
            raise BusyError(f"{waiting} requests wait already; try again in a moment")

    def _running(self) -> int:
        """Completions that have a place."""
        return self._prompts.rows + len(self._seats) + sum(solo.rows for solo in self._solos)

    def cancel(self, ticket: Ticket) -> None:
        """Give a job up; its rows leave with the next step."""
        with self._wake:
            ticket.cancelled = True
            self._wake.notify()

    def snapshot(self) -> Snapshot:
        """What runs and waits."""
        with self._wake:
            waiting = sum(len(ticket.job.rows) for ticket in self._waiting) + len(self._calls)
        lanes, seconds = list(self._lanes.values()), dict(self._seconds)
        for lane in lanes:
            for name, spent in list(lane.seconds.items()):
                seconds[name] = seconds.get(name, 0.0) + spent
        return Snapshot(
            running=self._running(),
            waiting=waiting,
            draining=self._draining,
            cache_bytes=sum(lane.nbytes for lane in lanes),
            prefix_bytes=self._store.nbytes,
            prompt_tokens=self._store.asked,
            cached_tokens=self._store.found,
            scorer_seconds=seconds,
            nan=self._nan,
        )

    @property
    def alive(self) -> bool:
        """Whether the thread runs: not before `start`, nor after `stop` or a defect that ended it."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Take nothing more in, and wait until what was taken in is done; whether it was, within ``seconds``."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(lambda: self._idle, seconds)

    def stop(self) -> None:
        """End the thread; what has not finished fails with ``StoppedError``."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        return not (self._waiting or self._calls or self._running())

    def _serve(self) -> None:
        why: RgtgError = StoppedError("the server was stopped")
        try:
            while not self._stopping:
                with self._wake:
                    self._idle = self._is_idle()
                    if self._idle:
                        self._wake.notify_all()  # whoever drains
                        self._wake.wait(_IDLE_SECONDS)
                self._turn()
        except Exception as error:  # a defect; nobody is left waiting for an answer
            why = as_ours(error)
        with self._wake:
            self._stopping = True
        self._fail_all(why)

    def _turn(self) -> None:
        """One step of all that decodes, one call, and one part of one prompt."""
        self._run_call()
        self._drop_given_up()
        self._admit()
        for key, lane in list(self._lanes.items()):
            self._step_lane(key, lane)
        for solo in self._solos:
            solo.step()
            self._nan += solo.unsound
        self._solos = [solo for solo in self._solos if not solo.done]
        if (ready := self._prompts.read()) is not None:
            self._enter(ready)
            self._prompts.unread.remove(ready)  # only now: it counts as running all the while

    def _run_call(self) -> None:
        """The next call of the request that was served longest ago; those given up cost no turn."""
        while self._calls:
            with self._wake:
                calls = self._calls.popleft()
                future, work = calls.popleft()
                if calls:
                    self._calls.append(calls)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except Exception as error:  # the caller's to handle
                future.set_exception(error)
            return

    # -- who comes and goes ----------------------------------------------------------------------------------------

    def _drop_given_up(self) -> None:
        """Jobs that were cancelled, or whose time is over."""
        now = time.monotonic()
        with self._wake:
            waiting = list(self._waiting)
            self._waiting = deque(ticket for ticket in waiting if given_up(ticket, now) is None)
        for ticket in waiting:
            if (why := given_up(ticket, now)) is not None:
                refuse(ticket, why)
        self._prompts.drop(lambda ticket: given_up(ticket, now))
        for lane in self._lanes.values():
            gone = {member: why for member in lane.members if (why := given_up(self._seats[member].ticket, now))}
            lane.leave(gone)
            for member, why in gone.items():
                self._seats.pop(member).fail(why)
        for solo in self._solos:
            if (why := given_up(solo.ticket, now)) is not None:
                solo.fail(why)
        self._solos = [solo for solo in self._solos if not solo.done]

    def _admit(self) -> None:
        """Start jobs in their order while there is room for their rows."""
        while self._waiting:
            ticket = self._waiting[0]
            rows = sum(rows_of(row.settings) for row in ticket.job.rows)
            if self._running() + rows > self.settings.max_batch:
                return
            with self._wake:
                self._waiting.popleft()
            try:
                self._seat([Seat(ticket, i, row, self.models, self.settings) for i, row in enumerate(ticket.job.rows)])
            except Exception as error:  # nothing of it has a place yet
                refuse(ticket, as_ours(error))

    def _seat(self, seats: list[Seat]) -> None:
        """Begin with the rows of one job: those of one lane share one reading of the prompt."""
        by_lane: dict[LaneKey, list[Seat]] = defaultdict(list)
        solos = [Solo(seat, self.settings.prefill_chunk) for seat in seats if seat.lane is None]
        arrivals = []
        for seat in seats:
            if seat.lane is not None:
                by_lane[seat.lane].append(seat)
        for key, mine in by_lane.items():
            names = list(dict.fromkeys(name for seat in mine for name in seat.row.scorers))
            first = next((seat for seat in mine if seat.row.scorers), mine[0])
            mine.sort(key=lambda seat: seat is not first)  # readers are made for its request
            prefill = make_prefill(self.models.policy, self.models.scorers, key, names, first.request)
            arrivals.append(Arrival(key, mine, prefill))
        self._prompts.unread += [*arrivals, *(solo for solo in solos if solo.prompt.left)]
        self._solos += [solo for solo in solos if not solo.prompt.left]

    def _enter(self, ready: Arrival | Solo) -> None:
        """Let rows whose prompt has been read into their lane, or take their steps apart."""
        if isinstance(ready, Solo):
            self._solos.append(ready)
            return
        key = ready.key
        if key not in self._lanes:
            self._lanes[key] = make_lane(
                self.models.policy, self.models.scorers, key, on_nan=self.settings.on_nan, store=self._store
            )
        self._seats |= {seat.member: seat for seat in ready.seats}
        try:
            ready.enter(self._lanes[key])
        except Exception as error:  # some readers have taken a row in and some have not: the lane is of no use
            self._break_lane(key, as_ours(error), [seat.member for seat in ready.seats])

    # -- steps -----------------------------------------------------------------------------------------------------

    def _step_lane(self, key: LaneKey, lane: Lane) -> None:
        if not lane.members:
            self._forget_lane(key)  # its cache with it
            return
        try:
            lane.step(self._tell)
        except Exception as error:
            self._break_lane(key, as_ours(error))

    def _tell(self, stepped: Sequence[Member]) -> None:
        """Tell what a step has drawn; rows that ended have no seat from then on."""
        for member in stepped:
            seat = self._seats[member]
            if member.unsound is not None:
                self._nan += 1
                del self._seats[member]
                seat.fail(NonFiniteError(unsound(member.unsound)))
                continue
            self._nan += seat.new_fallbacks()
            seat.tell()
            if member.request.finish_reason is not None:
                del self._seats[member]

    def _break_lane(self, key: LaneKey, why: RgtgError, more: Sequence[Member] = ()) -> None:
        """Give a lane up, and the rows in it or on their way."""
        members = dict.fromkeys([*self._lanes[key].members, *more])
        self._forget_lane(key)
        for member in members:
            if member in self._seats:
                self._seats.pop(member).fail(why)

    def _forget_lane(self, key: LaneKey) -> None:
        for name, spent in self._lanes.pop(key).seconds.items():
            self._seconds[name] += spent

    def _fail_all(self, why: RgtgError) -> None:
        for one in [*self._prompts.unread, *self._seats.values(), *self._solos]:
            one.fail(why)
        self._prompts.unread, self._lanes, self._seats, self._solos = [], {}, {}, []
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
            futures = [future for calls in self._calls for future, _ in calls]
            self._calls = deque()
        for ticket in waiting:
            refuse(ticket, why)
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(why)
