"""What a run tells people: progress and log while it trains, its report, and the scorer's model card."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field
from transformers import TrainerCallback

from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.types.base import Record

LOG_FILE = "train-log.jsonl"
_SECONDS = 10.0  # between two lines of progress


def progress(what: str, *, last: bool = False) -> Callable[[int, int], None]:
    """A function of (done, total) that writes a line to stderr every ten seconds.

    Args:
        what: is being done.
        last: write a line when all is done, however short it took.
    """
    start = shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if total and (now - shown > _SECONDS or (last and done == total)):
            shown = now
            sys.stderr.write(f"{what}: {done / total:.0%}  {now - start:.0f} s\n")

    return show


class TrainLog(TrainerCallback):  # type: ignore[misc]
    """Writes every logged figure to a JSONL file, and a line of it to stderr.

    Training from the first step cuts the file to ``start`` bytes, which belong to earlier trainings of the same run.
    """

    def __init__(self, path: Path, *, show: bool, start: int = 0) -> None:
        self.path = path
        self.show = show
        self.start = start

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove what an earlier start of this training wrote."""
        if state.is_world_process_zero and state.global_step == 0:
            self.cut(self.start)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write one line; only the main process does."""
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}, default=str) + "\n")
        if self.show and (line := summary_line(logs)):
            sys.stderr.write(f"step {state.global_step}/{state.max_steps}  {line}\n")

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Remove everything after the first ``size`` bytes."""
        if self.size() > size:
            os.truncate(self.path, size)


def summary_line(logs: dict[str, Any]) -> str:
    """The figures to watch: loss, and accuracy (or squared error) at the middle and the end.

    Example:
        >>> summary_line({"loss": 0.5, "accuracy_50": 0.75, "accuracy_100": 1.0})
        'loss 0.500  accuracy at 50 % 0.750, at 100 % 1.000'
        >>> summary_line({"loss": 0.5, "mse_50": 0.75, "mse_100": 0.25})
        'loss 0.500  squared error at 50 % 0.750, at 100 % 0.250'
    """
    for prefix in ("", "eval_"):
        if f"{prefix}loss" in logs:
            name, label = ("mse", "squared error") if f"{prefix}mse_100" in logs else ("accuracy", "accuracy")
            middle, end = (float(logs.get(f"{prefix}{name}_{p}", float("nan"))) for p in (50, 100))
            return (
                f"{prefix.replace('_', ' ')}loss {float(logs[f'{prefix}loss']):.3f}  "
                f"{label} at 50 % {middle:.3f}, at 100 % {end:.3f}"
            )
    return ""


class HeadChoice(Record):
    """One head of a search over layers and widths, with its held-out figures (empty without held-out data)."""

    layer: int
    width: int
    seconds: float
    evaluation: dict[str, float]


class TrainReport(Record):
    """What a training run did; ``rgtg train --json`` prints it."""

    output: str
    objective: str
    base: str
    pairs: int = Field(description="trained on; 0 if the objective reads rollouts")
    eval_pairs: int
    rollouts: int = Field(0, description="completions with rewards trained on; 0 if the objective reads pairs")
    eval_rollouts: int = 0
    steps: int
    seconds: float
    pairs_per_second: float = Field(description="or completions with rewards per second")
    loss: float = Field(description="mean training loss, nats")
    evaluation: dict[str, float] = Field(
        description="held-out loss; of pairs accuracy at 10 … 100 % and margin, of rollouts squared error and share of "
        "variance explained; empty without held-out data"
    )
    data_fingerprint: str
    device: str
    processes: int
    resumed_from: str | None = None
    layer: int | None = Field(None, description="of a head: the hidden state it reads")
    width: int | None = None
    rank: int | None = None
    states_seconds: float | None = Field(None, description="of ``seconds``, until the policy has read all completions")
    choices: list[HeadChoice] = Field(default_factory=list, description="heads tried; the best one was kept")

    def counts(self) -> dict[str, int]:
        """Pairs and rollouts, trained on and held out."""
        return self.model_dump(include={"pairs", "eval_pairs", "rollouts", "eval_rollouts"})


class FinishedRun(Record):
    """train-report.json of a scorer: the report of the run, and what decided its result."""

    report: TrainReport
    run: dict[str, Any]


def select_figures(metrics: dict[str, float]) -> dict[str, float]:
    """The figures of an evaluation that say how good the scorer is."""
    wanted = ("loss", "accuracy", "margin", "prefix_accuracy", "mse", "explained")
    short = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {name: float(value) for name, value in short.items() if name.startswith(wanted)}


_CARD = """---
library_name: {library}
pipeline_tag: {task}
base_model: {base}
tags: [reward-model, rgtg, {objective}]
---

# {name}

{intro}

| | |
|---|---|
| objective | `{objective}`: {formula} |
| {kind} | {count} for training, {held_out} held out |
| data fingerprint | `{data}` |
| base fingerprint | `{base_fingerprint}` |
| tokenizer hash | `{tokenizer}` |
| finished completions end with EOS | {append_eos} |

## Evaluation on held-out {kind}

{figures}

{legend}

## Use

{use}

## Settings

```json
{settings}
```
"""

