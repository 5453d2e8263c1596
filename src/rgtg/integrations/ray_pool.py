"""A pool of Ray actors that hold the models. Each loads them once, gets batch after batch, and is replaced if it dies.

A worker has one batch at a time, so its death affects only the rows of that batch and shows which batch it was.
"""

import time
import traceback
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
from rgtg.integrations.ray_cluster import WorkerResources
from rgtg.version import __version__

# How long to wait for a cluster that grows on demand.
_START_SECONDS = 600.0
# A worker can die for reasons other than its work: the batch is tried again, then its rows one by one.
_BATCH_DEATHS = 2
_START_DEATHS = 3


class Worker:
    """What runs in an actor.

    Errors of rgtg are returned, so that the driver can raise them unchanged. Ray reports any other error.
    """

    def __init__(self, settings: GenerateSettings) -> None:
        self.settings, self.decoding = settings, given_decoding_settings(settings)
        self._guided: GuidedPolicy | None = None

    def begin(self) -> tuple[str, str]:
        """The version of rgtg in the worker, and its process and node."""
        import os

        import ray

        return __version__, f"process {os.getpid()} on {ray.util.get_node_ip_address()}"

    def load(self) -> dict[str, Any] | RgtgError:
        """Load the models and return their fingerprints."""
        try:
            self._guided = self._load()
        except RgtgError as error:
            return error
        return model_fingerprints(self._guided)

    def plan(self, settings: GenerateSettings, prompts: PromptFile) -> JobPlan | RgtgError:
        """Plan the job, with the names of models in the driver's settings."""
        try:
            return plan_job(settings, self.decoding, prompts, self.guided)
        except RgtgError as error:
            return error

    def complete(self, batch: TaskBatch) -> list[TaskOutcome] | RgtgError:
        """Complete a batch. A failure of vLLM ends the process, and the pool starts another."""
        try:
            return complete_batch(self.guided, batch, self.decoding, trace=self.settings.trace)
        except RgtgError as error:
            return error
        except Exception:
            if self.settings.engine == "vllm":
                import ray

                traceback.print_exc()
                ray.actor.exit_actor()
            raise

    def _load(self) -> GuidedPolicy:
        settings = self.settings
        if settings.engine != "vllm":
            return load_guided_policy(settings)
        from rgtg.engines.vllm.guided_policy import VllmGuidedPolicy

        given = settings.model_fields_set
        gpus = settings.gpus_per_actor or 1
        return VllmGuidedPolicy(
            settings.policy or "",
            settings.scorer,
            method=settings.method,
            beta=settings.beta if "beta" in given else None,
            top_k=settings.top_k if "top_k" in given else "default",
            dtype=settings.dtype or "auto",
            seed=0,
            tensor_parallel_size=max(1, int(gpus)),
            **({"gpu_memory_utilization": 0.9 * gpus} if gpus < 1 else {}),
        )

    @property
    def guided(self) -> GuidedPolicy:
        """Policy and scorers."""
        assert self._guided is not None, "loaded before any work"
        return self._guided


@dataclass(frozen=True)
class _Call:
    """A call of a worker's method. Calls with the same name are the same work, tried again."""

    name: str
    method: str
    arguments: tuple[Any, ...] = ()


_BEGIN, _LOAD = _Call("it started", "begin"), _Call("it loaded the models", "load")


@dataclass
class _Actor:
    """A worker, and where it runs."""

    handle: Any
    where: str = "one that had not started"


@dataclass(frozen=True)
class _Death:
    """The answer of a worker that died."""

    why: str


