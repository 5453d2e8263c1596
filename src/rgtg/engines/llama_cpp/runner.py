"""The model runner of llama.cpp: rows, token trees and committed paths, as sequences that share what they agree on."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from rgtg.decoding.runners.token_tree import States, TokenTree
from rgtg.engines.llama_cpp.context import CachedSequence, LlamaContext, Node, Outputs, SavedPrefix


class _Read(NamedTuple):
    """The tree that was read last.

    Attributes:
        tree: of all rows.
        branches: for each row, a sequence for each leaf; None where there were not enough sequences to keep them.
    """

    tree: TokenTree
    branches: list[dict[int, CachedSequence]] | None


class LlamaRunner:
    """Reads token trees after its rows: each leaf's path is a sequence, and a node belongs to those of its leaves.

    The library computes logits and final states together. ``States.final`` holds logits (…, V) here, so that ``head``
    has nothing left to do, and ``States.hooked`` the final states (…, H), which heads read.

    Attributes:
        context: that holds the sequences.
        sequences: of the rows.
        calls: forward passes so far, those of the prompts included.
    """

    device = torch.device("cpu")

    def __init__(self, model: Any, context: LlamaContext, layer: int | None) -> None:
        """Without rows.

        Args:
            model: that the rows read, as `rgtg.engines.llama_cpp.model.LlamaModel`.
            context: of this model.
            layer: of the final states, where heads read them.
        """
        self.model, self.context, self.layer = model, context, layer
        self.sequences: list[CachedSequence] = []
        self.calls = 0
        self._room = 0  # tokens of a row
        self._last: _Read | None = None

    def fresh(self, capacity: int) -> Self:
        """A runner of the same model without rows, with room for ``capacity`` tokens in each."""
        other = copy.copy(self)
        other.sequences, other.calls, other._room, other._last = [], 0, capacity, None
        return other

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.sequences)

    @property
    def cache(self) -> "SequenceCache":
        """The rows' keys and values, as prefix caches see them."""
        return SequenceCache(self)

    def head(self, final: Tensor) -> Tensor:
        """Logits (…, V): the library has computed them."""
        return final

    # -- read and commit -------------------------------------------------------------------------------------------

    def reset(self, rows: int) -> None:
        """Start again with so many empty rows."""
        self._last, self.sequences = None, []
        self.context.reserve(rows * self._room)
        self.sequences = [self.context.new() for _ in range(rows)]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> States:
        """Start with these prompts as rows; states (B, …) after the last token of each."""
        self.reset(len(prompts))
        return self._append([list(prompt) for prompt in prompts])

    def append(self, tokens: Tensor) -> States:
        """Read tokens (B, n) after the rows and commit them; states (B, …) after the last ones."""
        if tokens.shape[1] > 1:
            return self._append(tokens.tolist())
        self._drop_branches()
        self.calls += 1
        return States(*self.context.append(self.sequences, tokens[:, 0].tolist()))

    def _append(self, texts: list[list[int]]) -> States:
        self._drop_branches()
        self.calls += 1
        rows = list(zip(self.sequences, texts, strict=True))
        first = [
            Node(token, sequence.length + i, (sequence,))
            for sequence, text in rows
            for i, token in enumerate(text[:-1])
        ]
        last = [Node(text[-1], sequence.length + len(text) - 1, (sequence,)) for sequence, text in rows]
        if first:
            self.context.read(first)
        try:
            logits, states = self.context.outputs(last)
        except Exception:
            for sequence, _ in rows:
                self.context.cut(sequence, sequence.length)
            raise
        for sequence, text in rows:
            sequence.length += len(text)
        return States(logits, states)

    def read(self, tree: TokenTree) -> States:
        """States (B, N, …) at every node of a tree after the rows; nothing is committed."""
        self._drop_branches()
        self.calls += 1
        if tree.width == 1:  # one token after each row, as in most steps
            self._last = _Read(tree, [{0: row} for row in self.sequences])
            return self._read_next([tokens[0] for tokens in tree.tokens.tolist()])
        leaves = _leaves(tree.parents)
        wanted = (len(leaves) - 1) * self.rows
        if wanted <= self.context.free_sequences:
            self._last, states = self._read_at_once(tree, leaves)
            return states
        self._last = _Read(tree, None)
        return self._read_in_parts(tree, leaves)

    def _read_next(self, tokens: Sequence[int]) -> States:
        """One pass over the next token of each row: states (B, 1, …)."""
        pairs = zip(self.sequences, tokens, strict=True)
        logits, states = self.context.outputs([Node(token, row.length, (row,)) for row, token in pairs])
        return States(logits[:, None], states[:, None])

    def _read_at_once(self, tree: TokenTree, leaves: list[int]) -> tuple[_Read, States]:
        """One pass over all nodes; the row's own sequence is that of its first leaf."""
        branches = [
            dict(zip(leaves, [row, *(self.context.fork(row) for _ in leaves[1:])], strict=True))
            for row in self.sequences
        ]
        below = _leaves_below(tree.parents, leaves)
        depths = tree.depths.tolist()
        nodes = [
            Node(token, row.length + depths[j], [mine[leaf] for leaf in below[j]])
            for row, mine, tokens in zip(self.sequences, branches, tree.tokens.tolist(), strict=True)
            for j, token in enumerate(tokens)
        ]
        logits, states = self.context.outputs(nodes)
        shape = (self.rows, tree.width, -1)
        return _Read(tree, branches), States(logits.view(shape), states.view(shape))

    def _read_in_parts(self, tree: TokenTree, leaves: list[int]) -> States:
        """Several passes over some leaves of one row each; the chosen path is read again when it is committed."""
        at_once = self.context.free_sequences
        if not at_once:
            self.context.new()  # raises the error that says so
        logits = torch.empty(self.rows, tree.width, self.context.vocabulary)
        states = torch.empty(self.rows, tree.width, self.context.hidden)
        for row in range(self.rows):
            for start in range(0, len(leaves), at_once):
                places, found = self._read_leaves(tree, row, leaves[start : start + at_once])
                logits[row, places], states[row, places] = found
        return States(logits, states)

    def _read_leaves(self, tree: TokenTree, row: int, leaves: list[int]) -> tuple[list[int], Outputs]:
        """The nodes above some leaves of one row, and their outputs; the sequences are gone afterwards."""
        prefix, tokens, depths = self.sequences[row], tree.tokens[row].tolist(), tree.depths.tolist()
        forks = {leaf: self.context.fork(prefix) for leaf in leaves}
        below = _leaves_below(tree.parents, leaves)
        places = [j for j in range(tree.width) if below[j]]
        nodes = [Node(tokens[j], prefix.length + depths[j], [forks[leaf] for leaf in below[j]]) for j in places]
        return places, self.context.outputs(nodes)

    def commit(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Commit the path ``nodes[b, :counts[b]]`` (B, D) of the tree that was read last, from the prefix down."""
        assert self._last is not None, "commit() follows read()"
        (tree, branches), self._last = self._last, None
        kept = counts if counts is not None else [nodes.shape[1]] * self.rows
        paths = [path[:n] for path, n in zip(nodes.tolist(), kept, strict=True)]
        if branches is None:
            again = [[mine[j] for j in path] for mine, path in zip(tree.tokens.tolist(), paths, strict=True)]
            self.context.read([
                Node(token, row.length + i, (row,))
                for row, tokens in zip(self.sequences, again, strict=True)
                for i, token in enumerate(tokens)
            ])  # fmt: skip
            for row, tokens in zip(self.sequences, again, strict=True):
                row.length += len(tokens)
            return
        below = _leaves_below(tree.parents, list(branches[0])) if tree.width > 1 else [[0]]
        chosen = []
        for row, mine, path in zip(self.sequences, branches, paths, strict=True):
            sequence = mine[below[path[-1]][0]] if path else row
            self.context.cut(sequence, row.length + len(path))
            chosen.append(sequence)
        self.sequences = chosen

    def _drop_branches(self) -> None:
        """Forget what was read last and not committed."""
        if self._last is not None and self._last.branches is not None:
            for row in self.sequences:
                self.context.cut(row, row.length)
        self._last = None

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last ``counts[b]`` committed tokens of row b."""
        self._drop_branches()
        for row, n in zip(self.sequences, counts, strict=True):
            self.context.cut(row, row.length - n)

    # -- rows ------------------------------------------------------------------------------------------------------

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is forked."""
        self._drop_branches()
        taken: set[int] = set()
        chosen = []
        for row in rows:
            sequence = self.sequences[row]
            chosen.append(self.context.fork(sequence) if row in taken else sequence)
            taken.add(row)
        self.sequences = chosen

    def copy_rows(self, rows: Sequence[int]) -> Self:
        """A runner of its own with forks of some rows."""
        copied = self.fresh(self._room)
        copied.sequences = [self.context.fork(self.sequences[row]) for row in rows]
        return copied

    def add(self, other: Self) -> None:
        """Append forks of the rows of another runner of the same model."""
        self._drop_branches()
        self.sequences += [self.context.fork(sequence) for sequence in other.sequences]


class SequenceCache:
    """Keys and values of a runner's rows, in the terms of `rgtg.decoding.engine.prefix_cache.PrefixCache`."""

    def __init__(self, runner: LlamaRunner) -> None:
        self._runner = runner

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [sequence.length for sequence in self._runner.sequences]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._runner.context.nbytes(sum(self.lengths))

    def copy_rows(self, rows: Sequence[int]) -> SavedPrefix:
        """A copy of one row, outside of the context."""
        (row,) = rows
        return self._runner.context.save(self._runner.sequences[row])

    def copy_prefix(self, saved: SavedPrefix, length: int) -> None:
        """Let the only row, an empty one, begin with the first ``length`` tokens of a saved text."""
        self._runner.sequences = [self._runner.context.restore(saved, length)]


def _leaves(parents: tuple[int, ...]) -> list[int]:
    """Nodes without children."""
    inner = set(parents)
    return [j for j in range(len(parents)) if j not in inner]


def _leaves_below(parents: tuple[int, ...], leaves: Sequence[int]) -> list[list[int]]:
    """For each node, which of these leaves hang on it (a leaf hangs on itself)."""
    below: list[list[int]] = [[] for _ in parents]
    for leaf in leaves:
        node = leaf
        while node >= 0:
            below[node].append(leaf)
            node = parents[node]
    return below
