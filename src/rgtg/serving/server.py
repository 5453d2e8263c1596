"""The process: listen, load in the background, serve, and on SIGTERM finish what was taken in."""

import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from rgtg.errors import UsageError
from rgtg.serving.engine.engine import Engine
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.http.app import create_app
from rgtg.serving.http.state import Service
from rgtg.serving.http.streaming import FAREWELL_SECONDS
from rgtg.serving.settings import ServeSettings

_log = logging.getLogger("rgtg.serving")


class DrainingServer(uvicorn.Server):
    """uvicorn that keeps answering while accepted requests are finished: others are told 503."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._asked = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then leave; second one: leave at once."""
        self._asked += 1
        if self._asked == 1:
            _log.info("stopping: requests that were accepted get %g s", self.service.settings.drain_seconds)
            threading.Thread(target=self._drain, name="rgtg-drain", daemon=True).start()
        else:
            self.force_exit = self._asked > 2 or sig == signal.SIGINT
            self.should_exit = True

    def _drain(self) -> None:
        try:
            self.service.drain()
        finally:
            self.should_exit = True


def listen(settings: ServeSettings) -> socket.socket:
    """A socket at the address.

    Raises:
        UsageError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((settings.host, settings.port))
        made.listen(1024)  # now, so that two servers cannot both have it
    except OSError as error:
        made.close()
        why = error.strerror or str(error)
        raise UsageError(
            f"cannot listen on {settings.host} port {settings.port}: {why}; choose another --host or --port"
        ) from error
    made.setblocking(False)
    return made


def serve(settings: ServeSettings, ready: Callable[[str, ServedModels], None]) -> None:
    """Serve until a signal says to stop.

    Args:
        settings: of the server.
        ready: told the URL and the models, once requests are taken.

    Raises:
        UsageError: the address cannot be had.
        RgtgError: models that cannot be loaded.
    """
    service, failed = Service(settings), []
    with listen(settings) as bound:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{bound.getsockname()[1]}"

        def load() -> None:
            try:
                engine = load_engine(settings)
                if service.open(engine):
                    ready(url, engine.models)
            except BaseException as error:
                failed.append(error)
                server.should_exit = True

        app = create_app(service, threading.Thread(target=load, name="rgtg-load", daemon=True).start)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=FAREWELL_SECONDS,
            server_header=False,
        )  # fmt: skip
        server = DrainingServer(config, service)
        server.run(sockets=[bound])
    if service.engine is not None:
        service.engine.stop()
    if failed:
        raise failed[0]


def load_engine(settings: ServeSettings) -> Engine:
    """The models loaded, and an engine running on them.

    Raises:
        RgtgError: models that cannot be loaded or joined.
    """
    models = ServedModels.load(
        settings.policy,
        settings.scorer,
        policy_name=settings.name,
        dtype=settings.dtype,
        device=settings.device,
        scorer_device=settings.scorer_device,
    )
    engine = Engine(models, settings)
    engine.start()
    return engine


def log_to_stderr(*, errors_only: bool) -> None:
    """Write a line for every request, or for errors only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.handlers = [handler]
    _log.propagate = False
    _log.setLevel(logging.ERROR if errors_only else logging.INFO)
