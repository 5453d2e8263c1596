"""Models by hub id and revision: the files that are safe to load, in the hub client's own cache."""

import functools
import re
from pathlib import Path

from rgtg.errors import ModelNotFoundError, UsageError, first_line

# What a model, a tokenizer or a scorer of ours is read from. No pickle and no code is downloaded.
SAFE_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "README.md")
# Folders hold other layouts of the same weights (onnx/, original/), and consolidated ones are their vendor's own.
_LEFT = ("*/*", "consolidated*.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>[^@\s]+))?")

EXPECTED = (
    "Expected a folder saved by save_pretrained, with safetensors weights and a tokenizer, or a hub id that can be "
    "reached (owner/name, or owner/name@revision)."
)


def local_folder(source: str) -> str:
    """Where a model's files are on this machine: ``source`` itself, or a snapshot of a hub repository.

    Within one process a name stands for one commit, so that weights and tokenizer belong together.

    Args:
        source: a folder, or a hub id ``owner/name``, with ``@revision`` (branch, tag or commit) or without.

    Raises:
        ModelNotFoundError: neither a folder nor a repository that can be reached.
    """
    return source if Path(source).exists() else _snapshot(*split_revision(source))


def local_file(source: str, name: str) -> Path:
    """One file of a folder, or of a hub repository: nothing else of it is downloaded.

    Raises:
        ModelNotFoundError: no such folder or repository, or no such file in it.
    """
    import httpx2
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if Path(source).exists():
        path = Path(source) / name
        if not path.is_file():
            raise ModelNotFoundError(f"{source} has no {name}. {EXPECTED}")
        return path
    repo, revision = split_revision(source)
    try:
        return Path(hf_hub_download(repo, name, revision=revision, library_name="rgtg"))
    except (OSError, httpx2.HTTPError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(
            error, FileNotFoundError
        ):  # both: without a network
            raise ModelNotFoundError(f"{source} has no {name}. {EXPECTED}") from error
        raise ModelNotFoundError(f"cannot load {source!r}: {_reason(error, repo)}. {EXPECTED}") from error


def split_revision(source: str) -> tuple[str, str | None]:
    """Repository and revision of a hub id.

    Raises:
        ModelNotFoundError: it looks like a path, and there is nothing.

    Example:
        >>> split_revision("owner/name@v1")
        ('owner/name', 'v1')
    """
    found = _HUB_ID.fullmatch(source)
    if found is None:
        raise ModelNotFoundError(f"no model folder {source}. {EXPECTED}")
    return found["repo"], found["revision"]


def named(source: str, revision: str | None) -> str:
    """The one name of a hub id and its revision.

    Raises:
        UsageError: a revision of a local folder, or a second one.

    Example:
        >>> named("owner/name", "v1")
        'owner/name@v1'
    """
    if revision is None:
        return source
    if Path(source).exists():
        raise UsageError(f"{source} is a local folder and has no revision; leave revision {revision} out")
    repo, other = split_revision(source)
    if other not in (None, revision):
        raise UsageError(f"{source} names one revision and {revision!r} is another; give one")
    return f"{repo}@{revision}"


def lasting_name(source: str) -> tuple[str, str | None]:
    """What finds a model from any folder, and its revision: an absolute path without one, or a hub id."""
    return (str(Path(source).resolve()), None) if Path(source).exists() else split_revision(source)


@functools.lru_cache(maxsize=256)
def _snapshot(repo: str, revision: str | None) -> str:
    import httpx2  # the hub client's own
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return snapshot_download(
            repo, revision=revision, allow_patterns=list(SAFE_FILES), ignore_patterns=list(_LEFT), library_name="rgtg"
        )
    except (OSError, httpx2.HTTPError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"cannot load {repo if revision is None else f'{repo}@{revision}'!r}: {_reason(error, repo)}. {EXPECTED}"
        ) from error


def forget_snapshots() -> None:
    """Look names up anew: a branch may have moved since this process first met it."""
    _snapshot.cache_clear()


def _reason(error: Exception, repo: str) -> str:
    """Why a repository cannot be had, in a line: the client's own texts are paragraphs."""
    from huggingface_hub import constants
    from huggingface_hub import errors as known

    match error:
        case known.GatedRepoError():
            return f"access must be asked for first, at {constants.ENDPOINT}/{repo}"
        case known.RevisionNotFoundError():
            return "the repository has no such revision"
        case known.RepositoryNotFoundError():
            return (
                f"there is no such folder, and no such model at {constants.ENDPOINT} (or it is private: log in with "
                "hf auth login, or set HF_TOKEN)"
            )
        case known.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return "there is no such folder, nor such a model in the hub's cache, and HF_HUB_OFFLINE is set"
        case known.LocalEntryNotFoundError():
            return f"there is no such folder, and {constants.ENDPOINT} cannot be reached"
    return first_line(error)


def holds_only_pickles(source: str) -> bool:
    """Whether a folder or hub repository has weights, and all in formats that can run code when they are loaded.

    False where the hub cannot be asked.
    """
    if Path(source).is_dir():
        return _only_pickles([path.name for path in Path(source).iterdir()])
    import httpx2
    from huggingface_hub import HfApi

    repo, revision = split_revision(source)
    try:
        names = HfApi(library_name="rgtg").list_repo_files(repo, revision=revision)
    except (OSError, httpx2.HTTPError):
        return False
    return _only_pickles(names)


def _only_pickles(names: list[str]) -> bool:
    return not any(name.endswith(".safetensors") for name in names) and any(name.endswith(_PICKLES) for name in names)
