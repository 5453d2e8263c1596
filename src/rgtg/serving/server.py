"""The server process: listen, load the models in the background, serve, and drain on SIGTERM."""

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
from rgtg.serving.http.state import ServerState
from rgtg.serving.http.streaming import FLUSH_SECONDS
from rgtg.serving.http.warm_up import warm_up
from rgtg.serving.settings import ServeSettings

_log = logging.getLogger("rgtg.serving")


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes accepted requests before it stops, and answers new ones with 503."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.state = state
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains and stops the server; the second stops it at once."""
        self._signals += 1
        if self._signals == 1:
            _log.info("stopping: accepted requests get up to %g s", self.state.settings.drain_seconds)
            threading.Thread(target=self._drain, name="rgtg-drain", daemon=True).start()
        else:
            self.force_exit = self._signals > 2 or sig == signal.SIGINT
            self.should_exit = True

    def _drain(self) -> None:
        try:
            self.state.drain()
        finally:
            self.should_exit = True


def listen(settings: ServeSettings) -> socket.socket:
    """A socket that listens on the settings' host and port.

    Raises:
        UsageError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
        sock.listen(1024)  # at once, so that no second server can take the same address
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise UsageError(
            f"cannot listen on {settings.host} port {settings.port}: {reason}; choose another --host or --port"
        ) from error
    sock.setblocking(False)
    return sock


def serve(settings: ServeSettings, ready: Callable[[str, ServedModels], None]) -> None:
    """Serve until a signal stops the process.

    Args:
        settings: of the server.
        ready: called with the URL and the models once the server accepts requests.

    Raises:
        UsageError: the address is not available.
        RgtgError: the models cannot be loaded.
    """
    state, errors = ServerState(settings), []
    with listen(settings) as sock:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{sock.getsockname()[1]}"

        def load() -> None:
            try:
                engine = load_engine(settings)
                if state.open(engine):
                    ready(url, engine.models)
            except BaseException as error:
                errors.append(error)
                server.should_exit = True

        app = create_app(state, threading.Thread(target=load, name="rgtg-load", daemon=True).start)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=FLUSH_SECONDS,
            server_header=False,
        )  # fmt: skip
        server = DrainingServer(config, state)
        server.run(sockets=[sock])
    if state.engine is not None:
        state.engine.stop()
    if errors:
        raise errors[0]


def load_engine(settings: ServeSettings) -> Engine:
    """Load the models, start an engine with them, and warm it up.

    Raises:
        RgtgError: the models cannot be loaded or combined.
    """
    models = ServedModels.load(
        settings.policy,
        settings.scorer,
        policy_name=settings.name,
        dtype=settings.dtype,
        device=settings.device,
        scorer_device=settings.scorer_device,
        cache_gguf=settings.cache_gguf,
        engine=settings.engine,
        threads=settings.threads,
    )
    engine = Engine(models, settings)
    engine.start()
    warm_up(engine, settings)
    return engine


def log_to_stderr(*, errors_only: bool) -> None:
    """Log every request to stderr, or only errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.handlers = [handler]
    _log.propagate = False
    _log.setLevel(logging.ERROR if errors_only else logging.INFO)
