"""Which engine runs a policy: llama.cpp for a GGUF file where it is installed, torch for everything else."""

import importlib
import warnings
from typing import Any

from rgtg.config.engines import ENGINES
from rgtg.errors import MissingExtraError, UsageError
from rgtg.models.loading.device_map import Placement
from rgtg.models.loading.pretrained import find_gguf

# The module of each engine that loads policies itself, with a function load_policy. It is imported by name, because it
# is built on the layers above this one.
_LOADERS = {"llama-cpp": "rgtg.engines.llama_cpp.model"}


def choose_engine(source: str, engine: str | None, placement: Placement, *, cache_gguf: bool = False) -> str:
    """The engine of a policy that is loaded by name.

    Args:
        source: a name that `rgtg.models.loading.policy.load_policy` takes.
        engine: as the user chose it; None and ``auto`` take llama.cpp for a GGUF file where it is installed, unless
            other arguments apply to torch alone.
        placement: dtype and place as the user gave them.
        cache_gguf: whether the conversion to torch is to be kept.

    Raises:
        UsageError: an unknown engine, or one that does not run this kind of model or take these arguments.
        MissingExtraError: an engine that is not installed.
    """
    known = ["torch", *_LOADERS]
    if engine not in (None, "auto", *known):
        raise UsageError(f"unknown engine {engine!r}; choose auto or one of {', '.join(known)}", setting="engine")
    if engine == "torch" or (engine in (None, "auto") and find_gguf(source) is None):
        return "torch"
    of_torch = [name for name in ("dtype", "device_map", "tp_plan") if getattr(placement, name) is not None]
    of_torch += ["cache_gguf"] if cache_gguf else []
    llama = ENGINES["llama-cpp"]
    if engine in (None, "auto"):
        if of_torch:
            return "torch"
        if not llama.installed:
            warnings.warn(
                f"{source} is dequantised and runs on torch. llama.cpp runs it as it is, one prompt faster on a CPU "
                f"({llama.install})",
                stacklevel=4,
            )
            return "torch"
        return llama.name
    if find_gguf(source) is None:
        raise UsageError(f"the engine llama-cpp runs {llama.runs}, and {source} is none: leave engine out")
    if of_torch:
        raise UsageError(
            f"{of_torch[0]} applies to the engine torch: llama.cpp takes the weights as they are in the file and "
            "places them itself; leave it out, or use --engine torch",
            setting=of_torch[0],
        )
    if not llama.installed:
        raise MissingExtraError(
            f"the engine llama-cpp needs llama-cpp-python (a C++ compiler and cmake build it): {llama.install}"
        )
    return llama.name


def load_in_engine(engine: str, source: str, *, device: Any = None) -> Any:
    """A policy in another engine than torch; errors are those of its ``load_policy``."""
    path = find_gguf(source)
    assert path is not None, "choose_engine has found the file"
    return importlib.import_module(_LOADERS[engine]).load_policy(source, path, device=device)
