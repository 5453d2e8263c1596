"""Around the training loop: a log file and progress lines, checkpoints without pickled arguments, safe resume."""

import json
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rgtg.errors import UsageError

LOG_FILE = "train-log.jsonl"
RUN_FILE = "run.json"


class TrainLog(TrainerCallback):  # type: ignore[misc]
    """Appends every logged figure to a JSONL file, and shows one line of it on stderr."""

    def __init__(self, path: Path, *, show: bool) -> None:
        self.path = path
        self.show = show

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write one line; only the main process does."""
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}, default=str) + "\n")
        if self.show and (shown := progress_line(logs)):
            sys.stderr.write(f"step {state.global_step}/{state.max_steps}  {shown}\n")


class DropPickledArguments(TrainerCallback):  # type: ignore[misc]
    """Removes ``training_args.bin``, a pickle that nothing here reads, from each checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Right after a checkpoint was written."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (folder / "training_args.bin").unlink(missing_ok=True)


def progress_line(logs: dict[str, Any]) -> str:
    """What a person watches: loss, and accuracy (or squared error) at the middle and the end.

    Example:
        >>> progress_line({"loss": 0.5, "accuracy_50": 0.75, "accuracy_100": 1.0})
        'loss 0.500  accuracy at 50 % 0.750, at 100 % 1.000'
        >>> progress_line({"loss": 0.5, "mse_50": 0.75, "mse_100": 0.25})
        'loss 0.500  squared error at 50 % 0.750, at 100 % 0.250'
    """
    for prefix in ("", "eval_"):
        if f"{prefix}loss" in logs:
            name, said = ("mse", "squared error") if f"{prefix}mse_100" in logs else ("accuracy", "accuracy")
            middle, end = (float(logs.get(f"{prefix}{name}_{p}", float("nan"))) for p in (50, 100))
            return (
                f"{prefix.replace('_', ' ')}loss {float(logs[f'{prefix}loss']):.3f}  "
                f"{said} at 50 % {middle:.3f}, at 100 % {end:.3f}"
            )
    return ""


def latest_checkpoint(folder: Path) -> Path | None:
    """Newest *complete* checkpoint, or None; broken ones (a run killed while saving) are passed over with a warning."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        problem = _problem(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=2)
    return None


def require_same_run(folder: Path, facts: dict[str, Any], *, write: bool) -> None:
    """Note what a run's checkpoints belong to, or compare with what an earlier start noted.

    Raises:
        UsageError: the checkpoints come from other data, another base model or another objective.
    """
    path = folder / RUN_FILE
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in facts if facts[name] != before.get(name))
        if changed:
            raise UsageError(
                f"cannot resume: {', '.join(changed)} changed since the checkpoints in {folder} were made; "
                "use the same data, base, objective, options and seed, or choose another --output"
            )
    elif write:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no readable trainer_state.json"
    weights = list(checkpoint.glob("*.safetensors"))
    if not weights:
        return "no weights"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{path.name} is truncated"
    for name in ("optimizer.pt", "scheduler.pt"):  # without them training would restart its state silently
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is missing or truncated"
    if not any(zipfile.is_zipfile(path) for path in checkpoint.glob("rng_state*.pth")):
        return "the random state is missing"
    return None
