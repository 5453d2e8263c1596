"""What stands in ``Policy.model`` if another engine than torch runs the policy."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor


class EngineModel(ABC):
    """A policy that an engine runs. It answers what the rest of the project asks of a torch model, and has no weights.

    The engines whose passes this project drives are of the class `ReadableModel`.

    Attributes:
        engine: its name, a row of `rgtg.config.engines.ENGINES`.
        name_or_path: as the user gave it.
        config: with ``vocab_size``, ``hidden_size``, ``num_hidden_layers``, ``max_position_embeddings``.
        generation_config: with ``eos_token_id``.
        device: of logits and states.
        dtype: of logits and states.
        stored_dtype: of the weights in the file.
    """

    engine: str
    name_or_path: str
    config: Any
    generation_config: Any
    device = torch.device("cpu")
    dtype = torch.float32
    stored_dtype: str
    _rgtg_fingerprint: str  # of the weight files; `rgtg.models.loading.scorer_info.fingerprint_weights` returns it

    @abstractmethod
    def require_layers(self, layers: Sequence[int]) -> None:
        """Check that the engine gives the states of these layers.

        Raises:
            UsageError: it does not.
        """

    def eval(self) -> Self:
        """Itself: it is never trained."""
        return self

    def parameters(self) -> Any:
        """One empty tensor with the dtype and device of what it computes."""
        yield torch.empty(0, dtype=self.dtype, device=self.device)

    def get_input_embeddings(self) -> Any:
        """An embedding without values; its size is that of the vocabulary."""
        return SimpleNamespace(weight=torch.empty(self.config.vocab_size, self.config.hidden_size, device="meta"))


class ReadableModel(EngineModel):
    """A policy whose engine reads the tokens that it is given and returns logits and states."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the weights."""

    @abstractmethod
    def logits(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Next-token logits at every token of whole texts, which may be padded on either side."""

    @abstractmethod
    def runner(self, capacity: int, layer: int | None) -> Any:
        """Reads it over a cache (`rgtg.decoding.runners.model_runner.EngineRunner`), without rows.

        Args:
            capacity: tokens of a row to make room for.
            layer: whose states heads read; None if they read none.
        """

    @abstractmethod
    def hidden_states(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch length hidden"]]:
        """States of whole texts, by layer; those at padding have no meaning."""

    @abstractmethod
    def packed_states(
        self, rows: Sequence[tuple[Tensor, Tensor, Tensor]], layers: Sequence[int]
    ) -> dict[int, Float[Tensor, "batch length hidden"]]:
        """States of completions that share their prompts, by layer; those at padding have no meaning.

        Args:
            rows: tokens, positions and parts (L,) of each row, as in `rgtg.models.ops.tree_attention.PackedRow`.
            layers: whose states are read.
        """

    @abstractmethod
    def get_output_embeddings(self) -> Any:
        """The rows (V, H) of the output layer as ``weight``, which training starts a head's token table from."""


class EngineConfig:
    """The sizes of an engine's model, under the names of transformers' configs."""

    is_encoder_decoder = False

    def __init__(self, **sizes: Any) -> None:
        vars(self).update(sizes)

    def get_text_config(self) -> Self:
        """Itself."""
        return self
