"""The preallocated cache: written once, one node kept, rows selected."""

import pytest
import torch

from rgtg.decoding.kv_cache import TreeCache


def write(cache, values):
    """Put (B, N) numbers into every layer's keys, their negatives into the values."""
    states = torch.tensor(values, dtype=torch.float32)[:, None, :, None].expand(-1, 2, -1, 3)
    return [cache.update(states, -states, layer) for layer in range(2)]


def kept(cache):
    layer = cache.layers[1]
    assert torch.equal(layer.keys[:, :, : cache.length], -layer.values[:, :, : cache.length])
    return layer.keys[:, 0, : cache.length, 0].tolist()


def test_keeps_one_node_per_row_and_overwrites_its_siblings():
    cache = TreeCache(2, 6)
    write(cache, [[1, 2], [3, 4]])
    cache.keep_chain(2)
    keys, _ = write(cache, [[5, 6, 7], [8, 9, 10]])[0]
    assert keys.shape == (2, 2, 5, 3)
    cache.keep_node(torch.tensor([2, 0]))
    assert kept(cache) == [[1, 2, 7], [3, 4, 8]]
    keys, _ = write(cache, [[11], [12]])[1]
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 7, 11], [3, 4, 8, 12]]


def test_rows_are_dropped_and_repeated():
    cache = TreeCache(2, 4)
    write(cache, [[1, 2], [3, 4]])
    cache.keep_chain(2)
    cache.select_rows(torch.tensor([1, 1, 0]))
    assert kept(cache) == [[3, 4], [3, 4], [1, 2]]


def test_nothing_is_concatenated():
    cache = TreeCache(2, 8)
    write(cache, [[1, 2]])
    size, place = cache.nbytes, cache.layers[0].keys.data_ptr()
    cache.keep_chain(2)
    write(cache, [[3, 4, 5]])
    cache.keep_node(torch.tensor([1]))
    assert (cache.nbytes, cache.layers[0].keys.data_ptr()) == (size, place)
    assert size == 2 * 2 * (2 * 8 * 3) * 4


def test_more_than_its_capacity_is_refused():
    cache = TreeCache(2, 3)
    with pytest.raises(ValueError, match="a cache for 3 tokens was asked to hold 4"):
        write(cache, [[1, 2, 3, 4]])
    assert cache.layers[0].get_max_length() == 3
