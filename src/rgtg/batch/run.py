"""Complete a file of prompts, row by row, so that nothing finished is lost: read, plan, complete, put in order."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rgtg.batch.distributed import follow, leading
from rgtg.batch.journal import Entry, JobLog
from rgtg.batch.lines import COUNTED, entry_of, failure_of, shape_of
from rgtg.batch.output import Place, sums
from rgtg.batch.tasks import Batch, Done, Failed, Outcome, Task, complete_batches, plan_batches, prepare
from rgtg.config import GenerateSettings
from rgtg.data.prompts import BadRow, PromptFile, refuse_rows
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.errors import DataError, RgtgError
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.loading.tensor_parallel import is_tensor_parallel
from rgtg.models.scorers.base import weights_of
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.types.base import Provenance
from rgtg.types.batch import JobResult

_HOPELESS = 32  # rows that fail without one success, after which the fault is not theirs
Complete = Callable[[Sequence[Batch]], Iterator[list[Outcome]]]


@dataclass
class JobState:
    """How far a job is; ``cost`` is in tokens that rows may come to hold, by which time is best foretold."""

    rows: int
    before: int
    done: int = 0
    failed: int = 0
    tokens: int = 0
    cost: int = 0
    total_cost: int = 0


Progress = Callable[[JobState], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What only the loaded models can say of a job; it can be pickled.

    Attributes:
        tasks: of the rows that can be completed.
        unfit: the others that were read.
        made_with: all that the lines of the output depend on.
        provenance: of the result.
    """

    tasks: list[Task]
    unfit: list[BadRow]
    made_with: dict[str, Any]
    provenance: Provenance


def run_job(
    settings: GenerateSettings,
    decoding: dict[str, Any],
    prompts: PromptFile,
    guided: GuidedPolicy,
    *,
    progress: Progress | None = None,
    complete: Complete | None = None,
) -> JobResult:
    """Complete every row of a file of prompts and write the output, or go on with what an earlier run has done.

    Finished rows are appended to ``OUTPUT.partial`` batch by batch, in the order in which they are finished. At the end
    the output is written in the order of the prompts. However often a run is killed in between, the output is the same,
    byte for byte, as that of a run that was not (on one machine, with the same batch settings).

    Args:
        settings: of the run: output, seed, batches, what to do with bad rows.
        decoding: the decoding settings that were given.
        prompts: the rows.
        guided: policy and scorers.
        progress: told after every batch.
        complete: makes outcomes of batches, in any order; None does it here, where models are split together with the
            other processes, which call `follow_job`.

    Raises:
        DataError: bad rows, where ``on_bad`` is error; or none that can be completed.
        UsageError: settings that cannot be used, or an output made with others, without ``force``.
        OutputError: a file that cannot be written; finished rows are kept.
        RgtgError: every row fails.
    """
    here = partial(complete_batches, guided, settings=decoding, trace=settings.trace)
    plan = plan_job(settings, decoding, prompts, guided)
    if complete is None and is_tensor_parallel(guided.policy.model):
        with leading(here) as together:
            return run_plan(settings, prompts, plan, together, progress=progress)
    return run_plan(settings, prompts, plan, complete or here, progress=progress)


def follow_job(
    settings: GenerateSettings, decoding: dict[str, Any], prompts: PromptFile, guided: GuidedPolicy
) -> None:  # fmt: skip
    """What every process but the first does of `run_job`, where models are split among them: it writes nothing.

    Raises:
        UsageError: settings that cannot be used.
    """
    plan_job(settings, decoding, prompts, guided)  # fingerprints of split models are made by all processes
    follow(partial(complete_batches, guided, settings=decoding, trace=settings.trace))


def plan_job(
    settings: GenerateSettings, decoding: dict[str, Any], prompts: PromptFile, guided: GuidedPolicy
) -> Plan:  # fmt: skip
    """The part of `run_job` that needs the models; the rest is `run_plan`, in whatever process.

    Raises:
        UsageError: settings that cannot be used.
    """
    tasks, unfit = prepare(guided, prompts.rows, decoding, settings.seed)
    return Plan(
        tasks, unfit, made_with(settings, decoding, prompts, guided), _provenance(settings, prompts, guided)
    )  # fmt: skip