@dataclass
class WorkerPool:
    """Workers and their running calls.

    Attributes:
        settings: by which workers load models.
        resources: how many workers there are, and the CPUs and GPUs of each.
    """

    settings: GenerateSettings
    resources: WorkerResources
    _running: dict[Any, tuple[_Actor, _Call]] = field(default_factory=dict)  # by the reference of the answer
    _idle: list[_Actor] = field(default_factory=list)
    _deaths: Counter[str] = field(default_factory=Counter)
    _models: dict[str, Any] | None = None
    _deadline: float | None = None  # for the first worker to start

    @contextmanager
    def open(self) -> Iterator["WorkerPool"]:
        """Start the workers; they end with the block."""
        import ray

        try:
            for _ in range(self.resources.actors):
                self._start_actor()
            yield self
        finally:
            for actor in [*self._idle, *(actor for actor, _ in self._running.values())]:
                ray.kill(actor.handle)

    def plan(self, settings: GenerateSettings, prompts: PromptFile) -> JobPlan:
        """Plan the job in the first worker that is ready, so that the driver needs no memory or device for models.

        Raises:
            UsageError: settings that cannot be used.
            RgtgError: no worker can start, or they die.
        """
        (plan,) = self._answers([_Call("it planned the job", "plan", (settings, prompts))])
        assert isinstance(plan, JobPlan), "what Worker.plan returns"
        return plan

    def complete(self, batches: Iterable[TaskBatch]) -> Iterator[list[TaskOutcome]]:
        """Yield the outcomes of each batch as it is finished.

        Raises:
            RgtgError: an error of a worker; or no worker can start, or one has other models than the first.
        """
        return self._answers(_complete_call(batch) for batch in batches)

    def _answers(self, calls: Iterable[_Call]) -> Iterator[Any]:
        """Yield answers to the calls as they come. Meanwhile workers start, and dead ones are replaced."""
        waiting = deque(calls)
        working = 0
        while waiting or working:
            # 1. Give waiting calls to idle workers, and wait for any answer.
            working += self._dispatch(waiting)
            actor, call, answer = self._next_answer()
            is_work = call not in (_BEGIN, _LOAD)
            working -= is_work
            if isinstance(answer, _Death):
                # 2. A worker died: replace it, and repeat its call or give it up.
                again, outcomes = self._after_death(actor, call, answer)
                waiting.extendleft(reversed(again))
                if outcomes:
                    yield outcomes
            elif is_work:
                # 3. A worker finished a call: it gets the next one before its answer is written to the disk.
                self._idle.append(actor)
                working += self._dispatch(waiting)
                yield _raise_error(answer)
            else:
                # 4. A worker started, or loaded the models.
                self._after_start(actor, call, _raise_error(answer))

    def _dispatch(self, waiting: deque[_Call]) -> int:
        """Give waiting calls to idle workers; return how many."""
        count = min(len(waiting), len(self._idle))
        for _ in range(count):
            self._send(self._idle.pop(), waiting.popleft())
        return count

    def _start_actor(self) -> None:
        import ray

        # Ray must not restart it: it would not say which call was running.
        kind = ray.remote(Worker).options(max_restarts=0, max_task_retries=0, **self.resources.options)
        if not self._idle and all(call is _BEGIN for _, call in self._running.values()):  # no worker has started
            self._deadline = self._deadline or time.monotonic() + _START_SECONDS
        self._send(_Actor(kind.remote(self.settings)), _BEGIN)

    def _send(self, actor: _Actor, call: _Call) -> None:
        self._running[getattr(actor.handle, call.method).remote(*call.arguments)] = actor, call

    def _next_answer(self) -> tuple[_Actor, _Call, Any]:
        """Wait for the next answer, or the death of a worker."""
        import ray
        from ray import exceptions

        seconds = None if self._deadline is None else max(self._deadline - time.monotonic(), 0)
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=seconds)
        if not ready:
            raise RgtgError(
                f"no node of the cluster had room for a worker with {self.resources.cpus} CPUs and "
                f"{self.resources.gpus:g} GPUs within {_START_SECONDS / 60:.0f} minutes: lower --cpus-per-actor or "
                "--gpus-per-actor, or add nodes; the same command resumes from the finished rows"
            )
        actor, call = self._running.pop(ready[0])
        try:
            return actor, call, ray.get(ready[0])
        except exceptions.OutOfMemoryError:
            return actor, call, _Death("its node is out of memory")
        except (
            exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError,
            exceptions.ObjectLostError,
        ) as error:  # fmt: skip
            ray.kill(actor.handle)  # it may be alive behind a broken network
            return actor, call, _Death(_exit_detail(error))

    def _after_start(self, actor: _Actor, call: _Call, answer: Any) -> None:
        """After a worker has started, let it load the models; after that, it is idle."""
        if call is _BEGIN:
            self._deadline = None
            version, actor.where = answer
            if version != __version__:
                raise RgtgError(f"{actor.where} has rgtg {version}, and this is {__version__}: install the same one")
            self._send(actor, _LOAD)
            return
        self._models = self._models or answer
        if other := [name for name in answer if answer[name] != self._models[name]]:
            raise RgtgError(
                f"{actor.where} has another {', '.join(other)} than the worker before it: every node needs the same "
                "files under the same names"
            )
        self._deaths[_BEGIN.name] = self._deaths[_LOAD.name] = 0
        self._idle.append(actor)

    def _after_death(self, actor: _Actor, call: _Call, death: _Death) -> tuple[list[_Call], list[TaskOutcome]]:
        """Replace a worker. Return the calls to try again, and the outcomes of tasks that are given up.

        Raises:
            RgtgError: workers die before they do any work.
        """
        self._deaths[call.name] += 1
        deaths = self._deaths[call.name]
        if call.method == "complete":
            self._start_actor()
            again, outcomes = _retry(call.arguments[0], deaths)
            then = "its rows are done again" if again else "its row is given up"
            warnings.warn(f"a worker died ({actor.where}: {death.why}); {then}", stacklevel=2)
            return again, outcomes
        if deaths >= _START_DEATHS:
            raise RgtgError(f"a worker died {deaths} times while {call.name} ({actor.where}: {death.why})")
        self._start_actor()
        return [call] if call.method == "plan" else [], []


def _complete_call(batch: TaskBatch) -> _Call:
    return _Call(f"it did rows {[task.index for task in batch.tasks]}", "complete", (batch,))


def _retry(batch: TaskBatch, deaths: int) -> tuple[list[_Call], list[TaskOutcome]]:
    """The calls to try again after a batch killed ``deaths`` workers, and the outcomes of tasks that are given up."""
    if deaths < _BATCH_DEATHS:
        return [_complete_call(batch)], []
    if len(batch.tasks) > 1:
        return [_complete_call(TaskBatch((task,), batch.settings)) for task in batch.tasks], []
    error = f"the worker's process died {deaths} times while it did this row"
    return [], [FailedTask(batch.tasks[0], "worker died", error)]


def _raise_error(answer: Any) -> Any:
    if isinstance(answer, RgtgError):
        raise answer
    return answer


def _exit_detail(error: Exception) -> str:
    """The informative line of Ray's report of a death."""
    detail = str(error).rpartition("Worker exit detail: ")[2].partition("Some common causes")[0]
    lines = [line.strip() for line in detail.splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
