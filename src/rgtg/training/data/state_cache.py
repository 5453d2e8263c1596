"""The frozen policy's hidden states at every completion token, computed once and read in every epoch.

They are kept in the policy's own dtype, which is bf16 for most: in memory up to ``MEMORY_LIMIT``, beyond that in a file
without a name in the temporary folder (TMPDIR), which the system removes however the process ends. A run with
``--resume`` saves them in its output folder instead, as it computes them, and one with ``--states`` where that says.
"""

import hashlib
import shutil
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from rgtg.data.pairs import TokenizedPair
from rgtg.data.rollouts import TokenizedRollout
from rgtg.errors import OutputError
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.ops.hidden_states import hidden_states_of
from rgtg.models.ops.tree_attention import (
    SharedPrefix,
    groups_by_length,
    pack_row,
    packed_states_of,
    packing_pays,
    prefix_pays,
    read_prefix,
    reads_packed_rows,
    reads_shared_prefix,
    shared_length,
)
from rgtg.models.scorers.hidden_state_head import prefix_states
from rgtg.tokenization.padding import pad_right
from rgtg.types.base import FileChecksum, Record
from rgtg.utils.files import file_checksum, make_folder, sync_file, write_text_synced

MEMORY_LIMIT = 2**30  # bytes
TOKENS = 8192  # padded tokens in one forward pass of the policy
CPU_TOKENS = 1024  # on a CPU, whose caches hold the activations of these: 1.6 times as fast as 8192
COMPLETIONS = 4  # of one prompt in a row; with more, attention to tokens that are masked costs more than it saves
PREFIX = 8  # tokens with which all prompts begin; fewer are read with each prompt
RECORD = "states.json"
SAVE_SECONDS = 20.0  # between two records of saved states


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
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StateCache:
    """Run the policy once over every completion; completions of the same prompt share one reading of it.

    The tokens with which all prompts begin (a system message) are read once for all, if the model can read them so.

    Args:
        model: the policy's causal LM.
        units: token ids of pairs, or of single completions.
        layers: whose states are kept.
        kind: ``state`` (read at each token) or ``vocab`` (read one token earlier).
        memory_limit: bytes; if the states of all layers are larger, they are kept on disk.
        folder: where states are saved as they are computed. If it holds states of an earlier call with the same
            policy, completions, layers and kind, only the missing ones are computed.
        progress: called with (completions done, of how many).

    Raises:
        OutputError: no room in the temporary folder, or in ``folder``.
    """
    rows = [row for unit in units for row in unit.rows]
    starts = [0, *np.cumsum([len(completion) for _, completion in rows]).tolist()]
    cache = StateCache(torch.tensor([token for _, completion in rows for token in completion]), starts)
    rows, prefix = _without_prefix(rows, model)
    batches = list(_batches(rows, model))
    # 1. what an earlier call has computed
    identity = _identity(model, prefix, rows, layers, kind, batches)
    saved = SavedStates(folder, identity) if folder is not None else None
    first = saved.restore(cache) if saved is not None else 0
    done = sum(len(same) for part in batches[:first] for row in part for same in row)
    if progress is not None and done:
        progress(done, len(rows))
    before = read_prefix(model, prefix) if prefix and first < len(batches) else None
    for number, part in enumerate(batches[first:], start=first):
        # 2. one forward pass over rows of similar length
        texts = [[rows[same[0]] for same in row] for row in part]
        read, columns = _read(model, texts, list(layers), before)  # (B, L, H)
        if not cache.states:
            _allocate(cache, read, memory_limit, saved)
        # 3. keep the states at the completions' tokens
        order = [same for row in part for same in row]
        windows = [slice(len(rows[i][0]), len(rows[i][0]) + len(rows[i][1])) for i, *_ in order]
        for layer, states in read.items():
            kept = [
                prefix_states(kind, states[b, where][None], window)[0]
                for (b, where), window in zip(columns, windows, strict=True)
            ]
            moved = torch.split(torch.cat(kept).cpu(), [len(k) for k in kept])  # one transfer from the device
            for same, k in zip(order, moved, strict=True):
                for i in same:
                    cache.states[layer][starts[i] : starts[i + 1]] = k
        done += sum(map(len, order))
        if saved is not None:
            saved.save(cache, number + 1, last=number + 1 == len(batches))
        if progress is not None:
            progress(done, len(rows))
    return cache


