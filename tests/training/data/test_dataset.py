"""The store of tokenized pairs, in memory and on disk, and the train/eval mask."""

import numpy as np
import pytest

from rgtg.data.pairs import TokenizedPair, held_out_prompts, split_pairs, split_position
from rgtg.errors import OutputError
from rgtg.training.data.dataset import TokenizedPairs, TokenStore
from rgtg.types.generation import PreferencePair


def some_pairs(count, seed=0):
    draw = np.random.default_rng(seed)
    ids = lambda least: draw.integers(0, 2**31 - 1, draw.integers(least, 40)).tolist()  # noqa: E731
    return [TokenizedPair(ids(1), ids(0), ids(0)) for _ in range(count)]


@pytest.mark.parametrize("memory_limit", [0, 4000, 2**27])
def test_pairs_are_read_back_unchanged(memory_limit, monkeypatch):
    monkeypatch.setattr("rgtg.training.data.dataset._IDS_PER_WRITE", 50)  # ids per write
    store, pairs = TokenStore(memory_limit=memory_limit), some_pairs(100)
    for i, pair in enumerate(pairs):
        store.append(pair)
        if i % 7 == 0:  # reads may come between writes
            assert store.pair(i) == pair
    assert len(store) == 100
    assert store.on_disk == (memory_limit < 2**27)
    assert [store.pair(i) for i in range(100)] == pairs


def test_a_store_without_pairs_is_empty():
    assert len(TokenStore()) == 0


def test_a_subset_of_a_store_is_a_sequence():
    store, pairs = TokenStore(), some_pairs(10)
    for pair in pairs:
        store.append(pair)
    every = TokenizedPairs(store, np.arange(10))
    some = every.take(np.array([7, 2, 5]))
    assert list(some) == [pairs[7], pairs[2], pairs[5]]
    assert list(every[3:8:2]) == pairs[3:8:2]
    assert some[-1] == pairs[5]
    assert (len(every), len(some), len(every[9:])) == (10, 3, 1)
    with pytest.raises(IndexError):
        some[3]


def test_a_full_temporary_folder_is_named(monkeypatch):
    class Full:
        def seek(self, *_):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr("rgtg.training.data.dataset.tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(OutputError, match=r"no room for the token ids in .*No space left on device; use another"):
        TokenStore(memory_limit=0).append(some_pairs(1)[0])


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"], [f"p{i % 37}" for i in range(200)]])
@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.1, 0.5, 0.999999])
def test_the_mask_splits_like_split_pairs(prompts, fraction):
    pairs = [PreferencePair(prompt=prompt, chosen=f" {i}", rejected=" x") for i, prompt in enumerate(prompts)]
    mask = held_out_prompts(np.array([split_position(prompt, 3) for prompt in prompts]), fraction)
    train, held_out = split_pairs(pairs, fraction, 3)
    assert train == [pair for pair, out in zip(pairs, mask, strict=True) if not out]
    assert held_out == [pair for pair, out in zip(pairs, mask, strict=True) if out]
    assert train
    assert bool(held_out) == (fraction > 0 and len(set(prompts)) > 1)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
