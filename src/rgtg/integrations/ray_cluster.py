"""Ray: joining a cluster, or starting one on this machine; and how many workers fit on it.

Ray is imported inside functions only, so that what the cluster would be can be said without it.
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
    """Refuse to go on without Ray.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("Ray needs its extra: pip install 'rgtg[ray]'")


@contextmanager
def cluster(settings: GenerateSettings) -> Iterator[bool]:
    """A connection to the cluster of the settings; where this process has one already, that one, and it stays.

    A cluster that is started here has no dashboard and ends with the block; where Ray had not been imported before, it
    listens on loopback only and asks for a token. Yields whether it was started here.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: an address of another form.
        EndpointError: no cluster is at the address, or it cannot be joined.
    """
    require_ray()
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    _prepare_environment(local=address == "local")
    import ray

    if ray.is_initialized():
        yield False
        return
    if address != "local":
        _require_listener(address)
    with _own_sigterm():
        _join(address, _cpus(settings) if address == "local" else None)
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def _prepare_environment(*, local: bool) -> None:
    """Settings that Ray reads from the environment only."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not local or "ray" in sys.modules:  # the others are read when it is imported, and by its processes: as one
        return
    # Despite its name, on every system: 0 keeps all of Ray's processes on loopback.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ray would leave a token in the home folder; a cluster of an hour has one of an hour.
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _cpus(settings: GenerateSettings) -> int:
    """CPUs that a cluster on this machine says it has: those there are, or more where more are asked for."""
    asked = (settings.actors or 1) * (settings.cpus_per_actor or 1)
    return max(os.cpu_count() or 1, asked)


def _require_listener(address: str) -> None:
    """Refuse an address where nothing answers; Ray itself would try for minutes."""
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
        f"no Ray cluster at {address}: {why}. Give its head node's HOST:PORT, or leave --address out to start one here"
    )


def _join(address: str, cpus: int | None) -> None:
    import ray

    own = {} if cpus is None else {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(address, logging_level="ERROR", log_to_driver=False, **own)
    except SystemExit as error:  # Ray's own handler of SIGTERM
        raise KeyboardInterrupt from error
    except Exception as error:
        if address != "local":
            raise _unreachable(address, one_line(error)) from error
        raise RgtgError(f"Ray could not start on this machine: {one_line(error)}") from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Room:
    """How many workers there are, and what each of them takes."""

    actors: int
    cpus: int
    gpus: float

    @property
    def options(self) -> dict[str, float]:
        """Of a Ray task or actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}


def share(settings: GenerateSettings, nodes: list[dict[str, float]]) -> tuple[Room, int]:
    """What each worker gets, and how many of them fit on the cluster as it is.

    Args:
        settings: of the run.
        nodes: ``CPU`` and ``GPU`` of every node.

    Example:
        >>> share(GenerateSettings(actors=3), [{"CPU": 8.0}, {"CPU": 8.0}])
        (Room(actors=3, cpus=4, gpus=0.0), 4)
        >>> share(GenerateSettings(), [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0}])
        (Room(actors=2, cpus=1, gpus=1.0), 2)
    """
    some = settings.device != "cpu" and any(node.get("GPU") for node in nodes)
    gpus = float(some) if settings.gpus_per_actor is None else settings.gpus_per_actor
    actors = settings.actors or (sum(_fit(node, 0, gpus) for node in nodes) if gpus else len(nodes)) or 1
    cpus = settings.cpus_per_actor or (1 if gpus else _equal_share(nodes, actors))
    return Room(actors, cpus, gpus), sum(_fit(node, cpus, gpus) for node in nodes)


def _equal_share(nodes: list[dict[str, float]], actors: int) -> int:
    """Most CPUs that each of the workers can have."""
    most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    shares = (cpus for cpus in range(most, 0, -1) if sum(_fit(node, cpus, 0) for node in nodes) >= actors)
    return next(shares, 1)


def _fit(node: dict[str, float], cpus: int, gpus: float) -> int:
    """Workers that a node has room for; several share a GPU only if they fit into one."""
    there = node.get("GPU", 0)
    by_cpus = node.get("CPU", 0) // cpus if cpus else math.inf
    by_gpus = math.inf if not gpus else there // gpus if gpus >= 1 else there * (1 // gpus)
    return int(min(by_cpus, by_gpus))


def nodes_alive() -> list[dict[str, float]]:
    """Resources of every node of the cluster that this process has joined."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def whole_path(source: str | None) -> str | None:
    """A model's folder as every process of this machine finds it; a hub id as it is."""
    return str(Path(source).absolute()) if source is not None and Path(source).is_dir() else source
