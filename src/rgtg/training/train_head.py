"""``rgtg train --trunk own`` from pairs to a saved head on the frozen policy's own states."""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgtg.config import TrainSettings
from rgtg.errors import StoppedError, UsageError
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import ScorerInfo, cast_fingerprints, fingerprint_weights
from rgtg.models.ops.hidden_states import require_hidden_states
from rgtg.models.scorers.heads import Head, round_to_half
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.training.arguments import CHECKPOINTS, HEAD_DEFAULTS, reward_config
from rgtg.training.callbacks import LOG_FILE, TrainLog
from rgtg.training.checkpoint.fitted import Fitted, FittedRecord, find_fitted, keep_fitted
from rgtg.training.checkpoint.resume import Finished, find_checkpoint, find_start, run_facts
from rgtg.training.checkpoint.save import save_own_state
from rgtg.training.checkpoint.signals import StopRequest
from rgtg.training.data.pair_weights import Trust, trust_of
from rgtg.training.data.read import TrainData, read_data
from rgtg.training.data.state_cache import StateCache, cache_states
from rgtg.training.model_card import model_card
from rgtg.training.new_head import new_head, starting_table, vocabulary_size
from rgtg.training.report import HeadChoice, TrainReport, drop_empty_checkpoints, figures_of, keep_quiet, longest, shown
from rgtg.training.trainers.head import HeadTrainer, RolloutHeadTrainer, StatePairs, StateRollouts
from rgtg.training.trainers.resumable import require_finite_weights, require_not_stopped, require_trained
from rgtg.utils.files import make_folder
from rgtg.version import __version__

WIDTHS = (64, 256)  # of an automatic choice
RANK = 16  # of the token table: more learn the training pairs by heart (docs/training.md)
TABLE_ENTRIES = 2**21  # 4 MB in a checkpoint; a large vocabulary gets a lower rank


@dataclass
class _Job:
    """What every head of a run shares."""

    settings: TrainSettings
    config: Any
    data: TrainData
    info: ScorerInfo  # of the head that will be saved, but for its layer and width
    run: dict[str, Any]  # what decides the result
    request: StopRequest
    train: StateCache
    held_out: StateCache | None
    trust: Trust
    table: Any  # where the token table starts (V, rank); None for a state head
    vocabulary: int  # tokens that the tokenizer has
    show: bool
    resumed_from: str | None = None

    def dataset(self, layer: int, *, held_out: bool = False) -> Any:
        """The states of one layer as the trainer reads them; None where nothing is held out."""
        cache = self.held_out if held_out else self.train
        if cache is None:
            return None
        if self.data.kind == "pairs":
            return StatePairs(cache, layer, None if held_out else self.trust.pairs)
        units = self.data.held_out if held_out else self.data.train
        return StateRollouts(cache, layer, [unit.reward for unit in units])

    def folder(self, layer: int, width: int) -> Path:
        """Of one head's checkpoints."""
        return self.settings.output / CHECKPOINTS / f"layer-{layer}-width-{width}"

    def keep(self, fitted: Fitted) -> None:
        """Write a trained head down, so that a resumed run need not train it again."""
        with self.request.defer():
            keep_fitted(self.folder(fitted.record.choice.layer, fitted.record.choice.width), fitted, self.run)


