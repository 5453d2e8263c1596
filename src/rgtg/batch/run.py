"""Complete a file of prompts row by row and lose nothing that is finished: read, plan, complete, write in order."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rgtg.batch.journal import Journal, JournalEntry
from rgtg.batch.output import COUNTS, JobOutput, choose_output_format, journal_entry, row_failure
from rgtg.batch.tasks import (
    CompletedTask,
    FailedTask,
    Task,
    TaskBatch,
    TaskOutcome,
    complete_batches,
    plan_batches,
    prepare_tasks,
)
from rgtg.config import GenerateSettings
from rgtg.data.prompts import BadRow, PromptFile, raise_for_bad_rows
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.request import any_chat
from rgtg.errors import DataError, RgtgError
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.loading.tensor_parallel import broadcast_object, is_tensor_parallel
from rgtg.models.scorers.base import weights_of
from rgtg.tokenization.conversation import template_fingerprint
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.types.base import Provenance
from rgtg.types.batch import JobResult

_MOST_FAILURES = 32  # after so many failures without one success, the rows are not the cause
# Completes batches, in any order, and yields the outcomes of each.
CompleteBatches = Callable[[Sequence[TaskBatch]], Iterator[list[TaskOutcome]]]


@dataclass
class JobProgress:
    """How far a job is. Time is best predicted from ``cost``, the most tokens that the rows can hold."""

    rows: int
    before: int
    done: int = 0
    failed: int = 0
    tokens: int = 0
    cost: int = 0
    total_cost: int = 0


OnProgress = Callable[[JobProgress], None]


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What only a process with the models can say of a job. It can be pickled.

    Attributes:
        tasks: of the rows that can be completed.
        bad: rows that were read but cannot be completed.
        made_with: everything that the lines of the output depend on.
        provenance: of the result.
    """

    tasks: list[Task]
    bad: list[BadRow]
    made_with: dict[str, Any]
    provenance: Provenance


def run_job(
    settings: GenerateSettings,
    decoding: dict[str, Any],
    prompts: PromptFile,
    guided: GuidedPolicy,
    *,
    progress: OnProgress | None = None,
    complete: CompleteBatches | None = None,
) -> JobResult:
    """Complete every row of a file of prompts and write the output, or resume what an earlier run has begun.

    Finished rows are appended to the journal ``OUTPUT.partial`` batch by batch. At the end, the output is written in
    the order of the prompts. However often the job is killed in between, its output is the same, byte for byte, as
    that of a job that was not killed (on one machine, with the same batch settings).

    Args:
        settings: of the run: output, seed, batches, what to do with bad rows.
        decoding: the decoding settings that the user gave.
        prompts: the rows.
        guided: policy and scorers.
        progress: called after every batch.
        complete: completes batches elsewhere. By default they are completed here, and where processes split the
            models, in all of them: the other processes call `follow_job`.

    Raises:
        DataError: bad rows, if ``on_bad`` is error; or no row that can be completed.
        UsageError: settings that cannot be used, or an output made with others, without ``force``.
        OutputError: a file that cannot be written; finished rows are kept.
        RgtgError: every row fails.
    """
    here = partial(complete_batches, guided, settings=decoding, trace=settings.trace)
    plan = plan_job(settings, decoding, prompts, guided)
    if complete is None and is_tensor_parallel(guided.policy.model):
        with _on_all_ranks(here) as everywhere:
            return run_plan(settings, prompts, plan, everywhere, progress=progress)
    return run_plan(settings, prompts, plan, complete or here, progress=progress)


def follow_job(
    settings: GenerateSettings, decoding: dict[str, Any], prompts: PromptFile, guided: GuidedPolicy
) -> None:  # fmt: skip
    """What rank 1 and up do while rank 0 runs `run_job` with split models: decode the same batches, write nothing.

    Raises:
        UsageError: settings that cannot be used.
    """
    plan_job(settings, decoding, prompts, guided)  # all ranks together compute the fingerprints of split models
    for _ in complete_batches(guided, broadcast_object(None), decoding, trace=settings.trace):
        pass


@contextmanager
def _on_all_ranks(here: CompleteBatches) -> Iterator[CompleteBatches]:
    """On rank 0: yield a function that completes batches on all ranks; the others wait for them in `follow_job`.

    The batches are broadcast once; an empty list if the block ends, or raises an error, before there are any. After an
    interrupt nothing is broadcast: the other ranks were interrupted too.
    """
    sent = False

    def complete(batches: Sequence[TaskBatch]) -> Iterator[list[TaskOutcome]]:
        nonlocal sent
        sent = True
        broadcast_object(list(batches))
        yield from here(batches)

    try:
        yield complete
    except Exception:
        if not sent:
            broadcast_object([])
        raise
    if not sent:
        broadcast_object([])


