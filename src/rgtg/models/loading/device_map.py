"""Where a model's weights are: on one device, spread over several by a device map, or sharded among processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rgtg.errors import UsageError, first_line
from rgtg.models.loading.tensor_parallel import TpPlan, is_sharded, tensor_parallel_kwargs
from rgtg.models.ops.lm_head import trunk

# A name ("auto", "balanced", "sequential", "cuda:1" …), or a device for each module.
DeviceMap = str | dict[str, int | str]
# Memory limit of a container, in bytes, or "max" (Linux, control groups 2).
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Placement:
    """The requested dtype and place of one model.

    ``device`` holds the whole model. ``device_map`` spreads its layers over devices, memory and disk (with accelerate).
    ``tp_plan`` shards each layer among the processes of a torchrun.
    """

    dtype: "str | torch.dtype | None" = None
    device: "str | torch.device | None" = None
    device_map: DeviceMap | None = None
    tp_plan: TpPlan | None = None

    def load_kwargs(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``, without the dtype.

        Raises:
            UsageError: more than one of device, device_map and tp_plan; or a tp_plan without torchrun.
        """
        if self.tp_plan is not None:
            if self.device is not None or self.device_map is not None:
                raise UsageError("tp_plan puts a shard of the model on each process's device: leave its device out")
            return tensor_parallel_kwargs(self.tp_plan)
        if self.device_map is None:
            return {}
        if self.device is not None:
            raise UsageError("device and device_map both say where a model goes: give one of them")
        return {"device_map": self.device_map}


def resolve_device(device: "str | torch.device | None") -> torch.device:
    """A torch device; None means the first GPU, or the CPU if there is none.

    Raises:
        UsageError: torch does not know the device, or the machine does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used: {first_line(error)}") from error
    return resolved


def finish_loading(model: Any, placement: Placement) -> Any:
    """Move a loaded model to its place, freeze it and put it in evaluation mode.

    Where no dtype was requested, 16-bit weights become float32 on a CPU that is faster so (`float32_is_faster`).

    Args:
        model: just loaded with ``placement.load_kwargs()``.
        placement: as requested.

    Raises:
        UsageError: a device that cannot be used, a device_map that leaves the input embedding on the disk, or a tp_plan
            that does not fit the model.
    """
    if is_sharded(model):
        _require_working_plan(model)
    elif placement.device_map is None:
        model.to(resolve_device(placement.device))
        if placement.dtype in (None, "auto") and float32_is_faster(model):
            model.float()
    elif has_device_map(model):
        if model.device.type == "meta":
            raise UsageError("device_map: the input embedding must be on a device, not on the disk")
        _return_outputs_to_input_device(model)
    return model.eval().requires_grad_(False)


def float32_is_faster(model: Any) -> bool:
    """Whether a model's 16-bit weights should be widened: a CPU that cannot multiply them, and enough memory.

    Without instructions for a 16-bit dtype (bf16: AVX-512), torch converts every number of every product. Measured on a
    processor with AVX2: SmolLM2-135M reads 256 tokens in 7.2 s in bf16 and in 0.95 s in float32. float32 holds the same
    weights exactly. It is not used where it would take more than half of the memory.
    """
    weights = list(model.parameters())
    halves = all(weight.dtype in (torch.bfloat16, torch.float16) for weight in weights)
    if model.device.type != "cpu" or not halves or multiplies(model.dtype):
        return False
    return bool(4 * sum(weight.numel() for weight in weights) <= memory_bytes() / 2)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU, by the kernels of this build of torch, multiplies matrices of a floating dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return dtype == torch.float32
    match dtype:
        case torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def memory_bytes() -> float:
    """Memory of this machine, or of the container that the process runs in."""
    import psutil

    machine = float(psutil.virtual_memory().total)
    try:
        return min(machine, float(_CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no limit
        return machine


@torch.inference_mode()
def _require_working_plan(model: Any) -> None:
    """Run a model that was just sharded on three tokens.

    Raises:
        UsageError: its plan does not fit it.
    """
    try:
        trunk(model)(torch.zeros(1, 3, dtype=torch.long, device=model.device), use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UsageError(f"the tensor parallel plan does not fit {model.name_or_path}: {first_line(error)}") from error


def has_device_map(model: Any) -> bool:
    """Whether a model's weights are spread over several places. Walks all modules: too slow for a decoding step."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def is_on_one_device(model: Any) -> bool:
    """Whether a model's weights are complete and on one device: neither spread by a map nor sharded."""
    return not (has_device_map(model) or is_sharded(model))


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished its work, so that a clock can be read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _return_outputs_to_input_device(model: Any) -> None:
    """Move the outputs of trunk and head to the inputs' device, wherever the last layer is."""
    device = model.device

    def move(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output.to(device)
        output.last_hidden_state = output.last_hidden_state.to(device)
        return output

    for module in (trunk(model), getattr(model, "score", None), model.get_output_embeddings()):
        if isinstance(module, nn.Module):
            module.register_forward_hook(move)
