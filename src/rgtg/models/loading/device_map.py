"""Where a model's weights are held: on one device, spread over several by a device map, or split among processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rgtg.errors import MissingExtraError, UsageError, first_line
from rgtg.models.loading.tensor_parallel import TpPlan, is_sharded, require_readable, tensor_parallel_kwargs

# A name ("auto", "balanced", "sequential", "cuda:1" …), or a device for each module.
DeviceMap = str | dict[str, int | str]


@dataclass(frozen=True)
class Placement:
    """What is said of one model's dtype and place.

    ``device`` moves it whole; ``device_map`` spreads its layers over devices, and over memory and disk (accelerate);
    ``tp_plan`` splits each layer among the processes of a torchrun.
    """

    dtype: "str | torch.dtype | None" = None
    device: "str | torch.device | None" = None
    device_map: DeviceMap | None = None
    tp_plan: TpPlan | None = None

    def arguments(self) -> dict[str, Any]:
        """For ``from_pretrained``, beside the dtype.

        Raises:
            UsageError: more than one of device, map and plan; or a plan without torchrun.
            MissingExtraError: accelerate is not installed.
        """
        if self.tp_plan is not None:
            if self.device is not None or self.device_map is not None:
                raise UsageError("tp_plan puts a share of the model on each process's device: leave its device out")
            return tensor_parallel_kwargs(self.tp_plan)
        if self.device_map is None:
            return {}
        if self.device is not None:
            raise UsageError("device and device_map each say where a model goes: give one of them")
        _require_accelerate()
        return {"device_map": self.device_map}


def resolve_device(device: "str | torch.device | None") -> torch.device:
    """A torch device; None takes the first GPU where there is one.

    Raises:
        UsageError: a device that torch does not know or have.
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
    """Put a loaded model where it belongs, frozen and in evaluation mode.

    Args:
        model: just loaded with ``placement.arguments()``.
        placement: as it was asked for.

    Raises:
        UsageError: a device that cannot be used, a map that leaves the input embedding without one, or a plan that does
            not fit.
    """
    if is_sharded(model):
        require_readable(model)
    elif placement.device_map is None:
        model.to(resolve_device(placement.device))
    elif has_device_map(model):
        if model.device.type == "meta":
            raise UsageError("device_map: the input embedding must be on a device, not on the disk")
        _bring_home(model)
    return model.eval().requires_grad_(False)


def has_device_map(model: Any) -> bool:
    """Whether a model's weights are in several places; asked when a model is loaded or joined, never in a step."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def is_on_one_device(model: Any) -> bool:
    """Whether a model's weights are all there, in one place: not spread by a map, and not split among processes."""
    return not (has_device_map(model) or is_sharded(model))


def synchronize() -> None:
    """Wait until a GPU, where there is one, has done what it was given: only then does a clock tell something."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def iter_full_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model with its name, in their order; those on the disk are read, one at a time.

    Of a model that is split, all processes must ask: each puts its share in.
    """
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            module, _, leaf = name.rpartition(".")
            yield name, model.get_submodule(module)._hf_hook.weights_map[leaf]
        else:
            yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _bring_home(model: Any) -> None:
    """Give what trunk and head return on the device that inputs are on, wherever their last layer is."""
    home = model.device
    heads = (getattr(model, "score", None), model.get_output_embeddings())
    for module in (model.base_model, *heads):
        if isinstance(module, nn.Module):
            module.register_forward_hook(lambda _module, _inputs, output: _moved(output, home))


def _moved(output: Any, home: torch.device) -> Any:
    if isinstance(output, Tensor):
        return output.to(home)
    output.last_hidden_state = output.last_hidden_state.to(home)
    return output


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("device_map needs accelerate: pip install 'rgtg[train]'") from error
