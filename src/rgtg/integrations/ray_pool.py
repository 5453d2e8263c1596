"""A pool of Ray actors, each of which holds the models: loaded once, fed batch by batch, replaced when they die.

A worker has one batch at a time, so its death costs the rows of that batch, and says which batch it was.
"""

import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rgtg.batch.run import JobPlan, model_fingerprints, plan_job
from rgtg.batch.tasks import (
    FailedTask,
    TaskBatch,
    TaskOutcome,
    complete_batch,
    given_decoding_settings,
    load_guided_policy,
)
from rgtg.config import GenerateSettings
from rgtg.data.prompts import PromptFile
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.errors import RgtgError
from rgtg.integrations.ray_cluster import Room
from rgtg.version import __version__

# How long a cluster that grows on demand is waited for.
_ROOM_SECONDS = 600.0
# A process may die for reasons that are not its work's: a batch is tried again, then row by row, to find the row.
_DEATHS = 2
_DEATHS_OF_START = 3


class Worker:
    """What runs in an actor.

    Errors of rgtg are returned, so that the driver raises them as they are; any other one is Ray's to tell.
    """

    def __init__(self, settings: GenerateSettings) -> None:
        self.settings, self.decoding = settings, given_decoding_settings(settings)
        self._guided: GuidedPolicy | None = None

    def begin(self) -> tuple[str, str]:
        """The version of rgtg here, and where "here" is."""
        import os

        import ray

        return __version__, f"process {os.getpid()} on {ray.util.get_node_ip_address()}"

    def load(self) -> dict[str, Any] | RgtgError:
        """Load the models; their fingerprints."""
        try:
            self._guided = load_guided_policy(self.settings)
        except RgtgError as error:
            return error
        return model_fingerprints(self._guided)

    def plan(self, settings: GenerateSettings, prompts: PromptFile) -> JobPlan | RgtgError:
        """The job, as the driver's settings name its models."""
        try:
            return plan_job(settings, self.decoding, prompts, self.guided)
        except RgtgError as error:
            return error

    def complete(self, batch: TaskBatch) -> list[TaskOutcome] | RgtgError:
        """Outcomes of a batch."""
        try:
            return complete_batch(self.guided, batch, self.decoding, trace=self.settings.trace)
        except RgtgError as error:
            return error

    @property
    def guided(self) -> GuidedPolicy:
        """Policy and scorers."""
        assert self._guided is not None, "loaded before any work"
        return self._guided


@dataclass(frozen=True)
class _Call:
    """A method of a worker with its arguments; calls of one name are the same work, tried again."""

    name: str
    method: str
    arguments: tuple[Any, ...] = ()


_BEGIN, _LOAD = _Call("it started", "begin"), _Call("it loaded the models", "load")


@dataclass
class _Hand:
    """An actor, and what the driver knows of it."""

    actor: Any
    where: str = "one that had not started"


@dataclass(frozen=True)
class _Death:
    why: str


