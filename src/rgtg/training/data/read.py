"""What a run trains on: pairs or rollouts, read once, tokenised as they are read, split by prompt."""

import sys
import time
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgtg.config import TrainSettings
from rgtg.data.pairs import PairReader, held_out_prompts, split_position
from rgtg.data.rollouts import read_rollouts, tokenize_rollouts
from rgtg.data.token_store import TokenizedPairs, TokenStore
from rgtg.errors import DataError, UsageError
from rgtg.training.objectives import Data

_TOLD = 10.0  # seconds between two lines of progress


@dataclass
class TrainData:
    """Tokenised pairs or rollouts of a run; ``held_out`` may be empty."""

    kind: Data
    train: Sequence[Any]
    held_out: Sequence[Any]
    fingerprint: str
    held_out_fingerprint: str | None = None  # of a file of their own

    def counts(self) -> dict[str, int]:
        """Numbers of the report."""
        sizes, none = (len(self.train), len(self.held_out)), (0, 0)
        pairs, rollouts = (sizes, none) if self.kind == "pairs" else (none, sizes)
        return {"pairs": pairs[0], "eval_pairs": pairs[1], "rollouts": rollouts[0], "eval_rollouts": rollouts[1]}


@dataclass
class _Units:
    """Everything in one file, tokenised; ``places`` are those of its prompts, by which they are split and compared."""

    units: Sequence[Any]
    places: "np.ndarray[Any, Any]"
    fingerprint: str

    def take(self, mask: "np.ndarray[Any, Any]") -> Sequence[Any]:
        where = np.flatnonzero(mask)
        if isinstance(self.units, TokenizedPairs):
            return self.units.take(where)
        return [self.units[int(i)] for i in where]


def read_data(
    settings: TrainSettings,
    config: Any,
    tokenizer: Any,
    max_length: int | None,
    *,
    is_main: bool = True,
    show: bool = False,
) -> TrainData:
    """Training and held-out pairs, or rollouts.

    Pairs are held as token ids in flat arrays (`rgtg.data.token_store`), on disk beyond 128 MB: a million take
    little memory.

    Args:
        settings: of the run.
        config: trl's, for when it evaluates.
        tokenizer: of the base model.
        max_length: longest prompt + completion in tokens.
        is_main: whether this process warns and writes rejects.
        show: progress lines on stderr.

    Raises:
        DataError: unusable rows, or none to train on.
        UsageError: evaluation is asked for during training, and nothing is held out.
        OutputError: no room for the token ids.
    """

    def read(source: str, rejects: str) -> _Units:
        where = settings.output / rejects if is_main and settings.on_bad == "skip" else None
        with warnings.catch_warnings():
            if not is_main:  # one process of a torchrun says it for all
                warnings.simplefilter("ignore")
            reader = _read_pairs if kind == "pairs" else _read_rollouts
            return reader(settings, source, tokenizer, max_length, where, show and is_main)

    kind: Data = "pairs" if settings.rollouts is None else "rollouts"
    source = settings.pairs or settings.rollouts
    assert source is not None, "checked with the settings"
    every, apart_fingerprint = read(source, "rejects.jsonl"), None
    if apart := settings.eval_pairs or settings.eval_rollouts:
        other = read(apart, "eval-rejects.jsonl")
        train, held_out, apart_fingerprint = every.units, other.units, other.fingerprint
        shared = len(np.intersect1d(every.places, other.places))
        if shared and is_main:
            warnings.warn(f"{shared} prompts are in --{kind} and --eval-{kind}: evaluation is optimistic", stacklevel=2)
    else:
        mask = held_out_prompts(every.places, settings.eval_fraction)
        train, held_out = every.take(~mask), every.take(mask)
    if not train:
        raise DataError(f"{source} leaves nothing to train on; add {kind} or lower eval_fraction")
    if config.eval_strategy != "no" and not held_out:
        raise UsageError(f"train.eval_strategy={config.eval_strategy} needs held-out {kind}; give --eval-{kind}")
    return TrainData(kind, train, held_out, every.fingerprint, apart_fingerprint)


def _read_pairs(
    settings: TrainSettings, source: str, tokenizer: Any, max_length: int | None, rejects: Path | None, show: bool
) -> _Units:
    store, places = TokenStore(), array("d")
    reader = PairReader(
        source, tokenizer=tokenizer, max_length=max_length, on_bad=settings.on_bad, rejects=rejects,
        progress=_progress(source) if show else None,
    )  # fmt: skip
    for pair, ids in reader:
        assert ids is not None, "there is a tokenizer"
        store.append(ids)
        places.append(split_position(pair.prompt, settings.seed))
    return _Units(TokenizedPairs(store, np.arange(len(store))), np.array(places), reader.fingerprint)


def _read_rollouts(
    settings: TrainSettings, source: str, tokenizer: Any, max_length: int | None, rejects: Path | None, show: bool
) -> _Units:
    labels = settings.objective == "cumulative-mse"
    scale = settings.options.reward_range if labels else None
    found = read_rollouts(
        source, tokenizer=tokenizer, max_length=max_length, on_bad=settings.on_bad, rejects=rejects, labels=labels,
        reward_range=scale, progress=_progress(source) if show else None,
    )  # fmt: skip
    places = np.array([split_position(row.prompt, settings.seed) for row in found.rows])
    return _Units(tokenize_rollouts(found.rows, tokenizer), places, found.fingerprint)


def _progress(source: str) -> Callable[[int, int], None]:
    """A line on stderr every ten seconds."""
    began = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _TOLD and total:
            last = now
            sys.stderr.write(f"read {done / total:.0%} of {source}  {now - began:.0f} s\n")

    return tell