def train_head(settings: TrainSettings, request: StopRequest, *, show: bool = False) -> TrainReport:
    """Read pairs, compute the policy's states once, train heads on them, and save the best on held-out pairs.

    Args:
        settings: of the run, already checked by `rgtg.training.fit`.
        request: to stop.
        show: progress lines on stderr.

    Raises:
        UsageError, DataError, ModelNotFoundError: unusable input; found before training.
        NonFiniteError: the loss or the gradient is NaN or infinite; names the step.
        OutputError: no room for the states, or the head cannot be written.
        StoppedError: it was asked to stop.
    """
    start = time.perf_counter()
    # 1. policy and pairs
    config = reward_config(settings, settings.max_length, HEAD_DEFAULTS)
    config._n_gpu = min(config.n_gpu, 1)  # a batch of states is not to be scattered over several GPUs
    dtype = (settings.train.get("model_init_kwargs") or {}).get("dtype")
    policy = load_policy(settings.base, dtype=dtype, device=config.device)
    layers, widths = _layers(settings, policy.model), _widths(settings)
    require_hidden_states(policy.model, layers)
    rank = _rank(settings, policy.model) if settings.head == "vocab" else None
    max_length = longest(settings, policy.model)
    make_folder(settings.output)
    data = read_data(settings, config, policy.tokenizer, max_length, show=show)
    if len(layers) * len(widths) > 1 and not data.held_out:
        raise UsageError(
            f"layer and width are chosen by held-out {data.kind}: give --eval-{data.kind}, or say --set layer=N "
            "--set width=N"
        )
    trust = trust_of(settings, data, policy.tokenizer, config.device)
    info = _info(settings, policy, data.fingerprint, max_length, rank, trust)
    run = run_facts(settings, config, info, data)
    if (finished := find_start(settings, run, is_main=True).finished) is not None:
        return finished
    # 2. states, once; the policy is not needed after this
    states, table, tokenizer = _compute_states(settings, policy, data, layers, show), None, policy.tokenizer
    if rank is not None:
        table = starting_table(policy.model, rank, settings.seed)
    del policy
    job = _Job(settings, config, data, info, run, request, *states, trust, table, len(tokenizer), show)
    states_seconds = time.perf_counter() - start
    # 3. one head per layer and width; the best stays
    fitted = _fit_all(job, layers, widths)
    best = min(fitted, key=lambda fit: fit.record.choice.evaluation.get("loss", 0.0))
    # 4. report and files
    kept = best.record.choice
    info = info.model_copy(update={"layer": kept.layer, "width": kept.width})
    report = TrainReport(
        output=str(settings.output), objective=settings.objective, base=settings.base,
        **data.counts(), steps=best.record.steps, seconds=time.perf_counter() - start,
        pairs_per_second=best.record.epochs * len(data.train) / kept.seconds, loss=best.record.loss,
        evaluation=kept.evaluation, data_fingerprint=data.fingerprint, device=str(config.device), processes=1,
        layer=info.layer, width=info.width, rank=info.rank, states_seconds=states_seconds,
        choices=[fit.record.choice for fit in fitted], resumed_from=job.resumed_from,
    )  # fmt: skip
    with request.defer():
        _save(job, best.head, tokenizer, info, report)
    return report


