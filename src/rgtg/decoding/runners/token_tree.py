"""Token trees over a cached prefix: tokens, positions, which tokens each node attends to, and the states read there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenTree:
    """Nodes after a cached prefix of length L; all rows of a batch have the same shape and their own tokens.

    Node j sits at position ``L + depth[j]`` and attends to the prefix, to its ancestors and to itself.

    Attributes:
        tokens: (B, N) token of each node.
        parents: (N,) index of each node's parent, smaller than its own; -1 for the prefix.
    """

    tokens: Int[Tensor, "batch nodes"]
    parents: tuple[int, ...]

    @classmethod
    def leaves(cls, candidate_ids: Int[Tensor, "batch candidates"]) -> Self:
        """K candidates of the next token: every node hangs on the prefix."""
        return cls(candidate_ids, (-1,) * candidate_ids.shape[1])

    @classmethod
    def chain(cls, token_ids: Int[Tensor, "batch length"]) -> Self:
        """A sequence of tokens, each the child of the one before."""
        return cls(token_ids, tuple(range(-1, token_ids.shape[1] - 1)))

    @property
    def width(self) -> int:
        """Number of nodes N."""
        return len(self.parents)

    @property
    def depths(self) -> Int[Tensor, " nodes"]:
        """Ancestors of each node, counted: (N,). Refuses what is no tree."""
        return tree_depths(self.parents, self.tokens.shape[1])

    @property
    def ancestry(self) -> Bool[Tensor, "nodes nodes"]:
        """``ancestry[i, j]``: node i attends to node j, that is j is i or one of its ancestors."""
        return tree_ancestry(self.parents)

    def path(self, node: int) -> list[int]:
        """Nodes from the prefix down to ``node``, itself included."""
        walked = [node]
        while (parent := self.parents[walked[-1]]) >= 0:
            walked.append(parent)
        return walked[::-1]


class States(NamedTuple):
    """Hidden states of one forward pass.

    Attributes:
        final: (B, H) or (B, N, H) the final states, which the output head reads.
        hooked: the same positions of the layer that scorers read; None where they read none.
    """

    final: Tensor
    hooked: Tensor | None

    def at(self, index: Any) -> "States":
        """The states at an index of the first dimensions: some rows, or one node of each row."""
        return States(self.final[index], None if self.hooked is None else self.hooked[index])


# A decoding loop reads trees of few shapes, thousands of times.
@lru_cache(maxsize=256)
def tree_depths(parents: tuple[int, ...], nodes: int) -> Tensor:
    """Number of ancestors of each node, (N,).

    Raises:
        ValueError: another number of parents than of nodes, or a parent that does not come before its node.
    """
    if len(parents) != nodes:
        raise ValueError(f"{nodes} nodes need as many parents, got {len(parents)}")
    depths: list[int] = []
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError("a node's parent must come before it (or be -1, the prefix)")
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return torch.tensor(depths)


@lru_cache(maxsize=256)
def tree_ancestry(parents: tuple[int, ...]) -> Tensor:
    """(N, N): ``[i, j]`` is true where node j is node i or one of its ancestors."""
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees


class TokenTrie:
    """One row's branches as a trie: branches that leave the prefix at the same place share their first tokens.

    Attributes:
        tokens: of each node.
        parents: of each node; -1 is the prefix.
        places: number of prefix tokens that each node attends to.
        positions: of each node, in tokens from the beginning of the row.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.places: list[int] = []
        self.positions: list[int] = []
        self._found: dict[tuple[int, int, int], int] = {}

    def add(self, place: int, tokens: Sequence[int]) -> int:
        """Add ``tokens`` (at least one) after the first ``place`` tokens of the prefix; the node of the last one."""
        node = -1
        for token in tokens:
            key = (place, node, token)
            if key not in self._found:
                self._found[key] = len(self.tokens)
                self.positions.append(place if node < 0 else self.positions[node] + 1)
                self.tokens.append(token)
                self.parents.append(node)
                self.places.append(place)
            node = self._found[key]
        return node

    def path(self, node: int) -> list[int]:
        """Nodes from the prefix down to ``node``, itself included."""
        walked = []
        while node >= 0:
            walked.append(node)
            node = self.parents[node]
        return walked[::-1]


class RaggedTree:
    """Tries of all rows, padded to the same number of nodes N; a padding node attends to itself only."""

    def __init__(self, rows: Sequence[TokenTrie], lengths: Sequence[int]) -> None:
        """Stack the tries.

        Args:
            rows: trie of each row; some may be empty, not all.
            lengths: number of prefix tokens of each row; the nodes follow in the next columns.
        """
        self.width = max(len(row.tokens) for row in rows)
        self.lengths = list(lengths)
        self.ids: Int[Tensor, "batch nodes"] = self._padded([row.tokens for row in rows])
        self.positions: Int[Tensor, "batch nodes"] = self._padded([row.positions for row in rows])
        self._places = self._padded([row.places for row in rows]).numpy()
        self._ancestry = np.stack([_padded_ancestry(row.parents, self.width) for row in rows])

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (self.width - len(row))] for row in rows])

    def visible(self, window: int | None) -> Bool[Tensor, "batch nodes columns"]:
        """Which of the columns (longest prefix + N) each node attends to.

        Args:
            window: of sliding attention, in tokens; None sees everything.
        """
        positions = self.positions.numpy()
        columns = np.arange(max(self.lengths) + self.width)
        visible = columns < self._places[..., None]
        ancestry = self._ancestry
        if window is not None:
            visible &= positions[..., None] - columns < window
            ancestry = ancestry & (positions[:, :, None] - positions[:, None] < window)
        for row, length in enumerate(self.lengths):
            visible[row, :, length : length + self.width] |= ancestry[row]
        return torch.from_numpy(visible)


def _padded_ancestry(parents: Sequence[int], width: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """(N, N): ``[i, j]`` is true where j is node i or one of its ancestors."""
    sees = np.eye(width, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees
