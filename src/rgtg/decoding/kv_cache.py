"""Preallocated cache: write a tree behind the prefix, keep one path, drop the rest. The one file on Cache's API."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class TreeLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one layer in one buffer (B, heads, capacity, dim), of which ``length`` columns are kept.

    ``update`` writes behind the kept columns and returns everything so far as a view: nothing is concatenated, and what
    is not kept is overwritten by the next pass. Sliding windows are the mask's business; every column stays stored.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on the first write, when shapes, dtype and device are known."""
        self.keys = _buffer(key_states, self.capacity)
        self.values = _buffer(value_states, self.capacity)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values behind the kept columns; return views of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            raise ValueError(f"a cache for {self.capacity} tokens was asked to hold {end}")
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep_node(self, rows: Tensor, nodes: Tensor) -> None:
        """Keep node ``nodes[b]`` of row b as the next column."""
        for buffer in (self.keys, self.values):
            buffer[:, :, self.length] = buffer[rows, :, self.length + nodes]
        self.length += 1

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows of the batch."""
        for name in ("keys", "values"):
            buffer = getattr(self, name)
            chosen = torch.empty((len(rows), *buffer.shape[1:]), dtype=buffer.dtype, device=buffer.device)
            chosen[:, :, : self.length] = buffer[rows, :, : self.length]
            setattr(self, name, chosen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Total columns after a pass of ``query_length`` tokens, and the offset of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Kept columns."""
        return self.length

    def get_max_length(self) -> int:
        """Columns there is room for."""
        return self.capacity


class TreeCache(Cache):  # type: ignore[misc]
    """A cache whose layers hold one kept prefix, shared by every node of a tree that is read over it."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[TreeLayer(capacity) for _ in range(layers)])

    @property
    def length(self) -> int:
        """Kept columns."""
        return int(self.layers[0].length)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        held = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.nbytes for t in held)

    def keep_chain(self, tokens: int) -> None:
        """Keep the first ``tokens`` nodes as they stand (a prompt, or a drafted path)."""
        for layer in self.layers:
            layer.length += tokens

    def keep_node(self, nodes: Tensor) -> None:
        """Keep node ``nodes[b]`` (B,) of each row; its siblings are overwritten by the next pass."""
        rows = torch.arange(len(nodes), device=nodes.device)
        for layer in self.layers:
            layer.keep_node(rows, nodes)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows of the batch."""
        for layer in self.layers:
            layer.select_rows(rows)


def _buffer(like: Tensor, capacity: int) -> Tensor:
    batch, heads, _, dim = like.shape
    return torch.empty((batch, heads, capacity, dim), dtype=like.dtype, device=like.device)
