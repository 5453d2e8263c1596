"""Finished shards are read back, rejected, or replaced."""

import pytest

from rgtg.errors import DataError, UsageError
from rgtg.evaluation.compare.shards import Shard, ShardFolder, ShardRewards, fingerprint_prompts
from rgtg.types.generation import Completion

MADE = {"beta": 2.0, "policy": "abc"}


def part(label="pargs β=2", seed=0):
    done = Completion(prompt="p", text="t", token_ids=[1, 2], finish_reason="stop", method="pargs", seed=9,
                      policy_log_prob=-1 / 3, guided_log_prob=float("-inf"), candidates_log_prob=-0.1)  # fmt: skip
    scores = {"reward": ShardRewards(fingerprint=None, values=[0.1 + 0.2])}
    return Shard(label=label, seed=seed, made_with=MADE, seconds=1.5, completions=[done], scores=scores)


def test_a_shard_reads_back_exactly(tmp_path):
    parts = ShardFolder(tmp_path / "parts")
    assert parts.find("pargs β=2", 0, MADE) is None
    parts.save(part())
    assert parts.find("pargs β=2", 0, MADE) == part()
    assert parts.find("pargs β=2", 1, MADE) is None
    assert parts.find("pargs b=2", 0, MADE) is None  # the same readable name, another label
    assert len(list((tmp_path / "parts").iterdir())) == 1


def test_a_shard_with_another_setting_is_an_error_unless_forced(tmp_path):
    ShardFolder(tmp_path).save(part())
    with pytest.raises(UsageError, match=r"made with another beta \(beta: 2.0 there, 3.0 now\)"):
        ShardFolder(tmp_path).find("pargs β=2", 0, MADE | {"beta": 3.0})
    with pytest.raises(UsageError, match="made with another top_k"):
        ShardFolder(tmp_path).find("pargs β=2", 0, MADE | {"top_k": 3})
    forced = ShardFolder(tmp_path, force=True)
    assert forced.find("pargs β=2", 0, MADE | {"beta": 3.0}) is None
    assert forced.find("pargs β=2", 0, MADE) == part()


def test_a_damaged_shard_is_an_error_with_its_path(tmp_path):
    parts = ShardFolder(tmp_path)
    parts.save(part())
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    with pytest.raises(DataError, match="delete it, or give --force"):
        parts.find("pargs β=2", 0, MADE)
    assert ShardFolder(tmp_path, force=True).find("pargs β=2", 0, MADE) is None


def test_the_fingerprint_depends_on_where_texts_end():
    assert fingerprint_prompts(["ab", "c"]) != fingerprint_prompts(["a", "bc"])
