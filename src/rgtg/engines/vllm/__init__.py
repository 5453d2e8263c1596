"""A plug-in for vLLM: `Guidance` steers requests with heads and scorers trained here (docs/vllm.md).

vLLM's environment is its own, so nothing here imports what only rgtg's own environment has. The names below are
imported when they are first used.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "Guidance": "rgtg.engines.vllm.logits_processor",
    "guided_params": "rgtg.engines.vllm.arguments",
    "xargs": "rgtg.engines.vllm.arguments",
}
__all__ = ["Guidance", "guided_params", "xargs"]  # by __getattr__


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
