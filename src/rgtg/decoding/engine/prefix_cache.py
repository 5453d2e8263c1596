"""Texts that models have read, kept so that others which begin alike need not be read again."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from rgtg.decoding.runners.kv_cache import TreeCache
from rgtg.decoding.runners.model_runner import TreeRunner

# Fewer tokens than this are read again sooner than copied.
_LEAST = 8


def policy_key(lead: str | None) -> str:
    """Whose cache a lane's policy fills: the policy's own, or its two halves with an adapter in the second."""
    return "" if lead is None else f"policy, {lead}"


class PrefixStore:
    """Caches of texts, by model, within a budget of bytes; the least recently used go first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self.asked = self.found = 0  # tokens
        self._kept: OrderedDict[tuple[str, bytes], tuple[Any, TreeCache]] = OrderedDict()

    def find(self, key: str, tokens: Sequence[int]) -> tuple[TreeCache, int] | None:
        """The text of that model that shares the longest beginning with these tokens, and how many they share.

        One token at least is left to read: its state is what comes next.
        """
        wanted = np.asarray(tokens)
        self.asked += len(tokens)
        best, shared = None, _LEAST - 1
        for place, (held, cache) in self._kept.items():
            if place[0] == key and (n := min(_shared(held, wanted), len(tokens) - 1)) > shared:
                best, shared = (place, cache), n
        if best is None:
            return None
        self._kept.move_to_end(best[0])
        self.found += shared
        return best[1], shared

    def keep_rows(self, key: str, runner: TreeRunner, text: Sequence[int], rows: Sequence[int]) -> None:
        """Keep copies of a runner's rows, which have all read the same beginning of a text."""
        if self.budget and (length := runner.cache.lengths[rows[0]]) >= _LEAST:
            self.add(key, text[:length], runner.cache.copy_of(rows))

    def add(self, key: str, tokens: Sequence[int], cache: TreeCache) -> None:
        """Keep a text's cache, which nobody writes any more; what it continues is dropped."""
        held = np.asarray(tokens)
        for place, (other, _) in list(self._kept.items()):
            if place[0] != key:
                continue
            shared = _shared(other, held)
            if shared == len(held):  # this text, or one that goes on, is there
                self._kept.move_to_end(place)
                return
            if shared == len(other):
                self._drop(place)
        if cache.nbytes > self.budget:
            return
        self._kept[key, held.tobytes()] = held, cache
        self.nbytes += cache.nbytes
        while self.nbytes > self.budget:
            self._drop(next(iter(self._kept)))

    def _drop(self, place: tuple[str, bytes]) -> None:
        self.nbytes -= self._kept.pop(place)[1].nbytes


def _shared(one: Any, other: Any) -> int:
    """Tokens at the beginning of both."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n
