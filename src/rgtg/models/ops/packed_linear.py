"""Linear layers laid out for a few rows at a time: siblings in one product, weights packed for the processor.

Decoding multiplies one to a few dozen rows by every weight of a model, so a step takes as long as reading the weights.
Two things keep a stock model from that limit on a CPU: a plain weight matrix is walked in an order that reaches half of
the memory's speed or less, and projections of one input (query, key, value; gate, up) are read in separate calls. Here
both are undone, on a twin of the model that shares everything else with it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rgtg.errors import UsageError
from rgtg.models.loading.device_map import is_on_one_device
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.ops import attention

# Weights that fit a processor's cache gain nothing.
MIN_WEIGHT_BYTES = 8 * 2**20
# Rows the packed layout is chosen for; measured good from 1 to 80.
_PACKED_ROWS = 16


class StackedWeights:
    """Rows of several weight matrices that read one input, laid out once and multiplied at once: y = x·Wᵀ + b."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, pack: bool) -> None:
        self.packed, self.bias = pack, bias
        self.rows, self.nbytes = weight.shape[0], weight.nbytes
        self._weight = _pack(weight) if pack else weight

    def __call__(self, x: Tensor) -> Tensor:
        """(…, in) → (…, rows)."""
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            return y
        return nn.functional.linear(x, self._weight, self.bias)

    def add(self, rows: Tensor) -> slice:
        """Lay out more rows behind those that are there; returns their place in the output."""
        weight = torch.cat([self._weight.to_dense() if self.packed else self._weight, rows])
        self._weight = _pack(weight) if self.packed else weight
        if self.bias is not None:
            self.bias = torch.cat([self.bias, rows.new_zeros(len(rows))])
        place = slice(self.rows, self.rows + len(rows))
        self.rows, self.nbytes = weight.shape[0], weight.nbytes
        return place


