"""Selects the files of a scorer's folder to publish, and rejects files that must not be published."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from rgtg.errors import DataError, ModelNotFoundError, UsageError
from rgtg.models.loading.scorer_info import HEAD_FILE, INFO_FILE, ScorerInfo, read_info

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
AUDITS = ("audit.json", "audit.png", "rollout-audit.json", "rollout-audit.png")
PUBLISHED = (
    *WEIGHTS, INFO_FILE, "settings.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken",
    "*.spm", "*.jinja", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
_PICKLES = (
    "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.dill", "*.npy", "*.npz", "*.h5",
)  # fmt: skip
_BIG = 2**20  # bytes; a larger unknown file is not just a note


@dataclass
class SelectedFiles:
    """The published files (name → path), and the names of those left out."""

    info: ScorerInfo
    published: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def select_files(folder: Path, exclude: Sequence[str] = ()) -> SelectedFiles:
    """Select a scorer's files. Folders (checkpoints), hidden files and small unknown files are left out.

    Args:
        folder: written by ``rgtg train``.
        exclude: names or patterns of files to leave out.

    Raises:
        ModelNotFoundError: no such folder.
        UsageError: not a finished scorer, a pickle, a link out of the folder, or a large file of an unknown kind.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"no folder {folder}; expected a scorer that rgtg train wrote")
    info = read_info(folder)
    if info is None:
        raise UsageError(f"{folder} has no {INFO_FILE}: publish a folder that rgtg train has finished")
    found = SelectedFiles(info)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir() or _any(path.name, exclude) or path.name in AUDITS:
            found.left_out.append(path.name)
        elif _is_published(path, folder):
            found.published[path.name] = path
        else:
            found.left_out.append(path.name)
    if unused := [name for name in exclude if not any(fnmatch(left, name) for left in found.left_out)]:
        raise UsageError(f"--exclude {unused[0]}: no such file in {folder}")
    _require_whole(folder, found)
    return found


def _is_published(path: Path, folder: Path) -> bool:
    """Whether a file is published.

    Raises:
        UsageError: a file that must not be published, and that must not be left out silently either.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{path} is a link out of the folder; put the file itself there, or --exclude {path.name}")
    if _any(path.name, _PICKLES):
        raise UsageError(
            f"{path} is a pickle (or a format that may hold one), which can run code when loaded: keep weights as "
            f"safetensors, or --exclude {path.name}"
        )
    if _any(path.name, PUBLISHED):
        return True
    if path.stat().st_size > _BIG:
        raise UsageError(
            f"{path} ({path.stat().st_size / 1e6:.1f} MB) is no file that a scorer is made of: move it away, or "
            f"--exclude {path.name}"
        )
    return False


def _require_whole(folder: Path, found: SelectedFiles) -> None:
    names = found.published
    if INFO_FILE not in names:
        raise UsageError(f"--exclude: a scorer without {INFO_FILE} cannot be loaded")
    if "README.md" not in names:
        raise UsageError(f"{folder} has no README.md; rgtg train writes one: put it back, or write your own")
    if found.info.trunk == "own":
        needed: tuple[str, ...] = (HEAD_FILE,)
    else:
        needed = ("*.safetensors", "adapter_config.json" if "adapter_config.json" in names else "config.json")
    if missing := [pattern for pattern in needed if not any(fnmatch(name, pattern) for name in names)]:
        raise DataError(f"{folder} is not whole: it has no {missing[0]}")


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
