"""What is asked of models that transformers loads: their contexts and dtypes."""

import pytest
import torch

from helpers.encoders import CONTEXTS, UNBOUNDED, encoder_model
from helpers.tiny_models import CONFIGS
from rgtg.errors import UsageError
from rgtg.models.loading.pretrained import context_length, max_sequence_length, resolve_dtype


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


def test_dtypes():
    assert resolve_dtype(None) == "auto"
    assert resolve_dtype("fp16") is torch.float16
    with pytest.raises(UsageError, match="unknown dtype 'int4'"):
        resolve_dtype("int4")
