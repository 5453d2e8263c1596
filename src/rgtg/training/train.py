"""``rgtg train``: from pairs or rollouts to a saved scorer; `_train` is the pipeline for models and for heads."""

import atexit
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import get_int_from_env

from rgtg.config import LoraSettings, TrainSettings
from rgtg.errors import MissingExtraError, UsageError
from rgtg.losses import fit_length_offset
from rgtg.models.loading.hub import absolute_source
from rgtg.models.loading.lora_merge import output_name
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.scorer_info import ScorerInfo, cast_fingerprints, fingerprint_weights, read_info
from rgtg.models.loading.tensor_parallel import destroy_process_group
from rgtg.models.ops.lm_head import scalar_head
from rgtg.tokenization.encoding import embedding_rows, tokenizer_hash
from rgtg.training.arguments import (
    defaults_of,
    longest_sequence,
    reward_config,
    run_facts,
    summarize_arguments,
    validate_settings,
)
from rgtg.training.checkpoint.manager import CHECKPOINTS
from rgtg.training.checkpoint.resume import Start, find_start
from rgtg.training.checkpoint.save import drop_empty_checkpoints, require_output, save_scorer
from rgtg.training.data.dataset import TrainData, pairs_dataset, read_data, rollouts_dataset
from rgtg.training.data.pair_weights import add_pair_weights
from rgtg.training.objectives import OBJECTIVES
from rgtg.training.report import LOG_FILE, FinishedRun, TrainLog, TrainReport, model_card, select_figures
from rgtg.training.train_head import HeadTraining
from rgtg.training.trainers.language_model import AutoregressiveTrainer, FarmaTrainer, load_language_base
from rgtg.training.trainers.resumable import StopRequest, TrainedModel, TrainingRun
from rgtg.training.trainers.reward import (
    CoherentRewardTrainer,
    FullRewardTrainer,
    PrefixRewardTrainer,
    ScorerTrainer,
    load_base,
)
from rgtg.training.trainers.value import CumulativePairTrainer, CumulativeTrainer, ValueTrainer
from rgtg.utils.files import lock_folder, make_folder
from rgtg.version import __version__