def plan_job(
    settings: GenerateSettings, decoding: dict[str, Any], prompts: PromptFile, guided: GuidedPolicy
) -> JobPlan:  # fmt: skip
    """The part of `run_job` that needs the models. `run_plan` is the rest, and may run in another process.

    Raises:
        UsageError: settings that cannot be used.
    """
    tasks, bad = prepare_tasks(guided, prompts.rows, decoding, settings.seed)
    output_format = choose_output_format(settings.output_format, prompts.rows)
    complete = guided.resolve(decoding, complete=True)
    # jobs that versions without this setting began have no entry for it
    unset = {"seed"} if complete.logit_bias else {"seed", "logit_bias"}
    made_with = complete.model_dump(mode="json", exclude=unset) | {
        "seed": settings.seed,
        "trace": settings.trace,
        "format": output_format,
        **model_fingerprints(guided),
        "prompts": prompts.fingerprint,
        **({"model": _model_name(settings)} if output_format == "openai" else {}),
    }
    if any_chat(row.prompt for row in prompts.rows):
        readers = [guided.policy, *guided.used]
        made_with["chat_templates"] = [template_fingerprint(getattr(one, "tokenizer", None)) for one in readers]
    models = {"policy": guided.policy.model}
    for i, scorer in enumerate(guided.scorers):
        models[f"scorer {i + 1}" if len(guided.scorers) > 1 else "scorer"] = weights_of(scorer)
    origin = provenance(
        command="rgtg generate", settings=settings.model_dump(mode="json", exclude={"force"}), seed=settings.seed,
        models=models, data={"prompts": prompts.fingerprint},
    )  # fmt: skip
    return JobPlan(tasks, bad, made_with, origin)


def model_fingerprints(guided: GuidedPolicy) -> dict[str, Any]:
    """Fingerprints of the models, which are a part of ``made_with``."""
    draft = guided.draft
    return {
        "draft": fingerprint_weights(draft.model) if isinstance(draft, Policy) else draft,
        "policy": fingerprint_weights(guided.policy.model),
        "tokenizer": tokenizer_hash(guided.policy.tokenizer),
        "scorers": [fingerprint_weights(weights_of(scorer)) for scorer in guided.scorers],
    }


def run_plan(
    settings: GenerateSettings,
    prompts: PromptFile,
    plan: JobPlan,
    complete: CompleteBatches,
    *,
    progress: OnProgress | None = None,
) -> JobResult:
    """The rest of `run_job`, which needs models only in ``complete``. Arguments and errors are those of `run_job`."""
    assert settings.output is not None, "checked before anything is loaded"
    # 1. Check the rows.
    tasks, bad = plan.tasks, sorted([*prompts.bad, *plan.bad], key=lambda row: row.number)
    if settings.on_bad == "error":
        raise_for_bad_rows(prompts.source, bad, prompts.total)
    if not tasks:
        raise DataError(f"{prompts.source}: no row can be completed; the first error is: {bad[0].error}")
    model = _model_name(settings)
    if prompts.models and prompts.models[0] not in ("", model):
        warnings.warn(f"the prompts ask for the model {prompts.models[0]!r}; {model} answers them", stacklevel=2)
    # 2. Is the job finished already?
    output, output_format = JobOutput(settings.output), choose_output_format(settings.output_format, prompts.rows)
    finished = output.find_finished(plan.made_with, force=settings.force)
    if finished is not None and not finished.undecoded:
        return finished
    made_with, force = plan.made_with, settings.force
    with Journal.open(output.journal, made_with, rows=len(tasks), counts=len(COUNTS), force=force) as journal:
        if finished is not None:  # only the rows that failed are tried again
            output.copy_to_journal(journal, {task.row.id: task.index for task in tasks})
        # 3. Complete the rows that the journal does not hold.
        batches = plan_batches(tasks, rows=settings.batch_size, tokens=settings.batch_tokens)
        entry = partial(journal_entry, output_format=output_format, model=model)
        failed = _complete(journal, batches, complete, entry, prompts.total, progress)
        # 4. Write the output in the order of the prompts.
        failures = [*map(row_failure, bad), *map(row_failure, failed)]
        failures.sort(key=lambda failure: failure.line)
        result = JobResult(
            rows=prompts.total, completions=journal.finished, failed=len(failures), undecoded=len(failed),
            counts=dict(zip(COUNTS, journal.counts, strict=True)), made_with=made_with, provenance=plan.provenance,
        )  # fmt: skip
        return output.write(journal, failures, result, output_format)


def _model_name(settings: GenerateSettings) -> str:
    return Path(settings.policy or "").name


def _complete(
    journal: Journal, batches: list[TaskBatch], complete: CompleteBatches,
    entry: Callable[[CompletedTask], JournalEntry], rows: int, on_progress: OnProgress | None,
) -> list[FailedTask]:  # fmt: skip
    """Complete what the journal does not hold, and append it. Return what failed."""
    pending = [batch for batch in batches if any(task.index not in journal for task in batch.tasks)]
    total_cost = sum(task.max_tokens for batch in pending for task in batch.tasks)
    progress = JobProgress(rows, before=journal.finished, done=journal.finished, total_cost=total_cost)
    report = on_progress or (lambda progress: None)
    report(progress)
    failed: list[FailedTask] = []
    for outcomes in complete(pending):
        # An interrupted batch is repeated as a whole; its rows that are finished already are dropped.
        new = [outcome for outcome in outcomes if outcome.task.index not in journal]
        done = [outcome for outcome in new if isinstance(outcome, CompletedTask)]
        new_failed = [outcome for outcome in new if isinstance(outcome, FailedTask)]
        journal.append(map(entry, done), (row_failure(outcome).model_dump_json() for outcome in new_failed))
        failed += new_failed
        if len(failed) >= _MOST_FAILURES and not journal.finished:
            raise RgtgError(f"the first {len(failed)} rows all failed; the last error is: {failed[-1].error}")
        progress.done, progress.failed = journal.finished, len(failed)
        progress.tokens += sum(len(outcome.completion.token_ids) for outcome in done)
        progress.cost += sum(outcome.task.max_tokens for outcome in outcomes)
        report(progress)
    return failed
