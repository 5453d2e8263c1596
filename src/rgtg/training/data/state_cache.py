"""The frozen policy's hidden states at every completion token, computed once and read in every epoch.

They are kept in the policy's own dtype: in memory up to ``MEMORY_LIMIT``, beyond that in a file without a name in the
temporary folder (TMPDIR), which the system removes however the process ends.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgtg.data.pairs import TokenizedPair
from rgtg.data.rollouts import TokenizedRollout
from rgtg.errors import OutputError
from rgtg.models.ops.hidden_states import hidden_states_of
from rgtg.models.scorers.hidden_state_head import prefix_states
from rgtg.tokenization.padding import pad_right

MEMORY_LIMIT = 2**30  # bytes
TOKENS = 8192  # padded tokens in one forward pass of the policy


@dataclass
class StateCache:
    """States (P, H) by layer, and token ids (P,), of completions laid end to end.

    Completions of pairs are in the order chosen₀, rejected₀, chosen₁, … Completion c is rows ``starts[c]`` to
    ``starts[c + 1]``; its row i is the state at which y_{1:i} is scored.
    """

    token_ids: Tensor
    starts: list[int]
    states: dict[int, Tensor] = field(default_factory=dict)
    on_disk: bool = False

    @property
    def completions(self) -> int:
        """Number of completions."""
        return len(self.starts) - 1

    @property
    def bytes(self) -> int:
        """Size of the states of all layers."""
        return sum(states.numel() * states.element_size() for states in self.states.values())

    def completion(self, layer: int, c: int) -> tuple[Tensor, Tensor]:
        """States (T, H) and token ids (T,) of one completion."""
        part = slice(self.starts[c], self.starts[c + 1])
        return self.states[layer][part], self.token_ids[part]


def cache_states(
    model: Any,
    units: Sequence[TokenizedPair | TokenizedRollout],
    layers: Sequence[int],
    kind: str,
    *,
    memory_limit: int = MEMORY_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> StateCache:
    """Run the policy once over every completion.

    Args:
        model: the policy's causal LM.
        units: token ids of pairs, or of single completions.
        layers: whose states are kept.
        kind: ``state`` (read at each token) or ``vocab`` (read one token earlier).
        memory_limit: bytes; if the states of all layers are larger, they are kept on disk.
        progress: called with (completions done, of how many).

    Raises:
        OutputError: no room in the temporary folder.
    """
    rows = [row for unit in units for row in unit.rows]
    starts = [0, *np.cumsum([len(completion) for _, completion in rows]).tolist()]
    cache = StateCache(torch.tensor([token for _, completion in rows for token in completion]), starts)
    done = 0
    for part in _batches(rows):
        # 1. one forward pass over rows of similar length
        ids, mask = pad_right([[*rows[i][0], *rows[i][1]] for i in part], 0, model.device)
        read = hidden_states_of(model, ids, mask, list(layers))  # (B, L, H) by layer
        windows = [slice(len(rows[i][0]), len(rows[i][0]) + len(rows[i][1])) for i in part]
        if not cache.states:
            _allocate(cache, read, memory_limit)
        # 2. keep the states at the completions' tokens
        for layer, states in read.items():
            kept = [prefix_states(kind, states[row : row + 1], window)[0] for row, window in enumerate(windows)]
            moved = torch.split(torch.cat(kept).cpu(), [len(k) for k in kept])  # one transfer from the device
            for i, k in zip(part, moved, strict=True):
                cache.states[layer][starts[i] : starts[i + 1]] = k
        done += len(part)
        if progress is not None:
            progress(done, len(rows))
    return cache


def _batches(rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[int]]:
    """Indices of rows of similar length, at most ``TOKENS`` tokens with their padding."""
    part: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1])):
        if part and (len(part) + 1) * (len(rows[i][0]) + len(rows[i][1])) > TOKENS:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _allocate(cache: StateCache, like: dict[int, Tensor], memory_limit: int) -> None:
    """Allocate the states of all layers in memory or on disk; ``like`` holds states (B, L, H) of a first batch."""
    shapes = {layer: (cache.starts[-1], states.shape[-1]) for layer, states in like.items()}
    size = sum(n * hidden * like[layer].element_size() for layer, (n, hidden) in shapes.items())
    cache.on_disk = size > memory_limit
    if cache.on_disk:
        _require_disk_space(size)
    for layer, shape in shapes.items():
        allocate = _tensor_on_disk if cache.on_disk else torch.empty
        cache.states[layer] = allocate(shape, dtype=like[layer].dtype)


def _tensor_on_disk(shape: tuple[int, int], *, dtype: torch.dtype) -> Tensor:
    """A tensor in a file of its own; the file is mapped as bytes because numpy has no bfloat16."""
    width = shape[1] * dtype.itemsize
    with tempfile.TemporaryFile(prefix="rgtg-states-") as file:
        held = np.memmap(file, dtype=np.uint8, mode="w+", shape=(shape[0], width))
    return torch.from_numpy(held).view(dtype)


def _require_disk_space(size: int) -> None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutputError(
            f"the policy's states need {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free; name another "
            "folder (TMPDIR=...), one layer (--layer N) or fewer pairs"
        )
