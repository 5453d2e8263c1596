"""A job's work in three pure steps: rows become tasks, tasks become batches, batches become outcomes.

Tasks and outcomes can be pickled, so any process that has loaded the same models can complete a batch. Batches depend
only on the tasks, not on which tasks are finished: a batch that was interrupted is repeated unchanged, and gives the
same numbers to the last bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rgtg.config import DecodingSettings, GenerateSettings
from rgtg.data.prompts import BadRow, PromptRow
from rgtg.data.sources import RejectReason, RowError
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import branch_columns
from rgtg.decoding.request import Request, RowSeeds, require_chats
from rgtg.errors import (
    DataError,
    NonFiniteError,
    PromptTooLongError,
    RgtgError,
    UnknownTokenError,
    UsageError,
    one_line,
)
from rgtg.models.loading.tensor_parallel import is_tensor_parallel
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.tokenization.conversation import check_template_kwargs, render_chat
from rgtg.tokenization.encoding import encode_prompts
from rgtg.types.generation import Completion

_CHUNK = 512  # rows that are tokenized at once
_MEMORY = "out of memory"
# Settings that GuidedPolicy.from_pretrained takes, and the seed, which each row has of its own.
_NOT_PER_CALL = {"method", "beta", "top_k", "n", "seed"}


def load_guided_policy(settings: GenerateSettings) -> GuidedPolicy:
    """Load the policy and scorers of the settings; ``settings.policy`` must be given.

    Raises:
        ModelNotFoundError: a folder or hub id that cannot be loaded.
        UsageError: models and settings that do not go together.
    """
    assert settings.policy is not None, "checked before anything is loaded"
    given = settings.model_fields_set
    return GuidedPolicy.from_pretrained(
        settings.policy,
        settings.scorer,
        method=settings.method,
        beta=settings.beta if "beta" in given else None,
        n=settings.n if "n" in given else None,
        top_k=settings.top_k if "top_k" in given else "default",
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        tp_plan=settings.tp_plan,
        scorer_device=settings.scorer_device,
        scorer_device_map=settings.scorer_device_map,
        scorer_tp_plan=settings.scorer_tp_plan,
        draft=settings.draft,
        cache_gguf=settings.cache_gguf,
        engine=settings.engine,
        threads=settings.threads,
    )


def given_decoding_settings(settings: GenerateSettings) -> dict[str, Any]:
    """The decoding settings that the user gave, as keyword arguments of ``GuidedPolicy.generate``."""
    names = DecodingSettings.model_fields.keys() & settings.model_fields_set - _NOT_PER_CALL
    return {name: getattr(settings, name) for name in DecodingSettings.model_fields if name in names}


@dataclass(frozen=True, slots=True)
class Task:
    """A row that is ready to be completed.

    Attributes:
        index: its position among all tasks.
        row: id, prompt and the row's own settings.
        seed: of its generator.
        prompt_tokens: length of the prompt.
        max_tokens: most tokens that the row can hold in the cache at once, prompt included.
    """

    index: int
    row: PromptRow
    seed: int
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """Tasks with the same settings, decoded together."""

    tasks: tuple[Task, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompletedTask:
    """A task and its completion."""

    task: Task
    completion: Completion


@dataclass(frozen=True, slots=True)
class FailedTask:
    """A task that has no completion, and why."""

    task: Task
    reason: str
    error: str


TaskOutcome = CompletedTask | FailedTask


def prepare_tasks(
    guided: GuidedPolicy, rows: Sequence[PromptRow], settings: dict[str, Any], seed: int
) -> tuple[list[Task], list[BadRow]]:
    """Tokenize rows. Return a task for each row that fits the models, and the rows that do not.

    Args:
        guided: policy and scorers.
        rows: of a file of prompts.
        settings: decoding settings of the run; a row's own settings override them.
        seed: of the run; rows get the seeds that ``GuidedPolicy.generate`` would give them.

    Raises:
        UsageError: settings of the run that cannot be used, or chats without a chat template.
    """
    guided.resolve(settings, complete=True)
    if settings.get("chat_template_kwargs"):
        require_chats(row.prompt for row in rows)
    tasks: list[Task] = []
    bad: list[BadRow] = []
    seeds, checker = RowSeeds(seed), _PromptChecker(guided, settings)
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        for row, prompt in zip(part, checker.encode(part), strict=True):
            try:
                prompt_tokens, max_tokens = checker.count_tokens(row, prompt)
            except RowError as problem:
                bad.append(BadRow(row.number, row.id, problem.reason, str(problem)))
                continue
            own_seed = seeds.next(prompt.ids) if row.seed is None else row.seed
            tasks.append(Task(len(tasks), row, own_seed, prompt_tokens, max_tokens))
    return tasks, bad


@dataclass
class _EncodedPrompt:
    """A prompt as the policy reads it, or why it cannot be read."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    problem: RowError | None = None


