"""Training data: pairs or rollouts, read once, tokenised, split by prompt, and batched for the trainers."""

import os
import tempfile
import warnings
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import pad

from rgtg.config import TrainSettings
from rgtg.data.pairs import PairReader, TokenizedPair, held_out_prompts, split_position
from rgtg.data.rollouts import TokenizedRollout, read_rollouts, tokenize_rollouts
from rgtg.errors import DataError, OutputError, UsageError
from rgtg.training.objectives import DataKind
from rgtg.training.report import progress

STORE_LIMIT = 2**27  # bytes of token ids kept in memory
DATASET_LIMIT = 100_000  # pairs of a dataset kept in memory
_PARTS_OF_PAIR = 3
_IDS_PER_WRITE = 2**20
TOKENIZED_PAIR_COLUMNS = ("chosen_ids", "rejected_ids", "prompt_length")
ROLLOUT_COLUMNS = ("completion_ids", "prompt_length", "reward")


@dataclass
class TrainData:
    """Tokenised pairs or rollouts of a run; ``held_out`` may be empty.

    ``pair_weights`` holds the weight of each training pair at each of its prefixes, if a reference scorer gives them.
    """

    kind: DataKind
    train: Sequence[Any]
    held_out: Sequence[Any]
    fingerprint: str
    held_out_fingerprint: str | None = None  # if held-out data is a file of its own
    pair_weights: list[list[float]] | None = None
    reference_fingerprint: str | None = None  # of the reference scorer's weights

    def counts(self) -> dict[str, int]:
        """The counts of the report."""
        sizes, none = (len(self.train), len(self.held_out)), (0, 0)
        pairs, rollouts = (sizes, none) if self.kind == "pairs" else (none, sizes)
        return {"pairs": pairs[0], "eval_pairs": pairs[1], "rollouts": rollouts[0], "eval_rollouts": rollouts[1]}


@dataclass
class _Source:
    """A whole file, tokenised. ``hashes`` are those of its prompts, in [0, 1); they decide which rows are held out."""

    units: Sequence[Any]
    hashes: "np.ndarray[Any, Any]"
    fingerprint: str

    def select(self, mask: "np.ndarray[Any, Any]") -> Sequence[Any]:
        rows = np.flatnonzero(mask)
        if isinstance(self.units, TokenizedPairs):
            return self.units.take(rows)
        return [self.units[int(i)] for i in rows]


def read_data(
    settings: TrainSettings,
    config: Any,
    tokenizer: Any,
    max_length: int | None,
    *,
    embeddings: int | None = None,
    is_main: bool = True,
    show: bool = False,
) -> TrainData:
    """Read training and held-out pairs or rollouts.

    Pairs are kept as token ids in flat arrays (`TokenStore`), on disk beyond 128 MB, so that a million of them need
    little memory.

    Args:
        settings: of the run.
        config: trl's arguments, for when to evaluate.
        tokenizer: of the base model.
        max_length: longest prompt + completion in tokens.
        embeddings: number of tokens that the model has embeddings for; None is not checked.
        is_main: whether this process warns and writes rejected rows.
        show: write progress to stderr.

    Raises:
        DataError: unusable rows, or none to train on.
        UsageError: evaluation during training is asked for, but no data is held out.
        OutputError: no room for the token ids.
    """

    def read(path: str, rejects: str) -> _Source:
        rejects_path = settings.output / rejects if is_main and settings.on_bad == "skip" else None
        with warnings.catch_warnings():
            if not is_main:  # the main process warns for all
                warnings.simplefilter("ignore")
            reader = _read_pairs if kind == "pairs" else _read_rollouts
            limits = {"max_length": max_length, "embeddings": embeddings}
            return reader(settings, path, tokenizer, limits, rejects_path, show and is_main)

    # 1. the training file, and the held-out file if there is one
    kind: DataKind = "pairs" if settings.rollouts is None else "rollouts"
    source = settings.pairs or settings.rollouts
    assert source is not None, "validated with the settings"
    every, held_out_fingerprint = read(source, "rejects.jsonl"), None
    if held_out_source := settings.eval_pairs or settings.eval_rollouts:
        other = read(held_out_source, "eval-rejects.jsonl")
        train, held_out, held_out_fingerprint = every.units, other.units, other.fingerprint
        common = len(np.intersect1d(every.hashes, other.hashes))
        if common and is_main:
            warnings.warn(f"{common} prompts are in --{kind} and --eval-{kind}: evaluation is optimistic", stacklevel=2)
    # 2. else a part of the prompts is held out
    else:
        mask = held_out_prompts(every.hashes, settings.eval_fraction)
        train, held_out = every.select(~mask), every.select(mask)
    if not train:
        raise DataError(f"{source} leaves nothing to train on; add {kind} or lower eval_fraction")
    if config.eval_strategy != "no" and not held_out:
        raise UsageError(f"train.eval_strategy={config.eval_strategy} needs held-out {kind}; give --eval-{kind}")
    return TrainData(kind, train, held_out, every.fingerprint, held_out_fingerprint)


