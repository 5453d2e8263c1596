"""``rgtg doctor``: what is installed, and whether guidance works on this machine."""

import importlib.metadata
import importlib.util
import platform
from typing import Any

from rgtg.cli.common import AsJson, Config, Overrides, Quiet, Seed, emit, hush_libraries, verb
from rgtg.config import Settings

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "pydantic", "typer")
_EXTRA_OF = {"trl": "train", "peft": "train", "datasets": "train", "accelerate": "train", "matplotlib": "report"}


@verb
def command(
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Report versions, devices and missing extras, and run a tiny guided generation."""
    settings = Settings.resolve(config, overrides, {"seed": seed})
    hush_libraries()
    report = {"versions": _versions(), "devices": _devices(), "trial": _trial(settings.seed)}
    emit(report, as_json=as_json, quiet=quiet, show=lambda: _show(report))


def _versions() -> dict[str, str]:
    import rgtg

    found = {"rgtg": rgtg.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
        else:
            found[name] = f"missing: pip install 'rgtg[{_EXTRA_OF[name]}]'" if name in _EXTRA_OF else "missing"
    return found


def _devices() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu_threads": torch.get_num_threads(), "gpus": gpus}


def _trial(seed: int) -> str:
    """Guided against recomputed scores on a tiny random model: the core promise, checked where the user stands."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from rgtg.decoding.runner import supports_token_tree
    from rgtg.models.readout import scorer_scores

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    exact = supports_token_tree(LlamaForSequenceClassification(config).eval(), scorer_scores)
    return "one-pass scores equal recomputed ones" if exact else "FAILED: one-pass scores differ from recomputed ones"


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "found")
    for name, version in report["versions"].items():
        table.add_row(name, version)
    table.add_row("CPU threads", str(report["devices"]["cpu_threads"]))
    table.add_row("GPUs", ", ".join(report["devices"]["gpus"]) or "none")
    table.add_row("trial", report["trial"])
    Console().print(table)
