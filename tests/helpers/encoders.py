"""Tiny encoder reward models of many families, and their contexts."""

import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForSequenceClassification

from helpers.other_tokenizers import byte_level

POSITIONS = 34
# Tokens that each family reads with 34 positions: two less where these begin after the padding token's id.
CONTEXTS = {
    "albert": 34, "bert": 34, "big_bird": 34, "camembert": 32, "data2vec-text": 32, "deberta": 34, "deberta-v2": 34,
    "distilbert": 34, "electra": 34, "esm": 32, "ibert": 32, "longformer": 32, "megatron-bert": 34, "modernbert": 34,
    "mpnet": 32, "nystromformer": 34, "roberta": 32, "roberta-prelayernorm": 32, "roformer": 34, "squeezebert": 34,
    "xlm-roberta": 32, "xlm-roberta-xl": 32,
}  # fmt: skip
# Families without a table of positions also read texts over the context that they were made for.
UNBOUNDED = {"modernbert"}


def encoder_tokenizer():
    """A byte-level tokenizer that writes <s> and </s> around every text."""
    tokenizer = byte_level(340)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.pad_token = "</s>"  # id 1, as in RoBERTa
    return tokenizer


def encoder_model(family, seed=2):
    """A tiny random encoder with one label and ``POSITIONS`` positions."""
    config = AutoConfig.for_model(
        family, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=340,
        pad_token_id=1, bos_token_id=0, eos_token_id=1, max_position_embeddings=POSITIONS, num_labels=1,
        embedding_size=32, attention_window=4, dim=32, n_heads=4, n_layers=1, hidden_dim=48, reference_compile=False,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)
