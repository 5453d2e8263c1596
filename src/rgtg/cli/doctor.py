"""``rgtg doctor``: what is installed, whether guidance works on this machine, and how fast."""

import importlib.metadata
import importlib.util
import platform
import warnings
from typing import Any

from rgtg.cli.common import Invocation, command, hush_libraries
from rgtg.config import DoctorSettings
from rgtg.errors import UsageError

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "matplotlib", "pydantic", "typer")
_EXTRA_OF = {"trl": "train", "peft": "train", "datasets": "train", "matplotlib": "report"}


@command(
    DoctorSettings,
    "speed",
    panels={"With --speed": "policy scorer top_k prompt_length tokens dtype device engine threads"},
)
def run(settings: DoctorSettings, invocation: Invocation) -> None:
    """Report versions, devices and missing extras, and run a tiny guided generation.

    With --speed, also time unguided and guided decoding in turn, and show how long reading the weights alone would
    take at this machine's memory bandwidth. Run nothing else meanwhile.

    [bold]Example[/bold]: rgtg doctor --speed --policy POLICY --scorer SCORER --dtype bfloat16
    """
    _check_use(settings)
    hush_libraries()
    report: dict[str, Any] = {
        "versions": _versions(),
        "devices": _devices(),
        "gguf": _gguf_engine(),
        "trial": _trial(settings.seed),
    }
    if settings.speed:
        report["speed"] = _speed(settings, show=not invocation.silent)
    invocation.emit(report, lambda: _show(report))


def _check_use(settings: DoctorSettings) -> None:
    if settings.speed and settings.policy is None:
        raise UsageError("--speed needs --policy (and --scorer, to time guidance)")
    extra = settings.model_fields_set - {"seed", "speed"}
    if extra and not settings.speed:
        raise UsageError(f"--{min(extra).replace('_', '-')} applies to --speed")


def _speed(settings: DoctorSettings, *, show: bool) -> list[dict[str, Any]]:
    """Measure the rows of the speed table."""
    from rich.console import Console

    from rgtg.decoding.guided_policy import GuidedPolicy
    from rgtg.evaluation.benchmark import measure_speed

    assert settings.policy is not None, "checked before anything is loaded"
    method = "pargs" if settings.scorer else "policy"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the scorer's objective does not matter here
        guided = GuidedPolicy.from_pretrained(
            settings.policy, settings.scorer, method=method, dtype=settings.dtype, device=settings.device,
            engine=settings.engine, threads=settings.threads,
        )  # fmt: skip
    longest = settings.prompt_length + settings.tokens + 2
    if guided.policy.max_length and longest > guided.policy.max_length:
        raise UsageError(
            f"--prompt-length {settings.prompt_length} and {settings.tokens} steps exceed the policy's context of "
            f"{guided.policy.max_length} tokens"
        )
    with Console(stderr=True, quiet=not show).status("timing") as status:
        rows = measure_speed(
            guided.policy, guided.scorer, prompt_length=settings.prompt_length, top_k=settings.top_k,
            tokens=settings.tokens, repeats=settings.repeats, progress=status.update,
        )  # fmt: skip
    return [row.model_dump() for row in rows]


def _versions() -> dict[str, str]:
    from rgtg.version import __version__

    found = {"rgtg": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        if importlib.util.find_spec(name):
            found[name] = importlib.metadata.version(name)
        else:
            found[name] = f"missing: pip install 'rgtg[{_EXTRA_OF[name]}]'" if name in _EXTRA_OF else "missing"
    return found


def _gguf_engine() -> str:
    """Which engine a policy in a GGUF file gets, and how to get a faster one."""
    from rgtg.config.engines import ENGINES

    llama = ENGINES["llama-cpp"]
    if llama.installed:
        from rgtg.engines.llama_cpp.library import describe

        return describe()
    return f"torch, dequantised; llama.cpp is faster for one prompt on a CPU: {llama.install}"


def _devices() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu_threads": torch.get_num_threads(), "gpus": gpus}


def _trial(seed: int) -> str:
    """Compare one-pass scores of candidates with recomputed ones on a tiny random model."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from rgtg.decoding.runners.model_runner import supports_token_tree
    from rgtg.models.ops.lm_head import scorer_scores

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    exact = supports_token_tree(LlamaForSequenceClassification(config).eval(), scorer_scores)
    return "one-pass scores equal recomputed ones" if exact else "FAILED: one-pass scores differ from recomputed ones"


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", "found")
    for name, version in report["versions"].items():
        table.add_row(name, escape(version))
    table.add_row("CPU threads", str(report["devices"]["cpu_threads"]))
    table.add_row("GPUs", ", ".join(report["devices"]["gpus"]) or "none")
    table.add_row("engine of a GGUF file", escape(report["gguf"]))
    table.add_row("trial", report["trial"])
    console = Console()
    console.print(table)
    if "speed" in report:
        console.print(_speed_table(report["speed"]))


def _speed_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("decoding", "ms per token", "of unguided", "MB read per token", "limit, ms", "limit, of unguided")
    for row in rows:
        numbers = ("ms_per_token", "of_unguided", "megabytes_per_token", "limit_ms", "limit_of_unguided")
        table.add_row(row["name"], *(f"{row[name]:.2f}" for name in numbers))
    return table
