"""Rows of token ids of different lengths as rectangular tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def pad_right(
    rows: Sequence[Sequence[int]], pad_id: int, device: Any
) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
    """Stack rows of token ids, padded on the right.

    Returns:
        The ids (B, T), and their mask (B, T): 1 at tokens, 0 at padding.
    """
    ids = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def batches_by_length(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int, device: Any
) -> Iterator[tuple[list[int], Int[Tensor, "batch length"], Int[Tensor, "batch length"]]]:
    """Batch (prompt, completion) rows of similar length together, so that they need little padding.

    Yields:
        The indices of a batch's rows, their padded ids (B, T), and the mask (B, T).
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        yield batch, *pad_right([[*rows[i][0], *rows[i][1]] for i in batch], 0, device)


def position_ids(attention_mask: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Positions (B, T) counted from each row's first token, whichever side is padded; 0 at padding on the left."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
