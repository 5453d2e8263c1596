"""Prefix cache: keys and values of texts that models have read, for later texts that begin alike."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from rgtg.decoding.runners.model_runner import CachedRunner

# Below this many tokens, recomputing the prefix is cheaper than copying its cache.
_MIN_TOKENS = 8


# Whose keys and values they are: ("policy", None), ("policy", name) with the rows of a LoRA scorer beside the policy's,
# or ("scorer", name).
CacheKey = tuple[str, str | None]


class PrefixCache:
    """Caches of texts, by model, within a budget of bytes; the least recently used are evicted first.

    Attributes:
        queried: tokens that were looked up.
        hits: tokens that were found.
        nbytes: of all entries.
    """

    def __init__(self, budget: int) -> None:
        """``budget`` in bytes."""
        self.budget = budget
        self.nbytes = 0
        self.queried = self.hits = 0
        self._entries: OrderedDict[tuple[CacheKey, bytes], tuple[Any, Any]] = OrderedDict()

    def find(self, key: CacheKey, tokens: Sequence[int]) -> tuple[Any, int] | None:
        """The entry of this model with the longest common prefix, and the number of tokens in common.

        At least one token is left to read: its state predicts the next one.
        """
        wanted = np.asarray(tokens)
        self.queried += len(tokens)
        best, shared = None, _MIN_TOKENS - 1
        for place, (held, cache) in self._entries.items():
            if place[0] == key and (n := min(_common(held, wanted), len(tokens) - 1)) > shared:
                best, shared = (place, cache), n
        if best is None:
            return None
        self._entries.move_to_end(best[0])
        self.hits += shared
        return best[1], shared

    def add_rows(self, key: CacheKey, runner: CachedRunner, text: Sequence[int], rows: Sequence[int]) -> None:
        """Add copies of a runner's rows, which have all read the same prefix of a text."""
        if self.budget and (length := runner.cache.lengths[rows[0]]) >= _MIN_TOKENS:
            self.add(key, text[:length], runner.cache.copy_rows(rows))

    def add(self, key: CacheKey, tokens: Sequence[int], cache: Any) -> None:
        """Add a text's cache, which has ``nbytes`` and which nobody writes any more; its prefixes are dropped."""
        held = np.asarray(tokens)
        for place, (other, _) in list(self._entries.items()):
            if place[0] != key:
                continue
            shared = _common(other, held)
            if shared == len(held):  # this text, or one that continues it, is there
                self._entries.move_to_end(place)
                return
            if shared == len(other):
                self._drop(place)
        if cache.nbytes > self.budget:
            return
        self._entries[key, held.tobytes()] = held, cache
        self.nbytes += cache.nbytes
        while self.nbytes > self.budget:
            self._drop(next(iter(self._entries)))

    def _drop(self, place: tuple[CacheKey, bytes]) -> None:
        self.nbytes -= self._entries.pop(place)[1].nbytes


def _common(one: Any, other: Any) -> int:
    """Number of tokens at the beginning that two texts share."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n
