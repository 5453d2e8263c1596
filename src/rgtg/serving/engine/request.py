"""What the engine tells of requests while they run, and the handle of those that were submitted together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rgtg.decoding.request import Request
from rgtg.errors import RgtgError
from rgtg.types.generation import Completion, StepTrace


@dataclass(frozen=True)
class TokenEvent:
    """A token that is final.

    Attributes:
        row: the request's place among those that were submitted together.
        token_id: the token.
        trace: the step's candidates, if the request keeps a trace.
    """

    row: int
    token_id: int
    trace: StepTrace | None = None


@dataclass(frozen=True)
class FinishedEvent:
    """A request has ended.

    Attributes:
        row: the request's place among those that were submitted together.
        completion: with its trace, if the request keeps one.
        cached_tokens: prompt tokens that the prefix cache held.
        scores_not_finite: tokens that were left to the policy because a scorer returned NaN.
    """

    row: int
    completion: Completion
    cached_tokens: int = 0
    scores_not_finite: int = 0


@dataclass(frozen=True)
class FailedEvent:
    """A request will have no completion."""

    row: int
    error: RgtgError


Event = TokenEvent | FinishedEvent | FailedEvent
Listener = Callable[[Event], None]


@dataclass(eq=False)
class Handle:
    """Requests that were submitted together.

    Attributes:
        groups: requests with one prompt each, which share one prefill and are admitted together.
        listener: called with every event, in the engine's thread.
        deadline: in ``time.monotonic()`` seconds; what has not ended by then fails.
        cancelled: whether nobody waits for it any more.
        rows: place of each request among all.
        sent: tokens of each request that the listener has been told.
        nan_counted: tokens of each request that the engine has counted as left to the policy because of NaN.
    """

    groups: Sequence[Sequence[Request]]
    listener: Listener
    deadline: float | None = None
    cancelled: bool = False
    rows: dict[Request, int] = field(default_factory=dict)
    sent: dict[Request, int] = field(default_factory=dict)
    nan_counted: dict[Request, int] = field(default_factory=dict)
