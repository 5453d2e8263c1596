"""``rgtg train --trunk own`` from pairs to a saved head on the frozen policy's own states."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rgtg
from rgtg.config import TrainSettings
from rgtg.errors import UsageError
from rgtg.models.checkpoint import ScorerInfo, cast_fingerprints, fingerprint_weights
from rgtg.models.encoding import tokenizer_hash
from rgtg.models.heads import Head, round_to_half
from rgtg.models.own_state import require_observable
from rgtg.models.policy import Policy, load_policy
from rgtg.outputs import make_folder
from rgtg.training.arguments import HEAD_DEFAULTS, reward_config
from rgtg.training.callbacks import LOG_FILE, TrainLog
from rgtg.training.card import model_card
from rgtg.training.common import (
    HeadChoice,
    TrainData,
    TrainReport,
    drop_empty_checkpoints,
    figures_of,
    keep_quiet,
    longest,
    read_data,
    shown,
)
from rgtg.training.heads import HeadTrainer, RolloutHeadTrainer, StatePairs, StateRollouts
from rgtg.training.new_head import new_head, starting_table, vocabulary_size
from rgtg.training.save import save_own_state
from rgtg.training.state_cache import StateCache, cache_states
from rgtg.training.trust import Trust, trust_of

WIDTHS = (64, 256)  # of an automatic choice
RANK = 16  # of the token table: more learn the training pairs by heart (docs/training.md)
TABLE_ENTRIES = 2**21  # 4 MB in a checkpoint; a large vocabulary gets a lower rank


@dataclass
class _Job:
    """What every head of a run shares."""

    settings: TrainSettings
    config: Any
    data: TrainData
    train: StateCache
    held_out: StateCache | None
    trust: Trust
    table: Any  # where the token table starts (V, rank); None for a state head
    vocabulary: int  # tokens that the tokenizer has
    show: bool

    def dataset(self, layer: int, *, held_out: bool = False) -> Any:
        """The states of one layer as the trainer reads them; None where nothing is held out."""
        cache = self.held_out if held_out else self.train
        if cache is None:
            return None
        if self.data.kind == "pairs":
            return StatePairs(cache, layer, None if held_out else self.trust.pairs)
        units = self.data.held_out if held_out else self.data.train
        return StateRollouts(cache, layer, [unit.reward for unit in units])


@dataclass
class _Fitted:
    choice: HeadChoice
    head: Head
    loss: float
    steps: int
    epochs: float


def train_head(settings: TrainSettings, *, show: bool = False) -> TrainReport:
    """Read pairs, compute the policy's states once, train heads on them, and save the best on held-out pairs.

    Args:
        settings: of the run, already checked by `rgtg.training.fit`.
        show: progress lines on stderr.

    Raises:
        UsageError, DataError, ModelNotFoundError: unusable input; found before training.
        NonFiniteError: the loss is NaN or infinite; names the step.
        OutputError: no room for the states, or the head cannot be written.
    """
    start = time.perf_counter()
    # 1. policy and pairs
    config = reward_config(settings, settings.max_length, HEAD_DEFAULTS)
    config._n_gpu = min(config.n_gpu, 1)  # a batch of states is not to be scattered over several GPUs
    dtype = (settings.train.get("model_init_kwargs") or {}).get("dtype")
    policy = load_policy(settings.base, dtype=dtype, device=config.device)
    layers, widths = _layers(settings, policy.model), _widths(settings)
    require_observable(policy.model, layers)
    rank = _rank(settings, policy.model) if settings.head == "vocab" else None
    max_length = longest(settings, policy.model)
    make_folder(settings.output)
    data = read_data(settings, config, policy.tokenizer, max_length)
    if len(layers) * len(widths) > 1 and not data.held_out:
        raise UsageError(
            f"layer and width are chosen by held-out {data.kind}: give --eval-{data.kind}, or say --set layer=N "
            "--set width=N"
        )
    # 2. states, once; the policy is not needed after this
    job = _compute_states(settings, config, policy, data, layers, rank, show)
    info, tokenizer = _info(job, policy, data.fingerprint, max_length), policy.tokenizer
    del policy
    states_seconds = time.perf_counter() - start
    # 3. one head per layer and width; the best stays
    fitted = [_fit(job, layer, width) for layer in layers for width in widths]
    best = min(fitted, key=lambda fit: fit.choice.evaluation.get("loss", 0.0))
    # 4. report and files
    info = info.model_copy(update={"layer": best.choice.layer, "width": best.choice.width})
    report = TrainReport(
        output=str(settings.output), objective=settings.objective, base=settings.base,
        **data.counts(), steps=best.steps, seconds=time.perf_counter() - start,
        pairs_per_second=best.epochs * len(data.train) / best.choice.seconds, loss=best.loss,
        evaluation=best.choice.evaluation, data_fingerprint=data.fingerprint, device=str(config.device), processes=1,
        layer=info.layer, width=info.width, rank=info.rank, states_seconds=states_seconds,
        choices=[fit.choice for fit in fitted],
    )  # fmt: skip
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
    settings: TrainSettings, config: Any, policy: Policy, data: TrainData, layers: list[int], rank: int | None,
    show: bool,
) -> _Job:  # fmt: skip
    kind, model = str(settings.head), policy.model
    train = cache_states(model, data.train, layers, kind, progress=_progress("", show))
    held_out = None
    if data.held_out:
        held_out = cache_states(model, data.held_out, layers, kind, progress=_progress("held-out ", show))
    if show and train.on_disk:
        sys.stderr.write(f"states of {train.bytes / 1e9:.1f} GB are kept in a temporary file\n")
    table = starting_table(model, rank, settings.seed) if rank is not None else None
    trust = trust_of(settings, data, policy.tokenizer, config.device)
    return _Job(settings, config, data, train, held_out, trust, table, len(policy.tokenizer), show)


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


def _fit(job: _Job, layer: int, width: int) -> _Fitted:
    """Train one head from a start that depends on the seed alone, and evaluate what would be saved."""
    head = new_head(job.train.states[layer], width, job.table, job.settings.seed)
    kind = HeadTrainer if job.data.kind == "pairs" else RolloutHeadTrainer
    trainer = kind(
        head,
        job.config,
        objective=job.settings.objective,
        options=job.settings.options,
        about={"layer": layer, "width": width},
        vocabulary=job.vocabulary,
        train_dataset=job.dataset(layer),
        eval_dataset=job.dataset(layer, held_out=True),
        callbacks=[TrainLog(job.settings.output / LOG_FILE, show=job.show)],
    )
    keep_quiet(trainer)
    if job.show:
        sys.stderr.write(f"layer {layer}, width {width}\n")
    start = time.perf_counter()
    done = trainer.train()
    seconds = time.perf_counter() - start
    round_to_half(head)
    figures = figures_of(trainer.evaluate()) if job.held_out else {}
    choice = HeadChoice(layer=layer, width=width, seconds=seconds, evaluation=figures)
    return _Fitted(choice, head, done.training_loss, trainer.state.global_step, trainer.state.epoch or 0.0)


def _info(job: _Job, policy: Policy, fingerprint: str, max_length: int | None) -> ScorerInfo:
    base = job.settings.base
    return ScorerInfo(
        rgtg_version=rgtg.__version__,
        objective=job.settings.objective,
        base_model=str(Path(base).resolve()) if Path(base).is_dir() else base,  # found from any folder
        base_fingerprint=fingerprint_weights(policy.model),
        base_casts=cast_fingerprints(policy.model),
        tokenizer_hash=tokenizer_hash(policy.tokenizer),
        data_fingerprint=fingerprint,
        append_eos=policy.tokenizer.eos_token_id is not None,
        max_length=max_length,
        trunk="own",
        head=job.settings.head or "state",
        rank=None if job.table is None else job.table.shape[1],
        reference_fingerprint=job.trust.reference,
    )


def _save(job: _Job, head: Head, tokenizer: Any, info: ScorerInfo, report: TrainReport) -> None:
    settings = job.settings
    resolved = settings.model_dump(mode="json", exclude_none=True) | {"train": shown(job.config)}
    card = model_card(settings.output, info, resolved, report.evaluation, report.counts())
    given = settings.model_dump(mode="json") | {"train": HEAD_DEFAULTS | settings.train}  # --config reads it back
    save_own_state(settings.output, head, tokenizer, info, card, settings=given)
    drop_empty_checkpoints(settings.output)
