"""What all routes share: settings, metrics, and the engine once its models are loaded."""

import time
from typing import Literal

from rgtg.errors import NotServingError
from rgtg.serving.engine.engine import Engine
from rgtg.serving.http.input_processor import InputProcessor
from rgtg.serving.metrics import Metrics
from rgtg.serving.settings import ServeSettings


class ServerState:
    """State of one server."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.status: Literal["loading", "ready", "draining"] = "loading"
        self.created = int(time.time())
        self.metrics = Metrics(lambda: self.engine.snapshot() if self.engine else None)
        self.engine: Engine | None = None
        self._processor: InputProcessor | None = None

    def open(self, engine: Engine) -> bool:
        """Start to accept requests with a running engine.

        Returns:
            False if the server was told to stop in the meantime; the engine is then stopped.
        """
        if self.status == "draining":
            engine.stop()
            return False
        self._processor = InputProcessor(engine, self.settings)
        self.engine, self.status = engine, "ready"
        return True

    def drain(self) -> None:
        """Refuse new requests, wait up to ``drain_seconds`` for accepted ones, then stop the engine."""
        self.status = "draining"
        if self.engine is not None:
            self.engine.drain(self.settings.drain_seconds)
            self.engine.stop()

    def require(self) -> InputProcessor:
        """The input processor, and with it the engine, if the server accepts requests.

        Raises:
            NotServingError: the models are not loaded yet, the server is stopping, or the engine has failed.
        """
        if self._processor is None:
            raise NotServingError("the models are being loaded; try again in a moment")
        if self.status == "draining":
            raise NotServingError("the server is stopping and accepts no new requests")
        if not self._processor.engine.alive:
            raise NotServingError("the engine has failed, and the log says why; restart the server")
        return self._processor
