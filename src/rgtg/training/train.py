"""``rgtg train`` from pairs to a saved scorer; the command line parses, calls this and prints."""

import atexit
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rgtg.config import LoraSettings, TrainSettings
from rgtg.errors import UsageError
from rgtg.models.loading.hub import absolute_source
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.scorer_info import ScorerInfo, cast_fingerprints, fingerprint_weights, read_info
from rgtg.models.loading.tensor_parallel import destroy_process_group, is_main_process
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.training.arguments import (
    CHECKPOINTS,
    DEFAULTS,
    require_folder,
    require_known,
    require_output,
    reward_config,
)
from rgtg.training.base_model import load_base, load_language_base, lora_config
from rgtg.training.bounds import require_values
from rgtg.training.callbacks import LOG_FILE, TrainLog
from rgtg.training.checkpoint.resume import Finished, find_start, run_facts
from rgtg.training.checkpoint.save import save_scorer
from rgtg.training.checkpoint.signals import StopRequest
from rgtg.training.data.dataset import pairs_dataset
from rgtg.training.data.pair_weights import Trust, trust_of
from rgtg.training.data.read import TrainData, read_data
from rgtg.training.fit import require_fit
from rgtg.training.model_card import model_card
from rgtg.training.objectives import OBJECTIVES
from rgtg.training.report import TrainReport, drop_empty_checkpoints, figures_of, keep_quiet, longest, shown
from rgtg.training.trainers.base import PrefixTrainer
from rgtg.training.trainers.full_reward import CoherentRewardTrainer, FullRewardTrainer
from rgtg.training.trainers.language_model import AutoregressiveTrainer, FarmaTrainer
from rgtg.training.trainers.prefix_reward import PrefixRewardTrainer
from rgtg.training.trainers.resumable import require_finite_weights, require_not_stopped, require_trained
from rgtg.training.trainers.value import CumulativePairTrainer, CumulativeTrainer, ValueTrainer, rollouts_dataset
from rgtg.utils.files import lock_folder, make_folder
from rgtg.version import __version__

# peft's own recipes for LoRA on every linear layer use ten times a whole model's rate.
LORA_LEARNING_RATE = 5e-4
TRAINERS: dict[tuple[str, str], type[PrefixTrainer]] = {
    ("prefix-bt", "pairs"): PrefixRewardTrainer,
    ("full-bt", "pairs"): FullRewardTrainer,
    ("tcrm", "pairs"): CoherentRewardTrainer,
    ("farma", "pairs"): FarmaTrainer,
    ("autoregressive", "pairs"): AutoregressiveTrainer,
    ("value", "rollouts"): ValueTrainer,
    ("cumulative-mse", "rollouts"): CumulativeTrainer,
    ("cumulative-mse", "pairs"): CumulativePairTrainer,
}


def train_scorer(settings: TrainSettings, *, show: bool = False) -> TrainReport:
    """Read pairs or rollouts, train a scorer, evaluate it on the held-out part and save it.

    Under ``torchrun`` every process calls this; only the main one writes and shows anything. SIGTERM and Ctrl-C end a
    training step, save a checkpoint and leave.

    Args:
        settings: of the run.
        show: progress lines on stderr.

    Raises:
        UsageError, DataError, ModelNotFoundError: unusable input, or another process is writing the output; found
            before training.
        NonFiniteError: the loss or the gradient is NaN or infinite; names the step.
        OutputError: the scorer, or a checkpoint, cannot be written.
        StoppedError: it was asked to stop.
    """
    require_known(settings.train)
    require_fit(settings)
    require_values(settings.train)
    again = "the same command with --resume goes on from the newest checkpoint"
    told = f"{again}, if there is one in {settings.output / CHECKPOINTS}"
    with _alone(settings), StopRequest(told) as request:
        if settings.trunk == "own":
            from rgtg.training.train_head import train_head

            return train_head(settings, request, show=show)
        return _train_model(settings, request, show)


@contextmanager
def _alone(settings: TrainSettings) -> Iterator[None]:
    """Keep other runs out of the output folder; of several processes of one run the first does it for all."""
    if not is_main_process():
        yield
        return
    require_folder(settings.output)
    with lock_folder(settings.output):  # before the folder is looked into: another run may be changing it
        require_output(settings.output, settings.resume)
        yield


def _train_model(settings: TrainSettings, request: StopRequest, show: bool) -> TrainReport:
    # 1. base and data
    about: dict[str, Any] = {}
    if settings.trunk == "shared":
        settings, about = _with_adapter(settings)
    model, tokenizer = _base(settings)
    max_length = longest(settings, model)
    config = reward_config(settings, max_length)
    is_main = config.process_index == 0
    if config.world_size > 1:
        atexit.register(destroy_process_group)
    make_folder(settings.output)
    data = read_data(settings, config, tokenizer, max_length, is_main=is_main, show=show)
    trust = trust_of(settings, data, tokenizer, config.device)
    about |= {"reference_fingerprint": trust.reference}
    info = _info(settings, model, tokenizer, data.fingerprint, max_length).model_copy(update=about)
    # 2. where it starts
    trainer = _trainer(settings, config, model, tokenizer, data, trust, show)
    trainer.run, trainer.request = run_facts(settings, config, info, data), request
    start = find_start(settings, trainer.run, is_main)
    if show and is_main and settings.resume:
        sys.stderr.write(start.told() + "\n")
    if start.finished is not None:
        return start.finished
    # 3. training
    began = time.perf_counter()
    done = trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
    seconds = time.perf_counter() - began
    require_not_stopped(trainer)
    require_trained(trainer)
    # 4. report and files
    figures = figures_of(trainer.evaluate()) if data.held_out else {}
    report = _report(settings, config, data, trainer, done, seconds, figures, start.checkpoint)
    with request.defer():
        _save(settings, trainer, tokenizer, info, report, is_main)
        trainer.accelerator.wait_for_everyone()
    return report


