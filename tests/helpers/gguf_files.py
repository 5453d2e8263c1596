"""Tiny GGUF files, written with the gguf package as llama.cpp's converter writes them."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

from helpers.tiny_models import randomise

TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "Ġt", "he"]
MERGES = ["Ġ t", "h e"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 128, "vocab_size": len(TOKENS),
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False, rms_norm_eps=1e-5),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=len(TOKENS)),
}


def gguf_model(family, seed=0):
    """The model that `write_gguf` writes."""
    return randomise(AutoModelForCausalLM.from_config(CONFIGS[family]()), seed)


def write_gguf(path, family="llama", *, seed=0, quantised=False, change=None):
    """Write a tiny random model with a byte-level tokenizer and a chat template; weights in F32, or Q8_0.

    ``change(writer)`` adds or overrides metadata.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

    model = gguf_model(family, seed)
    sizes = model.config
    heads, layers = sizes.num_attention_heads, sizes.num_hidden_layers
    writer = GGUFWriter(str(path), family)
    writer.add_name(f"tiny {family}")
    writer.add_context_length(sizes.max_position_embeddings)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(64)
    writer.add_head_count(heads)
    if family == "gpt2":
        writer.add_layer_norm_eps(sizes.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(sizes.num_key_value_heads)
        writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
        writer.add_rope_freq_base(sizes.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if family == "qwen2" else "default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 4 + [1] * (len(TOKENS) - 4))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(3)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    if change:
        change(writer)
    names = get_tensor_name_map(getattr(MODEL_ARCH, family.upper()), layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and sizes.tie_word_embeddings:
            continue
        data = _as_stored(name, tensor, sizes).float().numpy()
        stored = names.get_name(name, (".weight", ".bias"))
        assert stored, name
        if quantised and data.ndim > 1:
            packed = quants.quantize(data, GGMLQuantizationType.Q8_0)
            writer.add_tensor(stored, packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_stored(name, tensor, sizes):
    """llama.cpp stores GPT-2's linear layers transposed, and Llama's queries and keys with their halves interleaved."""
    if sizes.model_type == "gpt2" and tensor.dim() == 2 and ".wte" not in name and ".wpe" not in name:
        return tensor if name == "lm_head.weight" else tensor.T
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if sizes.model_type == "llama" and part in name:
            count = getattr(sizes, heads)
            return tensor.view(count, 2, tensor.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def weights(model):
    """Name and values of each weight."""
    return {name: tensor.to(torch.float32) for name, tensor in model.state_dict().items()}