def _layers(settings: TrainSettings, model: Any) -> list[int]:
    """The layer asked for, or the final state and those at 3/4 and 1/2 of the depth."""
    depth = int(model.config.get_text_config().num_hidden_layers)
    if isinstance(settings.layer, int):
        return [settings.layer]
    return list(dict.fromkeys([depth, -(-3 * depth // 4), -(-depth // 2)]))


def _widths(settings: TrainSettings) -> list[int]:
    return [settings.width] if isinstance(settings.width, int) else list(WIDTHS)


def _rank(settings: TrainSettings, model: Any) -> int:
    hidden = int(model.config.get_text_config().hidden_size)
    if settings.rank and settings.rank > hidden:
        raise UsageError(f"rank {settings.rank} exceeds the policy's hidden size, {hidden}: it would add nothing")
    return settings.rank or min(RANK, hidden, max(1, TABLE_ENTRIES // vocabulary_size(model)))


def _compute_states(
    settings: TrainSettings, policy: Policy, data: TrainData, layers: list[int], show: bool
) -> tuple[StateCache, StateCache | None]:
    """States of the completions trained on, and of those held out."""
    kind, model = str(settings.head), policy.model
    train = cache_states(model, data.train, layers, kind, progress=_progress("", show))
    held_out = None
    if data.held_out:
        held_out = cache_states(model, data.held_out, layers, kind, progress=_progress("held-out ", show))
    if show and train.on_disk:
        sys.stderr.write(f"states of {train.bytes / 1e9:.1f} GB are kept in a temporary file\n")
    return train, held_out


def _progress(what: str, show: bool) -> Callable[[int, int], None]:
    """A line on stderr every ten seconds, and at the end."""
    began = last = time.perf_counter()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if show and (done == total or now - last > 10):
            last = now
            sys.stderr.write(f"states of {done}/{total} {what}completions  {now - began:.0f} s\n")

    return tell


def _fit_all(job: _Job, layers: list[int], widths: list[int]) -> list[Fitted]:
    """Every head; what an earlier start has trained is taken up, and what this one has is kept if it must stop."""
    fitted: list[Fitted] = []
    try:
        for layer in layers:
            for width in widths:
                fitted.append(_found(job, layer, width) or _fit(job, layer, width, fitted[-1:]))
    except (StoppedError, KeyboardInterrupt):
        if not job.settings.resume:  # else each was kept when it was done
            for one in fitted:
                job.keep(one)
        raise
    return fitted


def _found(job: _Job, layer: int, width: int) -> Fitted | None:
    """A head that an earlier start has trained."""
    if not job.settings.resume:
        return None
    info = job.info.model_copy(update={"layer": layer, "width": width})
    folder = job.folder(layer, width)
    found = find_fitted(folder, job.run, info, force=job.settings.force)
    if found:
        job.resumed_from = str(folder)
        if job.show:
            sys.stderr.write(f"layer {layer}, width {width}: trained before\n")
    return found


def _fit(job: _Job, layer: int, width: int, before: list[Fitted]) -> Fitted:
    """Train one head from a start that depends on the seed alone, and evaluate what would be saved."""
    head = new_head(job.train.states[layer], width, job.table, job.settings.seed)
    log_start = before[0].record.log_bytes if before else 0
    log = TrainLog(job.settings.output / LOG_FILE, show=job.show, start=log_start)
    trainer = _trainer(job, head, layer, width, log)
    checkpoint = _checkpoint(job, layer, width)
    start = time.perf_counter()
    done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    require_not_stopped(trainer)
    require_trained(trainer)
    require_finite_weights(head)
    round_to_half(head)
    figures = figures_of(trainer.evaluate()) if job.held_out else {}
    choice = HeadChoice(layer=layer, width=width, seconds=seconds, evaluation=figures)
    steps, epochs = trainer.state.global_step, trainer.state.epoch or 0.0
    record = FittedRecord(choice=choice, loss=done.training_loss, steps=steps, epochs=epochs, log_bytes=log.size())
    fitted = Fitted(head, record)
    if job.settings.resume:
        job.keep(fitted)
    return fitted


def _trainer(job: _Job, head: Head, layer: int, width: int, log: TrainLog) -> HeadTrainer:
    kind = HeadTrainer if job.data.kind == "pairs" else RolloutHeadTrainer
    config = copy.copy(job.config)
    config.output_dir = str(job.folder(layer, width))
    trainer = kind(
        head,
        config,
        objective=job.settings.objective,
        options=job.settings.options,
        about={"layer": layer, "width": width},
        vocabulary=job.vocabulary,
        train_dataset=job.dataset(layer),
        eval_dataset=job.dataset(layer, held_out=True),
        callbacks=[log],
    )
    keep_quiet(trainer)
    trainer.run, trainer.request = job.run, job.request
    return trainer


def _checkpoint(job: _Job, layer: int, width: int) -> Path | None:
    """Where the training of one head goes on."""
    found = None
    if job.settings.resume:
        found = find_checkpoint(job.folder(layer, width), job.run, force=job.settings.force)
        job.resumed_from = str(found) if found else job.resumed_from
    if job.show:
        sys.stderr.write(f"layer {layer}, width {width}{f': resuming from {found}' if found else ''}\n")
    return found


def _info(
    settings: TrainSettings, policy: Policy, fingerprint: str, max_length: int | None, rank: int | None, trust: Trust
) -> ScorerInfo:
    base = settings.base
    return ScorerInfo(
        rgtg_version=__version__,
        objective=settings.objective,
        base_model=str(Path(base).resolve()) if Path(base).is_dir() else base,  # found from any folder
        base_fingerprint=fingerprint_weights(policy.model),
        base_casts=cast_fingerprints(policy.model),
        tokenizer_hash=tokenizer_hash(policy.tokenizer),
        data_fingerprint=fingerprint,
        append_eos=policy.tokenizer.eos_token_id is not None,
        max_length=max_length,
        trunk="own",
        head=settings.head or "state",
        rank=rank,
        reference_fingerprint=trust.reference,
    )


def _save(job: _Job, head: Head, tokenizer: Any, info: ScorerInfo, report: TrainReport) -> None:
    settings = job.settings
    resolved = settings.model_dump(mode="json", exclude_none=True) | {"train": shown(job.config)}
    card = model_card(settings.output, info, resolved, report.evaluation, report.counts())
    given = settings.model_dump(mode="json") | {"train": HEAD_DEFAULTS | settings.train}  # --config reads it back
    finished = Finished(report=report, run=job.run)
    save_own_state(settings.output, head, tokenizer, info, card, settings=given, train_report=finished)
    drop_empty_checkpoints(settings.output)