class LinearGroup:
    """One product for all linear layers that read the same input, with an optional LoRA on half of the batch.

    Rows of the second half of the batch also get x·Aᵀ·Bᵀ; the rows of A are stacked under the layers' own, so that the
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
        self._taken = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "LinearGroup":
        """A group of its own around the same weights, for a structural copy."""
        new = copy.copy(self)
        memo[id(self)] = new
        new._input = new._output = None
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of weights (an adapter's too) that one product reads."""
        return self.weights.nbytes + (self.adapter[1].nbytes if self.adapter else 0)

    def adapt(self, down: Sequence[Tensor | None], up: Sequence[Tensor | None]) -> None:
        """Add a LoRA to the second half of the batch: ``down[m]`` (r, in) and ``up[m]`` (out, r), scaled, per member.

        Members without one take None. The members' products become one: A stacked, B block by block.
        """
        pairs = [(a, b, at) for a, b, at in zip(down, up, self.slices, strict=True) if a is not None and b is not None]
        if not pairs:
            return
        stacked = torch.cat([a for a, _, _ in pairs])
        blocks = stacked.new_zeros(len(stacked), self.out)
        first = 0
        for a, b, columns in pairs:
            blocks[first : first + len(a), columns] = b.t()
            first += len(a)
        # fp32 for the second product: with one row, half the time of the same in bf16 on a CPU, and no less exact
        self.adapter = (self.weights.add(stacked), blocks, blocks.float())

    def member(self, index: int, x: Tensor) -> Tensor:
        """Output of one member; the first that meets an input computes it for all."""
        if len(self.slices) == 1:
            return self._product(x)
        if x is not self._input:
            self._input, self._output, self._taken = x, self._product(x), 0
        assert self._output is not None, "set together with the input"
        out = self._output[..., self.slices[index]]
        self._taken += 1
        if self._taken == len(self.slices):
            self._input = self._output = None
        return out

    def _product(self, x: Tensor) -> Tensor:
        y = self.weights(x)
        if self.adapter is not None:
            place, up, up_fp32 = self.adapter
            rows = y[x.shape[0] // 2 :].view(-1, y.shape[-1])
            if len(rows) == 1 and y.device.type == "cpu":
                rows[:, : self.out] += rows[:, place].float() @ up_fp32
            else:
                rows[:, : self.out].addmm_(rows[:, place], up)
        return y if y.shape[-1] == self.out else y[..., : self.out]


class GroupedLinear(nn.Module):
    """Stands where a linear layer stood; its group does the work."""

    def __init__(self, group: LinearGroup, index: int) -> None:
        super().__init__()
        self._shared = (group, index)  # in a tuple: the group is no submodule, and members share it

    @property
    def group(self) -> LinearGroup:
        """The group this layer belongs to."""
        return self._shared[0]

    @property
    def index(self) -> int:
        """This layer's place in its group."""
        return self._shared[1]

    def forward(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b."""
        group, index = self._shared
        return group.member(index, x)


def can_pack(model: Any) -> bool:
    """Whether packing is available for the model's device and dtype, and worth it for its size."""
    weight = model.get_input_embeddings().weight
    if not is_on_one_device(model) or weight.device.type != "cpu" or not can_pack_dtype(weight.dtype):
        return False
    size = sum(m.weight.nbytes for m in model.modules() if _is_linear(m))
    return bool(size >= MIN_WEIGHT_BYTES)


def can_pack_dtype(dtype: torch.dtype) -> bool:
    """Whether this build of torch, on this machine's processor, lays out weights of a dtype for a CPU."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def pack_linears(model: Any) -> Any:
    """The model's twin for decoding, packed, where that is available and agrees with it on a trial; else the model.

    The twin shares every other tensor with the model, which is left as it was.
    """
    return group_linears(model, pack=True) if can_pack(model) else model


@torch.inference_mode()
def group_linears(model: Any, *, pack: bool) -> Any:
    """A twin whose linear layers are grouped by the input they read, found by watching one small pass.

    Where the twin does not reproduce the model (a layer that reads another's weight, say), the model itself.

    Raises:
        UsageError: the model's weights are in several places.
    """
    if not is_on_one_device(model):
        raise UsageError(
            "an adapter is read in one pass with its policy where that is whole, on one device: load the policy "
            "without device_map and tp_plan"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[(7 * i + 3) % vocabulary for i in range(5)]], device=model.device)
    twin = structural_copy(model)
    calls, expected = _watch(twin, ids)
    for names in _siblings(calls):
        layers = [twin.get_submodule(name) for name in names]
        group = LinearGroup([_weight(m) for m in layers], [m.bias for m in layers], pack=pack)
        for index, name in enumerate(names):
            twin.set_submodule(name, GroupedLinear(group, index))
    if pack:
        attention.use_on(twin)
    twin._rgtg_fingerprint = fingerprint_weights(model)
    try:
        got = _first_output(twin(input_ids=ids, use_cache=False))
    except (AttributeError, TypeError, RuntimeError):
        return model
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    scale = float(expected.float().abs().max().clamp(min=1e-3))
    agrees = not expected.isfinite().all() or float((got - expected).abs().max()) <= tolerance * scale
    return twin if agrees else model


def structural_copy(model: Any) -> Any:
    """New modules around the same tensors: changing the copy's layers does not change the model's."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def grouped_linears(model: Any) -> dict[str, GroupedLinear]:
    """The grouped layers of a twin, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupedLinear)}


def decode_bytes(model: Any) -> int:
    """Bytes of weights that one decoding pass reads: everything but the input embedding, of which it takes a few rows.

    An output layer tied to the embedding is read, and counted.
    """
    embedding, output = model.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()
    weights = {id(p): p.nbytes for p in model.parameters()}
    tied = output is not None and getattr(output, "weight", None) is embedding.weight
    if not tied:
        weights.pop(id(embedding.weight), None)
    groups = {id(layer.group): layer.group.nbytes for layer in grouped_linears(model).values()}
    return int(sum(weights.values()) + sum(groups.values()))


def _watch(model: Any, ids: Tensor) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """Linear layers in the order of their calls, each with the input it was given; and the model's output."""
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


def _siblings(calls: list[tuple[str, Tensor]]) -> list[list[str]]:
    """Names of layers with one parent that read one tensor, together; a layer called twice stays alone."""
    seen = [name for name, _ in calls]
    grouped: dict[tuple[str, int], list[str]] = {}
    for name, x in calls:
        if seen.count(name) > 1:
            grouped[(name, -1)] = [name]
        else:
            grouped.setdefault((name.rpartition(".")[0], id(x)), []).append(name)
    return list(grouped.values())


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _weight(layer: Any) -> Tensor:
    """(out, in), whichever way the layer stores it."""
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
    first: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return first
