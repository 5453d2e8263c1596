"""A llama.cpp context: sequences over one cache, which share what they were forked from, and the outputs of a pass."""

import ctypes
import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from rgtg.engines.llama_cpp.library import first_error, forget_errors, library

P = ParamSpec("P")
R = TypeVar("R")
_TOKENS = 512  # of one call of the library
_OUTPUTS = 128  # tokens of one call whose logits are read: the library's buffers are that many times the vocabulary
_SEQUENCES = 128  # at once; not more than _OUTPUTS
_FIRST_CELLS = 2048
_NO_SLOT = 1  # what llama_decode returns where the cache is full


class Node(NamedTuple):
    """One token to read.

    Attributes:
        token: its id.
        position: from the beginning of its sequences.
        sequences: that it belongs to; they must hold the same text before it.
    """

    token: int
    position: int
    sequences: Sequence["CachedSequence"]


class Outputs(NamedTuple):
    """What one pass gives for N tokens: logits (N, V) of the next token, and final states (N, H), both fp32."""

    logits: Tensor
    states: Tensor


class CachedSequence:
    """A text in the cache. It leaves the cache when nothing refers to it any more.

    Attributes:
        length: number of its tokens, which are at positions 0 … length − 1.
        end: where the tokens in the cache end: after ``length`` there may be some that were read and not kept.
    """

    __slots__ = ("_context", "end", "length", "number")

    def __init__(self, context: "LlamaContext", number: int, length: int) -> None:
        self._context, self.number, self.length, self.end = context, number, length, length

    def __del__(self) -> None:
        self._context.release(self.number)


class SavedPrefix(NamedTuple):
    """Keys and values of the first tokens of a text, outside of the context."""

    data: Any
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.data.nbytes)


def _in_turn(call: Callable[P, R]) -> Callable[P, R]:
    """Let threads call a method of a context one after the other: the library takes one call at a time."""

    @functools.wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        context: Any = args[0]
        with context._lock:
            return call(*args, **kwargs)

    return run