def _read_pairs(
    settings: TrainSettings, path: str, tokenizer: Any, limits: dict[str, Any], rejects: Path | None, show: bool
) -> _Source:
    store, hashes = TokenStore(), array("d")
    reader = PairReader(
        path, tokenizer=tokenizer, on_bad=settings.on_bad, rejects=rejects, **limits,
        progress=progress(f"reading {path}") if show else None, chat_template_kwargs=settings.chat_template_kwargs,
    )  # fmt: skip
    for pair, ids in reader:
        assert ids is not None, "there is a tokenizer"
        store.append(ids)
        hashes.append(split_position(pair.prompt, settings.seed))
    return _Source(TokenizedPairs(store, np.arange(len(store))), np.array(hashes), reader.fingerprint)


def _read_rollouts(
    settings: TrainSettings, path: str, tokenizer: Any, limits: dict[str, Any], rejects: Path | None, show: bool
) -> _Source:
    labels = settings.objective == "cumulative-mse"
    found = read_rollouts(
        path, tokenizer=tokenizer, on_bad=settings.on_bad, rejects=rejects, labels=labels, **limits,
        reward_range=settings.options.reward_range if labels else None,
        chat_template_kwargs=settings.chat_template_kwargs,
        progress=progress(f"reading {path}") if show else None,
    )  # fmt: skip
    hashes = np.array([split_position(row.prompt, settings.seed) for row in found.rows])
    return _Source(tokenize_rollouts(found.rows, tokenizer), hashes, found.fingerprint)


class TokenStore:
    """Token ids of pairs as int32, in memory up to a limit, beyond it in an unnamed file.

    The file is in the temporary folder (TMPDIR). The system removes it however the process ends.

    Args:
        memory_limit: bytes of token ids kept in memory.
    """

    def __init__(self, *, memory_limit: int = STORE_LIMIT) -> None:
        self._limit = memory_limit
        self._ids = array("i")
        self._ends = array("q", [0])  # of each part of each pair, in order
        self._file: BinaryIO | None = None

    def append(self, pair: TokenizedPair) -> None:
        """Add a pair.

        Raises:
            OutputError: no room in the temporary folder.
        """
        for part in pair.parts:
            self._ids.extend(part)
            self._ends.append(self._ends[-1] + len(part))
        if self._file is not None:
            if len(self._ids) >= _IDS_PER_WRITE:
                self._spill()
        elif self._ids.itemsize * len(self._ids) > self._limit:
            self._file = tempfile.TemporaryFile(prefix="rgtg-tokens-")  # noqa: SIM115  # open as long as the store
            weakref.finalize(self, self._file.close)
            self._spill()

    def __len__(self) -> int:
        return (len(self._ends) - 1) // _PARTS_OF_PAIR

    def pair(self, index: int) -> TokenizedPair:
        """Read one pair."""
        first = index * _PARTS_OF_PAIR
        ends = self._ends[first : first + _PARTS_OF_PAIR + 1]
        ids = self._read(ends[0], ends[-1])
        prompt, chosen, rejected = (ids[a - ends[0] : b - ends[0]].tolist() for a, b in pairwise(ends))
        return TokenizedPair(prompt, chosen, rejected)

    @property
    def on_disk(self) -> bool:
        """Whether the ids are in a file."""
        return self._file is not None

    def _spill(self) -> None:
        assert self._file is not None, "opened before"
        try:
            self._file.seek(0, 2)
            self._ids.tofile(self._file)
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"no room for the token ids in {tempfile.gettempdir()}: {error.strerror or error}; use another "
                "folder (TMPDIR=...)"
            ) from error
        self._ids = array("i")

    def _read(self, begin: int, end: int) -> "array[int]":
        """Read a range of ids. The file is not memory-mapped, because mapped pages count as memory of the process."""
        if self._file is None:
            return self._ids[begin:end]
        if self._ids:
            self._spill()
        ids, size = array("i"), self._ids.itemsize
        ids.frombytes(os.pread(self._file.fileno(), size * (end - begin), size * begin))
        return ids


