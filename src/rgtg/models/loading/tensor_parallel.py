"""Tensor parallelism: the plans of transformers shard each layer of a model among the processes of a torchrun.

All ranks run the same loop with the same seeds and must draw the same tokens: every forward pass needs all ranks. If
two ranks drew different tokens, they would deadlock in a collective, or reduce partial results of different sequences.
The logits and scores that decide are therefore broadcast from rank 0. That includes models that are not sharded, which
every rank runs for itself, because other hardware may round differently.
"""

import atexit
import os
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rgtg.errors import UsageError

# "auto", the model's own plan; or transformers' styles by module, which override it.
TpPlan = str | dict[str, str]

_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Models whose outputs are broadcast, and the device that the process group communicates from.
_broadcast_devices: "WeakKeyDictionary[Any, torch.device]" = WeakKeyDictionary()


def is_main_process() -> bool:
    """True in a single process, and in rank 0 under ``torchrun``."""
    return int(os.environ.get("RANK", "0")) == 0


def destroy_process_group() -> None:
    """Close the process group before the interpreter ends, when its threads could abort a run that has succeeded."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_local_device() -> None:
    """Make this rank's own GPU, if there are any, the default one for models."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def tensor_parallel_kwargs(plan: TpPlan) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that shard a model over all ranks.

    Raises:
        UsageError: not started with torchrun, or not a plan.
    """
    from transformers.distributed import DistributedConfig

    if not isinstance(plan, dict) and plan != "auto":
        raise UsageError(f"tp_plan = {plan!r}: expected auto, or a style for each module")
    if not all(name in os.environ for name in _LAUNCH_VARIABLES):
        raise UsageError(
            "tp_plan shards a model among processes, and there is only this one: start it with torchrun "
            "(torchrun --standalone --nproc-per-node 2 --no-python rgtg generate …)"
        )
    atexit.register(destroy_process_group)
    return {"distributed_config": DistributedConfig(tp_plan=plan)}


def require_divisible(config: Any, plan: TpPlan, name: str) -> None:
    """Check that a model's own plan can shard it among these ranks.

    Args:
        config: of the model.
        plan: as requested. A plan by module is not checked here: the loaded model is tried.
        name: of the model, for the error.

    Raises:
        UsageError: transformers has no plan for the model, or its attention heads are not divisible.
    """
    text, processes = config.get_text_config(), int(os.environ["WORLD_SIZE"])
    if plan != "auto" or processes == 1:
        return
    if not text.base_model_tp_plan:
        raise UsageError(
            f"transformers has no tensor parallel plan for {name} ({text.model_type}): spread its layers over devices "
            "(device_map), without torchrun"
        )
    for kind in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, kind, None)
        if isinstance(heads, int) and heads % processes:
            divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise UsageError(
                f"the {heads} {kind.removeprefix('num_').replace('_', ' ')} of {name} cannot be split among "
                f"{processes} processes: start {', '.join(divisors[:-1])} or {divisors[-1]}"
            )


def is_sharded(model: Any) -> bool:
    """Whether each rank holds a shard of the model's layers."""
    return (getattr(model, "tp_size", None) or 1) > 1


def register_parallel_models(models: Iterable[Any]) -> bool:
    """Broadcast the outputs of these models from rank 0 if one of them is sharded. Returns whether one is."""
    models = list(models)
    device = next((model.device for model in models if is_sharded(model)), None)
    if device is None:
        return False
    for model in models:
        _broadcast_devices[model] = device
    return True


def is_tensor_parallel(model: Any) -> bool:
    """Whether a model is sharded, or used together with one that is."""
    return model in _broadcast_devices


def broadcast_from_rank0(model: Any, values: Tensor) -> Tensor:
    """Rank 0's outputs of a model, of any shape, in every rank; ``values`` unchanged if it is not tensor parallel."""
    device = _broadcast_devices.get(model)
    if device is None:
        return values
    sent = values.to(device).contiguous()
    torch.distributed.broadcast(sent, 0)
    return sent.to(values.device)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value in every rank; the other ranks pass None."""
    box = [value]
    torch.distributed.broadcast_object_list(box, 0)
    return box[0]
