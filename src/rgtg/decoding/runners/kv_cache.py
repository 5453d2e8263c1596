"""Preallocated cache: write a tree behind each row's prefix, keep one path, drop the rest.

The one file on transformers' Cache interface, which changes often.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class TreeLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's view of a ``TreeCache``: ``update`` writes the pass behind each row's prefix and returns views.

    Nothing is concatenated, and what is not kept is overwritten by the next pass. Sliding windows are the mask's
    business; every column stays stored.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: "TreeCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take buffers on the first write, when shapes, dtype and device are known."""
        self.slots = self.cache.allocate(key_states), self.cache.allocate(value_states)
        self.is_initialized = True
        self.look_up()

    def look_up(self) -> None:
        """Point at this layer's buffers, after the cache has made or replaced them."""
        if self.is_initialized:
            rows = len(self.cache.lengths)
            self.keys, self.values = (self.cache.pools[pool][slot][:rows] for pool, slot in self.slots)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values behind each row's kept columns; return views of all columns in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where, end = self.cache.columns(key_states.shape[-2])
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(where, slice):
                buffer[:, :, where] = states
            else:
                rows, columns = (index.to(buffer.device) for index in where)
                buffer[rows, :, columns] = states.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Total columns after a pass of ``query_length`` tokens, and the offset of the first."""
        return self.cache.longest + query_length, 0

    def get_seq_length(self) -> int:
        """Kept columns of the longest row."""
        return self.cache.longest

    def get_max_length(self) -> int:
        """Columns there is room for."""
        return self.cache.capacity


class TreeCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers, each row's prefix stored once and followed by the nodes of the last pass.

    ``lengths[b]`` columns of row b are kept. Rows may differ in length (prompts of several lengths, drafts of which
    more or fewer tokens were accepted); where they do not, a pass writes one slice. Buffers of one shape stand in one
    tensor (2·layers, R, heads, capacity, dim), R ≥ B, so that keeping a path is one copy, not one per layer. Rows that
    leave make place for those that join.
    """

    def __init__(self, layers: int, capacity: int, *, spread: bool = False) -> None:
        """``spread``: the layers may be on several devices, and none of these gets room for all of them."""
        self.capacity = capacity
        self.spread = spread
        self.lengths: list[int] = []
        self.pools: list[Tensor] = []
        self._used: list[int] = []
        self._where: tuple[int, Any] | None = None
        self._written = 0  # columns that any pass has reached
        super().__init__(layers=[TreeLayer(self) for _ in range(layers)])

    @property
    def longest(self) -> int:
        """Kept columns of the longest row."""
        return max(self.lengths, default=0)

    @property
    def uniform(self) -> int | None:
        """Kept columns where every row has as many, else None."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(pool.nbytes for pool in self.pools)

    def start(self, rows: int) -> None:
        """Begin anew with so many empty rows."""
        self._make_rows(rows)
        self._set_lengths([0] * rows)

    def allocate(self, like: Tensor) -> tuple[int, int]:
        """Pool and place in it of one new buffer (B, heads, capacity, dim); one pool holds all layers of a shape."""
        batch, heads, _, dim = like.shape
        shape = (batch, heads, self.capacity, dim)
        for i, pool in enumerate(self.pools):
            alike = pool.shape[1:] == shape and pool.dtype == like.dtype and pool.device == like.device
            if alike and self._used[i] < len(pool):
                self._used[i] += 1
                return i, self._used[i] - 1
        room = 2 * len(self.layers) if not self.pools else 2
        if self.spread:
            room = min(2 * len(self.layers), 16)  # eight layers, as they fill up
        # zeros: see select_rows
        self.pools.append(torch.zeros((room, *shape), dtype=like.dtype, device=like.device))
        self._used.append(1)
        return len(self.pools) - 1, 0

    def columns(self, width: int) -> tuple[Any, int]:
        """Where a pass of ``width`` nodes is written: a slice, or (rows, columns) to index with; and where it ends."""
        if self._where is None or self._where[0] != width:
            end = self.longest + width
            if end > self.capacity:
                raise ValueError(f"a cache for {self.capacity} tokens was asked to hold {end}")
            where: Any = slice(self.longest, end)
            if self.uniform is None:
                device = self.pools[0].device
                rows = torch.arange(len(self.lengths), device=device)[:, None]
                where = rows, torch.tensor(self.lengths, device=device)[:, None] + torch.arange(width, device=device)
            self._where = (width, (where, end))
            self._written = max(self._written, end)
        found: tuple[Any, int] = self._where[1]
        return found

    def keep_first(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts[b]`` nodes of row b as they stand (a prompt)."""
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]
        self._where = None

    def forget(self, counts: Sequence[int]) -> None:
        """Forget the last ``counts[b]`` kept columns of row b (drafts that were rejected)."""
        self.keep_first([-n for n in counts])

    def keep_path(self, nodes: Tensor, counts: Sequence[int] | None = None, stays: Sequence[int] | None = None) -> None:
        """Keep one path per row: ``nodes[b, :counts[b]]`` (B, D), in order; the other nodes are overwritten next.

        Without ``counts`` all D nodes are kept. With ``stays``, the path follows the first ``stays[b]`` kept columns,
        and those after them are forgotten.
        """
        batch, depth = nodes.shape
        kept = list(counts) if counts is not None else [depth] * batch
        after = list(stays) if stays is not None else self.lengths
        if batch == 1 and nodes.device.type == "cpu":  # one row: plain columns, nothing to index with
            self._move(self.lengths[0], after[0], nodes[0, : kept[0]].tolist())
        else:
            for pool in self.pools:
                rows = torch.arange(batch, device=pool.device)[:, None]
                source = torch.tensor(self.lengths, device=pool.device)[:, None] + nodes.to(pool.device)
                target = torch.tensor(after, device=pool.device)[:, None] + torch.arange(depth, device=pool.device)
                pool[:, rows, :, target] = pool[:, rows, :, source]
        self.lengths = after
        self.keep_first(kept)

    def _move(self, source: int, target: int, nodes: list[int]) -> None:
        """Copy columns of the only row, from left to right: a node never lies before its place on the path."""
        for step, node in enumerate(nodes):
            if source + node != target + step:
                for pool in self.pools:
                    pool[:, :1, :, target + step] = pool[:, :1, :, source + node]

    def grow(self, columns: int) -> None:
        """Make room for so many columns; what is kept is copied."""
        self.capacity = max(columns, self.capacity + self.capacity // 4)
        for i, pool in enumerate(self.pools):
            larger = pool.new_zeros((*pool.shape[:3], self.capacity, pool.shape[-1]))
            larger[:, :, :, : pool.shape[3]] = pool
            self.pools[i] = larger
        self._set_lengths(self.lengths)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows of the batch; a row that keeps its place is not copied.

        Others bring along what was written behind their prefix: of the row that was there before nothing may stay,
        since what is hidden from a node still meets its attention weight of 0, and 0 times NaN would be NaN.
        """
        chosen: list[int] = rows.tolist()
        self._make_rows(len(chosen))
        moved = [(to, source) for to, source in enumerate(chosen) if to != source]
        if moved:
            to, source = torch.tensor(moved).T
            for pool in self.pools:
                pool[:, to, :, : self._written] = pool[:, source, :, : self._written]
        self._set_lengths([self.lengths[i] for i in chosen])

    def join(self, other: "TreeCache") -> None:
        """Append copies of another cache's rows, which must fit.

        Both are of one model; a cache without buffers takes the other's shapes.
        """
        rows, more = len(self.lengths), len(other.lengths)
        if not self.pools:
            self._take_shapes(other)
        self._make_rows(rows + more)
        for pool, theirs in zip(self.pools, other.pools, strict=True):
            pool[:, rows : rows + more, :, : other.longest] = theirs[:, :more, :, : other.longest]
            pool[:, rows : rows + more, :, other.longest : self._written] = 0  # see select_rows
        self._written = max(self._written, other.longest)
        self._set_lengths([*self.lengths, *other.lengths])

    def take_first(self, other: "TreeCache", columns: int) -> None:
        """Begin with copies of the first columns of each row of another cache of the same model."""
        self.pools = []
        self._take_shapes(other)
        self._make_rows(len(other.lengths))
        for pool, theirs in zip(self.pools, other.pools, strict=True):
            pool[:, :, :, :columns] = theirs[:, : len(other.lengths), :, :columns]
        self._written = columns
        self._set_lengths([columns] * len(other.lengths))

    def copy_of(self, rows: Sequence[int]) -> "TreeCache":
        """What is kept of some rows, which are equally long, in a cache of their own without room for more."""
        length = self.lengths[rows[0]]
        copied = TreeCache(len(self.layers), length, spread=self.spread)
        copied._used, copied.lengths = list(self._used), [length] * len(rows)
        copied.pools = [pool[:, list(rows), :, :length] for pool in self.pools]
        for mine, theirs in zip(copied.layers, self.layers, strict=True):
            mine.slots, mine.is_initialized = theirs.slots, theirs.is_initialized
            mine.look_up()
        return copied

    def _take_shapes(self, other: "TreeCache") -> None:
        """Pools like another cache's, without rows, and the layers' places in them."""
        for theirs in other.pools:
            self.pools.append(theirs.new_zeros((theirs.shape[0], 0, theirs.shape[2], self.capacity, theirs.shape[4])))
        self._used = list(other._used)
        for mine, layer in zip(self.layers, other.layers, strict=True):
            mine.slots, mine.is_initialized = layer.slots, layer.is_initialized

    def _make_rows(self, rows: int) -> None:
        """Have places for so many rows."""
        for i, pool in enumerate(self.pools):
            if rows > pool.shape[1]:
                larger = pool.new_zeros((pool.shape[0], max(rows, pool.shape[1] * 3 // 2), *pool.shape[2:]))
                larger[:, : pool.shape[1], :, : self._written] = pool[:, :, :, : self._written]
                self.pools[i] = larger

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self._where = None
        for layer in self.layers:
            layer.look_up()