def _read(
    model: Any,
    groups: Sequence[Sequence[tuple[list[int], list[int]]]],
    layers: list[int],
    prefix: SharedPrefix | None,
) -> tuple[dict[int, Tensor], list[tuple[int, Tensor]]]:
    """States (B, L, H) by layer of completions, and the row and columns (P + T,) of each.

    Args:
        model: the policy's causal LM.
        groups: (prompt, completion) by row; those of one row have the same prompt.
        layers: whose states are read.
        prefix: the tokens before every prompt, if they were read.
    """
    if prefix is None and all(len(group) == 1 for group in groups):
        whole = [[*prompt, *completion] for group in groups for prompt, completion in group]
        states = hidden_states_of(model, *pad_right(whole, 0, model.device), layers)
        return states, [(b, torch.arange(len(text))) for b, text in enumerate(whole)]
    packed = [pack_row(group[0][0], [completion for _, completion in group]) for group in groups]
    states = packed_states_of(model, packed, layers, prefix)
    return states, [(b, columns) for b, row in enumerate(packed) for columns in row.columns]


def _without_prefix(
    rows: list[tuple[list[int], list[int]]], model: Any
) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """Completions whose prompts lack the tokens with which all begin, and these tokens; none if it does not pay.

    The last token of every prompt stays: a completion's first vocabulary state is read there.
    """
    prompts = [prompt for prompt, _ in rows]
    shared = min([shared_length(prompts), *(len(prompt) - 1 for prompt in prompts)])
    lengths = [len(prompt) - shared + len(completion) for prompt, completion in rows]
    hidden = int(model.config.get_text_config().hidden_size)
    if shared < PREFIX or not prefix_pays(hidden, shared, lengths) or not reads_shared_prefix(model):
        return rows, []
    return [(prompt[shared:], completion) for prompt, completion in rows], prompts[0][:shared]


def _batches(rows: Sequence[tuple[list[int], list[int]]], model: Any) -> Iterator[list[list[list[int]]]]:
    """Completions by row of a batch, in batches of similar length; each is a list of the indices that are this text.

    A batch has at most ``TOKENS`` tokens with their padding. A row has up to ``COMPLETIONS`` neighbouring completions
    of the same prompt, if the model can read them so. A completion that several neighbouring pairs share is read once.
    """
    limit = TOKENS if model.device.type != "cpu" else CPU_TOKENS
    groups = _groups(rows, model)
    sizes = [len(rows[group[0][0]][0]) + sum(len(rows[i][1]) for i, *_ in group) for group in groups]
    return ([groups[g] for g in part] for part in groups_by_length(sizes, limit))


def _groups(rows: Sequence[tuple[list[int], list[int]]], model: Any) -> list[list[list[int]]]:
    """Which completions share a row, and which are the same text."""
    packs, hidden = reads_packed_rows(model), int(model.config.get_text_config().hidden_size)
    groups: list[list[list[int]]] = []
    read: dict[tuple[int, ...], list[int]] = {}  # completions of the prompt at hand
    for i, (prompt, completion) in enumerate(rows):
        if i == 0 or rows[i - 1][0] != prompt:
            read.clear()
        if (same := read.get(tuple(completion))) is not None:
            same.append(i)
            continue
        last = groups[-1] if read else []
        lengths = [*(len(rows[j][1]) for j, *_ in last), len(completion)]
        fits = len(lengths) <= COMPLETIONS and len(prompt) + sum(lengths) <= TOKENS
        read[tuple(completion)] = [i]
        if packs and last and fits and packing_pays(hidden, len(prompt), lengths):
            last.append(read[tuple(completion)])
        else:
            groups.append([read[tuple(completion)]])
    return groups


def _identity(
    model: Any, prefix: list[int], rows: Sequence[tuple[list[int], list[int]]], layers: Sequence[int], kind: str,
    batches: Any,
) -> str:  # fmt: skip
    """A hash of everything that decides the states and the order in which they are computed."""
    digest = hashlib.sha256(f"{fingerprint_weights(model)} {model.dtype} {list(layers)} {kind} {prefix}".encode())
    for prompt, completion in rows:
        digest.update(array("q", [len(prompt), *prompt, *completion]).tobytes())
    digest.update(repr([len(part) for part in batches]).encode())
    return digest.hexdigest()


class SavedRecord(Record):
    """The file that says how much of the saved states is on the disk."""

    version: int = 1
    identity: str
    dtype: str
    sizes: dict[int, tuple[int, int]]  # (P, H) by layer
    batches: int
    files: dict[str, FileChecksum] | None = None  # once all are done


