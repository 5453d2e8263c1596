"""A row of a job while it is decoded, and rows that decode apart from the running batch."""

import logging
from collections.abc import Iterator

from rgtg.config import DecodingSettings, EngineSettings
from rgtg.decoding.methods import scores_vocabulary
from rgtg.decoding.requests import Request, to_completion
from rgtg.errors import RgtgError, UsageError
from rgtg.serving.jobs import Failed, Finished, Row, Step, Ticket
from rgtg.serving.models import ServedModels

_log = logging.getLogger("rgtg.serving")


def rows_of(settings: DecodingSettings) -> int:
    """Completions that are decoded at once for one row."""
    return settings.n if settings.method == "best-of-n" else 1


class Seat:
    """One row: its decoder, settings and request, and what its listener has been told."""

    def __init__(self, ticket: Ticket, index: int, row: Row, models: ServedModels, limits: EngineSettings) -> None:
        """Check the row and make its request.

        Raises:
            UsageError: unusable settings.
            DataError: a prompt that does not fit.
        """
        job = ticket.job
        self.ticket, self.index, self.row = ticket, index, row
        self.decoder, self.settings = models.resolve(row.settings, row.scorers)
        self._check(limits)
        (self.request,) = self.decoder.requests([job.prompt_ids], [job.prompt], [job.source], [row.seed], self.settings)
        self.cached_tokens = self.fallback = 0
        self._told = 0

    def _check(self, limits: EngineSettings) -> None:
        if self.settings.max_new_tokens > limits.max_tokens:
            raise UsageError(
                f"{self.settings.max_new_tokens} new tokens; this server makes at most {limits.max_tokens}"
            )
        widest = self.settings.top_k
        each = [scorer for scorer in self.decoder.used if not scores_vocabulary(scorer)]
        if each and self.decoder.method.unit == "token" and (widest is None or widest > limits.max_candidates):
            raise UsageError(
                f"top_k = {widest}: {each[0].name} reads every candidate, on this server at most "
                f"{limits.max_candidates}"
            )

    def tell(self) -> None:
        """Send the tokens that are new, and the completion once it is finished."""
        request = self.request
        if self.decoder.method.unit != "completion":
            for i in range(self._told, len(request.token_ids)):
                self.ticket.listener(
                    Step(self.index, request.token_ids[i], request.trace[i] if self.row.trace else None)
                )
            self._told = len(request.token_ids)
        if request.finish_reason is not None:
            self._leave()
            done = to_completion(request, self.decoder.method.name, trace=self.row.trace)
            self.ticket.listener(Finished(self.index, done, self.cached_tokens, self.fallback))

    def fail(self, why: RgtgError) -> None:
        """Say that nothing more will come."""
        self._leave()
        self.ticket.listener(Failed(self.index, why))

    def _leave(self) -> None:
        self.ticket.left -= 1


class Solo:
    """A row with models' caches of its own, stepped in turn with everything else: segments, best-of-n."""

    def __init__(self, seat: Seat) -> None:
        self.seat, self.rows = seat, rows_of(seat.settings)
        self.done = False
        self._steps: Iterator[list[Request]] = seat.decoder.steps([seat.request], seat.settings, trace=seat.row.trace)

    def step(self) -> None:
        """Take one step; what goes wrong ends this row alone."""
        try:
            ended = next(self._steps, None) is None
        except RgtgError as error:
            self.fail(error)
            return
        except Exception:
            _log.exception("a row failed")
            self.fail(RgtgError("the request failed inside the server"))
            return
        self.done = ended
        if ended or self.seat.request.finish_reason is None:
            self.seat.tell()

    def fail(self, why: RgtgError) -> None:
        """End the row with an error."""
        self.done = True
        self.seat.fail(why)