class _PromptChecker:
    """Tokenizes prompts and checks that they fit. Settings are resolved once for all rows that share them."""

    def __init__(self, guided: GuidedPolicy, settings: dict[str, Any]) -> None:
        self.guided, self.settings = guided, settings
        self._resolved: dict[str, Any] = {}
        self._fits: dict[str, int] = {}  # by settings: the longest prompt that is known to fit
        self._reads_text = any(isinstance(scorer, CrossTokenizerScorer) for scorer in guided.used)

    def encode(self, rows: Sequence[PromptRow]) -> list[_EncodedPrompt]:
        """Tokenize rows: all texts in one call, all chats in another."""
        prompts = [self._render(row) for row in rows]
        for templated in (False, True):
            usable = [
                prompt
                for prompt, row in zip(prompts, rows, strict=True)
                if isinstance(row.prompt, list) == templated and prompt.problem is None
            ]
            if usable:
                texts = [prompt.text for prompt in usable]
                ids = encode_prompts(self.guided.policy.tokenizer, texts, templated=templated)
                for prompt, found in zip(usable, ids, strict=True):
                    prompt.ids = found
        return prompts

    def count_tokens(self, row: PromptRow, prompt: _EncodedPrompt) -> tuple[int, int]:
        """Tokens of the prompt, and the most that the row can hold at once.

        Raises:
            RowError: the prompt cannot be read or does not fit, or the row's settings cannot be used.
        """
        if prompt.problem is not None:
            raise prompt.problem
        settings, key = self._resolve(row.settings)
        length = len(prompt.ids)
        try:
            self.guided.require_embeddings(prompt.ids)
        except DataError as error:
            raise RowError(RejectReason.UNKNOWN_TOKEN, one_line(error)) from error
        if length > self._fits.get(key, 0) or length == 0 or self._reads_text:
            try:
                request = Request(prompt.text, prompt.ids, 0, [], source=row.prompt)
                self.guided.require_room(request, settings)
            except PromptTooLongError as error:
                raise RowError(RejectReason.TOO_LONG, one_line(error)) from error
            except UnknownTokenError as error:
                raise RowError(RejectReason.UNKNOWN_TOKEN, one_line(error)) from error
            except DataError as error:
                raise RowError(RejectReason.EMPTY_PROMPT, one_line(error)) from error
            self._fits[key] = length
        return length, length + settings.max_new_tokens + branch_columns(self.guided.method, settings)

    def _render(self, row: PromptRow) -> _EncodedPrompt:
        if isinstance(row.prompt, str):
            return _EncodedPrompt(row.prompt)
        try:
            kwargs = (self.settings | row.settings).get("chat_template_kwargs")
            check_template_kwargs(self.guided.policy.tokenizer, kwargs)
            text = render_chat(
                self.guided.policy.tokenizer, row.prompt, add_generation_prompt=True, template_kwargs=kwargs
            )
            return _EncodedPrompt(text)
        except UsageError as error:
            if row.settings.get("chat_template_kwargs"):
                return _EncodedPrompt(problem=RowError(RejectReason.BAD_VALUE, one_line(error)))
            raise  # no chat template: no chat can be completed
        except DataError as error:
            return _EncodedPrompt(problem=RowError(RejectReason.CHAT_TEMPLATE, one_line(error)))

    def _resolve(self, own: dict[str, Any]) -> tuple[DecodingSettings, str]:
        key = repr(sorted(own.items())) if own else ""
        if key not in self._resolved:
            try:
                self._resolved[key] = self.guided.resolve(self.settings | own, complete=True)
            except UsageError as error:
                raise RowError(RejectReason.BAD_VALUE, one_line(error)) from error
        return self._resolved[key], key


