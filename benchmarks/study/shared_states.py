"""One reading of a completion's hidden states for all heads of a study: objectives, kinds of head, seeds and labels."""

import hashlib
from array import array
from contextlib import contextmanager

import numpy as np
import torch

from rgtg.training import train_head
from rgtg.training.data.state_cache import StateCache, cache_states


class _Rows:
    """Completions as `cache_states` reads them."""

    def __init__(self, rows):
        self.rows = rows


class SharedStates:
    """States of one layer at a completion's tokens and at the last token of its prompt, on disk by text.

    Args:
        folder: where they are kept; it belongs to one policy.
    """

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, row):
        prompt, completion = row
        text = array("q", [len(prompt), *prompt, *completion]).tobytes()
        return self.folder / f"{hashlib.sha256(text).hexdigest()[:24]}.pt"

    def cache(self, model, units, layers, kind, **more):
        """A `StateCache` as ``cache_states`` makes it; only texts that were never read are read."""
        (layer,) = layers
        rows = [row for unit in units for row in unit.rows]
        missing = {self.path(row): row for row in rows if not self.path(row).exists()}
        # one at a time: in batches, rounding would depend on which texts another seed or label has read before
        for done, (path, (prompt, completion)) in enumerate(missing.items()):
            # a token more at the end: its vocabulary state is the one of the last token
            read = cache_states(model, [_Rows([(prompt, [*completion, completion[-1]])])], layers, "vocab")
            new = path.with_suffix(".new")
            torch.save(read.completion(layer, 0)[0].clone(), new)
            new.replace(path)
            if more.get("progress"):
                more["progress"](done + 1, len(missing))
        window = slice(1, None) if kind == "state" else slice(None, -1)
        states = torch.cat([torch.load(self.path(row), weights_only=True)[window] for row in rows])
        tokens = torch.tensor([token for _, completion in rows for token in completion])
        starts = [0, *np.cumsum([len(completion) for _, completion in rows]).tolist()]
        return StateCache(tokens, starts, {layer: states})


@contextmanager
def shared_states(folder):
    """While it is entered, heads are trained on the states of ``folder``."""
    train_head.cache_states = SharedStates(folder).cache
    try:
        yield
    finally:
        train_head.cache_states = cache_states
