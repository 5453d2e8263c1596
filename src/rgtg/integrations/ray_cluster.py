"""Connect to a Ray cluster or start one on this machine, and compute how many workers fit on it.

Ray is imported only inside functions, so that workers can be planned without it.
"""

import importlib.util
import math
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rgtg.config import GenerateSettings
from rgtg.errors import EndpointError, MissingExtraError, RgtgError, UsageError, one_line

_CONNECT_SECONDS = 10.0


def require_ray() -> None:
    """Check that Ray is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("Ray needs its extra: pip install 'rgtg[ray]'")


@contextmanager
def connect_ray(settings: GenerateSettings) -> Iterator[bool]:
    """Connect to the cluster of the settings, or use the connection that this process has, which then stays open.

    A cluster that is started here has no dashboard and ends with the block. If Ray had not been imported before, it
    listens on loopback only and requires a token. Yields whether the cluster was started here.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: the address has another form.
        EndpointError: there is no cluster at the address, or it cannot be joined.
    """
    require_ray()
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    _set_environment(local=address == "local")
    import ray

    if ray.is_initialized():
        yield False
        return
    if address != "local":
        _check_address(address)
    with _keep_sigterm_handler():
        _init(address, _local_cpus(settings) if address == "local" else None)
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def _set_environment(*, local: bool) -> None:
    """Set what Ray reads only from the environment."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not local or "ray" in sys.modules:  # Ray reads the others at import, and its processes must agree
        return
    # Despite its name, 0 keeps all of Ray's processes on loopback on every system.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ray would store a token in the home folder; a temporary cluster gets a temporary token.
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _local_cpus(settings: GenerateSettings) -> int:
    """CPUs that a cluster on this machine declares: all there are, or more if more are requested."""
    requested = (settings.actors or 1) * (settings.cpus_per_actor or 1)
    return max(os.cpu_count() or 1, requested)


def _check_address(address: str) -> None:
    """Raise an error if nothing listens at an address; Ray itself would retry for minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not (host and colon and port.isdecimal() and int(port) < 65536):
        raise UsageError(
            f"address {address!r}: expected HOST:PORT of the cluster's head node (its port is 6379 unless changed), or "
            "auto. Run the command on a node of the cluster (ray job submit, or a shell there), not through ray://"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error


def _unreachable(address: str, why: str) -> EndpointError:
    return EndpointError(
        f"no Ray cluster at {address}: {why}. Give its head node's HOST:PORT, or omit --address to start one here"
    )


def _init(address: str, cpus: int | None) -> None:
    import ray

    local = {} if cpus is None else {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **local)
    except SystemExit as error:  # Ray's own handler of SIGTERM
        raise KeyboardInterrupt from error
    except Exception as error:
        if address != "local":
            raise _unreachable(address, one_line(error)) from error
        raise RgtgError(f"Ray could not start on this machine: {one_line(error)}") from error


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class WorkerResources:
    """How many workers there are, and the CPUs and GPUs of each."""

    actors: int
    cpus: int
    gpus: float

    @property
    def options(self) -> dict[str, float]:
        """Options of a Ray task or actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


def plan_workers(settings: GenerateSettings, nodes: list[dict[str, float]]) -> tuple[WorkerResources, int]:
    """Compute the resources of each worker, and how many workers fit on the cluster now.

    Args:
        settings: of the run.
        nodes: ``CPU`` and ``GPU`` of every node.

    Example:
        >>> plan_workers(GenerateSettings(actors=3), [{"CPU": 8.0}, {"CPU": 8.0}])
        (WorkerResources(actors=3, cpus=4, gpus=0.0), 4)
        >>> plan_workers(GenerateSettings(), [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0}])
        (WorkerResources(actors=2, cpus=1, gpus=1.0), 2)
    """
    use_gpus = settings.device != "cpu" and any(node.get("GPU") for node in nodes)
    gpus = float(use_gpus) if settings.gpus_per_actor is None else settings.gpus_per_actor
    actors = settings.actors or (sum(_fit(node, 0, gpus) for node in nodes) if gpus else len(nodes)) or 1
    cpus = settings.cpus_per_actor or (1 if gpus else _equal_share(nodes, actors))
    return WorkerResources(actors, cpus, gpus), sum(_fit(node, cpus, gpus) for node in nodes)


def _equal_share(nodes: list[dict[str, float]], actors: int) -> int:
    """The most CPUs that every worker can have."""
    most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    shares = (cpus for cpus in range(most, 0, -1) if sum(_fit(node, cpus, 0) for node in nodes) >= actors)
    return next(shares, 1)


def _fit(node: dict[str, float], cpus: int, gpus: float) -> int:
    """How many workers fit on a node. Workers share a GPU only if they fit on it together."""
    available = node.get("GPU", 0)
    by_cpus = node.get("CPU", 0) // cpus if cpus else math.inf
    by_gpus = math.inf if not gpus else available // gpus if gpus >= 1 else available * (1 // gpus)
    return int(min(by_cpus, by_gpus))


def node_resources() -> list[dict[str, float]]:
    """Resources of every live node of the cluster that this process is connected to."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def absolute_path(source: str | None) -> str | None:
    """The absolute path of a model's folder, for other processes of this machine; a hub id is unchanged."""
    return str(Path(source).absolute()) if source is not None and Path(source).is_dir() else source
