"""The provenance of every written result, so that it can be reproduced."""

import subprocess
from pathlib import Path
from typing import Any

from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.types.base import Provenance
from rgtg.version import __version__


def provenance(
    *, command: str, settings: dict[str, Any], seed: int | None, models: dict[str, Any], data: dict[str, str]
) -> Provenance:
    """Version, commit, settings, seed, and fingerprints of models (by role) and data.

    Absolute and dotted paths in the settings are reduced to their last part, because a result must not name the machine
    it was made on.
    """
    first = next(iter(models.values()), None)
    weight = next(first.parameters()) if first is not None else None
    return Provenance(
        version=__version__, git_commit=_git_commit(), command=command, settings=without_folders(settings), seed=seed,
        dtype=_dtype(first, weight),
        device=weight.device.type if weight is not None else None,
        models={role: fingerprint_weights(model) for role, model in models.items()}, data=data,
    )  # fmt: skip


def _dtype(model: Any, weight: Any) -> str | None:
    """Dtype of a model's first weight; of another engine's model, that of the weights in its file."""
    if weight is None:
        return None
    return str(getattr(model, "stored_dtype", None) or weight.dtype).removeprefix("torch.")


def without_folders(value: Any) -> Any:
    """Settings, in nested lists and mappings too, with absolute and dotted paths reduced to their last part."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith(("/", "~", "."))):
        return Path(value).name or value
    return value


def _git_commit() -> str | None:
    """Commit of the checkout that the package runs from; None if it is installed.

    A virtual environment may lie inside another repository, whose commit must not be used.
    """
    here = Path(__file__).parents[3]
    if not (here / ".git").exists() or not (here / "src" / "rgtg").is_dir():
        return None
    try:
        ran = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() or None
