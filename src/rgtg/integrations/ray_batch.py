"""Complete a file of prompts on a Ray cluster: the local job, with its batches completed by workers.

The driver reads the prompts, hands out batches, and appends finished rows to the job's journal. So the output, the
errors, the checks and resuming are those of `rgtg.batch`: a job can be started here and finished there.
docs/decisions/0011 says why this is a pool of actors and not a Ray Data pipeline.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rgtg.batch.run import run_plan
from rgtg.config import GenerateSettings
from rgtg.data.prompts import PromptFile
from rgtg.errors import RgtgError, UsageError, one_line
from rgtg.integrations.ray_cluster import WorkerResources, absolute_path, connect_ray, node_resources, plan_workers
from rgtg.integrations.ray_pool import WorkerPool
from rgtg.types.batch import JobResult


@contextmanager
def ray_job(settings: GenerateSettings, prompts: PromptFile) -> Iterator[Callable[..., JobResult]]:
    """Connect to or start the cluster of the settings, plan the job in a worker, and yield a function that runs it.

    The function takes ``progress``, returns the job's result, and raises the errors of `rgtg.batch.run.run_job`.

    Args:
        settings: of the run; those from ``ray`` to ``cpus_per_actor`` describe the cluster and its workers.
        prompts: the rows.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: settings that cannot be used, or more workers than fit on this machine.
        EndpointError: there is no cluster at the address.
        RgtgError: the cluster has no room or another version of rgtg, or its workers die.

    Example:
        >>> with ray_job(settings, read_prompt_rows("prompts.jsonl")) as run:  # doctest: +SKIP
        ...     run().completions
    """
    with connect_ray(settings) as started_here, _one_line_errors():
        resources = _plan_workers(settings, growing=not started_here)
        with WorkerPool(_worker_settings(settings, resources), resources).open() as pool:
            plan = pool.plan(settings, prompts)
            yield partial(run_plan, settings, prompts, plan, pool.complete)


def _plan_workers(settings: GenerateSettings, *, growing: bool) -> WorkerResources:
    """Check that the workers fit; on a ``growing`` cluster, warn if some of them do not fit yet."""
    resources, fit = plan_workers(settings, node_resources())
    if fit < resources.actors:
        each = f"{resources.cpus} CPUs and {resources.gpus:g} GPUs each"
        short = f"there is room for {fit} of {resources.actors} workers with {each}"
        if not growing:
            raise UsageError(f"{short} on this machine: lower --actors, --cpus-per-actor or --gpus-per-actor")
        warnings.warn(f"{short} in the cluster now; the others start when there is more", stacklevel=2)
    return resources


def _worker_settings(settings: GenerateSettings, resources: WorkerResources) -> GenerateSettings:
    """The settings by which workers load models: with absolute paths, and on the CPU if they have no GPU."""
    changed: dict[str, Any] = {name: absolute_path(getattr(settings, name)) for name in ("policy", "draft")}
    scorer = settings.scorer
    changed["scorer"] = [absolute_path(one) for one in scorer] if isinstance(scorer, list) else absolute_path(scorer)
    if settings.device is None and not resources.gpus:
        changed["device"] = "cpu"
    return settings.model_copy(update={k: v for k, v in changed.items() if v != getattr(settings, k)})


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Raise Ray's own errors as one line. A bug in a worker's code keeps its traceback."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError:
        raise
    except RayError as error:
        raise RgtgError(
            f"Ray failed: {one_line(error)}; finished rows are kept, and the same command resumes from them"
        ) from error
