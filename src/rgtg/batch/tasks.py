"""The work of a job in three pure steps: tasks of rows, batches of tasks, outcomes of batches.

Tasks and outcomes can be pickled, so a batch may be completed anywhere that the same models are loaded. Batches depend
on the tasks alone, never on which of them are finished: a batch that was cut short is done again as it was, and gives
the same figures to the last bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rgtg.config import DecodingSettings
from rgtg.data.prompts import BadRow, PromptRow
from rgtg.data.sources import Reason
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import branch_columns
from rgtg.decoding.request import Request, RowSeeds
from rgtg.errors import DataError, NonFiniteError, PromptTooLongError, RgtgError, UsageError
from rgtg.models.loading.tensor_parallel import is_tensor_parallel
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.tokenization.encoding import encode_prompts, render_chat
from rgtg.types.generation import Completion

_CHUNK = 512  # rows that are tokenised at once
_MEMORY = "out of memory"


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
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        for row, source in zip(part, costs.encode(part), strict=True):
            try:
                length, columns = costs.of(row, source)
            except _UnfitError as problem:
                bad.append(BadRow(row.number, row.id, problem.reason, str(problem)))
                continue
            drawn = seeds.next(source.ids) if row.seed is None else row.seed
            tasks.append(Task(len(tasks), row, drawn, length, columns))
    return tasks, bad


class _UnfitError(Exception):
    def __init__(self, reason: str, error: Exception) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {' '.join(str(error).split())[:300]}")


@dataclass
class _Source:
    """A row as the policy reads it, or why it cannot."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    problem: _UnfitError | None = None


class _Costs:
    """What rows come to in tokens; settings are resolved once for all rows that share them."""

    def __init__(self, guided: GuidedPolicy, settings: dict[str, Any]) -> None:
        self.guided, self.settings = guided, settings
        self._resolved: dict[str, Any] = {}
        self._fits: dict[str, int] = {}  # the longest prompt that is known to fit, by settings

    def encode(self, rows: Sequence[PromptRow]) -> list[_Source]:
        """Texts and token ids of rows, texts and chats in one call each."""
        sources = [self._render(row) for row in rows]
        for templated in (False, True):
            kind = [s for s, row in zip(sources, rows, strict=True) if isinstance(row.prompt, list) == templated]
            if mine := [source for source in kind if source.problem is None]:
                texts = [source.text for source in mine]
                ids = encode_prompts(self.guided.policy.tokenizer, texts, templated=templated)
                for source, found in zip(mine, ids, strict=True):
                    source.ids = found
        return sources

    def of(self, row: PromptRow, source: _Source) -> tuple[int, int]:
        """Tokens of the prompt, and those that the row may come to hold."""
        if source.problem is not None:
            raise source.problem
        settings, key = self._resolve(row.settings)
        length = len(source.ids)
        if length > self._fits.get(key, 0) or length == 0 or self._reads_text:
            self._require_room(row, source, settings)
            self._fits[key] = length
        return length, length + settings.max_new_tokens + branch_columns(self.guided.method, settings)

    @property
    def _reads_text(self) -> bool:
        return any(isinstance(scorer, CrossTokenizerScorer) for scorer in self.guided.used)

    def _render(self, row: PromptRow) -> _Source:
        if isinstance(row.prompt, str):
            return _Source(row.prompt)
        try:
            return _Source(render_chat(self.guided.policy.tokenizer, row.prompt, add_generation_prompt=True))
        except UsageError:  # no chat template: no row of this kind can be done
            raise
        except Exception as error:  # a template is a program: it may refuse roles, or fail in any way
            return _Source(problem=_UnfitError(Reason.CHAT_TEMPLATE.value, error))

    def _require_room(self, row: PromptRow, source: _Source, settings: DecodingSettings) -> None:
        try:
            self.guided.require_room(Request(source.text, source.ids, 0, [], source=row.prompt), settings)
        except PromptTooLongError as error:
            raise _UnfitError(Reason.TOO_LONG.value, error) from error
        except DataError as error:
            raise _UnfitError(Reason.EMPTY_PROMPT.value, error) from error

    def _resolve(self, own: dict[str, Any]) -> tuple[DecodingSettings, str]:
        key = repr(sorted(own.items())) if own else ""
        if key not in self._resolved:
            try:
                self._resolved[key] = self.guided.resolve(self.settings | own, complete=True)
            except UsageError as error:
                raise _UnfitError(Reason.BAD_VALUE.value, error) from error
        return self._resolved[key], key


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

    Raises:
        RgtgError: no memory, where processes split the models: one alone cannot halve what all of them decode.
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
        if reason == _MEMORY and is_tensor_parallel(guided.policy.model):
            raise RgtgError(
                "one of the processes that split the models is out of memory, and the others cannot go on without it: "
                "give less to decode at once (--batch-tokens)"
            ) from error
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
    return _MEMORY if short else None


def complete_batches(
    guided: GuidedPolicy, batches: Iterable[Batch], settings: dict[str, Any], *, trace: bool = False
) -> Iterator[list[Outcome]]:
    """Outcomes of each batch, one after another, in this process."""
    for batch in batches:
        yield complete_batch(guided, batch, settings, trace=trace)
