"""Store millions of tokenized pairs in flat arrays, on disk beyond a limit."""

import os
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, BinaryIO, overload

import numpy as np

from rgtg.data.pairs import TokenizedPair
from rgtg.errors import OutputError

MEMORY_LIMIT = 2**27  # bytes of token ids kept in memory
_PARTS = 3
_BUFFER = 2**20  # token ids per write


class TokenStore:
    """Token ids of pairs as int32, in memory up to a limit, beyond it in an unnamed file.

    The file is in the temporary folder (TMPDIR). The system removes it however the process ends.

    Args:
        memory_limit: bytes of token ids kept in memory.
    """

    def __init__(self, *, memory_limit: int = MEMORY_LIMIT) -> None:
        self._limit = memory_limit
        self._ids = array("i")
        self._ends = array("q", [0])  # of each part of each pair, in order
        self._file: BinaryIO | None = None

    def append(self, pair: TokenizedPair) -> None:
        """Add a pair.

        Raises:
            OutputError: no room in the temporary folder.
        """
        for part in pair.parts:
            self._ids.extend(part)
            self._ends.append(self._ends[-1] + len(part))
        if self._file is not None:
            if len(self._ids) >= _BUFFER:
                self._spill()
        elif self._ids.itemsize * len(self._ids) > self._limit:
            self._file = tempfile.TemporaryFile(prefix="rgtg-tokens-")  # noqa: SIM115  # open as long as the store
            weakref.finalize(self, self._file.close)
            self._spill()

    def __len__(self) -> int:
        return (len(self._ends) - 1) // _PARTS

    def pair(self, index: int) -> TokenizedPair:
        """Read one pair."""
        first = index * _PARTS
        ends = self._ends[first : first + _PARTS + 1]
        ids = self._read(ends[0], ends[-1])
        prompt, chosen, rejected = (ids[a - ends[0] : b - ends[0]].tolist() for a, b in pairwise(ends))
        return TokenizedPair(prompt, chosen, rejected)

    @property
    def on_disk(self) -> bool:
        """Whether the ids are in a file."""
        return self._file is not None

    def _spill(self) -> None:
        assert self._file is not None, "opened before"
        try:
            self._file.seek(0, 2)
            self._ids.tofile(self._file)
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"no room for the token ids in {tempfile.gettempdir()}: {error.strerror or error}; use another "
                "folder (TMPDIR=...)"
            ) from error
        self._ids = array("i")

    def _read(self, begin: int, end: int) -> "array[int]":
        """Read a range of ids. The file is not memory-mapped, because mapped pages count as memory of the process."""
        if self._file is None:
            return self._ids[begin:end]
        if self._ids:
            self._spill()
        ids, size = array("i"), self._ids.itemsize
        ids.frombytes(os.pread(self._file.fileno(), size * (end - begin), size * begin))
        return ids


class TokenizedPairs(Sequence[TokenizedPair]):
    """Some pairs of a store as a sequence; each pair is read when it is accessed."""

    def __init__(self, store: TokenStore, indices: "np.ndarray[Any, Any]") -> None:
        self._store, self._indices = store, indices

    def take(self, chosen: "np.ndarray[Any, Any]") -> "TokenizedPairs":
        """The pairs at the given indices."""
        return TokenizedPairs(self._store, self._indices[chosen])

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...

    @overload
    def __getitem__(self, index: slice) -> "TokenizedPairs": ...

    def __getitem__(self, index: int | slice) -> "TokenizedPair | TokenizedPairs":
        if isinstance(index, slice):
            return TokenizedPairs(self._store, self._indices[index])
        return self._store.pair(int(self._indices[index]))