class SavedStates:
    """States in a folder that a later call continues: a file for each layer, and a record of the batches that are done.

    Args:
        folder: made if it does not exist.
        identity: of the states; others in the folder are replaced.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self._saved = time.monotonic()

    def restore(self, cache: StateCache) -> int:
        """Map the states that are there into a cache; the number of batches that are done."""
        try:
            record = SavedRecord.model_validate_json((self.folder / RECORD).read_bytes())
        except (OSError, ValidationError):
            return 0
        if record.identity != self.identity:
            return 0
        dtype: torch.dtype = getattr(torch, record.dtype)
        for layer, (count, hidden) in record.sizes.items():
            path = self.path(layer)
            if not path.is_file() or path.stat().st_size != count * hidden * dtype.itemsize:
                return self._damaged(path)
            if record.files is not None and file_checksum(path) != record.files[path.name]:
                return self._damaged(path)
        for layer, shape in record.sizes.items():
            cache.states[layer] = _map_file(self.path(layer), "r+", shape, dtype)
        cache.on_disk = True
        return record.batches

    def allocate(self, layer: int, shape: tuple[int, int], *, dtype: torch.dtype) -> Tensor:
        """A tensor in the file of a layer."""
        (self.folder / RECORD).unlink(missing_ok=True)
        return _map_file(self.path(layer), "w+", shape, dtype)

    def path(self, layer: int) -> Path:
        """The file of one layer's states: rows (H,) in the policy's dtype, completion after completion."""
        return self.folder / f"layer-{layer}.states"

    def save(self, cache: StateCache, batches: int, *, last: bool) -> None:
        """Bring the states to the disk and record them, every ``SAVE_SECONDS`` and after the last batch."""
        if not last and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        for layer in cache.states:
            with self.path(layer).open("rb+") as file:  # the mapped pages belong to the same file
                sync_file(file)
        files = {self.path(layer).name: file_checksum(self.path(layer)) for layer in cache.states} if last else None
        record = SavedRecord(
            identity=self.identity, batches=batches, files=files,
            dtype=str(next(iter(cache.states.values())).dtype).removeprefix("torch."),
            sizes={layer: tuple(states.shape) for layer, states in cache.states.items()},
        )  # fmt: skip
        write_text_synced(self.folder / RECORD, record.model_dump_json(indent=2) + "\n")
        self._saved = time.monotonic()

    def _damaged(self, path: Path) -> int:
        warnings.warn(f"the states in {path} are damaged, and are computed again", stacklevel=4)
        return 0


def _allocate(cache: StateCache, like: dict[int, Tensor], memory_limit: int, saved: SavedStates | None) -> None:
    """Allocate the states of all layers in memory or on disk; ``like`` holds states (B, L, H) of a first batch."""
    shapes = {layer: (cache.starts[-1], states.shape[-1]) for layer, states in like.items()}
    size = sum(n * hidden * like[layer].element_size() for layer, (n, hidden) in shapes.items())
    cache.on_disk = size > memory_limit or saved is not None
    if saved is not None:
        make_folder(saved.folder)
    if cache.on_disk:
        _require_disk_space(size, saved.folder if saved is not None else None)
    for layer, shape in shapes.items():
        if saved is not None:
            cache.states[layer] = saved.allocate(layer, shape, dtype=like[layer].dtype)
        else:
            allocate = _tensor_on_disk if cache.on_disk else torch.empty
            cache.states[layer] = allocate(shape, dtype=like[layer].dtype)


def _tensor_on_disk(shape: tuple[int, int], *, dtype: torch.dtype) -> Tensor:
    """A tensor in a file of its own, without a name."""
    with tempfile.TemporaryFile(prefix="rgtg-states-") as file:
        return _map_file(file, "w+", shape, dtype)


def _map_file(file: Any, mode: Literal["r+", "w+"], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A file as a tensor; it is mapped as bytes because numpy has no bfloat16."""
    held = np.memmap(file, dtype=np.uint8, mode=mode, shape=(shape[0], shape[1] * dtype.itemsize))
    return torch.from_numpy(held).view(dtype)


def _require_disk_space(size: int, folder: Path | None) -> None:
    where = folder or tempfile.gettempdir()
    free = shutil.disk_usage(where).free
    if size > free:
        other = "choose another --output" if folder else "name another folder (TMPDIR=...)"
        raise OutputError(
            f"the policy's states need {size / 1e9:.1f} GB, and {where} has {free / 1e9:.1f} GB free; {other}, one "
            "layer (--layer N) or fewer pairs"
        )
