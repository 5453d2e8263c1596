"""The server of ``rgtg serve`` as a Ray Serve application: replicas on several machines behind Ray's proxies.

``rgtg.integrations.ray_serve:app`` is an application builder: ``serve run`` and Serve's config files call it with the
settings of ``rgtg serve`` and of `ReplicaSettings`.
"""

import os
from typing import TYPE_CHECKING, Any, Self

from fastapi import FastAPI
from pydantic import Field, model_validator

from rgtg.config import GenerateSettings
from rgtg.config.base import validate
from rgtg.errors import BusyError, UsageError
from rgtg.integrations.ray_cluster import WorkerResources, absolute_path, node_resources, plan_workers, require_ray
from rgtg.serving.http.app import create_app
from rgtg.serving.http.state import ServerState
from rgtg.serving.server import load_engine, log_to_stderr
from rgtg.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "Guided"
# Requests beyond the engine's queue: they get status 429, and health checks get through.
_SPARE_REQUESTS = 16
_SHUTDOWN_SECONDS = 5.0
_MAX_STARTS = 3


class ReplicaSettings(ServeSettings):
    """``rgtg serve`` on Ray Serve. Limits apply to each replica. Serve's proxies listen, not the replicas."""

    replicas: int = Field(1, ge=1, description="processes, each with its own models")
    max_replicas: int | None = Field(None, ge=1, description="most replicas under load; replicas is then the minimum")
    gpus_per_replica: float | None = Field(
        None, ge=0, description="GPUs of each replica; default: 1 if the cluster has GPUs, else 0"
    )
    cpus_per_replica: int | None = Field(
        None, ge=1, description="CPUs and threads of each replica; default: 1 with a GPU, else an equal share"
    )

    @model_validator(mode="before")
    @classmethod
    def _require_key_or_public(cls, given: Any) -> Any:
        if isinstance(given, dict) and not (given.get("api_key") or given.get("allow_public")):
            raise ValueError("Ray's proxies may be reachable by anyone: set a key (RGTG_API_KEY), or allow_public=true")
        return given

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below replicas ({self.replicas})")
        return self

    @property
    def scaling(self) -> dict[str, Any]:
        """Arguments of ``serve.deployment``: a fixed number of replicas, or autoscaling."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        limits = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
        return {"autoscaling_config": limits | {"target_ongoing_requests": self.max_batch}}


class GuidedDeployment:
    """One replica: the app of ``rgtg serve`` with its own engine."""

    def __init__(self, settings: ReplicaSettings) -> None:
        log_to_stderr(errors_only=settings.log == "errors")
        self.state = ServerState(settings)
        self.state.open(load_engine(settings))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the app to which Serve passes requests."""
        return create_app(self.state)

    def check_health(self) -> None:
        """Raise an error if the engine's thread has ended: Serve then replaces the replica.

        Raises:
            NotServingError: it has ended.
        """
        try:
            self.state.require().engine.run(_nothing)
        except BusyError:  # it is alive, and its queue is full
            return

    def __del__(self) -> None:
        """Stop the engine. Serve calls this once accepted requests are answered or out of time."""
        if (state := getattr(self, "state", None)) is not None and state.engine is not None:
            state.engine.stop()


def app(args: dict[str, Any]) -> "Application":
    """Build the application. Settings that are not given come from the environment (``RGTG_POLICY`` …).

    A key or ``allow_public`` is required, because Ray's proxies may be reachable by anyone.

    Args:
        args: settings by name, as text or values.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: unknown or invalid settings, or neither a key nor ``allow_public``.

    Example:
        >>> serve.run(app({"policy": "policy", "scorer": "helpful=scorer", "replicas": 2}))  # doctest: +SKIP
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster that serve run starts later
    from ray import serve

    settings = _read(args)
    resources = _plan_replicas(settings)
    deployment = serve.deployment(
        serve.ingress()(GuidedDeployment),
        name=NAME,
        ray_actor_options=dict(resources.options),
        max_ongoing_requests=settings.max_batch + settings.max_queue + _SPARE_REQUESTS,
        max_queued_requests=max(settings.max_queue, 1),
        backpressure_config={"status_code": 429, "retry_after_s": 1.0},
        graceful_shutdown_timeout_s=settings.drain_seconds + _SHUTDOWN_SECONDS,
        max_constructor_retry_count=_MAX_STARTS,
        **settings.scaling,
    )
    return deployment.bind(_replica_settings(settings, resources))


def _read(args: dict[str, Any]) -> ReplicaSettings:
    if given := {"host", "port"} & args.keys():
        raise UsageError(f"{', '.join(sorted(given))}: Ray Serve listens; set it in http_options, or with serve start")
    return validate(ReplicaSettings, args | {"host": "0.0.0.0"})  # a replica does not listen


def _plan_replicas(settings: ReplicaSettings) -> WorkerResources:
    """Compute the resources of each replica: of the cluster, or of this machine if ``serve run`` has not joined one."""
    import ray
    import torch

    asked = GenerateSettings(
        actors=settings.max_replicas or settings.replicas,
        gpus_per_actor=settings.gpus_per_replica,
        cpus_per_actor=settings.cpus_per_replica,
        device=settings.device,
    )
    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    return plan_workers(asked, node_resources() if ray.is_initialized() else [here])[0]


def _replica_settings(settings: ReplicaSettings, resources: WorkerResources) -> ReplicaSettings:
    """The settings by which a replica loads models: with absolute paths, and on the CPU if it has no GPU."""
    changed: dict[str, Any] = {
        "policy": absolute_path(settings.policy),
        "scorer": {name: absolute_path(folder) for name, folder in settings.scorer.items()},
    }
    if settings.device is None and not resources.gpus:
        changed["device"] = "cpu"
    return settings.model_copy(update=changed)


def _nothing() -> None:
    return None
