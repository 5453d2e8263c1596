"""Preallocated key-value cache: write a tree after each row's prefix, commit one path, overwrite the rest.

The one file on transformers' Cache interface, which changes often.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class TreeLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's view of a ``TreeCache``: ``update`` writes a forward pass after each row's prefix and returns views.

    Nothing is concatenated, and columns that are not committed are overwritten by the next pass. The attention mask
    handles sliding windows; all columns stay stored.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: "TreeCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers on the first write, when shapes, dtype and device are known."""
        self.slots = self.cache.allocate(key_states), self.cache.allocate(value_states)
        self.is_initialized = True
        self.cache.refresh_views([self])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, heads, N, dim) after each row's committed columns; return all columns in use."""
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
        """Committed columns of the longest row."""
        return self.cache.longest

    def get_max_length(self) -> int:
        """Columns there is room for."""
        return self.cache.capacity


class TreeCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers; each row's prefix is stored once, followed by the nodes of the last pass.

    ``lengths[b]`` columns of row b are committed. Rows may differ in length (prompts of different lengths, drafts of
    which different numbers of tokens were accepted); where all are equally long, a pass writes one slice. Buffers of
    the same shape share one tensor (2·layers, R, heads, capacity, dim), R ≥ B, so that committing a path is one copy,
    not one per layer. Rows that leave make room for new ones.

    Attributes:
        capacity: columns that the buffers hold.
        lengths: committed columns of each row.
        longest: the largest of them.
        uniform: the length that all rows share; None where they differ.
    """

    def __init__(self, layers: int, capacity: int, *, spread: bool = False) -> None:
        """``spread``: the layers may be on several devices, so buffers are allocated as layers appear."""
        self.capacity = capacity
        self.spread = spread
        self.lengths: list[int] = []
        self.longest = 0
        self.uniform: int | None = None
        self.pools: list[Tensor] = []
        self._used: list[int] = []
        self._where: tuple[int, Any] | None = None
        self._filled = 0  # columns that any pass has reached
        super().__init__(layers=list(map(TreeLayer, [self] * layers)))

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(pool.nbytes for pool in self.pools)

    def reset(self, rows: int) -> None:
        """Start again with so many empty rows."""
        if self.pools:
            self._allocate_rows(rows)
        self._commit_lengths([0] * rows)
        if self.pools:
            self.refresh_views(self.layers)

    def allocate(self, like: Tensor) -> tuple[int, int]:
        """Pool and index of one new buffer (B, heads, capacity, dim); one pool holds all layers of the same shape."""
        batch, heads, _, dim = like.shape
        shape = (batch, heads, self.capacity, dim)
        for i, pool in enumerate(self.pools):
            same = pool.shape[1:] == shape and pool.dtype == like.dtype and pool.device == like.device
            if same and self._used[i] < len(pool):
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
        """Where a pass of ``width`` nodes is written: a slice, or an index (rows, columns); and where it ends."""
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
            self._filled = max(self._filled, end)
        found: tuple[Any, int] = self._where[1]
        return found

    def commit_first(self, counts: Sequence[int]) -> None:
        """Commit the first ``counts[b]`` nodes of row b as they stand (a prompt)."""
        lengths = list(self.lengths)
        for row, n in enumerate(counts):
            lengths[row] += n
        self._commit_lengths(lengths)

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last ``counts[b]`` committed columns of row b (rejected drafts)."""
        self.commit_first([-n for n in counts])

    def commit_path(
        self, nodes: Tensor, counts: Sequence[int] | None = None, after: Sequence[int] | None = None
    ) -> None:
        """Commit one path per row: ``nodes[b, :counts[b]]`` (B, D), in order; other nodes are overwritten next.

        Args:
            nodes: (B, D) node numbers.
            counts: path length of each row; None commits all D nodes.
            after: number of committed columns that the path follows; later ones are dropped. None keeps all.
        """
        batch, depth = nodes.shape
        kept = list(counts) if counts is not None else [depth] * batch
        target = list(after) if after is not None else self.lengths
        if batch == 1 and nodes.device.type == "cpu":  # one row: plain columns, nothing to index with
            self._move(self.lengths[0], target[0], nodes[0, : kept[0]].tolist())
        else:
            for pool in self.pools:
                rows = torch.arange(batch, device=pool.device)[:, None]
                source = torch.tensor(self.lengths, device=pool.device)[:, None] + nodes.to(pool.device)
                to = torch.tensor(target, device=pool.device)[:, None] + torch.arange(depth, device=pool.device)
                pool[:, rows, :, to] = pool[:, rows, :, source]
        self._commit_lengths([length + n for length, n in zip(target, kept, strict=True)])

    def _move(self, source: int, target: int, nodes: list[int]) -> None:
        """Copy columns of the only row from left to right: a node never lies before its place on the path."""
        for step, node in enumerate(nodes):
            if source + node != target + step:
                for pool in self.pools:
                    pool[:, :1, :, target + step] = pool[:, :1, :, source + node]

    def grow(self, columns: int) -> None:
        """Make room for so many columns; committed ones are copied."""
        self.capacity = max(columns, self.capacity + self.capacity // 4)
        for i, pool in enumerate(self.pools):
            larger = pool.new_zeros((*pool.shape[:3], self.capacity, pool.shape[-1]))
            larger[:, :, :, : pool.shape[3]] = pool
            self.pools[i] = larger
        self._set_lengths(self.lengths)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row that keeps its place is not copied.

        Columns that were written after a row's prefix are copied with it, so that nothing of the row that was there
        before stays: hidden columns get attention weight 0, and 0 times a stale NaN would be NaN.
        """
        self._allocate_rows(len(rows))
        moved = [(to, source) for to, source in enumerate(rows) if to != source]
        if moved:
            to, source = torch.tensor(moved).T
            for pool in self.pools:
                pool[:, to, :, : self._filled] = pool[:, source, :, : self._filled]
        self._set_lengths([self.lengths[i] for i in rows])

    def add(self, other: "TreeCache") -> None:
        """Append copies of another cache's rows, which must fit.

        Both caches belong to the same model; a cache without buffers takes over the other's shapes.
        """
        rows, more = len(self.lengths), len(other.lengths)
        if not self.pools:
            self._take_shapes(other)
        self._allocate_rows(rows + more)
        for pool, theirs in zip(self.pools, other.pools, strict=True):
            pool[:, rows : rows + more, :, : other.longest] = theirs[:, :more, :, : other.longest]
            pool[:, rows : rows + more, :, other.longest : self._filled] = 0  # see select_rows
        self._filled = max(self._filled, other.longest)
        self._set_lengths([*self.lengths, *other.lengths])

    def copy_prefix(self, other: "TreeCache", columns: int) -> None:
        """Start with copies of the first columns of each row of another cache of the same model."""
        self.pools = []
        self._take_shapes(other)
        self._allocate_rows(len(other.lengths))
        for pool, theirs in zip(self.pools, other.pools, strict=True):
            pool[:, :, :, :columns] = theirs[:, : len(other.lengths), :, :columns]
        self._filled = columns
        self._set_lengths([columns] * len(other.lengths))

    def copy_rows(self, rows: Sequence[int]) -> "TreeCache":
        """The committed columns of some rows, in a cache of their own without room for more."""
        lengths = [self.lengths[i] for i in rows]
        columns = max(lengths, default=0)
        copied = TreeCache(len(self.layers), columns, spread=self.spread)
        copied._used, copied._filled = list(self._used), columns
        copied.pools = [pool[:, list(rows), :, :columns] for pool in self.pools]
        for mine, theirs in zip(copied.layers, self.layers, strict=True):
            mine.is_initialized = theirs.is_initialized
            if theirs.is_initialized:
                mine.slots = theirs.slots
        copied._set_lengths(lengths)
        return copied

    def _take_shapes(self, other: "TreeCache") -> None:
        """Pools like another cache's, without rows, and each layer's place in them."""
        for theirs in other.pools:
            self.pools.append(theirs.new_zeros((theirs.shape[0], 0, theirs.shape[2], self.capacity, theirs.shape[4])))
        self._used = list(other._used)
        for mine, layer in zip(self.layers, other.layers, strict=True):
            mine.is_initialized = layer.is_initialized
            if layer.is_initialized:
                mine.slots = layer.slots

    def _allocate_rows(self, rows: int) -> None:
        """Have buffers for so many rows."""
        for i, pool in enumerate(self.pools):
            if rows > pool.shape[1]:
                larger = pool.new_zeros((pool.shape[0], max(rows, pool.shape[1] * 3 // 2), *pool.shape[2:]))
                larger[:, : pool.shape[1], :, : self._filled] = pool[:, :, :, : self._filled]
                self.pools[i] = larger

    def _set_lengths(self, lengths: list[int]) -> None:
        """Set the number of rows and their lengths."""
        self._commit_lengths(lengths)
        if self.pools:
            self.refresh_views(self.layers)

    def refresh_views(self, layers: Sequence[TreeLayer]) -> None:
        """Point layers at their buffers again, after these have been allocated or replaced."""
        rows = len(self.lengths)
        for layer in layers:
            if layer.is_initialized:
                (key_pool, key_slot), (value_pool, value_slot) = layer.slots
                layer.keys = self.pools[key_pool][key_slot][:rows]
                layer.values = self.pools[value_pool][value_slot][:rows]

    def _commit_lengths(self, lengths: list[int]) -> None:
        self.lengths, self._where = lengths, None
        self.longest = max(lengths, default=0)
        self.uniform = self.longest if lengths and min(lengths) == self.longest else None
