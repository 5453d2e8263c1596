"""A GGUF file as a policy that llama.cpp runs."""

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgtg.engines.llama_cpp.context import LlamaContext, Node
from rgtg.engines.llama_cpp.library import first_error, forget_errors, library
from rgtg.engines.llama_cpp.probe import may_repack, require_readable
from rgtg.engines.llama_cpp.runner import LlamaRunner
from rgtg.engines.llama_cpp.vocabulary import require_same_tokens
from rgtg.errors import ModelNotFoundError, UsageError
from rgtg.models.loading.engine_model import EngineConfig, ReadableModel
from rgtg.models.loading.gguf import require_model
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.policy_files import describe_policy_files
from rgtg.models.loading.pretrained import load_tokenizer

_OTHER_TORCH = "use --engine torch"


def load_policy(source: str, path: Path, *, device: "str | torch.device | None" = None) -> Policy:
    """Load a GGUF file with the tokenizer and chat template in it.

    Args:
        source: as the user named the file.
        path: of the file.
        device: ``cpu`` keeps all layers there; None puts them on a GPU if the library was built for one.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        ModelNotFoundError: a damaged file, or one that llama.cpp does not know.
        UsageError: a model that this engine cannot steer, or a tokenizer that reads text in another way.
    """
    require_model(path)
    require_readable(path)
    model = LlamaModel(source, path, device=device)
    tokenizer = load_tokenizer(source, "policy")
    require_same_tokens(model, tokenizer)
    model.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
    return Policy(model, tokenizer)


