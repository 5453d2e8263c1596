"""Tiny random models and a character tokenizer that every test shares."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 64

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IDS = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, **_IDS, num_key_value_heads=2, max_position_embeddings=128),
    "qwen2": lambda: Qwen2Config(**_SIZES, **_IDS, num_key_value_heads=2, max_position_embeddings=128),
    "qwen3": lambda: Qwen3Config(**_SIZES, **_IDS, num_key_value_heads=2, head_dim=8, max_position_embeddings=128),
    "mistral": lambda: MistralConfig(
        **_SIZES, **_IDS, num_key_value_heads=2, max_position_embeddings=128, sliding_window=6
    ),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **_IDS),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, **_IDS, max_position_embeddings=128),
    "opt": lambda: OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=128,
        word_embed_proj_dim=32, do_layer_norm_before=True, **_IDS,
    ),
}  # fmt: skip


def tiny_policy(family: str = "llama", seed: int = 0):
    """A random causal LM; weights are scaled up so that its distributions are far from flat."""
    return randomise(AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="sdpa"), seed)


def tiny_reward_model(family: str = "llama", seed: int = 1):
    """A random sequence-classification model with one label."""
    config = CONFIGS[family]()
    config.num_labels = 1
    return randomise(AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa"), seed)


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35 if "embed" in name or "wte" in name else 0.25, generator=generator)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Character-level: <s> 0, <pad> 1, </s> 2, <unk> 3, then 60 printable characters."""
    characters = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:'\n"[: VOCAB - 4]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *characters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def padded(model, rows: int):
    """The same model with ``rows`` embeddings; the additional ones are what a language model says with preference."""
    model.resize_token_embeddings(rows, mean_resizing=False)
    output = model.get_output_embeddings()
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:].normal_(0, 0.35, generator=torch.Generator().manual_seed(8))
        if output is not None and rows > VOCAB:
            ids = torch.arange(4, 30)[None]
            states = model.base_model(input_ids=ids).last_hidden_state[0]  # (26, H)
            output.weight[VOCAB:] = 0.5 * states[VOCAB - rows :]
    return model.eval().requires_grad_(False)
