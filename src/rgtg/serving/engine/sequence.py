"""A row of a job while it is decoded, prompts on their way into a lane, and rows that decode apart from it."""

import logging

from rgtg.config import DecodingSettings, EngineSettings
from rgtg.decoding.engine.batch import Lane, Member
from rgtg.decoding.engine.batches import LaneKey, lane_key
from rgtg.decoding.engine.chunked_prefill import Prefill
from rgtg.decoding.methods import betas_of, scores_vocabulary
from rgtg.decoding.request import to_completion
from rgtg.errors import DeadlineError, NonFiniteError, RgtgError, StoppedError, UsageError
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.engine.request import Event, Failed, Finished, Row, Step, Ticket

_log = logging.getLogger("rgtg.serving")


def send(ticket: Ticket, event: Event) -> None:
    """Tell a job's listener; one that raises harms nobody else."""
    try:
        ticket.listener(event)
    except Exception:
        _log.exception("a listener failed")


def rows_of(settings: DecodingSettings) -> int:
    """Completions, or segments of one, that are decoded at once for one row."""
    return settings.n if settings.method in ("best-of-n", "cd-blockwise") else 1


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
        token_wise = self.decoder.method.unit == "token"
        self.lane = lane_key(models.scorers, row.scorers) if token_wise else None
        self.member = Member(
            self.request, self.decoder.rule(self.settings, row.trace), self.decoder.stopping(self.settings),
            row.scorers, tuple(betas_of(self.settings)) if row.scorers else (),
        )  # fmt: skip
        self.cached_tokens = 0
        self._told = self._fallbacks = 0

    def _check(self, limits: EngineSettings) -> None:
        if self.settings.max_new_tokens > limits.max_tokens:
            raise UsageError(
                f"max_new_tokens = {self.settings.max_new_tokens}; this server makes at most {limits.max_tokens}",
                setting="max_new_tokens",
            )
        if (length := self.settings.segment_length or 0) > limits.max_tokens:
            raise UsageError(
                f"segment_length = {length}; this server makes at most {limits.max_tokens} tokens",
                setting="segment_length",
            )
        widest = self.settings.top_k
        each = [scorer for scorer in self.decoder.used if not scores_vocabulary(scorer)]
        if each and self.decoder.method.unit == "token" and (widest is None or widest > limits.max_candidates):
            raise UsageError(
                f"top_k = {widest}: {each[0].name} reads every candidate, on this server at most "
                f"{limits.max_candidates}",
                setting="top_k",
            )

    def tell(self) -> None:
        """Send the tokens that are new, and the completion once it is finished."""
        request = self.request
        if self.decoder.method.unit != "completion":
            for i in range(self._told, len(request.token_ids)):
                self._send(Step(self.index, request.token_ids[i], request.trace[i] if self.row.trace else None))
            self._told = len(request.token_ids)
        if request.finish_reason is not None:
            done = to_completion(request, self.decoder.method.name, trace=self.row.trace)
            self._send(Finished(self.index, done, self.cached_tokens, self.member.fallback))

    def new_fallbacks(self) -> int:
        """Tokens that were left to the policy since this was asked last."""
        new, self._fallbacks = self.member.fallback - self._fallbacks, self.member.fallback
        return new

    def fail(self, why: RgtgError) -> None:
        """Say that nothing more will come."""
        self._send(Failed(self.index, why))

    def _send(self, event: Event) -> None:
        send(self.ticket, event)


class Arrival:
    """Rows of one job and one lane, while their prompt is read."""

    def __init__(self, key: LaneKey, seats: list[Seat], prompt: Prefill) -> None:
        self.key, self.seats, self.prompt = key, seats, prompt
        self.rows, self.ticket = len(seats), seats[0].ticket

    def enter(self, lane: Lane) -> None:
        """Join the lane: every row takes the readers of its own scorers, over one reading of the prompt."""
        for i, seat in enumerate(self.seats):
            seat.cached_tokens = self.prompt.cached
            read = {name: reader for name, reader in self.prompt.readers.items() if name in seat.row.scorers}
            if i:
                read = {name: reader.again(seat.request) for name, reader in read.items()}
            lane.join(seat.member, self.prompt.stepper, read, self.prompt.logits)

    def fail(self, why: RgtgError) -> None:
        """End all rows with an error."""
        for seat in self.seats:
            seat.fail(why)


class Solo:
    """A row with models' caches of its own, stepped in turn with everything else: segments, best-of-n."""

    def __init__(self, seat: Seat, chunk: int) -> None:
        """``chunk``: tokens of a text that are read between two steps of others."""
        self.seat, self.ticket, self.rows = seat, seat.ticket, rows_of(seat.settings)
        self.done = self.unsound = False
        run = seat.decoder.begin(seat.request, seat.settings, trace=seat.row.trace, chunk=chunk)
        self.prompt, self._steps = run.prompt, run.steps

    def step(self) -> None:
        """Take one step; what goes wrong ends this row alone."""
        self.seat.cached_tokens = self.prompt.cached
        try:
            ended = next(self._steps, None) is None
        except NonFiniteError:
            self.unsound = True
            self.fail(NonFiniteError("a model returned NaN or infinite values for this text"))
            return
        except Exception as error:
            self.fail(as_ours(error))
            return
        self.done = ended
        if ended or self.seat.request.finish_reason is None:
            self.seat.tell()

    def fail(self, why: RgtgError) -> None:
        """End the row with an error."""
        self.done = True
        self.seat.fail(why)


def refuse(ticket: Ticket, why: RgtgError) -> None:
    """End all rows of a job that has no place yet."""
    for row in range(len(ticket.job.rows)):
        send(ticket, Failed(row, why))


def given_up(ticket: Ticket, now: float) -> RgtgError | None:
    """Why a job is not continued."""
    if ticket.cancelled:
        return StoppedError("the request was cancelled")
    if ticket.job.deadline is not None and now > ticket.job.deadline:
        return DeadlineError("the request was not finished in its time")
    return None


def as_ours(error: Exception) -> RgtgError:
    """An error for the client; what is nobody's but the server's is logged and kept from it."""
    if isinstance(error, RgtgError):
        return error
    _log.error("a request failed", exc_info=error)
    return RgtgError("the request failed inside the server")


def unsound(what: str) -> str:
    """What is said of a row whose policy (``policy``) or scorer, by name, is not finite."""
    if what == "policy":
        return "the policy gives no finite probability to any next token"
    return f"the scorer {what} returned NaN or infinite scores for this text"
