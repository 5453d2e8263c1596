"""The shape of a model, for planning: its layers, the weights that a pass reads, the bytes of its KV cache."""

import json
import re
from pathlib import Path
from typing import Any, Self

from rgtg.errors import DataError, ModelNotFoundError, UsageError, first_line
from rgtg.types.base import Record


class ModelShape(Record):
    """Sizes of a decoder."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    trunk: int  # weights in the matrix products of all layers
    head: int  # weights of the output layer
    total: int  # all weights
    experts: int = 0  # weights of the trunk that belong to mixtures of experts
    routed: int = 1  # experts in a layer
    active: int = 1  # experts that a token uses
    exact: bool  # counted from a config.json, not estimated from a size

    @classmethod
    def llama(
        cls, name: str, layers: int, hidden: int, kv_heads: int, intermediate: int, vocabulary: int, **more: Any
    ) -> Self:
        """A Llama decoder with these dimensions."""
        head_dim = more.get("head_dim", 128 if hidden >= 3072 else 64)
        heads = more.get("heads", hidden // head_dim)
        layer = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 3 * hidden * intermediate
        head = vocabulary * hidden
        tied = more.get("tied", False)
        total = layers * (layer + 2 * hidden) + hidden + head * (1 if tied else 2)
        return cls(
            name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            vocabulary=vocabulary, trunk=layers * layer, head=head, total=total, exact=more.get("exact", False),
        )  # fmt: skip

    def cache_bytes(self, width: int) -> int:
        """Bytes of one token in the KV cache, at ``width`` bytes per number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def weights_read(self, tokens: int) -> float:
        """Weights of the trunk that a pass of so many tokens reads; only experts that a token is routed to are read."""
        used = 1 - (1 - self.active / self.routed) ** tokens
        return self.trunk - self.experts + self.experts * used

    @property
    def weights_per_token(self) -> float:
        """Weights of the trunk that one token is multiplied with."""
        return self.trunk - self.experts + self.experts * self.active / self.routed

    def without_head(self) -> Self:
        """The shape as a reward model, with a scalar head in place of the output layer."""
        own = self.head if self.total - self.trunk > 1.5 * self.head else 0  # a tied head is the embedding, which stays
        return self.model_copy(update={"head": 0, "total": self.total - own})


# Widely used open models: layers, hidden, key-value heads, intermediate, vocabulary.
_KNOWN = {
    0.5e9: ModelShape.llama("0.5B", 24, 896, 2, 4864, 151_936, tied=True),
    1.2e9: ModelShape.llama("1B", 16, 2048, 8, 8192, 128_256, tied=True),
    3.2e9: ModelShape.llama("3B", 28, 3072, 8, 8192, 128_256, tied=True),
    8.0e9: ModelShape.llama("8B", 32, 4096, 8, 14_336, 128_256),
    14.8e9: ModelShape.llama("14B", 48, 5120, 8, 13_824, 152_064),
    32.8e9: ModelShape.llama("32B", 64, 5120, 8, 27_648, 152_064),
    70.6e9: ModelShape.llama("70B", 80, 8192, 8, 28_672, 128_256),
    405.9e9: ModelShape.llama("405B", 126, 16_384, 8, 53_248, 128_256),
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([MB]?)", re.IGNORECASE)
# Hub ids without an owner do not begin like this, and asking the hub takes half a minute offline.
_NUMBER = re.compile(r"[-+.]*\d")


def model_shape(source: str) -> ModelShape:
    """The shape of a model, given as a size (70B, 350M), or as a folder or hub id with a config.json.

    Raises:
        UsageError: neither, or a size without a unit or with an unknown one.
        ModelNotFoundError: no such folder or repository, or it contains no decoder.
    """
    found = _SIZE.fullmatch(source)
    if Path(source).exists() or not (found or _NUMBER.match(source)) or "/" in source:
        return _from_config(source)
    if found is None:
        raise UsageError(
            f"{source} is no folder, and no size: those are written 70B, 0.5B or 350M (a hub id: owner/name)"
        )
    if not found[2]:
        raise UsageError(f"{source} is no folder, and as a size it needs a unit: {source}B or {source}M parameters")
    return _by_size(source, float(found[1]) * (1e9 if found[2].upper() == "B" else 1e6))


def _by_size(name: str, parameters: float) -> ModelShape:
    """The nearest known model, scaled to the given size."""
    if not 1e7 <= parameters <= 2e12:
        raise UsageError(f"{name}: sizes from 10M to 2000B are known; give a folder with a config.json for others")
    near = min(_KNOWN, key=lambda size: abs(size / parameters - 1) + abs(parameters / size - 1))
    shape = _KNOWN[near]
    if abs(parameters / shape.total - 1) < 0.15:  # 70B means the model of that name
        return shape.model_copy(update={"name": name})
    scale = parameters / shape.total
    side = scale ** (1 / 3)  # layers and both sides of a matrix grow equally
    kept = {"vocabulary": shape.vocabulary, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    hidden = max(64, round(shape.hidden * side / 64) * 64)
    return shape.model_copy(
        update={
            **kept, "name": name, "layers": max(2, round(shape.layers * side)), "hidden": hidden,
            "heads": max(shape.kv_heads, hidden // shape.head_dim), "trunk": round(shape.trunk * scale),
            "head": round(shape.head * scale), "total": round(parameters),
        }
    )  # fmt: skip


def _from_config(source: str) -> ModelShape:
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    from rgtg.models.loading.hub import local_file
    from rgtg.models.loading.pretrained import find_gguf, load_pretrained

    adapter = Path(source) / "adapter_config.json"
    if adapter.is_file() and not (Path(source) / "config.json").is_file():
        return _from_config(_base_of(adapter)).model_copy(update={"name": source})
    config = load_pretrained(AutoConfig, source, "model") if find_gguf(source) else None
    folder = local_file(source, "config.json").parent if config is None else None
    try:
        config = config or AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return count_shape(model, source)
    except (ValueError, OSError, LookupError, TypeError, RuntimeError, AttributeError, StrictDataclassError) as error:
        message = f"cannot determine the sizes of {source} from its config.json: {first_line(error)}"
        raise ModelNotFoundError(message) from error


def _base_of(adapter: Path) -> str:
    """The base model of a LoRA adapter.

    Raises:
        DataError: the adapter's config names no base model.
    """
    try:
        return str(json.loads(adapter.read_bytes())["base_model_name_or_path"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{adapter} names no base model (base_model_name_or_path)") from error


def count_shape(model: Any, name: str) -> ModelShape:
    """Count the sizes of a causal language model, which may be on the meta device."""
    from rgtg.models.ops.lm_head import trunk

    text = model.config.get_text_config()
    output = model.get_output_embeddings()
    inside = [(n, p) for n, p in trunk(model).named_parameters() if p.dim() > 1]
    embeddings = {id(m.weight) for m in trunk(model).modules() if type(m).__name__ == "Embedding"}
    products = [(n, p.numel()) for n, p in inside if id(p) not in embeddings]
    experts = sum(size for n, size in products if ".experts." in n)
    heads = text.num_attention_heads
    routed = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    return ModelShape(
        name=name, layers=text.num_hidden_layers, hidden=text.hidden_size, heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads, vocabulary=text.vocab_size,
        trunk=sum(size for _, size in products), head=output.weight.numel() if output is not None else 0,
        total=sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()),
        experts=experts if routed > 1 else 0, routed=routed,
        active=getattr(text, "num_experts_per_tok", 1) if routed > 1 else 1, exact=True,
    )  # fmt: skip
