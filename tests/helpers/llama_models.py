"""The tiny policy of `tiny_models` as a GGUF file, run by llama.cpp: what llama.cpp gives can be held against torch."""

import functools
import tempfile
from pathlib import Path

import pytest

from helpers.tiny_models import tiny_policy, tiny_tokenizer

WHY = "llama-cpp-python is not installed: pip install 'rgtg[llama-cpp]'"


def require_llama_cpp():
    """Skip a module of tests where the library is absent."""
    pytest.importorskip("llama_cpp", reason=WHY)


def write_tiny_gguf(path, seed=0, context=128):
    """Write `tiny_policy` of the Llama family in F32, with the characters of `tiny_tokenizer` as tokens."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    model, tokenizer = tiny_policy(seed=seed), tiny_tokenizer()
    sizes = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    writer.add_rope_freq_base(sizes.rope_parameters["rope_theta"])
    writer.add_vocab_size(sizes.vocab_size)
    tokens = [token.replace(" ", "Ġ").replace("\n", "Ċ") for token in tokenizer.convert_ids_to_tokens(range(64))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * 60)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, sizes.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), _as_stored(name, tensor, sizes).float().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_stored(name, tensor, sizes):
    """llama.cpp's Llama has the halves of queries and keys interleaved."""
    for part, heads in (("q_proj", sizes.num_attention_heads), ("k_proj", sizes.num_key_value_heads)):
        if part in name:
            return tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


@functools.cache
def tiny_llama_policy():
    """The tiny policy in llama.cpp, with the character tokenizer; one for all tests of a process."""
    from rgtg.engines.llama_cpp.model import LlamaModel
    from rgtg.models.loading.policy import Policy

    folder = Path(tempfile.mkdtemp(prefix="tiny-gguf-"))
    path = write_tiny_gguf(folder / "tiny.gguf")
    model = LlamaModel(str(path), path, threads=1, exact=True)
    model.generation_config.eos_token_id = 2
    return Policy(model, tiny_tokenizer())