def run_plan(
    settings: GenerateSettings,
    prompts: PromptFile,
    plan: Plan,
    complete: Complete,
    *,
    progress: Progress | None = None,
) -> JobResult:
    """The part of `run_job` that needs no models, but for ``complete``; arguments and errors are those of `run_job`."""
    assert settings.output is not None, "checked before anything is loaded"
    tasks, bad = plan.tasks, _bad_rows(prompts, plan.unfit, settings.on_bad)
    if not tasks:
        raise DataError(f"{prompts.source}: no row can be completed, the first one since {bad[0].error}")
    place, shape = Place(settings.output), shape_of(settings.output_format, prompts.rows)
    name = _model_name(settings)
    _say_who_answers(prompts, name)
    kept = place.finished(plan.made_with, force=settings.force)
    if kept is not None and not kept.undecoded:
        return kept
    with JobLog.open(place.log, plan.made_with, rows=len(tasks), sums=len(COUNTED), force=settings.force) as log:
        if kept is not None:
            place.reopen(log, {task.row.id: task.index for task in tasks})
        batches = plan_batches(tasks, rows=settings.batch_size, tokens=settings.batch_tokens)
        failed = _complete(log, batches, complete, partial(entry_of, shape=shape, model=name), prompts.total, progress)
        without: list[BadRow | Failed] = [*bad, *failed]
        failures = sorted(map(failure_of, without), key=lambda failure: failure.line)
        result = JobResult(
            rows=prompts.total, completions=log.finished, failed=len(failures), undecoded=len(failed),
            counts=sums(log.counts), made_with=plan.made_with, provenance=plan.provenance,
        )  # fmt: skip
        return place.write(log, failures, result, shape)


def made_with(
    settings: GenerateSettings, decoding: dict[str, Any], prompts: PromptFile, guided: GuidedPolicy
) -> dict[str, Any]:
    """All that the lines of an output depend on."""
    shape = shape_of(settings.output_format, prompts.rows)
    return guided.resolve(decoding, complete=True).model_dump(mode="json", exclude={"seed"}) | {
        "seed": settings.seed,
        "trace": settings.trace,
        "format": shape,
        **models_of(guided),
        "prompts": prompts.fingerprint,
        **({"model": _model_name(settings)} if shape == "openai" else {}),
    }


def models_of(guided: GuidedPolicy) -> dict[str, Any]:
    """Fingerprints of the models, among all that a job is made with."""
    draft = guided.draft
    return {
        "draft": fingerprint_weights(draft.model) if isinstance(draft, Policy) else draft,
        "policy": fingerprint_weights(guided.policy.model),
        "tokenizer": tokenizer_hash(guided.policy.tokenizer),
        "scorers": [fingerprint_weights(weights_of(scorer)) for scorer in guided.scorers],
    }


def _bad_rows(prompts: PromptFile, unfit: list[BadRow], on_bad: str) -> list[BadRow]:
    """Rows that cannot be completed, in their order; refused unless they may be left out."""
    bad = sorted([*prompts.bad, *unfit], key=lambda row: row.number)
    if on_bad == "error":
        refuse_rows(prompts.source, bad, prompts.total)
    return bad


def _model_name(settings: GenerateSettings) -> str:
    return Path(settings.policy or "").name


def _say_who_answers(prompts: PromptFile, name: str) -> None:
    if prompts.models and prompts.models[0] not in ("", name):
        warnings.warn(f"the prompts ask for the model {prompts.models[0]!r}; {name} answers them", stacklevel=3)


def _complete(
    log: JobLog, batches: list[Batch], complete: Complete, entry: Callable[[Done], Entry], rows: int,
    progress: Progress | None,
) -> list[Failed]:  # fmt: skip
    """Complete what the log does not hold, and put it there; what failed."""
    pending = [batch for batch in batches if any(task.index not in log for task in batch.tasks)]
    state = JobState(rows, before=log.finished, done=log.finished, total_cost=sum(map(_cost, pending)))
    tell = progress or (lambda state: None)
    tell(state)
    failed: list[Failed] = []
    for outcomes in complete(pending):
        new = [outcome for outcome in outcomes if outcome.task.index not in log]
        done = [outcome for outcome in new if isinstance(outcome, Done)]
        wrong = [outcome for outcome in new if isinstance(outcome, Failed)]
        log.append(map(entry, done), (failure_of(outcome).model_dump_json() for outcome in wrong))
        failed += wrong
        if len(failed) >= _HOPELESS and not log.finished:
            raise RgtgError(f"the first {len(failed)} rows all failed, the last one since {failed[-1].error}")
        state.done, state.failed = log.finished, len(failed)
        state.tokens += sum(len(outcome.completion.token_ids) for outcome in done)
        state.cost += sum(outcome.task.columns for outcome in outcomes)
        tell(state)
    return failed


def _cost(batch: Batch) -> int:
    return sum(task.columns for task in batch.tasks)


def _provenance(settings: GenerateSettings, prompts: PromptFile, guided: GuidedPolicy) -> Provenance:
    models = {"policy": guided.policy.model}
    for i, scorer in enumerate(guided.scorers):
        models[f"scorer {i + 1}" if len(guided.scorers) > 1 else "scorer"] = weights_of(scorer)
    return provenance(
        command="rgtg generate", settings=settings.model_dump(mode="json", exclude={"force"}), seed=settings.seed,
        models=models, data={"prompts": prompts.fingerprint},
    )  # fmt: skip