@dataclass
class Pool:
    """Workers, and what each of them is at.

    Attributes:
        settings: by which workers load models.
        room: how many workers there are, and what each takes.
    """

    settings: GenerateSettings
    room: Room
    _at: dict[Any, tuple[_Hand, _Call]] = field(default_factory=dict)  # by the reference of the answer
    _idle: list[_Hand] = field(default_factory=list)
    _deaths: Counter[str] = field(default_factory=Counter)
    _models: dict[str, Any] | None = None
    _limit: float | None = None

    @contextmanager
    def open(self) -> Iterator["Pool"]:
        """The pool with its workers on their way; they end with the block."""
        import ray

        try:
            for _ in range(self.room.actors):
                self._hire()
            yield self
        finally:
            for hand in [*self._idle, *(hand for hand, _ in self._at.values())]:
                ray.kill(hand.actor)

    def plan(self, settings: GenerateSettings, prompts: PromptFile) -> JobPlan:
        """The job, by the worker that is ready first: the driver needs neither memory nor device for the models.

        Raises:
            UsageError: settings that cannot be used.
            RgtgError: no worker can start, or they die.
        """
        (plan,) = self._answers([_Call("it planned the job", "plan", (settings, prompts))])
        assert isinstance(plan, JobPlan), "what a worker answers"
        return plan

    def complete(self, batches: Iterable[TaskBatch]) -> Iterator[list[TaskOutcome]]:
        """Outcomes of the batches, as they come.

        Raises:
            RgtgError: what a worker raises; or no worker can start, or one has other models than the first.
        """
        return self._answers(_completing(batch) for batch in batches)

    def _answers(self, calls: Iterable[_Call]) -> Iterator[Any]:
        """Answers to the calls as they come; in between, workers start, and the dead are replaced."""
        waiting = deque(calls)
        working = 0
        while waiting or working:
            working += self._hand_out(waiting)
            hand, call, answer = self._next()
            asked_for = call not in (_BEGIN, _LOAD)
            working -= asked_for
            if isinstance(answer, _Death):
                again, outcomes = self._after_death(hand, call, answer)
                waiting.extendleft(reversed(again))
                if outcomes:
                    yield outcomes
            elif asked_for:
                self._idle.append(hand)
                working += self._hand_out(waiting)  # it need not wait until the answer is written
                yield _unwrapped(answer)
            else:
                self._go_on(hand, call, _unwrapped(answer))

    def _hand_out(self, waiting: deque[_Call]) -> int:
        """Give those that are idle what waits; how many got something."""
        given = min(len(waiting), len(self._idle))
        for _ in range(given):
            self._give(self._idle.pop(), waiting.popleft())
        return given

    def _hire(self) -> None:
        import ray

        # it is replaced here and never by Ray, which would not say what it was at
        actor = ray.remote(Worker).options(max_restarts=0, max_task_retries=0, **self.room.options)
        if not self._idle and all(call is _BEGIN for _, call in self._at.values()):  # nobody is there any more
            self._limit = self._limit or time.monotonic() + _ROOM_SECONDS
        self._give(_Hand(actor.remote(self.settings)), _BEGIN)

    def _give(self, hand: _Hand, call: _Call) -> None:
        self._at[getattr(hand.actor, call.method).remote(*call.arguments)] = hand, call

    def _next(self) -> tuple[_Hand, _Call, Any]:
        """The next answer that comes, or death."""
        import ray
        from ray import exceptions as told

        seconds = None if self._limit is None else max(self._limit - time.monotonic(), 0)
        ready, _ = ray.wait(list(self._at), num_returns=1, timeout=seconds)
        if not ready:
            raise RgtgError(
                f"no node of the cluster had room for a worker with {self.room.cpus} CPUs and {self.room.gpus:g} GPUs "
                f"within {_ROOM_SECONDS / 60:.0f} minutes: lower --cpus-per-actor or --gpus-per-actor, or add nodes; "
                "the same command goes on from the rows that are finished"
            )
        hand, call = self._at.pop(ready[0])
        try:
            return hand, call, ray.get(ready[0])
        except told.OutOfMemoryError:
            return hand, call, _Death("its node had no memory left")
        except (told.RayActorError, told.WorkerCrashedError, told.NodeDiedError, told.ObjectLostError) as error:
            ray.kill(hand.actor)  # it may live on behind a broken network
            return hand, call, _Death(_why(error))

    def _go_on(self, hand: _Hand, call: _Call, answer: Any) -> None:
        """A worker began or loaded the models: the next thing."""
        if call is _BEGIN:
            self._limit = None
            version, hand.where = answer
            if version != __version__:
                raise RgtgError(f"{hand.where} has rgtg {version}, and this is {__version__}: install the same one")
            self._give(hand, _LOAD)
            return
        self._models = self._models or answer
        if other := [name for name in answer if answer[name] != self._models[name]]:
            raise RgtgError(
                f"{hand.where} has another {', '.join(other)} than the worker before it: every node needs the same "
                "files under the same names"
            )
        self._deaths[_BEGIN.name] = self._deaths[_LOAD.name] = 0
        self._idle.append(hand)

    def _after_death(self, hand: _Hand, call: _Call, death: _Death) -> tuple[list[_Call], list[TaskOutcome]]:
        """Replace a worker; its work that is to be tried again, and outcomes of what is given up.

        Raises:
            RgtgError: workers die before they do any work.
        """
        self._deaths[call.name] += 1
        deaths = self._deaths[call.name]
        if call.method == "complete":
            self._hire()
            again, outcomes = _again(call.arguments[0], deaths)
            then = "its rows are done again" if again else "its row is given up"
            warnings.warn(f"a worker died ({hand.where}: {death.why}); {then}", stacklevel=2)
            return again, outcomes
        if deaths >= _DEATHS_OF_START:
            raise RgtgError(f"a worker died {deaths} times while {call.name} ({hand.where}: {death.why})")
        self._hire()
        return [call] if call.method == "plan" else [], []


def _completing(batch: TaskBatch) -> _Call:
    return _Call(f"it did rows {[task.index for task in batch.tasks]}", "complete", (batch,))


def _again(batch: TaskBatch, deaths: int) -> tuple[list[_Call], list[TaskOutcome]]:
    """What is tried again of a batch whose worker died so many times, and outcomes of what is not."""
    if deaths < _DEATHS:
        return [_completing(batch)], []
    if len(batch.tasks) > 1:
        return [_completing(TaskBatch((task,), batch.settings)) for task in batch.tasks], []
    return [], [
        FailedTask(batch.tasks[0], "worker died", f"the worker's process died {deaths} times while it did this row")
    ]


def _unwrapped(answer: Any) -> Any:
    if isinstance(answer, RgtgError):
        raise answer
    return answer


def _why(error: Exception) -> str:
    """The one line of Ray's report of a death that says something."""
    detail = str(error).rpartition("Worker exit detail: ")[2].partition("Some common causes")[0]
    lines = [line.strip() for line in detail.splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