def plan_batches(tasks: Iterable[Task], *, rows: int | None, tokens: int) -> list[TaskBatch]:
    """Group tasks of similar length and equal settings, the largest first, so that a lack of memory shows at once.

    A batch of n tasks is padded to its longest: n · max_tokens of that one ≤ ``tokens``, and n ≤ ``rows`` if given. A
    task that exceeds the budget gets a batch of its own.
    """
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(repr(sorted(task.row.settings.items())), []).append(task)
    batches = [batch for group in groups.values() for batch in _split(group, rows, tokens)]
    return sorted(batches, key=lambda batch: (-batch.tasks[0].max_tokens, batch.tasks[0].index))


def _split(group: list[Task], rows: int | None, tokens: int) -> Iterator[TaskBatch]:
    group.sort(key=lambda task: (-task.max_tokens, task.index))
    start = 0
    while start < len(group):
        count = max(1, min(tokens // group[start].max_tokens, rows or len(group)))
        yield TaskBatch(tuple(group[start : start + count]), group[start].row.settings)
        start += count


def complete_batch(
    guided: GuidedPolicy, batch: TaskBatch, settings: dict[str, Any], *, trace: bool = False
) -> list[TaskOutcome]:
    """Complete a batch. A row that fails has no completion; the others are completed.

    A batch that is too large for the memory is halved.

    Args:
        guided: policy and scorers.
        batch: of `plan_batches`.
        settings: decoding settings of the run.
        trace: keep the scores and probabilities of every candidate at every step.

    Raises:
        RgtgError: out of memory while processes share the models: one process cannot halve what all of them decode.
    """
    merged = settings | batch.settings
    # 1. a request for each row
    outcomes: dict[int, TaskOutcome] = {}
    requests: dict[int, Request] = {}
    for task in batch.tasks:
        try:
            (requests[task.index],) = guided.prepare([task.row.prompt], seed=[task.seed], trace=trace, **merged)
        except DataError as error:
            outcomes[task.index] = _failed(task, error)
    # 2. completed together
    guided.complete(list(requests.values()))
    # 3. the outcome of each row
    too_much = []
    for task in batch.tasks:
        if (request := requests.pop(task.index, None)) is None:
            continue
        if request.error is None:
            completion = request.to_completion().model_copy(update={"id": task.row.id})
            outcomes[task.index] = CompletedTask(task, completion)
        elif _is_out_of_memory(request.error) and len(batch.tasks) > 1:
            too_much.append(task)
        else:
            outcomes[task.index] = _failed(task, request.error)
        if request.error is not None and _is_out_of_memory(request.error) and is_tensor_parallel(guided.policy.model):
            raise RgtgError(
                "one of the processes that split the models is out of memory, and the others cannot go on without it: "
                "decode less at once (--batch-tokens)"
            ) from request.error
    del request
    # 4. repeat what was too large in halves; the tensors of the failed attempt are free by now
    half = (len(too_much) + 1) // 2
    for part in (too_much[:half], too_much[half:]):
        if part:
            for outcome in complete_batch(guided, TaskBatch(tuple(part), batch.settings), settings, trace=trace):
                outcomes[outcome.task.index] = outcome
    return [outcomes[task.index] for task in batch.tasks]


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU or the CPU is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def _failed(task: Task, error: Exception) -> FailedTask:
    """A row without a completion, and why."""
    if isinstance(error, NonFiniteError):
        reason = "not a finite number"
    elif isinstance(error, DataError):
        reason = "bad prompt"
    else:
        reason = _MEMORY if _is_out_of_memory(error) else "error"
    kind = f"{type(error).__name__}: " if reason == "error" and not isinstance(error, RgtgError) else ""
    return FailedTask(task, reason, kind + one_line(error))


def complete_batches(
    guided: GuidedPolicy, batches: Iterable[TaskBatch], settings: dict[str, Any], *, trace: bool = False
) -> Iterator[list[TaskOutcome]]:
    """Complete batches one after another in this process."""
    for batch in batches:
        yield complete_batch(guided, batch, settings, trace=trace)
