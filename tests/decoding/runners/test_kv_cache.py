"""The preallocated cache: written once, one path committed, rows selected."""

import pytest
import torch

from rgtg.decoding.runners.kv_cache import TreeCache


def write(cache, values):
    """Put (B, N) numbers into every layer's keys, their negatives into the values."""
    states = torch.tensor(values, dtype=torch.float32)[:, None, :, None].expand(-1, 2, -1, 3)
    return [cache.update(states, -states, layer) for layer in range(2)]


def committed(cache):
    layer = cache.layers[1]
    rows = range(len(cache.lengths))
    assert all(torch.equal(layer.keys[b, :, : cache.lengths[b]], -layer.values[b, :, : cache.lengths[b]]) for b in rows)
    return [layer.keys[b, 0, : cache.lengths[b], 0].tolist() for b in rows]


def test_one_node_per_row_is_committed_and_its_siblings_are_overwritten():
    cache = TreeCache(2, 6)
    cache.reset(2)
    write(cache, [[1, 2], [3, 4]])
    cache.commit_first([2, 2])
    keys, _ = write(cache, [[5, 6, 7], [8, 9, 10]])[0]
    assert keys.shape == (2, 2, 5, 3)
    cache.commit_path(torch.tensor([[2], [0]]))
    assert committed(cache) == [[1, 2, 7], [3, 4, 8]]
    keys, _ = write(cache, [[11], [12]])[1]
    assert keys[:, 0, :, 0].tolist() == [[1, 2, 7, 11], [3, 4, 8, 12]]


def test_rows_are_dropped_and_repeated():
    cache = TreeCache(2, 4)
    cache.reset(2)
    write(cache, [[1, 2], [3, 4]])
    cache.commit_first([2, 2])
    cache.select_rows([1, 1, 0])
    assert committed(cache) == [[3, 4], [3, 4], [1, 2]]


def test_rows_of_different_lengths_are_written_after_their_own_prefix():
    cache = TreeCache(2, 9)
    cache.reset(2)
    write(cache, [[1, 2, 3], [4, 0, 0]])
    cache.commit_first([3, 1])
    keys, _ = write(cache, [[5, 6, 7], [8, 9, 10]])[0]
    assert keys.shape == (2, 2, 6, 3)
    assert keys[0, 0, :, 0].tolist() == [1, 2, 3, 5, 6, 7]
    assert keys[1, 0, :4, 0].tolist() == [4, 8, 9, 10]
    cache.commit_path(torch.tensor([[0, 2], [1, 0]]), [2, 1])
    assert committed(cache) == [[1, 2, 3, 5, 7], [4, 9]]
    cache.select_rows([1, 0, 1])
    assert committed(cache) == [[4, 9], [1, 2, 3, 5, 7], [4, 9]]


def test_a_pass_is_written_in_place():
    cache = TreeCache(2, 8)
    cache.reset(1)
    write(cache, [[1, 2]])
    size, place = cache.nbytes, cache.layers[0].keys.data_ptr()
    cache.commit_first([2])
    write(cache, [[3, 4, 5]])
    cache.commit_path(torch.tensor([[1]]))
    assert (cache.nbytes, cache.layers[0].keys.data_ptr()) == (size, place)
    assert size == 2 * 2 * (2 * 8 * 3) * 4


def test_more_than_its_capacity_is_refused():
    cache = TreeCache(2, 3)
    cache.reset(1)
    with pytest.raises(ValueError, match="a cache for 3 tokens was asked to hold 4"):
        write(cache, [[1, 2, 3, 4]])
    assert cache.layers[0].get_max_length() == 3


@pytest.mark.parametrize("rows", [1, 2])
def test_a_path_replaces_committed_columns(rows):
    cache = TreeCache(2, 8)
    cache.reset(rows)
    write(cache, [[1, 2, 3], [4, 5, 6]][:rows])
    cache.commit_first([3] * rows)
    write(cache, [[7, 8, 9, 10], [11, 12, 13, 14]][:rows])
    cache.commit_path(torch.tensor([[0, 2, 3], [1, 0, 0]][:rows]), [3, 1][:rows], after=[1, 2][:rows])
    assert committed(cache) == [[1, 7, 9, 10], [4, 5, 12]][:rows]


def test_a_cache_grows_and_keeps_what_is_committed():
    cache = TreeCache(2, 4)
    cache.reset(2)
    write(cache, [[1, 2], [3, 4]])
    cache.commit_first([2, 1])
    cache.grow(5)
    assert cache.capacity == 5
    assert committed(cache) == [[1, 2], [3]]
    write(cache, [[5, 6, 7], [8, 9, 10]])
    cache.commit_first([3, 3])
    assert committed(cache) == [[1, 2, 5, 6, 7], [3, 8, 9, 10]]


def test_a_cache_grows_by_a_quarter_at_least():
    cache = TreeCache(2, 40)
    cache.grow(41)
    assert cache.capacity == 50
