"""The table of engines: what each runs, how to install it, and what it cannot carry, with the reason."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rgtg.errors import MissingExtraError, UsageError

EngineName = Literal["auto", "torch", "llama-cpp"]
JobEngineName = Literal["auto", "torch", "llama-cpp", "vllm"]  # of a job on Ray

# What an engine may carry besides the decoding methods. The names stand in messages, `rgtg engines` and the docs.
SCORERS = (
    "reward model of its own", "vocabulary scorer of its own", "reward model with another tokenizer",
    "vocabulary head on final states", "state head on final states", "head on another layer",
    "LoRA adapter on the policy",
)  # fmt: skip
FEATURES = (
    "several scorers", "batches", "streams", "traces", "resumed files", "server", "prefix cache", "compare",
    "training heads on its states", "audit roll-outs", "drafts", "overlap", "device_map and tp_plan", "Ray",
)  # fmt: skip

_PREFIX_ONLY = "it gives the state of the prefix, not those at the candidates"
_DRAWS_TOKENS = "it draws tokens one by one"
_PLUG_IN = "the plug-in has none; vLLM's own interfaces are used"


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: of the engine.
        runs: which policies.
        package: that is imported, where it is not always installed.
        install: the command that installs it.
        chosen: how a user chooses it.
        lacks: what it cannot carry, by the names of methods, `SCORERS` and `FEATURES`, with the reason.
    """

    name: str
    runs: str
    package: str | None
    install: str
    chosen: str
    lacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


ENGINES = {
    row.name: row
    for row in (
        Engine("torch", "any causal model of transformers", None, "always there", "--engine torch"),
        Engine(
            "llama-cpp", "GGUF files, quantised as they are", "llama_cpp", "pip install 'rgtg[llama-cpp]'",
            "--engine llama-cpp; the default of a GGUF file where it is installed",
            {
                "head on another layer": "llama.cpp gives the final states only",
                "LoRA adapter on the policy": "the adapter is a part of the policy's pass in torch",
                "drafts": "they are verified by torch models",
                "overlap": "it reads the policy on another device than the scorer, in torch",
                "device_map and tp_plan": "llama.cpp places the weights itself",
                "audit roll-outs": "rgtg audit loads the policy in torch",
            },
        ),
        Engine(
            "vllm", "what vLLM runs", "vllm", "see docs/vllm.md: an environment of its own",
            "a plug-in of vLLM's own server; for files of prompts rgtg generate --ray --engine vllm",
            {
                "cd-blockwise": _DRAWS_TOKENS, "cards": _DRAWS_TOKENS, "best-of-n": _DRAWS_TOKENS,
                "smc": _DRAWS_TOKENS, "beam": _DRAWS_TOKENS,
                "vfd": "the plug-in adds scores to logits and excludes no tokens by them",
                "reward model with another tokenizer": "the plug-in sees tokens, not text",
                "state head on final states": _PREFIX_ONLY,
                "head on another layer": "vLLM gives the final states only",
                "LoRA adapter on the policy": "vLLM fuses adapters into its own layers",
                "compare": _PLUG_IN, "traces": _PLUG_IN, "audit roll-outs": _PLUG_IN,
                "training heads on its states": "train on the states of the same weights in torch",
                "drafts": "vLLM's first model runner refuses speculation with logits processors",
                "overlap": "vLLM schedules its own passes", "device_map and tp_plan": "vLLM has its own",
            },
        ),
    )
}  # fmt: skip


def require_carried(engine: str, what: str) -> None:
    """Check that an engine can carry a method, a kind of scorer or a feature.

    Raises:
        UsageError: it cannot; with the reason and what to do.
    """
    if (reason := ENGINES[engine].lacks.get(what)) is not None:
        raise UsageError(f"the engine {engine} cannot carry {what}: {reason}; use the engine torch (--engine torch)")


def require_vllm(*others: str) -> None:
    """Check that this is an environment with vLLM and with these other packages.

    Raises:
        MissingExtraError: it is not.
    """
    if missing := [name for name in ("vllm", *others) if importlib.util.find_spec(name) is None]:
        raise MissingExtraError(
            f"this environment has no {missing[0]}: the engine vllm runs in vLLM's own environment, and the command is "
            "started there (docs/ray.md says how to make one)"
        )