# peft's recipes for LoRA on every linear layer use ten times the learning rate of a whole model.
LORA_LEARNING_RATE = 5e-4
TRAINERS: dict[tuple[str, str], type[ScorerTrainer]] = {
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
    """Read pairs or rollouts, train a scorer, evaluate it on held-out data and save it.

    Under ``torchrun`` every process calls this; only the main one writes or shows anything. On SIGTERM and Ctrl-C, a
    training step ends, a checkpoint is saved and StoppedError is raised.

    Args:
        settings: of the run.
        show: write progress to stderr.

    Raises:
        UsageError, DataError, ModelNotFoundError: unusable input, or another process is writing to the output; found
            before training.
        NonFiniteError: the loss, the gradient or the weights are NaN or infinite; names the step.
        OutputError: the scorer, or a checkpoint, cannot be written.
        StoppedError: it was asked to stop.
    """
    validate_settings(settings)
    how_to_resume = (
        "the same command with --resume resumes from the newest checkpoint, if there is one in "
        f"{settings.output / CHECKPOINTS}"
    )
    with _locked_output(settings), StopRequest(how_to_resume) as stop:
        return _train(settings, stop, show)


@contextmanager
def _locked_output(settings: TrainSettings) -> Iterator[None]:
    """Keep other runs out of the output folder, and check that it can be used; the main process does it for all."""
    if get_int_from_env(["RANK"], 0) > 0:  # of torchrun; accelerate's own state would start a process group
        yield
        return
    if settings.output.exists() and not settings.output.is_dir():
        raise UsageError(f"--output {settings.output} is a file; give a folder that is new or empty")
    with lock_folder(settings.output):  # before the folder is checked: another run may be changing it
        require_output(settings.output, settings.resume)
        yield


def _train(settings: TrainSettings, stop: StopRequest, show: bool) -> TrainReport:
    # 1. the model that is trained, or the frozen policy that heads are trained on
    training = HeadTraining(settings) if settings.trunk == "own" else ModelTraining(settings)
    settings, config, tokenizer = training.settings, training.config, training.tokenizer
    is_main = config.process_index == 0
    show = show and is_main
    # 2. data
    make_folder(settings.output)
    data = read_data(
        settings, config, tokenizer, training.max_length, embeddings=training.embeddings, is_main=is_main, show=show
    )
    training.require_data(data)
    settings = training.settings = control_length(settings, data)
    if settings.reference_scorer is not None:
        add_pair_weights(data, settings, tokenizer, config.device)
    # 3. what decides the result, and where the run starts
    info = ScorerInfo(
        rgtg_version=__version__, objective=settings.objective, tokenizer_hash=tokenizer_hash(tokenizer),
        data_fingerprint=data.fingerprint, append_eos=tokenizer.eos_token_id is not None,
        max_length=training.max_length, reference_fingerprint=data.reference_fingerprint, **training.about,
    )  # fmt: skip
    run = TrainingRun(settings, data, info, run_facts(settings, config, info, data.held_out_fingerprint), stop, show)
    start = find_start(settings, run.facts, is_main) if settings.resume else Start()
    if start.finished is not None:
        if show:
            sys.stderr.write(f"{settings.output} is finished: nothing to do\n")
        return start.finished
    # 4. training
    trained = training.train(run, start.checkpoint)
    # 5. report and files
    report = TrainReport(**{
        "output": str(settings.output), "objective": settings.objective, "base": settings.base, **data.counts(),
        "steps": trained.steps, "seconds": trained.seconds, "loss": trained.loss, "evaluation": trained.evaluation,
        "pairs_per_second": trained.epochs * len(data.train) / trained.seconds, "data_fingerprint": data.fingerprint,
        "device": str(config.device), "processes": config.world_size, "resumed_from": trained.resumed_from,
        **trained.details,
    })  # fmt: skip
    with stop.defer():
        if is_main:
            _save(run, trained, tokenizer, report)
        PartialState().wait_for_everyone()
    return report


def _save(run: TrainingRun, trained: TrainedModel, tokenizer: Any, report: TrainReport) -> None:
    output, settings, info = run.settings.output, run.settings, trained.info
    resolved = settings.model_dump(mode="json", exclude_none=True) | {"train": summarize_arguments(trained.args)}
    given = settings.model_dump(mode="json") | {"train": defaults_of(settings) | settings.train}  # --config reads it
    save_scorer(
        output, trained.model, tokenizer, info, model_card(output, info, resolved, report.evaluation, report.counts()),
        settings=given, weights=trained.weights, train_report=FinishedRun(report=report, run=run.facts),
    )  # fmt: skip
    drop_empty_checkpoints(output)


def control_length(settings: TrainSettings, data: TrainData) -> TrainSettings:
    """The settings with the offset of ``length_control``, fitted to the training pairs where none is given."""
    options = settings.options
    if not getattr(options, "length_control", False) or options.length_offset is not None:
        return settings
    longer = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in data.train]
    fitted = options.model_copy(update={"length_offset": fit_length_offset(longer)})
    return settings.model_copy(update={settings.objective.replace("-", "_"): fitted})


