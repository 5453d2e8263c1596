"""The engine: one thread that runs all models; requests join and leave the running batches at any step."""

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from rgtg.config import DecodingSettings, EngineSettings
from rgtg.decoding.engine.batch import Batch
from rgtg.decoding.engine.chunked_prefill import BatchPrefill, ChunkedPrefill
from rgtg.decoding.engine.prefix_cache import PrefixCache
from rgtg.decoding.engine.prompt_log_probs import PromptLogProbs
from rgtg.decoding.methods import METHODS, scores_vocabulary
from rgtg.decoding.request import Request
from rgtg.decoding.runners.factory import BatchKey, TokenRunners
from rgtg.errors import BusyError, DeadlineError, NonFiniteError, NotServingError, RgtgError, StoppedError, UsageError
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.engine.request import Event, FailedEvent, FinishedEvent, Handle, Listener, TokenEvent
from rgtg.types.generation import StepTrace

T = TypeVar("T")
Calls = deque[tuple[Future[Any], Callable[[], Any]]]  # of one HTTP request, in their order
_log = logging.getLogger("rgtg.serving")
# How long the thread sleeps when there is nothing to do and nobody wakes it.
_IDLE_SECONDS = 0.5


def num_sequences(settings: DecodingSettings) -> int:
    """Completions, or segments of one, that are decoded at once for one request."""
    return settings.n if "n" in METHODS[settings.method].takes else 1


@dataclass(eq=False)
class Prefilling:
    """Requests whose prompt is being read.

    Attributes:
        requests: with one prompt.
        prefill: reads it in chunks.
        runners: of the batch that they join then; None for a request that is not batched.
        steps: of a request that is not batched, once its prompt has been read.
    """

    requests: list[Request]
    prefill: ChunkedPrefill
    runners: TokenRunners | None = None
    steps: Iterator[list[Request]] | None = None


