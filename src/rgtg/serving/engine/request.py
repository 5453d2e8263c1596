"""What the engine is asked for, and what it tells: jobs, their rows, and events."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rgtg.config import DecodingSettings
from rgtg.errors import RgtgError
from rgtg.types.generation import Completion, StepTrace

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Row:
    """One completion to make.

    Attributes:
        settings: method, beta (one per scorer), top_k …; those that are unset are the method's own.
        scorers: names of loaded scorers, in the order of the betas.
        seed: of this row's own generator; ``rgtg.decoding.request.row_seeds`` derives those of ``generate``.
        trace: keep every candidate's figures of every step.
    """

    settings: DecodingSettings
    scorers: tuple[str, ...] = ()
    seed: int = 0
    trace: bool = False


@dataclass(frozen=True)
class Job:
    """One prompt, and the completions to make of it: the n choices of a request, the two sides of a comparison.

    Attributes:
        prompt: its text, with a chat template written out.
        prompt_ids: its tokens.
        rows: completions.
        source: what scorers with a tokenizer of their own take: chat messages, text, or None for what the tokens say.
        deadline: in ``time.monotonic()`` seconds; what is not finished then fails.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    rows: tuple[Row, ...]
    source: str | list[dict[str, Any]] | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Step:
    """A token that is final."""

    row: int
    token_id: int
    trace: StepTrace | None = None


@dataclass(frozen=True)
class Finished:
    """A completion.

    Attributes:
        row: its place in the job.
        completion: with its trace, where that was asked for.
        cached_tokens: tokens of the prompt that had been read before.
        fallback: tokens that were left to the policy, since a scorer returned NaN.
    """

    row: int
    completion: Completion
    cached_tokens: int = 0
    fallback: int = 0


@dataclass(frozen=True)
class Failed:
    """A completion that will not come."""

    row: int
    error: RgtgError


Event = Step | Finished | Failed
Listener = Callable[[Event], None]


@dataclass
class Ticket:
    """A job that was taken in."""

    job: Job
    listener: Listener
    number: int = field(default_factory=lambda: next(_numbers))
    cancelled: bool = False