class LlamaModel(ReadableModel):
    """A model in llama.cpp, with one cache for everything that is read with it."""

    engine = "llama-cpp"

    def __init__(
        self,
        source: str,
        path: Path,
        *,
        device: "str | torch.device | None" = None,
        threads: int | None = None,
        exact: bool = False,
    ) -> None:
        """Load the weights; arguments and errors are those of `load_policy`.

        ``threads`` compute; None for as many as torch uses. ``exact`` computes attention in fp32, for comparisons.
        """
        self._lib = lib = library()
        self.name_or_path, self.path = source, path
        params = lib.llama_model_default_params()
        params.use_extra_bufts = may_repack(path)
        if device is not None:
            params.n_gpu_layers = _gpu_layers(lib, torch.device(device))
        forget_errors()
        pointer = lib.llama_model_load_from_file(str(path).encode(), params)
        if not pointer:
            raise ModelNotFoundError(f"llama.cpp cannot load {source}: {first_error() or 'no reason given'}")
        self._pointer = pointer
        self._free = weakref.finalize(self, lib.llama_model_free, pointer)
        self._require_decoder()
        self.context = LlamaContext(pointer, threads or torch.get_num_threads(), exact=exact)
        self._close = weakref.finalize(self, self.context.close)  # before the model: the newest finalizer runs first
        description = ctypes.create_string_buffer(256)
        lib.llama_model_desc(pointer, description, 256)
        self.stored_dtype = description.value.decode(errors="replace").rpartition(" ")[2]
        self.config = EngineConfig(
            vocab_size=self.context.vocabulary,
            hidden_size=self.context.hidden,
            num_hidden_layers=int(lib.llama_model_n_layer(pointer)),
            max_position_embeddings=int(lib.llama_model_n_ctx_train(pointer)),
            model_type=self.metadata("general.architecture") or "unknown",
        )
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self._rgtg_fingerprint = describe_policy_files(source).fingerprint

    def metadata(self, key: str) -> str | None:
        """A value of the file's header as text; None if it has none."""
        text = ctypes.create_string_buffer(1024)
        found = self._lib.llama_model_meta_val_str(self._pointer, key.encode(), text, 1024)
        return text.value.decode(errors="replace") if found >= 0 else None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return int(self._lib.llama_model_size(self._pointer))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Ids that llama.cpp's own tokenizer gives a text, in which special tokens may be written.

        Args:
            text: to encode.
            special: put the special tokens around it that the file asks for.
        """
        vocab, data = self._lib.llama_model_get_vocab(self._pointer), text.encode()
        most = len(data) + 8
        tokens = (self._lib.llama_token * most)()
        n = self._lib.llama_tokenize(vocab, data, len(data), tokens, most, special, True)
        if n < 0:
            raise UsageError(f"llama.cpp cannot tokenize {text[:40]!r}")
        return list(tokens[:n])

    def runner(self, capacity: int, layer: int | None) -> LlamaRunner:
        """Reads the model over its cache; without rows."""
        if layer is not None:
            self.require_layers([layer])
        return LlamaRunner(self, self.context, layer).fresh(capacity)

    def require_layers(self, layers: Sequence[int]) -> None:
        """Check that only final states are asked for.

        Raises:
            UsageError: another layer.
        """
        final = self.config.num_hidden_layers
        if other := [layer for layer in layers if layer != final]:
            raise UsageError(
                f"the engine llama-cpp gives the final states only (layer {final}), not those of layer {other[0]}: "
                f"train the head with --layer final, or {_OTHER_TORCH}"
            )

    def hidden_states(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch length hidden"]]:
        """Final states of whole texts; those at padding are zero."""
        self.require_layers(layers)
        states = torch.zeros(*input_ids.shape, self.config.hidden_size)
        for row, places, nodes in self._texts(input_ids, attention_mask):
            states[row, places] = self.context.states(nodes)
        return dict.fromkeys(layers, states)

    def packed_states(
        self, rows: Sequence[tuple[Tensor, Tensor, Tensor]], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch length hidden"]]:
        """Final states of completions that share their prompts: each is a sequence, and shared tokens belong to all."""
        self.require_layers(layers)
        states = torch.zeros(len(rows), max(len(ids) for ids, _, _ in rows), self.config.hidden_size)
        for b, (ids, positions, parts) in enumerate(rows):
            sequences = [self.context.new() for _ in range(max(int(parts.max()), 1))]
            places = zip(ids.tolist(), positions.tolist(), parts.tolist(), strict=True)
            nodes = [Node(token, at, [sequences[part - 1]] if part else sequences) for token, at, part in places]
            states[b, : len(ids)] = self.context.states(nodes)
        return dict.fromkeys(layers, states)

    def logits(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Next-token logits at every token of whole texts; those at padding are zero."""
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, places, nodes in self._texts(input_ids, attention_mask):
            logits[row, places] = self.context.outputs(nodes).logits
        return logits

    def _texts(self, input_ids: Tensor, attention_mask: Tensor) -> Iterator[tuple[int, Tensor, list[Node]]]:
        """Of each row: its number, the places of its tokens, and these as nodes of a sequence of their own."""
        for row in range(len(input_ids)):
            places = attention_mask[row].nonzero()[:, 0]  # padding may be on either side
            sequence = self.context.new()
            yield row, places, [Node(token, i, (sequence,)) for i, token in enumerate(input_ids[row, places].tolist())]

    @cached_property
    def _output_embedding(self) -> Tensor:
        """(V, H): the rows of the output layer in fp32, dequantised from the file."""
        from gguf import GGUFReader, dequantize

        found = {tensor.name: tensor for tensor in GGUFReader(str(self.path)).tensors}
        tensor = found.get("output.weight") or found["token_embd.weight"]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())

    def get_output_embeddings(self) -> Any:
        """The rows of the output layer, which training starts a head's token table from."""
        return SimpleNamespace(weight=self._output_embedding)

    def _require_decoder(self) -> None:
        lib, pointer = self._lib, self._pointer
        reason = None
        if lib.llama_model_has_encoder(pointer) or not lib.llama_model_has_decoder(pointer):
            reason = "it is no decoder"
        elif lib.llama_model_is_recurrent(pointer) or lib.llama_model_is_hybrid(pointer):
            reason = "it has recurrent layers, whose state cannot be cut back to a prefix"
        elif lib.llama_model_is_diffusion(pointer):
            reason = "it is a diffusion model"
        if reason is not None:
            raise UsageError(f"the engine llama-cpp cannot steer {self.name_or_path}: {reason}; {_OTHER_TORCH}")


def _gpu_layers(lib: Any, device: torch.device) -> int:
    """How many layers go to the GPU: none, or all of them."""
    if device.type == "cpu":
        return 0
    if not lib.llama_supports_gpu_offload():
        raise UsageError(
            f"device {device}: this llama-cpp-python was built for the CPU; build it for your GPU (its documentation "
            "says how), or leave device out"
        )
    return -1