@dataclass(frozen=True)
class Snapshot:
    """What the engine is doing now, and what it has done since it started.

    Attributes:
        running: completions that are decoded or whose prompt is read.
        waiting: completions in the queue.
        draining: whether new requests are refused.
        cache_bytes: keys and values of running requests.
        prefix_bytes: keys and values in the prefix cache.
        prompt_tokens: prompt tokens that were looked up in the prefix cache.
        cached_tokens: those that were found.
        scorer_seconds: spent by each scorer on candidates.
        nan: requests that failed, and tokens that were left to the policy, because of NaN.
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
    """Admission, scheduling, and the one thread that runs the models.

    Example:
        >>> engine = Engine(models, EngineSettings())  # doctest: +SKIP
        >>> engine.start()  # doctest: +SKIP
        >>> handle = engine.submit([requests], print)  # doctest: +SKIP
    """

    def __init__(self, models: ServedModels, settings: EngineSettings) -> None:
        self.models, self.settings = models, settings
        self._wake = threading.Condition()
        self._waiting: deque[tuple[Handle, Sequence[Request]]] = deque()
        self._calls: deque[Calls] = deque()
        self._batches: dict[BatchKey, Batch] = {}
        self._prefilling: list[Prefilling] = []
        self._unbatched: list[Prefilling] = []  # requests with caches of their own, which take steps of their own
        self._handles: dict[Request, Handle] = {}  # of every admitted request
        self._runners: dict[tuple[str, ...], TokenRunners] = {}
        self._prefix_cache = PrefixCache(settings.prefix_cache_mib * 2**20)
        self._turns = 0
        self._seconds: dict[str, float] = defaultdict(float)  # of batches that are gone
        self._nan = 0
        self._draining = self._stopping = False
        self._idle = True  # as the engine's thread last found it, with nothing in its hands
        self._thread = threading.Thread(target=self._run, name="rgtg-engine", daemon=True)

    # -- any thread ------------------------------------------------------------------------------------------------

    def submit(self, groups: Sequence[Sequence[Request]], listener: Listener, deadline: float | None = None) -> Handle:
        """Accept requests, all or none.

        Args:
            groups: requests with one prompt each, as ``ServedModels`` prepares them.
            listener: called with their events, in the engine's thread.
            deadline: in ``time.monotonic()`` seconds; what has not ended by then fails.

        Raises:
            BusyError: the queue is too full for them.
            NotServingError: the engine is draining or has stopped.
            UsageError: more than this server ever decodes at once, or settings beyond its limits.
        """
        if len(groups) > (most := self.settings.max_queue + self.settings.max_batch):
            raise UsageError(
                f"{len(groups)} prompts in one request; this server takes at most {most}", setting="prompt"
            )
        for group in groups:
            self.check(group)
        handle = Handle(groups, listener, deadline)
        for group in groups:
            for request in group:
                handle.rows[request] = len(handle.rows)
        with self._wake:
            self._require_room(len(groups))
            for group in groups:
                self._waiting.append((handle, group))
            self._notify()
        return handle

    def check(self, group: Sequence[Request]) -> None:
        """Refuse requests with one prompt that this server never decodes.

        Raises:
            UsageError: too many at once, or settings beyond the limits.
        """
        if not group:
            raise UsageError("a prompt has at least one request")
        limits, total = self.settings, 0
        for request in group:
            settings = request.settings
            total += num_sequences(settings)
            if settings.max_new_tokens > limits.max_tokens:
                raise UsageError(
                    f"max_new_tokens = {settings.max_new_tokens}; this server makes at most {limits.max_tokens}",
                    setting="max_new_tokens",
                )
            if (length := settings.segment_length or 0) > limits.max_tokens:
                raise UsageError(
                    f"segment_length = {length}; this server makes at most {limits.max_tokens} tokens",
                    setting="segment_length",
                )
            if settings.top_k is None or settings.top_k > limits.max_candidates:
                self._require_narrow(request)
        if total > limits.max_batch:
            raise UsageError(
                f"{total} completions at once; this server decodes at most {limits.max_batch}",
                setting="n" if total > len(group) else None,
            )

    def _require_narrow(self, request: Request) -> None:
        """Refuse more candidates than a scorer that reads each of them may be given."""
        each = [name for name in request.scorers if not scores_vocabulary(self.models.scorers[name])]
        if each and METHODS[request.method].scores_tokens:
            raise UsageError(
                f"top_k = {request.settings.top_k}: {each[0]} reads every candidate, on this server at most "
                f"{self.settings.max_candidates}",
                setting="top_k",
            )

    def run(self, work: Callable[[], T]) -> "Future[T]":
        """Run something on the models between two steps.

        Raises:
            BusyError, NotServingError: as ``submit``.
        """
        (future,) = self.run_all([work])
        return future

    def run_all(self, works: Sequence[Callable[[], T]]) -> "list[Future[T]]":
        """Run several things, each between two steps; all are accepted, or none.

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
            self._notify()
        return futures

    def prompt_log_probs(self, ids: Sequence[int], count: int) -> list[Callable[[], list[StepTrace]]]:
        """Calls for ``run_all`` that read a prompt in chunks, for the policy's own log-probabilities of its tokens.

        Args:
            ids: the prompt.
            count: most likely tokens to tell at each place, beside the prompt's own.

        Returns:
            Calls whose joined results are a step for each token but the first.
        """
        reader = PromptLogProbs(ids, count, self.models.policy.vocabulary)
        chunk = self.settings.prefill_chunk

        def read() -> list[StepTrace]:
            return reader.read(self._runners_for(()).policy.runner, chunk, self._prefix_cache)

        return [read] * -(-len(ids) // chunk)

    def forget(self) -> None:
        """Forget cached prompts and counts, as if nothing had run; called in the engine's thread (``run``)."""
        self._batches = {key: batch for key, batch in self._batches.items() if batch.requests}
        self._prefix_cache = PrefixCache(self.settings.prefix_cache_mib * 2**20)
        self._seconds.clear()
        self._nan = 0

    def _notify(self) -> None:
        """There is work; the lock is held."""
        self._idle = False
        self._wake.notify_all()

    def _require_room(self, more: int = 1) -> None:
        if self._draining or not self.alive:
            raise NotServingError("the server is stopping and accepts no new requests")
        waiting = len(self._waiting) + len(self._calls)
        if waiting + more > self.settings.max_queue + max(self.settings.max_batch - self._num_running(), 0):
            raise BusyError(f"{waiting} requests wait already; try again in a moment")

    def _num_running(self) -> int:
        """Completions that are decoded or whose prompt is read."""
        return sum(num_sequences(request.settings) for request in list(self._handles))

    def cancel(self, handle: Handle) -> None:
        """Cancel requests; they leave with the next step."""
        with self._wake:
            handle.cancelled = True
            self._wake.notify()

    def snapshot(self) -> Snapshot:
        """What runs and waits."""
        with self._wake:
            waiting = sum(len(group) for _, group in self._waiting) + len(self._calls)
        batches, seconds = list(self._batches.values()), dict(self._seconds)
        for batch in batches:
            for name, spent in list(batch.seconds.items()):
                seconds[name] = seconds.get(name, 0.0) + spent
        return Snapshot(
            running=self._num_running(),
            waiting=waiting,
            draining=self._draining,
            cache_bytes=sum(batch.nbytes for batch in batches),
            prefix_bytes=self._prefix_cache.nbytes,
            prompt_tokens=self._prefix_cache.queried,
            cached_tokens=self._prefix_cache.hits,
            scorer_seconds=seconds,
            nan=self._nan,
        )

    @property
    def alive(self) -> bool:
        """Whether the thread runs: not before ``start``, nor after ``stop`` or an error that ended it."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for accepted ones; whether all ended within ``seconds``."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(lambda: self._idle, seconds)

    def stop(self) -> None:
        """End the thread; requests that have not ended fail with ``StoppedError``."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        why: RgtgError = StoppedError("the server was stopped")
        try:
            while not self._stopping:
                with self._wake:
                    self._idle = not (self._waiting or self._calls or self._handles)
                    if self._idle:
                        self._wake.notify_all()  # whoever drains
                        self._wake.wait(_IDLE_SECONDS)
                self._turn()
        except Exception as error:  # a defect of the engine: nobody is left waiting for an answer
            why = _public_error(error)
        with self._wake:
            self._stopping = True
        self._fail_everything(why)

    def _turn(self) -> None:
        """One step of everything that decodes, one call, and one chunk of one prompt."""
        # 1. one call of another kind (scores)
        self._run_call()
        # 2. who leaves, and who is admitted
        self._drop_cancelled()
        self._admit()
        # 3. one step of every batch, and of every request that is not batched
        for key, batch in list(self._batches.items()):
            self._step_batch(key, batch)
        for run in list(self._unbatched):
            self._step_unbatched(run)
        # 4. one chunk of one prompt
        self._read_prompt()

    def _run_call(self) -> None:
        """The next call of the HTTP request that was served longest ago; cancelled ones cost no turn."""
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
            except Exception as error:  # the caller handles it
                future.set_exception(error)
            return

    # -- who comes and goes ----------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        """Requests that were cancelled, or whose deadline has passed."""
        now = time.monotonic()
        # 1. in the queue
        with self._wake:
            waiting = list(self._waiting)
            self._waiting = deque(entry for entry in waiting if _reason_to_drop(entry[0], now) is None)
        for handle, group in waiting:
            if (why := _reason_to_drop(handle, now)) is not None:
                self._send_failed(handle, group, why)
        # 2. admitted
        dropped = [request for request, handle in self._handles.items() if _reason_to_drop(handle, now) is not None]
        if not dropped:
            return
        gone = set(dropped)
        self._prefilling = [one for one in self._prefilling if gone.isdisjoint(one.requests)]
        self._unbatched = [one for one in self._unbatched if gone.isdisjoint(one.requests)]
        for batch in self._batches.values():
            batch.remove(gone.intersection(batch.requests))
        for request in dropped:
            why = _reason_to_drop(self._handles[request], now)
            assert why is not None, "it was dropped for a reason"
            self._fail([request], why)

    def _admit(self) -> None:
        """Start groups of requests in their order while there is room for them."""
        while self._waiting:
            handle, group = self._waiting[0]
            more = sum(num_sequences(request.settings) for request in group)
            if self._num_running() + more > self.settings.max_batch:
                return
            with self._wake:
                self._waiting.popleft()
            self._handles |= dict.fromkeys(group, handle)
            try:
                self._start(group)
            except Exception as error:
                self._fail(group, error)

    def _start(self, group: Sequence[Request]) -> None:
        """Start requests with one prompt: those that join one batch share its prefill."""
        by_key: dict[BatchKey, list[Request]] = {}
        started = []
        for request in group:
            if METHODS[request.method].unit == "token":
                by_key.setdefault(self._runners_for(request.scorers).key, []).append(request)
            else:
                guided = self.models.guided(request.method, request.scorers)
                run = guided.start_segments([request], chunk=self.settings.prefill_chunk)
                started.append(Prefilling([request], run.prefill, steps=run.steps))
        for requests in by_key.values():
            requests.sort(key=lambda request: not request.scorers)  # text scorers start with the first one's prompt
            names = tuple(dict.fromkeys(name for request in requests for name in request.scorers))
            runners = self._runners_for(names)
            started.append(Prefilling(requests, BatchPrefill(runners, requests[0]), runners))
        self._prefilling += started

    def _runners_for(self, names: tuple[str, ...]) -> TokenRunners:
        if names not in self._runners:
            self._runners[names] = self.models.factory.token_runners(names)
        return self._runners[names]

    def _read_prompt(self) -> None:
        """One chunk of the shortest prompt, and every fourth time of the one that waits longest."""
        if not self._prefilling:
            return
        self._turns += 1
        one = self._prefilling[0]
        if self._turns % 4 and len(self._prefilling) > 1:
            one = min(self._prefilling, key=lambda one: one.prefill.left)
        try:
            if one.prefill.left:
                one.prefill.advance(self.settings.prefill_chunk, self._prefix_cache)
            if not one.prefill.left:
                self._enter(one)
                self._prefilling.remove(one)
        except Exception as error:
            self._prefilling.remove(one)
            for batch in self._batches.values():  # those that had joined already
                batch.remove(set(one.requests).intersection(batch.requests))
            self._fail(one.requests, error)

    def _enter(self, one: Prefilling) -> None:
        """Let requests whose prompt has been read join their batch, or take steps of their own."""
        for request in one.requests:
            request.cached_tokens = one.prefill.cached_tokens
        if one.runners is None:
            self._unbatched.append(one)
            return
        assert isinstance(one.prefill, BatchPrefill), "a prompt on its way into a batch"
        key = one.runners.key
        if key not in self._batches:
            self._batches[key] = Batch(
                **one.runners.options, on_nan=self.settings.on_nan, prefix_cache=self._prefix_cache, keep_order=False
            )
        for request in self._batches[key].read_pending():  # an error of theirs must not be the newcomer's
            if request.error is not None:
                self._fail([request], request.error)
        self._batches[key].add(one.requests, one.prefill.result())

    # -- steps -----------------------------------------------------------------------------------------------------

    def _step_batch(self, key: BatchKey, batch: Batch) -> None:
        if not batch.requests:
            self._close_batch(key)
            return
        try:
            left = batch.step(self._send_drawn)
        except Exception as error:  # a defect of the loop: what belongs to one request has failed that one alone
            requests = [request for request in batch.requests if request in self._handles]
            self._close_batch(key)
            self._fail(requests, error)
            return
        for request in left:
            if request in self._handles and request.error is not None:
                self._fail([request], request.error)

    def _close_batch(self, key: BatchKey) -> None:
        for name, spent in self._batches.pop(key).seconds.items():
            self._seconds[name] += spent

    def _step_unbatched(self, run: Prefilling) -> None:
        (request,) = run.requests
        assert run.steps is not None, "a request that is not batched has steps of its own"
        try:
            ended = next(run.steps, None) is None
        except Exception as error:
            self._unbatched.remove(run)
            self._fail([request], error)
            return
        if ended:
            self._unbatched.remove(run)
        if ended or request.finish_reason is None:
            self._send(request)

    # -- what listeners are told -----------------------------------------------------------------------------------

    def _send_drawn(self, requests: list[Request]) -> None:
        """Send what a step of a batch has drawn."""
        for request in requests:
            if request.error is None:
                self._send(request)

    def _send(self, request: Request) -> None:
        """Send a request's new tokens, and its completion once it has ended."""
        handle = self._handles[request]
        row = handle.rows[request]
        if METHODS[request.method].unit != "completion":
            for i in range(handle.sent.get(request, 0), len(request.token_ids)):
                trace = request.trace[i] if request.keep_trace else None
                _notify(handle, TokenEvent(row, request.token_ids[i], trace))
            handle.sent[request] = len(request.token_ids)
        self._nan += request.scores_not_finite - handle.nan_counted.get(request, 0)
        handle.nan_counted[request] = request.scores_not_finite
        if request.finish_reason is not None:
            del self._handles[request]
            done = FinishedEvent(row, request.to_completion(), request.cached_tokens, request.scores_not_finite)
            _notify(handle, done)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """End admitted requests with an error."""
        self._nan += len(requests) if isinstance(error, NonFiniteError) else 0
        why = _public_error(error)
        for request in requests:
            if (handle := self._handles.pop(request, None)) is not None:
                _notify(handle, FailedEvent(handle.rows[request], why))

    def _send_failed(self, handle: Handle, group: Sequence[Request], why: RgtgError) -> None:
        """End requests that are still in the queue."""
        for request in group:
            _notify(handle, FailedEvent(handle.rows[request], why))

    def _fail_everything(self, why: RgtgError) -> None:
        self._prefilling, self._unbatched, self._batches = [], [], {}
        self._fail(list(self._handles), why)
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
            futures = [future for calls in self._calls for future, _ in calls]
            self._calls = deque()
        for handle, group in waiting:
            self._send_failed(handle, group, why)
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(why)


def _notify(handle: Handle, event: Event) -> None:
    """Call a listener; one that raises harms nobody else."""
    try:
        handle.listener(event)
    except Exception:
        _log.exception("a listener failed")


def _reason_to_drop(handle: Handle, now: float) -> RgtgError | None:
    if handle.cancelled:
        return StoppedError("the request was cancelled")
    if handle.deadline is not None and now > handle.deadline:
        return DeadlineError("the request was not finished in its time")
    return None


def _public_error(error: Exception) -> RgtgError:
    """An error for the client; one that is nobody's but the server's is logged and kept from it."""
    if isinstance(error, RgtgError):
        return error
    _log.error("a request failed", exc_info=error)
    return RgtgError("the request failed inside the server")
