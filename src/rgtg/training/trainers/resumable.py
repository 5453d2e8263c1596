"""What every trainer here adds to transformers' own: sealed checkpoints, exact resumption, a stop on request."""

import json
import math
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate.data_loader import SkipBatchSampler
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput, has_length, rotate_checkpoints

from rgtg.errors import DataError, NonFiniteError, OutputError, StoppedError, UsageError
from rgtg.training.callbacks import TrainLog
from rgtg.training.checkpoint.manager import PREFIX, in_the_way, newest_valid, seal
from rgtg.training.checkpoint.signals import StopRequest

PROGRESS = "progress.json"


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` that goes on exactly where a checkpoint left off.

    ``run`` is noted in each checkpoint (what decides the result), ``request`` may ask to stop, and ``stopped`` says
    that it was heeded: a checkpoint of the last step was then saved.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run: dict[str, Any] = {}
        self.request: StopRequest | None = None
        self.stopped = False
        self._checkpoint: Path | None = None
        self.add_callback(_Flow(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers' own; ``True`` goes on from the newest checkpoint that is complete and undamaged.

        Raises:
            DataError: a file of the checkpoint is a pickle of more than tensors and numbers; it is not loaded.
            UsageError: there is no whole batch, and others are dropped.
        """
        require_batch(self)
        if resume_from_checkpoint is True:
            found = newest_valid(Path(self.args.output_dir))
            resume_from_checkpoint = str(found[0]) if found else None
        self._checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._checkpoint is not None:
            self.args.eval_on_start = False  # that was before the first step
        try:
            done = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except UnpicklingError as error:
            raise DataError(
                f"{self._checkpoint} holds a pickle of more than tensors and numbers, which no training saves and "
                "which could run code: it was not loaded. Delete that checkpoint, and find out who wrote it"
            ) from error
        loss = self._mean_loss()
        return TrainOutput(done.global_step, loss, done.metrics | {"train_loss": loss})

    def figures_so_far(self) -> Any:
        """What has been seen since the last logged line, as JSON takes it; `take_up` gets it back."""
        return None

    def take_up(self, figures: Any) -> None:
        """Go on with the figures of a checkpoint."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean training loss of all steps, those before a resumption included."""
        if "train_loss" in logs:
            logs = logs | {"train_loss": self._mean_loss()}
        super().log(logs, start_time)

    def _mean_loss(self) -> float:
        return float(self._total_loss_scalar / max(self.state.global_step, 0.001))

    def _run_epoch(self, **where: Any) -> None:
        # 1. a checkpoint of the last step: transformers would train one step more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # 2. else the epoch, or the rest of it
        super()._run_epoch(**where)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Norm of the gradient; a loss can be finite where its gradient is not, and the weights would be lost."""
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
            OutputError: it cannot be written; what was saved before is untouched.
            NonFiniteError: the weights are not worth saving.
        """
        require_finite_weights(self.model)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX}{self.state.global_step}"
        if (blocking := in_the_way(folder)) is not None:
            raise OutputError(
                f"cannot save a checkpoint: {blocking} is a file, not a folder; move it away, then resume"
            )
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier start, cut off or passed over
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self._write_progress(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                # a pickle that nothing here reads
                (folder / "training_args.bin").unlink(missing_ok=True)
                seal(folder, step=self.state.global_step, processes=self.args.world_size, run=self.run)
        except (OSError, SafetensorError, RuntimeError) as error:
            if (reason := _unwritable(error)) is None:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise OutputError(
                f"cannot write {folder}: {reason}. Earlier checkpoints are untouched: make room, then resume"
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _write_progress(self, folder: Path) -> None:
        """What transformers forgets: sums since the last logged line, and how long the log was."""
        losses = gather_object([float(self._tr_loss)])
        log = self._train_log()
        progress = {
            "losses": losses, "total_loss": self._total_loss_scalar, "last_logged": self._globalstep_last_logged,
            "figures": self.figures_so_far(), "log_bytes": log.size() if log else None,
        }  # fmt: skip
        if self.args.should_save:
            (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")

    def _read_progress(self) -> None:
        """Take up what `_write_progress` wrote, where there is a checkpoint of ours."""
        path = self._checkpoint / PROGRESS if self._checkpoint else None
        if path is None or not path.is_file():
            return
        progress = json.loads(path.read_text(encoding="utf-8"))
        losses = progress["losses"]
        if len(losses) == self.args.world_size:
            self._tr_loss += losses[self.args.process_index]
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]
        self.take_up(progress["figures"])
        log = self._train_log()
        if log and progress["log_bytes"] is not None and self.args.should_save:
            log.cut(progress["log_bytes"])

    def _train_log(self) -> TrainLog | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, TrainLog)), None)


class _Flow(TrainerCallback):  # type: ignore[misc]
    """Stops on request, and saves what coincides with the end of an epoch after all that belongs to that end.

    transformers saves first and then, at the epoch's end, evaluates: who resumes there never evaluates.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self.waiting = self.midway = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up the checkpoint's figures; from now on a signal waits for the step to end."""
        self.trainer._read_progress()
        self.waiting = self.midway = self.trainer.stopped = False
        if self.trainer.request:
            self.trainer.request.deferred = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Once the epoch's batches are being read."""
        mend_remainder(self.trainer.accelerator.gradient_state.active_dataloader)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After transformers' own decisions about logs, evaluations and checkpoints."""
        ends = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if self._asked():
            self.trainer.stopped = control.should_training_stop = control.should_save = True
            self.midway = not ends
        if control.should_save and ends:
            control.should_save, self.waiting = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save what waited; where an epoch was broken off, it has not ended."""
        if self.midway:
            control.should_log = control.should_evaluate = control.should_save = False
        elif self.waiting:
            control.should_save, self.waiting = True, False

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What follows can be cut short."""
        if self.trainer.request:
            self.trainer.request.deferred = False

    def _asked(self) -> bool:
        """Whether any process was asked to stop: all of them must leave at one step."""
        asked = bool(self.trainer.request and self.trainer.request.asked)
        if self.trainer.args.world_size == 1:
            return asked
        flag = torch.tensor(int(asked), device=self.trainer.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)


def require_not_stopped(trainer: ResumableTrainer) -> None:
    """Leave, if the training has heeded a request.

    Raises:
        StoppedError: says how to go on.
    """
    if trainer.stopped:
        raise StoppedError(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is in "
            f"{trainer.args.output_dir}: the same command with --resume goes on from it"
        )


def require_batch(trainer: Trainer) -> None:
    """Refuse data that fills no batch where what fills none is dropped.

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


def require_trained(trainer: ResumableTrainer) -> None:
    """Refuse to call a model trained that has not made a step.

    Raises:
        UsageError: nothing is to be saved.
    """
    if trainer.state.global_step < 1:
        raise UsageError(
            "the training ended before its first step, and nothing is saved: look for what ends it among the train. "
            "settings"
        )


def mend_remainder(loader: Any) -> None:
    """Tell a loader how many rows of its last batch are real, where its epoch is gone on with in its midst.

    Of several processes the others are repeated, and counted in no figure; accelerate looks for the size of a batch
    where its `SkipBatchSampler` has none, and then does not know.
    """
    sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(sampler, "batch_sampler", None)
    if isinstance(sampler, SkipBatchSampler) and loader.remainder == -1 and not getattr(inner, "drop_last", False):
        for name, default in (("batch_size", None), ("num_processes", 1), ("split_batches", False)):
            setattr(sampler, name, getattr(inner, name, default))
        loader.remainder = len(loader.dataset) % loader.total_batch_size


def require_finite_weights(model: Any) -> None:
    """Refuse to save weights that are lost.

    Raises:
        NonFiniteError: names the first tensor with NaN or an infinity.
    """
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not bool(torch.isfinite(local.detach()).all()):
            raise NonFiniteError(f"the weights are not finite ({name}), and are not saved; lower train.learning_rate")


def _unwritable(error: Exception) -> str | None:
    """Why a file could not be written, in a library's own terms; None where it is another matter."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if isinstance(error, SafetensorError):
        return text.rpartition("I/O error: ")[2]
    # torch's writer of zip files
    return "the disk may be full" if "unexpected pos" in text or "PytorchStreamWriter failed" in text else None
