"""What is told of a run while it trains: a log file, and lines on stderr."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

LOG_FILE = "train-log.jsonl"


class TrainLog(TrainerCallback):  # type: ignore[misc]
    """Writes every logged figure to a JSONL file, and shows one line of it on stderr.

    Training from the first step on cuts the file to ``start`` bytes: those of other trainings that share it.
    """

    def __init__(self, path: Path, *, show: bool, start: int = 0) -> None:
        self.path = path
        self.show = show
        self.start = start

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what an earlier start wrote."""
        if state.is_world_process_zero and state.global_step == 0:
            self.cut(self.start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write one line; only the main process does."""
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}, default=str) + "\n")
        if self.show and (shown := progress_line(logs)):
            sys.stderr.write(f"step {state.global_step}/{state.max_steps}  {shown}\n")

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop what was written after ``size`` bytes."""
        if self.size() > size:
            os.truncate(self.path, size)


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
