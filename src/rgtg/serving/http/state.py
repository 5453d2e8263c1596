"""What every route reads: settings, metrics, and the engine once its models are loaded."""

import time
from typing import Literal

from rgtg.errors import NotServingError
from rgtg.serving.engine.engine import Engine
from rgtg.serving.http.input_processor import Planner
from rgtg.serving.metrics import Metrics
from rgtg.serving.settings import ServeSettings
from rgtg.tokenization.token_bytes import TokenBytes


class Service:
    """One policy being served."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.status: Literal["loading", "ready", "draining"] = "loading"
        self.created = int(time.time())
        self.metrics = Metrics(lambda: self.engine.snapshot() if self.engine else None)
        self.engine: Engine | None = None
        self._planner: Planner | None = None
        self._known: TokenBytes | None = None

    def open(self, engine: Engine) -> bool:
        """Take requests, since the engine runs; whether they are taken: not where the server was told to stop."""
        if self.status == "draining":
            engine.stop()
            return False
        self._planner = Planner(engine.models, self.settings)
        self._known = TokenBytes(engine.models.tokenizer)
        self.engine, self.status = engine, "ready"
        return True

    def drain(self) -> None:
        """Take no new requests, and wait for those that were taken, as long as they are given; then stop the engine."""
        self.status = "draining"
        if self.engine is not None:
            self.engine.drain(self.settings.drain_seconds)
            self.engine.stop()

    def require(self) -> Engine:
        """The engine, where it takes requests.

        Raises:
            NotServingError: models are being loaded, or the server is about to stop.
        """
        if self.engine is None:
            raise NotServingError("the models are being loaded; try again in a moment")
        if self.status == "draining":
            raise NotServingError("the server is about to stop, and takes no new requests")
        if not self.engine.alive:
            raise NotServingError("the engine has failed, and its log says why; the server must be started again")
        return self.engine

    @property
    def planner(self) -> Planner:
        """Reads requests.

        Raises:
            NotServingError: as ``require``.
        """
        self.require()
        assert self._planner is not None, "made with the engine"
        return self._planner

    @property
    def known(self) -> TokenBytes:
        """The policy's tokens as bytes; ask after ``require``."""
        assert self._known is not None, "made with the engine"
        return self._known