_INTRO = "A reward model that scores {what}, trained by rgtg {version} from `{base}`."
_HEAD_FORMULAS = {
    "state": "r(y_{1:i}) = Q(h_i): it reads the state at the last token of the prefix it scores",
    "vocab": "r(y_{1:i}) = Q(h_{i-1})[y_i]: it reads the state before a token and scores every next token at once",
}
_HEAD_INTRO = """A small head on the frozen hidden states of `{base}` (layer {layer}) that scores {what}, trained by
rgtg {version}: {reads}. It means nothing to any other model."""

_USE = """```python
import rgtg
scorer = rgtg.load_scorer("{folder}")
scorer.score(["a prompt"], ["a completion"])
```

"""

_HEAD_USE = """```python
import rgtg
scorer = rgtg.load_scorer("{folder}")  # loads its policy too; policy=... shares one that is loaded
scorer.score(["a prompt"], ["a completion"])
```"""

_STOCK = """It is a stock sequence-classification model, so plain transformers reads it too:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

_ADAPTER = """It is a LoRA adapter of the base model; with plain transformers and peft:

```python
from peft import AutoPeftModelForSequenceClassification
model = AutoPeftModelForSequenceClassification.from_pretrained("{folder}", num_labels=1)
```"""

_NEXT_TOKENS = """```python
import rgtg
scorer = rgtg.load_scorer("{folder}")
scorer.score(["a prompt"], ["a completion"])
```

Its weights are a causal language model's, so plain transformers reads them too (an adapter with peft's
`AutoPeftModelForCausalLM`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

It is no model to generate with: {reads}."""
_NEXT_TOKEN_SCORES = {
    "farma": "its logits are values, Q(h)[v] is what the text is worth once v is appended",
    "autoregressive": "a text's score is its log-probability, and what it likes is what people prefer",
}

_OBJECTIVES = {
    "prefix-bt": ("completions and their prefixes", "mean over prefixes of −log σ(r(x, y^w_{1:i}) − r(x, y^l_{1:i}))"),
    "full-bt": ("finished completions", "−log σ(r(x, y^w) − r(x, y^l))"),
    "farma": (
        "every next token at once",
        "−log σ(V(y^w) − V(y^l)), alternating with ½(V(y^w_{1:i}) − max_v V(y^w_{1:i}⊕v))² over prefixes",
    ),
    "autoregressive": ("every next token at once", "−log σ(β_r [log π_r(y^w) − log π_r(y^l)])"),
    "value": ("completions and their prefixes by expected reward", "(V(y_{1:i}) − target)², mean over prefixes"),
    "cumulative-mse": ("completions and their prefixes from 0 to 1", "Σ i (r(y_{1:i}) − label)² / Σ i"),
    "tcrm": (
        "completions and their prefixes",
        "−log σ(r(y^w) − r(y^l)) plus (r(y_{1:i}) − r(y))² and (r(y_{1:i}) − r(y_{1:i+1}))², weighted",
    ),
}
_PAIR_LEGEND = """Accuracy at p % is the share of pairs whose chosen completion scores higher after ⌈p/100 · T⌉ tokens,
T being the longer completion's length; ties count half, and pairs whose prefixes are still identical there are left
out."""
_ROLLOUT_LEGEND = """mse_p is the mean squared difference between the score after ⌈p/100 · T⌉ of a completion's T
tokens and its reward (scaled to [0, 1] for cumulative-mse); explained_p is the share of the rewards' variance that the
score explains there."""


def model_card(
    folder: Path, info: ScorerInfo, settings: dict[str, Any], figures: dict[str, float], counts: dict[str, int]
) -> str:
    """The README of a scorer: what it was trained on and for, how good it is, how to load it."""
    what, formula = _OBJECTIVES[info.objective]
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    base = Path(info.base_model).name if Path(info.base_model).is_dir() else info.base_model
    intro, use = _INTRO, _USE + (_ADAPTER if settings.get("lora") else _STOCK)
    if info.trunk == "own":
        intro, use = _HEAD_INTRO, _HEAD_USE
    elif info.head == "vocab":
        use = _NEXT_TOKENS.replace("{reads}", _NEXT_TOKEN_SCORES[info.objective])
    kind = "rollouts" if counts["rollouts"] else "pairs"
    next_tokens = info.trunk == "separate" and info.head == "vocab"
    return _CARD.format(
        library="rgtg" if info.trunk == "own" else "transformers",
        task="text-generation" if next_tokens else "text-classification",
        base=base, objective=info.objective, name=folder.name, formula=formula, use=use.format(folder=folder.name),
        intro=intro.format(
            what=what, version=info.rgtg_version, base=base, layer=info.layer, reads=_HEAD_FORMULAS.get(info.head)
        ),
        kind=kind, count=counts[kind], held_out=counts[f"eval_{kind}"], data=info.data_fingerprint,
        legend=_ROLLOUT_LEGEND if kind == "rollouts" else _PAIR_LEGEND, base_fingerprint=info.base_fingerprint,
        tokenizer=info.tokenizer_hash, append_eos="yes" if info.append_eos else "no",
        figures=f"| figure | value |\n|---|---|\n{rows}" if rows else f"None: no {kind} were held out.",
        settings=json.dumps(settings, indent=2, default=str),
    )  # fmt: skip