class TokenizedPairs(Sequence[TokenizedPair]):
    """Some pairs of a store as a sequence; each pair is read when it is accessed."""

    def __init__(self, store: TokenStore, indices: "np.ndarray[Any, Any]") -> None:
        self._store, self._indices = store, indices

    def take(self, chosen: "np.ndarray[Any, Any]") -> "TokenizedPairs":
        """The pairs at the given indices."""
        return TokenizedPairs(self._store, self._indices[chosen])

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...

    @overload
    def __getitem__(self, index: slice) -> "TokenizedPairs": ...

    def __getitem__(self, index: int | slice) -> "TokenizedPair | TokenizedPairs":
        if isinstance(index, slice):
            return TokenizedPairs(self._store, self._indices[index])
        return self._store.pair(int(self._indices[index]))


def pairs_dataset(pairs: Sequence[Any], weights: Sequence[Sequence[float]] | None = None) -> Dataset:
    """A dataset of tokenised pairs in trl's columns: prompt and completion together, and the prompt's length.

    More than ``DATASET_LIMIT`` pairs are kept in a file in the temporary folder (TMPDIR), removed with the dataset.

    Args:
        pairs: anything with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` (completions only).
        weights: weight of each pair at each prefix, as many as the longer completion has tokens.
    """
    if len(pairs) <= DATASET_LIMIT:
        return Dataset.from_dict(_pair_columns(pairs, weights))
    folder = tempfile.TemporaryDirectory(prefix="rgtg-pairs-")
    path = Path(folder.name) / "pairs.arrow"
    try:
        _write_arrow(path, pairs, weights)
    except OSError as error:
        raise OutputError(
            f"no room for the pairs in {tempfile.gettempdir()}: {error}; name another folder (TMPDIR=...)"
        ) from error
    dataset = Dataset.from_file(str(path))
    dataset.rgtg_folder = folder  # removed when the dataset is
    return dataset


def _pair_columns(pairs: Sequence[Any], weights: Sequence[Sequence[float]] | None) -> dict[str, list[Any]]:
    return {
        "chosen_ids": [[*pair.prompt_ids, *pair.chosen_ids] for pair in pairs],
        "rejected_ids": [[*pair.prompt_ids, *pair.rejected_ids] for pair in pairs],
        "prompt_length": [len(pair.prompt_ids) for pair in pairs],
        **({} if weights is None else {"pair_weights": [list(row) for row in weights]}),
    }


def _write_arrow(path: Path, pairs: Sequence[Any], weights: Sequence[Sequence[float]] | None) -> None:
    """Write the columns as an Arrow stream, a thousand pairs at a time."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    fields = {"chosen_ids": ids, "rejected_ids": ids, "prompt_length": pyarrow.int32()}
    schema = pyarrow.schema(fields | ({} if weights is None else {"pair_weights": pyarrow.list_(pyarrow.float64())}))
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(pairs), 1000):
            part = slice(start, start + 1000)
            columns = _pair_columns(pairs[part], None if weights is None else weights[part])
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def rollouts_dataset(rollouts: Sequence[TokenizedRollout]) -> Dataset:
    """A dataset of tokenised rollouts: prompt and completion together, the prompt's length and the reward."""
    return Dataset.from_dict({
        "completion_ids": [[*rollout.prompt_ids, *rollout.completion_ids] for rollout in rollouts],
        "prompt_length": [len(rollout.prompt_ids) for rollout in rollouts],
        "reward": [rollout.reward for rollout in rollouts],
    })  # fmt: skip


@dataclass
class PrefixCollator(DataCollatorMixin):  # type: ignore[misc]
    """Stacks pairs as trl does, rows [chosen …; rejected …] padded on the right, and keeps the prompt lengths.

    Example:
        >>> row = {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 4], "prompt_length": 1}
        >>> PrefixCollator(pad_token_id=0)([row])["input_ids"].tolist()
        [[1, 2, 3], [1, 4, 0]]
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch: input_ids and attention_mask (2B, L), prompt_lengths (B,), and pair_weights (B, T) if any."""
        rows = [row["chosen_ids"] for row in examples] + [row["rejected_ids"] for row in examples]
        batch = _pad_rows(rows, examples, self.pad_token_id, self.pad_to_multiple_of)
        if examples[0].get("pair_weights") is not None:
            weights = [torch.tensor(row["pair_weights"]) for row in examples]
            batch["pair_weights"] = pad_sequence(weights, batch_first=True)
        return batch


