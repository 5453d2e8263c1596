"""A model whose layers are split among the processes of a torchrun, by the tensor parallel plans of transformers.

Every process runs the same loop with the same seeds, and all must draw the same tokens, since a pass is made by all of
them together. So what they decide by, logits and scores, are the first process's figures in all of them: a model that
is whole is read by each for itself, and another processor may round otherwise.
"""

import atexit
import os
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rgtg.errors import UsageError, first_line

# "auto", a model's own plan; or styles of transformers by module, laid over it.
TpPlan = str | dict[str, str]

_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Models that are read together with one that is split, and the device that the processes talk from.
_homes: "WeakKeyDictionary[Any, torch.device]" = WeakKeyDictionary()


def is_main_process() -> bool:
    """True in a single process, and in rank 0 under ``torchrun``."""
    return int(os.environ.get("RANK", "0")) == 0


def destroy_process_group() -> None:
    """Close the process group before the interpreter ends: its threads may otherwise abort a run that has succeeded."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def tensor_parallel_kwargs(plan: TpPlan) -> dict[str, Any]:
    """For ``from_pretrained``: a plan over all processes.

    Raises:
        UsageError: no torchrun, or no plan.
    """
    from transformers.distributed import DistributedConfig

    if not isinstance(plan, dict) and plan != "auto":
        raise UsageError(f"tp_plan = {plan!r}: expected auto, or a style for each module")
    if not all(name in os.environ for name in _LAUNCH):
        raise UsageError(
            "tp_plan splits a model among processes, and this one is alone: start it with torchrun "
            "(torchrun --standalone --nproc-per-node 2 --no-python rgtg generate …)"
        )
    atexit.register(destroy_process_group)
    return {"distributed_config": DistributedConfig(tp_plan=plan)}


def require_divisible(config: Any, plan: TpPlan, name: str) -> None:
    """Refuse a model that its own plan cannot split among these processes.

    Args:
        config: the model's.
        plan: as it was asked for; one in full is tried as it is.
        name: of the model, for the error.

    Raises:
        UsageError: transformers has no plan for it, or its attention heads do not divide.
    """
    text, processes = config.get_text_config(), int(os.environ["WORLD_SIZE"])
    if plan != "auto" or processes == 1:
        return
    if not text.base_model_tp_plan:
        raise UsageError(
            f"transformers has no tensor parallel plan for {name} ({text.model_type}): spread it by layers "
            "(device_map), without torchrun"
        )
    for kind in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, kind, None)
        if isinstance(heads, int) and heads % processes:
            fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise UsageError(
                f"the {heads} {kind.removeprefix('num_').replace('_', ' ')} of {name} cannot be split among "
                f"{processes} processes: start {', '.join(fitting[:-1])} or {fitting[-1]}"
            )


def is_sharded(model: Any) -> bool:
    """Whether each process holds a share of a model's layers."""
    return (getattr(model, "tp_size", None) or 1) > 1


@torch.inference_mode()
def require_readable(model: Any) -> None:
    """Let a model that was just split read three tokens.

    Raises:
        UsageError: its plan does not fit it.
    """
    try:
        model.base_model(torch.zeros(1, 3, dtype=torch.long, device=model.device), use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UsageError(f"the tensor parallel plan does not fit {model.name_or_path}: {first_line(error)}") from error


def set_local_device() -> None:
    """Make this process's GPU, where there are any, the one that models are put on: each has its own."""
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def register_parallel_models(models: Iterable[Any]) -> bool:
    """Let all processes decide by the first one's figures of these models, where one of them is split; whether so."""
    every = list(models)
    home = next((model.device for model in every if is_sharded(model)), None)
    if home is None:
        return False
    for model in every:
        _homes[model] = home
    return True


def is_tensor_parallel(model: Any) -> bool:
    """Whether a model is split, or read together with one that is."""
    return model in _homes


def broadcast_from_rank0(model: Any, values: Tensor) -> Tensor:
    """What the first process has read from a model, in every process; where the model is not bound, as it is."""
    home = _homes.get(model)
    if home is None:
        return values
    there = values.to(home).contiguous()
    torch.distributed.broadcast(there, 0)
    return there.to(values.device)


def broadcast_object(what: Any) -> Any:
    """What the first process gives, in every process; others give nothing."""
    box = [what]
    torch.distributed.broadcast_object_list(box, 0)
    return box[0]