class ModelTraining:
    """Trains a reward model or a language model, in full or with LoRA.

    ``about`` holds the fields of rgtg.json that depend on the model.
    """

    def __init__(self, settings: TrainSettings) -> None:
        """Load the model and make the training arguments.

        Raises:
            UsageError, ModelNotFoundError: unusable settings, or a base that cannot be trained.
        """
        shared: dict[str, Any] = {}
        if settings.trunk == "shared":
            policy = load_policy(settings.base, dtype="float32", device="cpu").model
            shared = {
                "trunk": "shared", "base_fingerprint": fingerprint_weights(policy),
                "base_casts": cast_fingerprints(policy),
            }  # fmt: skip
            # LoRA learns with larger steps than whole models; a learning rate that was given stays.
            train = {"learning_rate": LORA_LEARNING_RATE} | settings.train
            settings = settings.model_copy(update={"lora": settings.lora or LoraSettings(), "train": train})
        self.settings = settings
        self.model, self.tokenizer = self._load()
        self.max_length, self.embeddings = longest_sequence(settings, self.model), embedding_rows(self.model)
        self.config = reward_config(settings, self.max_length)
        if self.config.world_size > 1:
            atexit.register(destroy_process_group)
        language_model = OBJECTIVES[settings.objective].language_model
        self.about = {
            "base_model": settings.base,
            "base_fingerprint": fingerprint_weights(self.model),
            "head": "vocab" if language_model else "scalar",
        } | shared

    def _load(self) -> tuple[Any, Any]:
        """The model that is trained, and its tokenizer."""
        settings, given = self.settings, self.settings.train.get("model_init_kwargs") or {}
        if not OBJECTIVES[settings.objective].language_model:
            return load_base(settings.base, settings.seed, **given)
        return load_language_base(settings.base, output_scale=self._output_scale(), **given)

    def _output_scale(self) -> float:
        """Factor of a language model's output layer at the start; 1 leaves the layer as it is."""
        settings = self.settings
        if settings.objective != "farma":
            return 1.0
        if read_info(settings.base) is None:
            return float(settings.options.output_scale)
        if "output_scale" in settings.options.model_fields_set:
            raise UsageError(
                f"{settings.base} is trained further with the output layer it has: leave farma.output_scale out"
            )
        return 1.0

    def require_data(self, data: TrainData) -> None:
        """Nothing more is required of the data."""

    def train(self, run: TrainingRun, checkpoint: Path | None) -> TrainedModel:
        """Train from a checkpoint or from the start, and evaluate on the held-out data.

        Raises:
            NonFiniteError, OutputError, StoppedError: as `train_scorer`.
        """
        trainer = self._trainer(run)
        if run.show and run.settings.resume:
            sys.stderr.write(f"resuming from {checkpoint}\n" if checkpoint else "no checkpoint yet: starting anew\n")
        began = time.perf_counter()
        done = trainer.train_run(run, checkpoint)
        seconds = time.perf_counter() - began
        figures = select_figures(trainer.evaluate()) if run.data.held_out else {}
        with run.stop.defer():  # every process takes part, because the weights may be sharded
            weights = gathered_weights(trainer)
        return TrainedModel(
            model=trainer.accelerator.unwrap_model(trainer.model), info=run.info, args=trainer.args,
            loss=done.training_loss, steps=trainer.state.global_step, epochs=trainer.state.epoch or 0.0,
            seconds=seconds, evaluation=figures, resumed_from=str(checkpoint) if checkpoint else None, weights=weights,
        )  # fmt: skip

    def _trainer(self, run: TrainingRun) -> ScorerTrainer:
        settings, data, lora = run.settings, run.data, None
        if settings.lora is not None:
            # peft writes this name into the adapter, which must find its base from any folder
            self.model.name_or_path, revision = absolute_source(settings.base)
            scaled = self._output_scale() != 1
            lora = lora_config(self.model, settings.lora, own_output=scaled, revision=revision)
        make: Any = pairs_dataset if data.kind == "pairs" else rollouts_dataset
        train = pairs_dataset(data.train, data.pair_weights) if data.kind == "pairs" else rollouts_dataset(data.train)
        return TRAINERS[settings.objective, data.kind](
            self.model,
            self.config,
            options=settings.options,
            train_dataset=train,
            eval_dataset=make(data.held_out) if data.held_out else None,
            processing_class=self.tokenizer,
            peft_config=lora,
            callbacks=[TrainLog(settings.output / LOG_FILE, show=run.show)],
        )


def lora_config(model: Any, settings: LoraSettings, *, own_output: bool = False, revision: str | None = None) -> Any:
    """Configuration for peft of a scorer: LoRA on the trunk, and the reward head trained in full.

    Args:
        model: with a scalar head, or a language model.
        settings: of the LoRA.
        own_output: train a language model's output layer in full (after `untie_output`); else it stays as it is.
        revision: of the base's hub repository.

    Raises:
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtraError("LoRA needs peft: pip install 'rgtg[train]'") from error
    from transformers.pytorch_utils import Conv1D

    stored_transposed = any(isinstance(module, Conv1D) for module in model.modules())
    what: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    if scalar_head(model) is None:
        what = {"task_type": "CAUSAL_LM", "modules_to_save": [output_name(model)] if own_output else None}
    return LoraConfig(**what, fan_in_fan_out=stored_transposed, revision=revision, **settings.model_dump())


def gathered_weights(trainer: Any) -> dict[str, Any] | None:
    """All weights of a model that is sharded over processes (FSDP, DeepSpeed); None if every process has them all."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    return dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))