@dataclass
class RolloutCollator(DataCollatorMixin):  # type: ignore[misc]
    """Stacks prompts with their completions, padded on the right.

    Example:
        >>> rows = [{"completion_ids": [1, 2, 3], "prompt_length": 1, "reward": 0.5}]
        >>> RolloutCollator(pad_token_id=0)(rows)["rewards"]
        tensor([0.5000])
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch: input_ids and attention_mask (B, L), prompt_lengths (B,), rewards (B,)."""
        rows = [row["completion_ids"] for row in examples]
        batch = _pad_rows(rows, examples, self.pad_token_id, self.pad_to_multiple_of)
        return batch | {"rewards": torch.tensor([row["reward"] for row in examples], dtype=torch.float32)}


def _pad_rows(
    rows: Sequence[Sequence[int]], examples: list[dict[str, Any]], pad_token_id: int, pad_to_multiple_of: int | None
) -> dict[str, Tensor]:
    """input_ids and attention_mask (rows, L), padded on the right, and prompt_lengths (B,)."""
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad(ids, padding_value=pad_token_id, pad_to_multiple_of=pad_to_multiple_of),
        "attention_mask": pad(masks, padding_value=0, pad_to_multiple_of=pad_to_multiple_of),
        "prompt_lengths": torch.tensor([row["prompt_length"] for row in examples]),
    }


def prepare_pairs(dataset: Any, tokenizer: Any, max_length: int | None, name: str) -> Any:
    """Tokenise a dataset of texts if it is not tokenised, and check its rows.

    Args:
        dataset: with texts (prompt, chosen, rejected) or token ids (`TOKENIZED_PAIR_COLUMNS`).
        tokenizer: of the model.
        max_length: longest prompt + completion in tokens.
        name: of the dataset, for messages.

    Raises:
        UsageError: columns that are neither token ids nor texts.
        DataError: an empty prompt or completion, or a row over ``max_length`` (trl would drop it silently).
    """
    if isinstance(dataset, IterableDataset):
        return dataset  # its rows are read only during training
    columns = set(dataset.column_names)
    if "margin" in columns:
        raise UsageError(f"the {name} dataset has a margin column, which these objectives do not use; remove it")
    if {"prompt", "chosen", "rejected"} <= columns and not columns >= set(TOKENIZED_PAIR_COLUMNS):
        dataset = _tokenize_texts(dataset, tokenizer)
    elif not columns >= set(TOKENIZED_PAIR_COLUMNS):
        raise UsageError(
            f"the {name} dataset has columns {sorted(columns)}; expected texts in prompt, chosen and rejected, or "
            f"token ids in {', '.join(TOKENIZED_PAIR_COLUMNS)}"
        )
    for i, row in enumerate(dataset):
        shorter, longer = sorted((len(row["chosen_ids"]), len(row["rejected_ids"])))
        _require_lengths(i, name, row["prompt_length"], shorter, longer, max_length)
    return dataset


def _tokenize_texts(dataset: Dataset, tokenizer: Any) -> Dataset:
    from rgtg.data.pairs import tokenize_pairs
    from rgtg.types.generation import PreferencePair

    fields = [name for name in PreferencePair.model_fields if name in dataset.column_names]
    pairs = [PreferencePair(**{name: row[name] for name in fields}) for row in dataset]
    return pairs_dataset(tokenize_pairs(pairs, tokenizer))


def prepare_rollouts(dataset: Any, max_length: int | None, name: str) -> float:
    """Check the rows of a dataset of rollouts, and return the mean number of tokens of a completion.

    Args:
        dataset: with the columns `ROLLOUT_COLUMNS`.
        max_length: longest prompt + completion in tokens.
        name: of the dataset, for messages.

    Raises:
        UsageError: other columns.
        DataError: an empty prompt or completion, or a row over ``max_length``.
    """
    if not set(dataset.column_names) >= set(ROLLOUT_COLUMNS):
        raise UsageError(
            f"the {name} dataset has columns {sorted(dataset.column_names)}; expected {', '.join(ROLLOUT_COLUMNS)} "
            "(rgtg.training.data.dataset.rollouts_dataset makes them)"
        )
    tokens = 0
    for i, row in enumerate(dataset):
        length = len(row["completion_ids"])
        _require_lengths(i, name, row["prompt_length"], length, length, max_length)
        tokens += length - row["prompt_length"]
    return tokens / len(dataset)


def _require_lengths(i: int, name: str, prompt: int, shorter: int, longer: int, max_length: int | None) -> None:
    if not 0 < prompt < shorter:
        raise DataError(f"row {i} of the {name} dataset has an empty prompt or an empty completion")
    if max_length is not None and longer > max_length:
        raise DataError(
            f"row {i} of the {name} dataset has {longer} tokens, more than max_length {max_length}; "
            "drop the row or raise max_length"
        )
