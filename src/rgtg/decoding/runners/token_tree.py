"""Branches over a cached prefix, as tensors: tokens, depths, and who may see whom."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenTree:
    """Nodes after a cached prefix of length L; the same shape for every row of a batch, other tokens.

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

    def __post_init__(self) -> None:
        if len(self.parents) != self.tokens.shape[1]:
            raise ValueError(f"{self.tokens.shape[1]} nodes need as many parents, got {len(self.parents)}")
        if any(not -1 <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError("a node's parent must come before it (or be -1, the prefix)")

    @property
    def width(self) -> int:
        """Number of nodes N."""
        return len(self.parents)

    @property
    def depths(self) -> Int[Tensor, " nodes"]:
        """Ancestors of each node, counted: (N,)."""
        return _depths(self.parents)

    @property
    def ancestry(self) -> Bool[Tensor, "nodes nodes"]:
        """``ancestry[i, j]``: node i attends to node j, that is j is i or one of its ancestors."""
        return _ancestry(self.parents)

    def path(self, node: int) -> list[int]:
        """Nodes from the prefix down to ``node``, itself included."""
        walked = [node]
        while (parent := self.parents[walked[-1]]) >= 0:
            walked.append(parent)
        return walked[::-1]


# A decoding loop reads trees of few shapes, thousands of times.
@lru_cache(maxsize=256)
def _depths(parents: tuple[int, ...]) -> Tensor:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return torch.tensor(depths)


@lru_cache(maxsize=256)
def _ancestry(parents: tuple[int, ...]) -> Tensor:
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees
