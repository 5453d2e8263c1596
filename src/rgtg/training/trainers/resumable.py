"""What every trainer adds to ``transformers.Trainer``: sealed checkpoints, exact resumption, and a stop on request."""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from accelerate.data_loader import SkipBatchSampler
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput, has_length, rotate_checkpoints
from trl import RewardConfig

from rgtg.config import TrainSettings
from rgtg.errors import DataError, NonFiniteError, OutputError, StoppedError, UsageError
from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.training.checkpoint.manager import PREFIX, blocking_file, newest_valid, seal
from rgtg.training.data.dataset import TrainData
from rgtg.training.report import TrainLog

PROGRESS = "progress.json"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Handles SIGTERM and Ctrl-C during a block; outside of the main thread, signals are not handled.

    A signal raises KeyboardInterrupt, which the block turns into ``StoppedError``. While ``deferred``, it only sets
    ``asked``, so that a step or a save can finish. A second Ctrl-C, at least a second later (a launcher may pass on the
    first one again), interrupts what was deferred.
    """

    def __init__(self, how_to_resume: str) -> None:
        self.how_to_resume = how_to_resume
        self.asked = self.deferred = False
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt):
            raise StoppedError(f"stopped; {self.how_to_resume}") from error

    def _handle(self, number: int, _frame: Any) -> None:
        insists = self.asked and number == signal.SIGINT and time.monotonic() - self._since > 1
        if not self.deferred or insists:
            raise KeyboardInterrupt  # no library's "except Exception" catches it
        if not self.asked:
            self.asked, self._since = True, time.monotonic()

    @contextmanager
    def defer(self) -> Iterator[None]:
        """During the block, a signal only sets ``asked``."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False


@dataclass
class TrainingRun:
    """What all parts of one ``rgtg train`` share."""

    settings: TrainSettings
    data: TrainData
    info: ScorerInfo  # written as rgtg.json
    facts: dict[str, Any]  # what decides the result
    stop: StopRequest
    show: bool  # write progress to stderr


