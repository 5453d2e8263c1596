"""Linear layers for decoding: layers with the same input in one product, weights packed for the processor.

A decoding step multiplies one to a few dozen rows by every weight of a model, so it takes as long as reading the
weights from memory. On a CPU, a stock model is slower than that for two reasons: the kernel for a plain weight matrix
reaches half of the memory bandwidth or less, and projections of the same input (query, key, value; gate, up) run in
separate calls. The packed copy of a model has neither problem, and shares all other tensors with the model.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rgtg.errors import UsageError
from rgtg.models.loading.device_map import is_on_one_device, multiplies
from rgtg.models.loading.engine_model import ReadableModel
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.ops.attention import use_single_query_attention

# Packing weights that fit the processor's cache gains nothing.
MIN_WEIGHT_BYTES = 8 * 2**20
# Rows that the packed layout is chosen for; it measured well from 1 to 80.
_PACKED_ROWS = 16


class StackedWeights:
    """Weight matrices with the same input, stacked into one W (out, in): y = x·Wᵀ + b."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, *, pack: bool) -> None:
        self.packed, self.bias = pack, bias
        self.rows, self.nbytes = weight.shape[0], weight.nbytes
        self._weight = _pack(weight) if pack else weight

    def __call__(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """x·Wᵀ + b."""
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            return y
        return nn.functional.linear(x, self._weight, self.bias)

    def append(self, rows: Float[Tensor, "new in"]) -> slice:
        """Append rows to W; returns their columns in the output."""
        weight = torch.cat([self._weight.to_dense() if self.packed else self._weight, rows])
        self._weight = _pack(weight) if self.packed else weight
        if self.bias is not None:
            self.bias = torch.cat([self.bias, rows.new_zeros(len(rows))])
        columns = slice(self.rows, self.rows + len(rows))
        self.rows, self.nbytes = weight.shape[0], weight.nbytes
        return columns


class LinearGroup:
    """One product for all linear layers with the same input, with an optional LoRA on half of the batch.

    The second half of the batch also gets x·Aᵀ·Bᵀ. The rows of A are stacked below the layers' own weights, so that the
    adapter costs one small product more, not two.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, pack: bool) -> None:
        weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        ends = torch.tensor([w.shape[0] for w in weights]).cumsum(0).tolist()
        self.slices = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        self.out = int(ends[-1])
        self.weights = StackedWeights(weight, _stack_biases(weights, biases), pack=pack)
        self.adapter: tuple[slice, Tensor, Tensor] | None = None
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._layers_served = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "LinearGroup":
        """Another group with the same weights, for a structural copy."""
        new = copy.copy(self)
        memo[id(self)] = new
        new._input = new._output = None
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one product reads, those of an adapter included."""
        return self.weights.nbytes + (self.adapter[1].nbytes if self.adapter else 0)

    def adapt(
        self, down: Sequence[Float[Tensor, "rank in"] | None], up: Sequence[Float[Tensor, "out rank"] | None]
    ) -> None:
        """Add a LoRA to the second half of the batch.

        The layers' products become one: their A are stacked, their B are the blocks of one matrix.

        Args:
            down: A of each layer, or None for a layer without an adapter.
            up: B of each layer, scale included, or None.
        """
        pairs = [(a, b, at) for a, b, at in zip(down, up, self.slices, strict=True) if a is not None and b is not None]
        if not pairs:
            return
        stacked = torch.cat([a for a, _, _ in pairs])  # (R, in), R the sum of all ranks
        blocks = stacked.new_zeros(len(stacked), self.out)  # (R, out)
        first = 0
        for a, b, columns in pairs:
            blocks[first : first + len(a), columns] = b.t()
            first += len(a)
        # fp32 for the product of one row: on a CPU it takes half the time of bf16, and is at least as exact
        self.adapter = (self.weights.append(stacked), blocks, blocks.float())

    def output(self, index: int, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Output of layer ``index``. The first layer that is called with an input computes the outputs of all."""
        if len(self.slices) == 1:
            return self._product(x)
        if x is not self._input:
            self._input, self._output, self._layers_served = x, self._product(x), 0
        assert self._output is not None, "set together with the input"
        out = self._output[..., self.slices[index]]
        self._layers_served += 1
        if self._layers_served == len(self.slices):
            self._input = self._output = None
        return out

    def _product(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        y = self.weights(x)
        if self.adapter is not None:
            columns, up, up_fp32 = self.adapter
            rows = y[x.shape[0] // 2 :].view(-1, y.shape[-1])  # (rows of the second half, out + R)
            if len(rows) == 1 and y.device.type == "cpu":
                rows[:, : self.out] += rows[:, columns].float() @ up_fp32
            else:
                rows[:, : self.out].addmm_(rows[:, columns], up)
        return y if y.shape[-1] == self.out else y[..., : self.out]


class GroupedLinear(nn.Module):
    """Replaces a linear layer; its group computes the output."""

    def __init__(self, group: LinearGroup, index: int) -> None:
        super().__init__()
        self.group, self.index = group, index

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """x·Wᵀ + b."""
        return self.group.output(self.index, x)


def can_pack(model: Any) -> bool:
    """Whether packing is available for the model's device and dtype, and the model is large enough to gain from it."""
    weight = model.get_input_embeddings().weight
    if not is_on_one_device(model) or weight.device.type != "cpu" or not can_pack_dtype(weight.dtype):
        return False
    size = sum(m.weight.nbytes for m in model.modules() if _is_linear(m))
    return bool(size >= MIN_WEIGHT_BYTES)


def can_pack_dtype(dtype: torch.dtype) -> bool:
    """Whether this build of torch can pack weights of a dtype for this machine's processor."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[no-untyped-call]
        return False
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and dtype != torch.float16 and multiplies(dtype)


def pack_linears(model: Any) -> Any:
    """The packed copy of a model, or the model itself if packing is not available or fails the check.

    The copy shares all other tensors with the model, which is not changed.
    """
    return group_linears(model, pack=True) if can_pack(model) else model


@torch.inference_mode()
def group_linears(model: Any, *, pack: bool) -> Any:
    """A copy whose linear layers are grouped by their input, which one small pass shows.

    The copy is checked against the model on that pass. The model itself is returned if the outputs differ, for example
    because one layer uses another layer's weight.

    Raises:
        UsageError: the model's weights are on several devices or in several processes.
    """
    if not is_on_one_device(model):
        raise UsageError(
            "an adapter shares a forward pass only with a policy that is on one device: load the policy without "
            "device_map and tp_plan"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[(7 * i + 3) % vocabulary for i in range(5)]], device=model.device)
    # 1. find layers with the same input
    packed = structural_copy(model)
    calls, expected = _record_linear_calls(packed, ids)
    # 2. replace each set of them by one group
    for names in _names_by_input(calls):
        layers = [packed.get_submodule(name) for name in names]
        group = LinearGroup([_weight(m) for m in layers], [m.bias for m in layers], pack=pack)
        for index, name in enumerate(names):
            packed.set_submodule(name, GroupedLinear(group, index))
    if pack:
        use_single_query_attention(packed)
    packed._rgtg_fingerprint = fingerprint_weights(model)
    # 3. compare the copy's output with the model's
    try:
        output = _first_output(packed(input_ids=ids, use_cache=False))
    except (AttributeError, TypeError, RuntimeError):
        return model
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    scale = float(expected.float().abs().max().clamp(min=1e-3))
    equal = not expected.isfinite().all() or float((output - expected).abs().max()) <= tolerance * scale
    return packed if equal else model


def structural_copy(model: Any) -> Any:
    """New modules with the same tensors: layers of the copy can be replaced without changing the model."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def grouped_linears(model: Any) -> dict[str, GroupedLinear]:
    """The grouped layers of a copy, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupedLinear)}


def decode_bytes(model: Any) -> int:
    """Bytes of weights that one decoding pass reads.

    The input embedding does not count, because a pass reads only a few of its rows; an output layer tied to it does.
    Of another engine's model all weights in its file count.
    """
    if isinstance(model, ReadableModel):
        return model.nbytes
    embedding, output = model.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()
    weights = {id(p): p.nbytes for p in model.parameters()}
    tied = output is not None and getattr(output, "weight", None) is embedding.weight
    if not tied:
        weights.pop(id(embedding.weight), None)
    groups = {id(layer.group): layer.group.nbytes for layer in grouped_linears(model).values()}
    return int(sum(weights.values()) + sum(groups.values()))


def _record_linear_calls(model: Any, ids: Int[Tensor, "batch length"]) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Names of linear layers in the order of their calls, each with its input (…, in); and the model's output."""
    calls: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _m, inputs, name=name: calls.append((name, inputs[0])))
        for name, module in model.named_modules()
        if _is_linear(module)
    ]
    try:
        out = _first_output(model(input_ids=ids, use_cache=False))
    finally:
        for handle in handles:
            handle.remove()
    return calls, out


def _names_by_input(calls: list[tuple[str, Tensor]]) -> list[list[str]]:
    """Names of layers with the same parent and the same input tensor; a layer that is called twice is on its own."""
    called = [name for name, _ in calls]
    grouped: dict[tuple[str, int], list[str]] = {}
    for name, x in calls:
        if called.count(name) > 1:
            grouped[(name, -1)] = [name]
        else:
            grouped.setdefault((name.rpartition(".")[0], id(x)), []).append(name)
    return list(grouped.values())


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a plain weight; quantised layers keep their own kernels."""
    linear = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    return linear and type(module.weight) in (nn.Parameter, Tensor)


def _weight(layer: Any) -> Float[Tensor, "out in"]:
    """The weight of a linear layer; GPT-2's ``Conv1D`` stores it transposed."""
    weight: Tensor = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t().contiguous()
    return weight


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)
    return packed


def _stack_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(b is None for b in biases):
        return None
    return torch.cat(
        [w.new_zeros(w.shape[0]) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
    )


def _first_output(out: Any) -> Tensor:
    """Logits (B, T, V), or a reward model's (B, labels), or the final states (B, T, H) of a model without a head."""
    first: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return first
