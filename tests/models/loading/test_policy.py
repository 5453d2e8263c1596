"""Loading the frozen policy."""

import pytest
import torch

from helpers.tiny_models import tiny_policy, tiny_tokenizer
from rgtg.errors import ModelNotFoundError, UsageError
from rgtg.models.loading.device_map import resolve_device
from rgtg.models.loading.policy import Policy, load_policy


def test_loads_frozen_from_a_folder(policy_folder):
    policy = load_policy(str(policy_folder), dtype="bf16", device="cpu")
    assert policy.model.dtype == torch.bfloat16
    assert not policy.model.training
    assert not any(p.requires_grad for p in policy.model.parameters())
    assert policy.max_length == 128


def test_a_loaded_model_is_wrapped():
    pair = (tiny_policy(), tiny_tokenizer())
    assert load_policy(pair).model is pair[0]
    policy = Policy(*pair)
    assert load_policy(policy) is policy
    with pytest.raises(UsageError, match="loaded by name"):
        load_policy(pair, dtype="float32")


def test_folders_that_cannot_be_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    for source, message in ((tmp_path / "no" / "such", "no model folder"), (tmp_path / "file", "is a file")):
        with pytest.raises(ModelNotFoundError, match=message):
            load_policy(str(source))
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="cannot load the policy"):
        load_policy(str(tmp_path))


def test_missing_weights_raise_an_error(scorer_folder):
    with pytest.raises(UsageError, match=r"not a complete language model \(lm_head\.weight not in its weights"):
        load_policy(str(scorer_folder))


def test_an_unknown_device_is_an_error():
    with pytest.raises(UsageError, match="device 'gpu' cannot be used"):
        resolve_device("gpu")