def _with_adapter(settings: TrainSettings) -> tuple[TrainSettings, dict[str, Any]]:
    """Settings of a scorer on its policy's trunk, and what its rgtg.json says of the policy it needs beside it.

    LoRA learns with larger steps than whole models; a learning rate that was given stays.
    """
    policy = load_policy(settings.base, dtype="float32", device="cpu").model
    about = {
        "trunk": "shared", "base_fingerprint": fingerprint_weights(policy), "base_casts": cast_fingerprints(policy),
    }  # fmt: skip
    train = {"learning_rate": LORA_LEARNING_RATE} | settings.train
    return settings.model_copy(update={"lora": settings.lora or LoraSettings(), "train": train}), about


def _base(settings: TrainSettings) -> tuple[Any, Any]:
    """The model that is trained, and its tokenizer."""
    given = settings.train.get("model_init_kwargs") or {}
    if not OBJECTIVES[settings.objective].language_model:
        return load_base(settings.base, settings.seed, **given)
    return load_language_base(settings.base, output_scale=_output_scale(settings), **given)


def _output_scale(settings: TrainSettings) -> float:
    """What the output layer of a language model is multiplied by at the start; 1 leaves it as it is."""
    if settings.objective != "farma":
        return 1.0
    info = read_info(settings.base)
    if info is None:
        return float(settings.options.output_scale)
    if "output_scale" in settings.options.model_fields_set:
        raise UsageError(
            f"{settings.base} is trained further with the output layer it has: leave farma.output_scale out"
        )
    return 1.0


def _info(settings: TrainSettings, model: Any, tokenizer: Any, fingerprint: str, max_length: int | None) -> ScorerInfo:
    return ScorerInfo(
        rgtg_version=__version__,
        objective=settings.objective,
        base_model=settings.base,
        base_fingerprint=fingerprint_weights(model),
        tokenizer_hash=tokenizer_hash(tokenizer),
        data_fingerprint=fingerprint,
        append_eos=tokenizer.eos_token_id is not None,
        max_length=max_length,
        head="vocab" if OBJECTIVES[settings.objective].language_model else "scalar",
    )


def _trainer(
    settings: TrainSettings, config: Any, model: Any, tokenizer: Any, data: TrainData, trust: Trust, show: bool
) -> Any:
    revision = None
    if settings.lora is not None:  # the adapter must find its base from any folder
        model.name_or_path, revision = absolute_source(settings.base)
    train = pairs_dataset(data.train, trust.pairs) if data.kind == "pairs" else rollouts_dataset(data.train)
    make: Any = pairs_dataset if data.kind == "pairs" else rollouts_dataset
    scaled = _output_scale(settings) != 1
    trainer = TRAINERS[settings.objective, data.kind](
        model,
        config,
        options=settings.options,
        train_dataset=train,
        eval_dataset=make(data.held_out) if data.held_out else None,
        processing_class=tokenizer,
        peft_config=lora_config(model, settings.lora, own_output=scaled, revision=revision) if settings.lora else None,
        callbacks=[TrainLog(settings.output / LOG_FILE, show=show)],
    )
    keep_quiet(trainer)
    return trainer


def _report(
    settings: TrainSettings, config: Any, data: TrainData, trainer: Any, done: Any, seconds: float,
    figures: dict[str, float], checkpoint: Path | None,
) -> TrainReport:  # fmt: skip
    epochs = trainer.state.epoch or 0.0
    return TrainReport(
        output=str(settings.output), objective=settings.objective, base=settings.base,
        **data.counts(), steps=trainer.state.global_step, seconds=seconds,
        pairs_per_second=epochs * len(data.train) / seconds,
        loss=done.training_loss, evaluation=figures, data_fingerprint=data.fingerprint, device=str(config.device),
        processes=config.world_size, resumed_from=str(checkpoint) if checkpoint else None,
    )  # fmt: skip


def _save(
    settings: TrainSettings, trainer: Any, tokenizer: Any, info: ScorerInfo, report: TrainReport, is_main: bool
) -> None:
    """Every process calls this, since the weights may be spread over them; the main one writes."""
    require_finite_weights(trainer.model)
    weights = gathered_weights(trainer)
    if not is_main:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    resolved = settings.model_dump(mode="json", exclude_none=True) | {"train": shown(trainer.args)}
    card = model_card(settings.output, info, resolved, report.evaluation, report.counts())
    given = settings.model_dump(mode="json") | {"train": DEFAULTS | settings.train}  # --config reads it back
    finished = Finished(report=report, run=trainer.run)
    save_scorer(settings.output, model, tokenizer, info, card, settings=given, weights=weights, train_report=finished)
    drop_empty_checkpoints(settings.output)


def gathered_weights(trainer: Any) -> dict[str, Any] | None:
    """All weights of a model that is sharded over processes (FSDP, DeepSpeed); None where it is whole in each."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    return dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))
