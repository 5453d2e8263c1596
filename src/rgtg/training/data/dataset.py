"""Preference pairs as the trainers read them: a dataset of token ids, and batches of it."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers.data.data_collator import DataCollatorMixin

from rgtg.errors import DataError, OutputError, UsageError
from rgtg.tokenization.padding import pad_right

IN_MEMORY = 100_000  # pairs
COLUMNS = ("chosen_ids", "rejected_ids", "prompt_length")


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

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch: input_ids and attention_mask (2B, L), prompt_lengths (B,)."""
        rows = [row["chosen_ids"] for row in examples] + [row["rejected_ids"] for row in examples]
        ids, mask = pad_rows(rows, self.pad_token_id, self.pad_to_multiple_of)
        lengths = torch.tensor([row["prompt_length"] for row in examples])
        batch = {"input_ids": ids, "attention_mask": mask, "prompt_lengths": lengths}
        if examples[0].get("trust") is not None:
            trust = [torch.tensor(row["trust"]) for row in examples]
            batch["trust"] = torch.nn.utils.rnn.pad_sequence(trust, batch_first=True)
        return batch


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, pad_to_multiple_of: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, L) and mask of rows padded on the right, to a multiple of some length where that is asked for."""
    ids, mask = pad_right(rows, pad_token_id, "cpu")
    if pad_to_multiple_of and (extra := -ids.shape[1] % pad_to_multiple_of):
        ids = torch.nn.functional.pad(ids, (0, extra), value=pad_token_id)
        mask = torch.nn.functional.pad(mask, (0, extra))
    return ids, mask


def pairs_dataset(pairs: Sequence[Any], trust: Sequence[Sequence[float]] | None = None) -> Dataset:
    """A dataset of tokenised pairs in trl's columns: prompt and completion together, plus the prompt's length.

    More than ``IN_MEMORY`` pairs lie in a file in the temporary folder (TMPDIR), which goes with the dataset.

    Args:
        pairs: anything with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` (completions only).
        trust: how far each pair's judgement is trusted at each prefix, as many as the longer completion has tokens.
    """
    if len(pairs) <= IN_MEMORY:
        return Dataset.from_dict(_columns(pairs, trust))
    folder = tempfile.TemporaryDirectory(prefix="rgtg-pairs-")
    path = Path(folder.name) / "pairs.arrow"
    try:
        _write_arrow(path, pairs, trust)
    except OSError as error:
        raise OutputError(
            f"no room for the pairs in {tempfile.gettempdir()}: {error}; name another folder (TMPDIR=...)"
        ) from error
    dataset = Dataset.from_file(str(path))
    dataset.rgtg_folder = folder  # removed with it
    return dataset


def _columns(pairs: Sequence[Any], trust: Sequence[Sequence[float]] | None) -> dict[str, list[Any]]:
    return {
        "chosen_ids": [[*pair.prompt_ids, *pair.chosen_ids] for pair in pairs],
        "rejected_ids": [[*pair.prompt_ids, *pair.rejected_ids] for pair in pairs],
        "prompt_length": [len(pair.prompt_ids) for pair in pairs],
        **({} if trust is None else {"trust": [list(row) for row in trust]}),
    }


def _write_arrow(path: Path, pairs: Sequence[Any], trust: Sequence[Sequence[float]] | None) -> None:
    """The columns as an Arrow stream, a thousand pairs at a time."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    fields = {"chosen_ids": ids, "rejected_ids": ids, "prompt_length": pyarrow.int32()}
    schema = pyarrow.schema(fields | ({} if trust is None else {"trust": pyarrow.list_(pyarrow.float64())}))
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(pairs), 1000):
            part = slice(start, start + 1000)
            columns = _columns(pairs[part], None if trust is None else trust[part])
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def prepare(dataset: Any, tokenizer: Any, max_length: int | None, name: str) -> Any:
    """Tokenise a dataset of texts if need be, and refuse rows that cannot be trained on.

    Raises:
        UsageError: columns that are neither token ids nor texts.
        DataError: an empty prompt or completion, or a row over ``max_length`` (trl would drop it silently).
    """
    if isinstance(dataset, IterableDataset):
        return dataset  # its rows are seen only while training
    columns = set(dataset.column_names)
    if "margin" in columns:
        raise UsageError(f"the {name} dataset has a margin column, which these objectives do not use; remove it")
    if {"prompt", "chosen", "rejected"} <= columns and not columns >= set(COLUMNS):
        dataset = _tokenise(dataset, tokenizer)
    elif not columns >= set(COLUMNS):
        raise UsageError(
            f"the {name} dataset has columns {sorted(columns)}; expected texts in prompt, chosen and rejected, or "
            f"token ids in {', '.join(COLUMNS)}"
        )
    _require_rows(dataset, max_length, name)
    return dataset


def _tokenise(dataset: Dataset, tokenizer: Any) -> Dataset:
    from rgtg.data.pairs import tokenize_pairs
    from rgtg.types.generation import PreferencePair

    fields = [name for name in PreferencePair.model_fields if name in dataset.column_names]
    pairs = [PreferencePair(**{name: row[name] for name in fields}) for row in dataset]
    return pairs_dataset(tokenize_pairs(pairs, tokenizer))


def _require_rows(dataset: Dataset, max_length: int | None, name: str) -> None:
    for i, row in enumerate(dataset):
        shorter, longer = sorted((len(row["chosen_ids"]), len(row["rejected_ids"])))
        if not 0 < row["prompt_length"] < shorter:
            raise DataError(f"row {i} of the {name} dataset has an empty prompt or an empty completion")
        if max_length is not None and longer > max_length:
            raise DataError(
                f"row {i} of the {name} dataset has {longer} tokens, more than max_length {max_length}; "
                "drop the row or raise max_length"
            )
