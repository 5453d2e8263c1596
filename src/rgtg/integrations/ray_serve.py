"""The server of ``rgtg serve`` as a Ray Serve application: replicas on many machines behind Ray's proxies.

``rgtg.integrations.ray_serve:app`` is an application builder: ``serve run`` and Serve's config files call it with the
settings of ``rgtg serve``, and those of `ReplicaSettings`.
"""

import os
from typing import TYPE_CHECKING, Any, Self

from fastapi import FastAPI
from pydantic import Field, model_validator

from rgtg.config import GenerateSettings
from rgtg.config.base import validate
from rgtg.errors import BusyError, UsageError
from rgtg.integrations.ray_cluster import Room, nodes_alive, require_ray, share, whole_path
from rgtg.serving.http.app import create_app
from rgtg.serving.http.state import ServerState
from rgtg.serving.server import load_engine, log_to_stderr
from rgtg.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "Guided"
# Requests beyond those that the engine holds, so that it can refuse them, and say that it lives.
_SPARE = 16
_FAREWELL_SECONDS = 5.0
_STARTS = 3


class ReplicaSettings(ServeSettings):
    """``rgtg serve`` on Ray Serve; limits are each replica's. Serve's proxies listen, not the replicas."""

    replicas: int = Field(1, ge=1, description="processes, each with the models")
    max_replicas: int | None = Field(None, ge=1, description="more of them under load; replicas are then the fewest")
    gpus_per_replica: float | None = Field(None, ge=0, description="default: 1 where the cluster has GPUs, else 0")
    cpus_per_replica: int | None = Field(
        None, ge=1, description="also its threads; default: 1 beside a GPU, else an equal share of the cluster"
    )

    @model_validator(mode="before")
    @classmethod
    def _closed(cls, given: Any) -> Any:
        if isinstance(given, dict) and not (given.get("api_key") or given.get("allow_public")):
            raise ValueError("Ray's proxies may listen to anyone: set a key (RGTG_API_KEY), or allow_public=true")
        return given

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is below replicas ({self.replicas})")
        return self

    @property
    def scaling(self) -> dict[str, Any]:
        """As ``serve.deployment`` takes it: a number of replicas, or one that follows the load."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        limits = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
        return {"autoscaling_config": limits | {"target_ongoing_requests": self.max_batch}}


class Guided:
    """One replica: the app of ``rgtg serve`` over an engine of its own."""

    def __init__(self, settings: ReplicaSettings) -> None:
        log_to_stderr(errors_only=settings.log == "errors")
        self.state = ServerState(settings)
        self.state.open(load_engine(settings))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Serve passes requests to."""
        return create_app(self.state)

    def check_health(self) -> None:
        """Fail where the engine's thread is gone: Serve then replaces the replica.

        Raises:
            NotServingError: it is.
        """
        try:
            self.state.require().engine.run(_nothing)
        except BusyError:  # it lives, and has much to do
            return

    def __del__(self) -> None:
        """Serve calls it when accepted requests are answered, or out of time."""
        if (state := getattr(self, "state", None)) is not None and state.engine is not None:
            state.engine.stop()


def app(args: dict[str, Any]) -> "Application":
    """The application of these settings; where there are none, the environment's (``RGTG_POLICY`` …) are used.

    Since Ray's proxies may listen to anyone, a key is required, or ``allow_public``.

    Args:
        args: settings by name, as text or as values.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: unknown or unusable settings, or neither a key nor ``allow_public``.

    Example:
        >>> serve.run(app({"policy": "policy", "scorer": "helpful=scorer", "replicas": 2}))  # doctest: +SKIP
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that serve run starts after this
    from ray import serve

    settings = _read(args)
    room = _room(settings)
    deployment = serve.deployment(
        serve.ingress()(Guided),
        name=NAME,
        ray_actor_options=dict(room.options),
        max_ongoing_requests=settings.max_batch + settings.max_queue + _SPARE,
        max_queued_requests=max(settings.max_queue, 1),
        backpressure_config={"status_code": 429, "retry_after_s": 1.0},
        graceful_shutdown_timeout_s=settings.drain_seconds + _FAREWELL_SECONDS,
        max_constructor_retry_count=_STARTS,
        **settings.scaling,
    )
    return deployment.bind(_placed(settings, room))


def _read(args: dict[str, Any]) -> ReplicaSettings:
    if given := {"host", "port"} & args.keys():
        raise UsageError(f"{', '.join(sorted(given))}: Ray Serve listens; set it in http_options, or with serve start")
    return validate(ReplicaSettings, args | {"host": "0.0.0.0"})  # as far as a replica knows


def _room(settings: ReplicaSettings) -> Room:
    """What each replica takes of the cluster; ``serve run`` asks before it has joined one: then of this machine."""
    import ray
    import torch

    asked = GenerateSettings(
        actors=settings.max_replicas or settings.replicas,
        gpus_per_actor=settings.gpus_per_replica,
        cpus_per_actor=settings.cpus_per_replica,
        device=settings.device,
    )
    here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    return share(asked, nodes_alive() if ray.is_initialized() else [here])[0]


def _placed(settings: ReplicaSettings, room: Room) -> ReplicaSettings:
    """The settings as a replica loads models by them."""
    changed: dict[str, Any] = {
        "policy": whole_path(settings.policy),
        "scorer": {name: whole_path(folder) for name, folder in settings.scorer.items()},
    }
    if settings.device is None and not room.gpus:
        changed["device"] = "cpu"
    return settings.model_copy(update=changed)


def _nothing() -> None:
    return None
