"""A file of prompts completed by the workers of a Ray cluster: the local job, with its batches done elsewhere.

The driver reads the prompts, hands out batches, and appends rows to the job's working file as they come. So the
records, the errors, what is refused and how a stopped job goes on are those of `rgtg.jobs`: a job may be begun here and
finished there. Why a pool of actors and not a Ray Data pipeline: docs/decisions/0011.
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
from rgtg.integrations.ray_cluster import Room, cluster, nodes_alive, share, whole_path
from rgtg.integrations.ray_pool import Pool
from rgtg.types.batch import JobResult


@contextmanager
def on_ray(settings: GenerateSettings, prompts: PromptFile) -> Iterator[Callable[..., JobResult]]:
    """Join or start the cluster of the settings, and plan the job in a worker; yields what completes it.

    The yielded function takes ``progress``, returns the job's result, and raises what `rgtg.batch.run.run_job` does.

    Args:
        settings: of the run; from ``ray`` to ``cpus_per_actor`` they say where.
        prompts: the rows.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: settings that cannot be used, or more workers than this machine has room for.
        EndpointError: no cluster is at the address.
        RgtgError: a cluster without room or without this version of rgtg, or whose workers die.

    Example:
        >>> with on_ray(settings, read_prompt_rows("prompts.jsonl")) as run:  # doctest: +SKIP
        ...     run().completions
    """
    with cluster(settings) as started_here, _told():
        room = _room(settings, growing=not started_here)
        with Pool(_placed(settings, room), room).open() as pool:
            plan = pool.plan(settings, prompts)
            yield partial(run_plan, settings, prompts, plan, pool.complete)


def _room(settings: GenerateSettings, *, growing: bool) -> Room:
    """The workers' share of the cluster; a growing one may have no room for all of them yet."""
    room, fit = share(settings, nodes_alive())
    if fit < room.actors:
        short = f"there is room for {fit} of {room.actors} workers with {room.cpus} CPUs and {room.gpus:g} GPUs each"
        if not growing:
            raise UsageError(f"{short} on this machine: lower --actors, --cpus-per-actor or --gpus-per-actor")
        warnings.warn(f"{short} in the cluster now; the others start when there is more", stacklevel=2)
    return room


def _placed(settings: GenerateSettings, room: Room) -> GenerateSettings:
    """The settings as workers load models by them: whole paths of what is here, and no GPU that they were not given."""
    changed: dict[str, Any] = {name: whole_path(getattr(settings, name)) for name in ("policy", "draft")}
    scorer = settings.scorer
    changed["scorer"] = [whole_path(one) for one in scorer] if isinstance(scorer, list) else whole_path(scorer)
    if settings.device is None and not room.gpus:
        changed["device"] = "cpu"
    return settings.model_copy(update={k: v for k, v in changed.items() if v != getattr(settings, k)})


@contextmanager
def _told() -> Iterator[None]:
    """Tell Ray's own errors in a line; a fault in a worker's code keeps its traceback."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError:
        raise
    except RayError as error:
        why = one_line(error)
        raise RgtgError(f"Ray failed: {why}; finished rows are kept, and the same command goes on from them") from error
