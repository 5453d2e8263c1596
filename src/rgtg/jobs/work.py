"""The work of a job in three pure steps: tasks of rows, batches of tasks, outcomes of batches.

Tasks and outcomes can be pickled, so a batch may be completed anywhere that the same models are loaded. Batches depend
on the tasks alone, never on which of them are finished: a batch that was cut short is done again as it was, and gives
the same figures to the last bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError

from rgtg.data_prompts import BadRow, PromptRow
from rgtg.data_sources import Reason
from rgtg.decoding.guided import GuidedPolicy
from rgtg.decoding.methods import branch_columns
from rgtg.decoding.requests import Request, RowSeeds
from rgtg.errors import DataError, NonFiniteError, PromptTooLongError, UsageError
from rgtg.models.encoding import encode_source
from rgtg.types import Completion


@dataclass(frozen=True, slots=True)
class Task:
    """A row that is ready to be completed.

    Attributes:
        index: its place among all tasks.
        row: id, prompt and settings of its own.
        seed: of its generator.
        length: of the prompt, in tokens.
        columns: tokens that it may come to hold at once, prompt included.
    """

    index: int
    row: PromptRow
    seed: int
    length: int
    columns: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Tasks of the same settings that are decoded together."""

    tasks: tuple[Task, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """A task and its completion."""

    task: Task
    completion: Completion


@dataclass(frozen=True, slots=True)
class Failed:
    """A task that got no completion, and why."""

    task: Task
    reason: str
    error: str


Outcome = Done | Failed


def prepare(
    guided: GuidedPolicy, rows: Sequence[PromptRow], settings: dict[str, Any], seed: int
) -> tuple[list[Task], list[BadRow]]:
    """Tasks of the rows that fit the models, with the seeds that ``GuidedPolicy.generate`` gives them; and the others.

    Args:
        guided: policy and scorers.
        rows: of a file of prompts.
        settings: decoding settings of the run; a row's own are laid over them.
        seed: of the run.

    Raises:
        UsageError: settings of the run that cannot be used, or chats without a template.
    """
    guided.resolve(settings, complete=True)
    tasks: list[Task] = []
    bad: list[BadRow] = []
    seeds, costs = RowSeeds(seed), _Costs(guided, settings)
    for row in rows:
        try:
            length, columns, ids = costs.of(row)
        except _UnfitError as problem:
            bad.append(BadRow(row.number, row.id, problem.reason, str(problem)))
            continue
        drawn = seeds.next(ids) if row.seed is None else row.seed
        tasks.append(Task(len(tasks), row, drawn, length, columns))
    return tasks, bad


class _UnfitError(Exception):
    def __init__(self, reason: str, error: Exception) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {' '.join(str(error).split())[:300]}")


class _Costs:
    """What rows come to in tokens; settings are resolved once for all rows that share them."""

    def __init__(self, guided: GuidedPolicy, settings: dict[str, Any]) -> None:
        self.guided, self.settings = guided, settings
        self._resolved: dict[str, Any] = {}

    def of(self, row: PromptRow) -> tuple[int, int, list[int]]:
        settings = self._resolve(row.settings)
        text, ids = self._encode(row)
        try:
            self.guided.require_room(Request(text, ids, 0, [], source=row.prompt), settings)
        except PromptTooLongError as error:
            raise _UnfitError(Reason.TOO_LONG.value, error) from error
        except DataError as error:
            raise _UnfitError(Reason.EMPTY_PROMPT.value, error) from error
        columns = len(ids) + settings.max_new_tokens + branch_columns(self.guided.method, settings)
        return len(ids), columns, ids

    def _resolve(self, own: dict[str, Any]) -> Any:
        key = repr(sorted(own.items()))
        if key not in self._resolved:
            try:
                self._resolved[key] = self.guided.resolve(self.settings | own, complete=True)
            except UsageError as error:
                raise _UnfitError(Reason.BAD_VALUE.value, error) from error
        return self._resolved[key]

    def _encode(self, row: PromptRow) -> tuple[str, list[int]]:
        try:
            return encode_source(self.guided.policy.tokenizer, row.prompt)
        except UsageError:  # no chat template: no row of this kind can be done
            raise
        except DataError as error:
            refused = isinstance(error.__cause__, TemplateError)
            raise _UnfitError((Reason.CHAT_TEMPLATE if refused else Reason.EMPTY_PROMPT).value, error) from error
        except Exception as error:  # a template is a program: it may refuse roles, or fail in any way
            raise _UnfitError(Reason.CHAT_TEMPLATE.value, error) from error


def plan_batches(tasks: Iterable[Task], *, rows: int | None, tokens: int) -> list[Batch]:
    """Batches of tasks of like length and equal settings, the largest first, so that what does not fit shows at once.

    A batch of n tasks is padded to the longest: n · columns of that one ≤ ``tokens``, and n ≤ ``rows`` where it is
    given. A task over the budget has a batch of its own.
    """
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(repr(sorted(task.row.settings.items())), []).append(task)
    batches = [batch for group in groups.values() for batch in _split(group, rows, tokens)]
    return sorted(batches, key=lambda batch: (-batch.tasks[0].columns, batch.tasks[0].index))


def _split(group: list[Task], rows: int | None, tokens: int) -> Iterator[Batch]:
    group.sort(key=lambda task: (-task.columns, task.index))
    start = 0
    while start < len(group):
        count = max(1, min(tokens // group[start].columns, rows or len(group)))
        yield Batch(tuple(group[start : start + count]), group[start].row.settings)
        start += count


def complete_batch(
    guided: GuidedPolicy, batch: Batch, settings: dict[str, Any], *, trace: bool = False
) -> list[Outcome]:
    """Complete a batch; where a row makes it fail, it is halved until that row stands alone.

    Args:
        guided: policy and scorers.
        batch: of `plan_batches`.
        settings: decoding settings of the run.
        trace: keep every candidate's figures of every step.
    """
    tasks = batch.tasks
    try:
        done = guided.generate(
            [task.row.prompt for task in tasks], seed=[task.seed for task in tasks], trace=trace,
            batch_size=len(tasks), **settings | batch.settings,
        )  # fmt: skip
    except (DataError, NonFiniteError, RuntimeError) as error:
        if (reason := _reason(error)) is None:
            raise
        if len(tasks) == 1:
            return [Failed(tasks[0], reason, " ".join(str(error).split())[:300])]
        half = (len(tasks) + 1) // 2
    else:
        named = [each.model_copy(update={"id": task.row.id}) for task, each in zip(tasks, done, strict=True)]
        return [Done(task, each) for task, each in zip(tasks, named, strict=True)]
    halves = (
        Batch(tasks[:half], batch.settings),
        Batch(tasks[half:], batch.settings),
    )  # outside: the memory is free again
    return [outcome for part in halves for outcome in complete_batch(guided, part, settings, trace=trace)]


def _reason(error: Exception) -> str | None:
    """Why a row has no completion, where that is the row's or the batch's matter; None for any other fault."""
    if isinstance(error, NonFiniteError):
        return "not a finite number"
    if isinstance(error, DataError):
        return "bad prompt"
    short = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)  # of a GPU, of the CPU
    return "out of memory" if short else None


def complete_batches(
    guided: GuidedPolicy, batches: Iterable[Batch], settings: dict[str, Any], *, trace: bool = False
) -> Iterator[list[Outcome]]:
    """Outcomes of each batch, one after another, in this process."""
    for batch in batches:
        yield complete_batch(guided, batch, settings, trace=trace)