@dataclass
class TrainedModel:
    """A trained model or head, for the report and the files of a run."""

    model: Any
    info: ScorerInfo
    args: RewardConfig
    loss: float
    steps: int
    epochs: float
    seconds: float
    evaluation: dict[str, float]
    resumed_from: str | None
    weights: dict[str, Any] | None = None  # gathered, if the model is sharded over processes
    details: dict[str, Any] = field(default_factory=dict)  # further fields of the report


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` that resumes from a checkpoint exactly as if it had not been interrupted.

    ``run`` is written into each checkpoint (what decides the result) and ``request`` may ask to stop. ``stopped`` is
    true once the trainer has stopped on request, after it saved a checkpoint of the last step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run: dict[str, Any] = {}
        self.request: StopRequest | None = None
        self.stopped = False
        self._checkpoint: Path | None = None
        self.add_callback(_SaveAndStop(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As in transformers; ``True`` resumes from the newest checkpoint that is complete and undamaged.

        Raises:
            DataError: a file of the checkpoint is a pickle of more than tensors and numbers; it is not loaded.
            UsageError: incomplete batches are dropped, and the data does not fill one.
        """
        require_batch(self)
        if resume_from_checkpoint is True:
            found = newest_valid(Path(self.args.output_dir))
            resume_from_checkpoint = str(found[0]) if found else None
        self._checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._checkpoint is not None:
            self.args.eval_on_start = False  # the first start has done it
        try:
            done = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except UnpicklingError as error:
            raise DataError(
                f"{self._checkpoint} holds a pickle of more than tensors and numbers, which no training saves and "
                "which could run code: it was not loaded. Delete that checkpoint, and find out who wrote it"
            ) from error
        loss = self._mean_loss()
        return TrainOutput(done.global_step, loss, done.metrics | {"train_loss": loss})

    def train_run(self, run: TrainingRun, checkpoint: Path | None) -> Any:
        """Train as a part of ``rgtg train``, whose stdout is for results: nothing is printed.

        Raises:
            StoppedError: it was asked to stop; says how to resume.
            UsageError: not one step was made, so there is nothing to save.
            NonFiniteError: a loss, a gradient or the weights are not finite.
        """
        self.run, self.request = run.facts, run.stop
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        done = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.stopped:
            raise StoppedError(
                f"stopped after step {self.state.global_step} of {self.state.max_steps}; a checkpoint is in "
                f"{self.args.output_dir}: the same command with --resume resumes from it"
            )
        if self.state.global_step < 1:
            raise UsageError(
                "the training ended before its first step, and nothing is saved: look for the cause among the train. "
                "settings"
            )
        require_finite_weights(self.model)
        return done

    def pending_figures(self) -> Any:
        """Figures since the last logged line, as JSON; `restore_figures` gets them back."""
        return None

    def restore_figures(self, figures: Any) -> None:
        """Continue with the figures of a checkpoint."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean training loss over all steps, including those before a resumption."""
        if "train_loss" in logs:
            logs = logs | {"train_loss": self._mean_loss()}
        super().log(logs, start_time)

    def _mean_loss(self) -> float:
        return float(self._total_loss_scalar / max(self.state.global_step, 0.001))

    def _run_epoch(self, **where: Any) -> None:
        # With a checkpoint of the last step, transformers would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**where)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Norm of the gradient; a loss can be finite while its gradient is not, and the weights would be lost."""
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # fp16 skips such steps and scales down
        if norm is not None and not scaled and not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}; lower "
                "train.learning_rate, or use a dtype with more range"
            )
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, seal it, and only then delete older ones.

        Raises:
            OutputError: it cannot be written; earlier checkpoints are untouched.
            NonFiniteError: the weights are not finite.
        """
        require_finite_weights(self.model)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX}{self.state.global_step}"
        if (blocking := blocking_file(folder)) is not None:
            raise OutputError(
                f"cannot save a checkpoint: {blocking} is a file, not a folder; move it away, then resume"
            )
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier start, incomplete or skipped
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            # 1. transformers' files, and what it leaves out
            super()._save_checkpoint(model, trial)
            self._write_progress(folder)
            self.accelerator.wait_for_everyone()
            # 2. the seal
            if self.args.should_save:
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that rgtg never reads
                seal(folder, step=self.state.global_step, processes=self.args.world_size, run=self.run)
        except (OSError, SafetensorError, RuntimeError) as error:
            if (reason := _write_failure(error)) is None:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise OutputError(
                f"cannot write {folder}: {reason}. Earlier checkpoints are untouched: make room, then resume"
            ) from error
        finally:
            self.args.save_total_limit = limit
        # 3. older checkpoints
        if self.args.should_save:
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _write_progress(self, folder: Path) -> None:
        """Write what transformers does not save: sums since the last logged line, and the length of the log."""
        losses = gather_object([float(self._tr_loss)])
        log = self._train_log()
        progress = {
            "losses": losses, "total_loss": self._total_loss_scalar, "last_logged": self._globalstep_last_logged,
            "figures": self.pending_figures(), "log_bytes": log.size() if log else None,
        }  # fmt: skip
        if self.args.should_save:
            (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")

    def _restore_progress(self) -> None:
        """Restore what `_write_progress` wrote, if the checkpoint has it."""
        path = self._checkpoint / PROGRESS if self._checkpoint else None
        if path is None or not path.is_file():
            return
        progress = json.loads(path.read_text(encoding="utf-8"))
        losses = progress["losses"]
        if len(losses) == self.args.world_size:
            self._tr_loss += losses[self.args.process_index]
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]
        self.restore_figures(progress["figures"])
        log = self._train_log()
        if log and progress["log_bytes"] is not None and self.args.should_save:
            log.cut(progress["log_bytes"])

    def _train_log(self) -> TrainLog | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, TrainLog)), None)


class _SaveAndStop(TrainerCallback):  # type: ignore[misc]
    """Stops on request, and saves a checkpoint that is due at the end of an epoch after that end's evaluation.

    transformers saves first and evaluates then, so a run that resumes from that checkpoint would never evaluate.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self.save_waits = self.stops_inside_epoch = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the checkpoint's figures; from now on a signal waits for the end of the step."""
        self.trainer._restore_progress()
        self.save_waits = self.stops_inside_epoch = self.trainer.stopped = False
        if self.trainer.request:
            self.trainer.request.deferred = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Repair the data loader, which exists by now."""
        repair_remainder(self.trainer.accelerator.gradient_state.active_dataloader)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide to stop or to save later, after transformers' own decisions about logs and checkpoints."""
        epoch_ends = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if self._asked():
            self.trainer.stopped = control.should_training_stop = control.should_save = True
            self.stops_inside_epoch = not epoch_ends
        if control.should_save and epoch_ends:
            control.should_save, self.save_waits = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save what waited. An epoch that was stopped inside has not ended: nothing is logged or evaluated."""
        if self.stops_inside_epoch:
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.save_waits:
            control.should_save, self.save_waits = True, False

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From now on a signal interrupts at once."""
        if self.trainer.request:
            self.trainer.request.deferred = False

    def _asked(self) -> bool:
        """Whether any process was asked to stop: all of them must stop at the same step."""
        asked = bool(self.trainer.request and self.trainer.request.asked)
        if self.trainer.args.world_size == 1:
            return asked
        flag = torch.tensor(int(asked), device=self.trainer.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)


def require_batch(trainer: Trainer) -> None:
    """Check that the data fills a batch if incomplete batches are dropped.

    Raises:
        UsageError: says what to change.
    """
    args, rows = trainer.args, trainer.train_dataset
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and has_length(rows) and len(rows) < batch:
        raise UsageError(
            f"train.dataloader_drop_last leaves nothing to train on: {len(rows)} rows are less than a batch of {batch}"
            ". Lower train.per_device_train_batch_size, or leave train.dataloader_drop_last out"
        )


def repair_remainder(loader: Any) -> None:
    """Set how many rows of a loader's last batch are real, if training resumed inside an epoch.

    With several processes, the last batch is filled up with repeated rows, which must not count in any figure.
    accelerate looks for the batch size on its `SkipBatchSampler`, which has none, and then does not know the number.
    """
    sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(sampler, "batch_sampler", None)
    if isinstance(sampler, SkipBatchSampler) and loader.remainder == -1 and not getattr(inner, "drop_last", False):
        for name, default in (("batch_size", None), ("num_processes", 1), ("split_batches", False)):
            setattr(sampler, name, getattr(inner, name, default))
        loader.remainder = len(loader.dataset) % loader.total_batch_size


def require_finite_weights(model: Any) -> None:
    """Check weights before they are saved.

    Raises:
        NonFiniteError: names the first tensor with NaN or an infinity.
    """
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not bool(torch.isfinite(local.detach()).all()):
            raise NonFiniteError(f"the weights are not finite ({name}), and are not saved; lower train.learning_rate")


def _write_failure(error: Exception) -> str | None:
    """Why a file could not be written, in the words of the library that failed; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if isinstance(error, SafetensorError):
        return text.rpartition("I/O error: ")[2]
    # torch's writer of zip files
    return "the disk may be full" if "unexpected pos" in text or "PytorchStreamWriter failed" in text else None
