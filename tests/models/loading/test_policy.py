"""Loading the frozen policy."""

import pytest
import torch

from helpers.encoders import CONTEXTS, UNBOUNDED, encoder_model
from helpers.tiny_models import CONFIGS, tiny_policy, tiny_tokenizer
from rgtg.errors import ModelNotFoundError, UsageError
from rgtg.models.loading.device_map import resolve_device
from rgtg.models.loading.policy import Policy, context_length, load_policy, max_sequence_length, resolve_dtype


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


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_context_length(family):
    assert context_length(CONFIGS[family]()) == 128


@pytest.mark.parametrize("family", CONTEXTS)
def test_an_encoder_reads_as_many_tokens_as_it_has_positions_for(family):
    model = encoder_model(family)
    limit = max_sequence_length(model)
    assert limit == CONTEXTS[family]
    assert model(input_ids=torch.full((1, limit), 5)).logits.isfinite().all()
    if family not in UNBOUNDED:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


def test_a_model_that_is_no_torch_module_has_the_context_of_its_config():
    class Other:
        config = CONFIGS["llama"]()

    assert max_sequence_length(Other()) == 128


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


def test_dtypes_and_devices():
    assert resolve_dtype(None) == "auto"
    assert resolve_dtype("fp16") is torch.float16
    with pytest.raises(UsageError, match="unknown dtype 'int4'"):
        resolve_dtype("int4")
    with pytest.raises(UsageError, match="device 'gpu' cannot be used"):
        resolve_device("gpu")