class LlamaContext:
    """One model with one cache, for all sequences that are read at a time. Threads take turns.

    Sequences share the cells of what they were forked from. The cache grows when it is full; it is never made smaller.
    """

    def __init__(self, model: Any, threads: int, *, exact: bool = False) -> None:
        """Set up for a loaded model.

        Args:
            model: pointer to llama_model; the caller frees it after this context.
            threads: that compute.
            exact: compute attention in fp32, where the library rounds to fp16 otherwise, to compare with other engines.
        """
        self._lib, self._model, self._threads, self._exact = library(), model, threads, exact
        lib = self._lib
        self.vocabulary = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)))
        self.hidden = int(lib.llama_model_n_embd_out(model))
        self.max_sequences = min(_SEQUENCES, int(lib.llama_max_parallel_sequences()))
        self._free = list(reversed(range(self.max_sequences)))
        self._released: deque[int] = deque()  # sequences that nothing refers to; they are still in the cache
        self._lock = threading.RLock()
        self._batch = _Batch(lib, self.max_sequences)
        self.cells, self._embeddings = _FIRST_CELLS, True
        self._context = self._new_context(self.cells)

    # -- sequences -------------------------------------------------------------------------------------------------

    @_in_turn
    def new(self) -> CachedSequence:
        """An empty sequence.

        Raises:
            RuntimeError: llama.cpp holds no more of them.
        """
        self._remove_released()
        if not self._free:
            raise RuntimeError(
                f"not enough memory for another sequence: llama.cpp holds at most {self.max_sequences}; decode fewer "
                "at once (batch_size, n, top_k)"
            )
        return CachedSequence(self, self._free.pop(), 0)

    @_in_turn
    def fork(self, sequence: CachedSequence, length: int | None = None) -> CachedSequence:
        """A new sequence that shares the first ``length`` tokens of another (None: all of them)."""
        length = sequence.length if length is None else length
        forked = self.new()
        self._lib.llama_memory_seq_cp(self._memory, sequence.number, forked.number, 0, length)
        forked.length = forked.end = length
        return forked

    @_in_turn
    def cut(self, sequence: CachedSequence, length: int) -> None:
        """Keep the first ``length`` tokens of a sequence, also where tokens after its own were read."""
        if sequence.end > length:
            self._lib.llama_memory_seq_rm(self._memory, sequence.number, length, -1)
            sequence.end = length
        sequence.length = length

    def release(self, number: int) -> None:
        """Let a sequence leave the cache before the next call; any thread may do so, also while another one reads."""
        self._released.append(number)

    def _remove_released(self) -> None:
        """Take released sequences out of the cache. The last one leaves it as it was at first, cell by cell."""
        if not self._released or self._context is None:
            return
        while self._released:
            number = self._released.popleft()
            self._lib.llama_memory_seq_rm(self._memory, number, -1, -1)
            self._free.append(number)
        if len(self._free) == self.max_sequences:
            # The order of cells decides the order of sums: what is read next must not depend on what was read before.
            self._free.sort(reverse=True)
            self._lib.llama_memory_clear(self._memory, False)

    @property
    def free_sequences(self) -> int:
        """How many more sequences there can be."""
        return len(self._free) + len(self._released)

    @_in_turn
    def save(self, sequence: CachedSequence) -> SavedPrefix:
        """A copy of a sequence's keys and values outside of the context."""
        size = self._lib.llama_state_seq_get_size(self._context, sequence.number)
        data = np.empty(size, np.uint8)
        written = self._lib.llama_state_seq_get_data(self._context, _bytes(data), size, sequence.number)
        if not written:
            raise RuntimeError(f"llama.cpp could not copy a sequence: {first_error()}")
        return SavedPrefix(data[:written], sequence.length)

    @_in_turn
    def restore(self, saved: SavedPrefix, length: int) -> CachedSequence:
        """A sequence with the first ``length`` tokens of what was saved."""
        sequence = self.new()
        self.reserve(saved.length)
        args = _bytes(saved.data), saved.data.nbytes, sequence.number
        while not self._lib.llama_state_seq_set_data(self._context, *args):
            self._grow(2 * self.cells)
        sequence.end = saved.length
        self.cut(sequence, length)
        return sequence

    def nbytes(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        return tokens * self._token_bytes

    @_in_turn
    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens before they are read, where the cache is smaller."""
        self._remove_released()
        if tokens > self.cells:
            self._grow(max(tokens, 2 * self.cells))

    # -- passes ----------------------------------------------------------------------------------------------------

    def read(self, nodes: Sequence[Node]) -> None:
        """Read tokens whose outputs nobody needs. Changes nothing where it raises."""
        self._read(nodes, outputs=False)

    def outputs(self, nodes: Sequence[Node]) -> Outputs:
        """Read N tokens; logits and states after each. Changes nothing where it raises."""
        return Outputs(*map(torch.from_numpy, self._read(nodes, outputs=True)))

    @_in_turn
    def append(self, sequences: Sequence[CachedSequence], tokens: Sequence[int]) -> Outputs:
        """Read the next token of each of N sequences, which grow by it; outputs after each.

        Changes nothing where it raises. It does what ``outputs`` does for such nodes, in fewer steps.
        """
        self._remove_released()
        self._embed(True)
        self._batch.fill_next(sequences, tokens)
        try:
            self._decode()
        except Exception:
            for sequence in sequences:
                self._lib.llama_memory_seq_rm(self._memory, sequence.number, sequence.length, -1)
            raise
        for sequence in sequences:
            sequence.length += 1
            sequence.end = max(sequence.end, sequence.length)
        n, lib = len(tokens), self._lib
        logits, states = torch.empty(n, self.vocabulary), torch.empty(n, self.hidden)
        ctypes.memmove(logits.data_ptr(), lib.llama_get_logits(self._context), 4 * n * self.vocabulary)
        ctypes.memmove(states.data_ptr(), lib.llama_get_embeddings(self._context), 4 * n * self.hidden)
        return Outputs(logits, states)

    def states(self, nodes: Sequence[Node]) -> Tensor:
        """Read N tokens; the final states (N, H) alone, without copying the logits of many tokens."""
        return torch.from_numpy(self._read(nodes, outputs=True, logits=False)[1])

    @_in_turn
    def _read(self, nodes: Sequence[Node], *, outputs: bool, logits: bool = True) -> tuple[Any, Any]:
        self._remove_released()
        lib, most = self._lib, _OUTPUTS if outputs else _TOKENS
        self._embed(outputs)
        rows = len(nodes) if outputs else 0
        scores = np.empty((rows if logits else 0, self.vocabulary), np.float32)
        states = np.empty((rows, self.hidden), np.float32)
        try:
            for start in range(0, len(nodes), most):
                part = nodes[start : start + most]
                self._batch.fill(part, outputs)
                self._decode()
                if outputs:
                    end = start + len(part)
                    if logits:
                        _copy(lib.llama_get_logits(self._context), scores[start:end])
                    _copy(lib.llama_get_embeddings(self._context), states[start:end])
        except Exception:
            for node in nodes:
                for sequence in node.sequences:
                    lib.llama_memory_seq_rm(self._memory, sequence.number, node.position, -1)
            raise
        for node in nodes:
            for sequence in node.sequences:
                sequence.end = max(sequence.end, node.position + 1)
        return scores, states

    def _embed(self, embeddings: bool) -> None:
        """Whether the next pass gives states; where it does, the library computes the logits of all tokens."""
        if embeddings != self._embeddings:
            self._lib.llama_set_embeddings(self._context, embeddings)
            self._embeddings = embeddings

    def _decode(self) -> None:
        """Read the tokens of the batch."""
        forget_errors()
        while (code := self._lib.llama_decode(self._context, self._batch.struct)) == _NO_SLOT:
            self._grow(2 * self.cells)
        if code:
            tokens = self._batch.struct.n_tokens
            raise RuntimeError(f"llama.cpp could not read {tokens} tokens (code {code}): {first_error()}")

    # -- the cache -------------------------------------------------------------------------------------------------

    @property
    def _memory(self) -> Any:
        return self._lib.llama_get_memory(self._context)

    def _new_context(self, cells: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = cells, _TOKENS, _TOKENS
        params.n_seq_max, params.n_outputs_max = self.max_sequences, _OUTPUTS
        params.n_threads = params.n_threads_batch = self._threads
        params.pooling_type = self._lib.LLAMA_POOLING_TYPE_NONE
        params.embeddings, params.kv_unified, params.no_perf = True, True, True
        if self._exact:
            params.type_k = params.type_v = self._lib.GGML_TYPE_F32
            params.flash_attn_type = self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        forget_errors()
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"not enough memory for a llama.cpp cache of {cells} tokens: {first_error()}")
        return context

    def _grow(self, cells: int) -> None:
        """Replace the context by one with more cells, with all sequences in it."""
        larger = self._new_context(cells)
        if len(self._free) < self.max_sequences:
            # the whole state at once, since it keeps which sequences share a cell
            size = self._lib.llama_state_get_size(self._context)
            data = np.empty(size, np.uint8)
            written = self._lib.llama_state_get_data(self._context, _bytes(data), size)
            if not written or not self._lib.llama_state_set_data(larger, _bytes(data), written):
                self._lib.llama_free(larger)
                raise RuntimeError(f"llama.cpp could not move its cache to a larger one: {first_error()}")
        self._lib.llama_free(self._context)
        self._context, self.cells, self._embeddings = larger, cells, True

    @property
    def _token_bytes(self) -> int:
        lib = self._lib
        heads = lib.llama_model_n_head_kv(self._model)
        size = lib.llama_model_n_embd(self._model) // max(lib.llama_model_n_head(self._model), 1)
        of_value = 4 if self._exact else 2
        return int(2 * of_value * heads * size * lib.llama_model_n_layer(self._model))  # keys and values

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._lib.llama_free(self._context)
            self._context = None

    def __del__(self) -> None:
        self.close()


class _Batch:
    """The arrays of a llama_batch, filled through numpy."""

    def __init__(self, lib: Any, max_sequences: int) -> None:
        self.tokens, self.positions = np.zeros(_TOKENS, np.int32), np.zeros(_TOKENS, np.int32)
        self.counts, self.outputs = np.zeros(_TOKENS, np.int32), np.zeros(_TOKENS, np.int8)
        self.sequences = np.zeros((_TOKENS, max_sequences), np.int32)
        self.addresses = self.sequences.ctypes.data + np.arange(_TOKENS, dtype=np.uint64) * self.sequences.strides[0]
        as_int = ctypes.POINTER(ctypes.c_int32)
        self.struct = lib.llama_batch(
            n_tokens=0,
            token=self.tokens.ctypes.data_as(as_int),
            pos=self.positions.ctypes.data_as(as_int),
            n_seq_id=self.counts.ctypes.data_as(as_int),
            seq_id=self.addresses.ctypes.data_as(ctypes.POINTER(as_int)),
            logits=self.outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, nodes: Sequence[Node], outputs: bool) -> None:
        """Write these tokens."""
        self.struct.n_tokens = n = len(nodes)
        self.outputs[:n] = outputs
        for i, node in enumerate(nodes):
            self.tokens[i], self.positions[i] = node.token, node.position
            self.counts[i] = len(node.sequences)
            for j, sequence in enumerate(node.sequences):
                self.sequences[i, j] = sequence.number

    def fill_next(self, sequences: Sequence[CachedSequence], tokens: Sequence[int]) -> None:
        """Write the next token of each sequence."""
        struct = self.struct  # through ctypes: for a few numbers, numpy's machinery takes longer
        struct.n_tokens = len(tokens)
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            struct.token[i], struct.pos[i], struct.seq_id[i][0] = token, sequence.length, sequence.number
            struct.n_seq_id[i] = struct.logits[i] = 1


def _bytes(data: Any) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _copy(source: Any, target: Any) -> None:
    """Copy floats out of the library's buffer, which the next pass overwrites."""
    ctypes.memmove(target.ctypes.data, source, target.nbytes)
