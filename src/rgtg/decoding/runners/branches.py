"""Branches that differ from row to row, and leave a row's cached prefix at any place: as tensors, who sees whom."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Branches:
    """One row's branches as a trie: those that leave the prefix at one place share the tokens they begin with.

    Attributes:
        tokens: of each node.
        parents: of each node; -1 is the prefix.
        places: how many tokens of the prefix each node sees.
        positions: of each node, in tokens from the beginning of the row.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.places: list[int] = []
        self.positions: list[int] = []
        self._found: dict[tuple[int, int, int], int] = {}

    def add(self, place: int, tokens: Sequence[int]) -> int:
        """Let ``tokens`` (at least one) follow the first ``place`` tokens of the prefix; the node of the last one."""
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


class BranchBatch:
    """The branches of all rows, padded to the same number of nodes N; a node that pads sees itself alone."""

    def __init__(self, rows: Sequence[Branches], lengths: Sequence[int]) -> None:
        """Stack them.

        Args:
            rows: branches of each row; a row may have none, not all of them.
            lengths: tokens of each row's prefix; the nodes lie in the columns behind it.
        """
        self.width = max(len(row.tokens) for row in rows)
        self.lengths = list(lengths)
        self.ids: Int[Tensor, "batch nodes"] = self._padded([row.tokens for row in rows])
        self.positions: Int[Tensor, "batch nodes"] = self._padded([row.positions for row in rows])
        self._places = self._padded([row.places for row in rows]).numpy()
        self._ancestry = np.stack([_ancestry(row.parents, self.width) for row in rows])

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (self.width - len(row))] for row in rows])

    def sees(self, window: int | None) -> Bool[Tensor, "batch nodes columns"]:
        """Which columns each node attends to, of the longest prefix and N more.

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


def _ancestry(parents: Sequence[int], width: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """``[i, j]``: node i attends to node j, that is j is i or one of its ancestors."""
    sees = np.eye(width, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees
