"""Rows of unequal length as rectangular tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def pad_right(rows: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    """Stack ragged rows: ids (B, T) padded on the right, and their 0/1 mask."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def batches_by_length(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int, device: Any
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices of rows of like length (little padding), with their padded ids (B, T) and mask."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        yield part, *pad_right([[*rows[i][0], *rows[i][1]] for i in part], 0, device)
