"""Models by hub id and revision: downloads the files that are safe to load, into the hub client's own cache."""

import functools
import re
from pathlib import Path

from rgtg.errors import ModelNotFoundError, UsageError, first_line

# Files of models, tokenizers and scorers. Neither pickles nor code are downloaded.
SAFE_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "README.md")
# Subfolders (onnx/, original/) and consolidated files hold the same weights in other formats.
_IGNORED = ("*/*", "consolidated*.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
_GGUF_FILE = r"\w[\w.-]*/\w[\w.-]*/(?:\w[\w.+-]*/)*\w[\w.+-]*\.gguf"
_HUB_ID = re.compile(rf"(?P<repo>{_GGUF_FILE}|\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>[^@\s]+))?")

EXPECTED = (
    "Expected a folder saved by save_pretrained, with safetensors weights and a tokenizer, a GGUF file, or a hub id "
    "that can be reached (owner/name, or owner/name@revision)."
)


def local_folder(source: str) -> str:
    """The folder with a model's files: ``source`` itself, or the downloaded snapshot of a hub repository.

    A GGUF file is a whole model; its name gives the path of the (downloaded) file instead of a folder.
    Within a process, a name always means the same commit, so that weights and tokenizer belong together.

    Args:
        source: a folder, a GGUF file, or a hub id ``owner/name`` or ``owner/name/FILE.gguf``, optionally with
            ``@revision`` (branch, tag or commit).

    Raises:
        ModelNotFoundError: neither a folder nor a repository that can be reached.
    """
    if Path(source).exists():
        return source
    repo, revision = split_revision(source)
    return _hub_file(repo, revision) if is_hub_file(repo) else _snapshot(repo, revision)


def is_hub_file(source: str) -> bool:
    """Whether a name is that of a GGUF file in a hub repository: owner/name/FILE.gguf, optionally with @revision.

    Example:
        >>> is_hub_file("owner/name/model.Q4_0.gguf@main"), is_hub_file("owner/name"), is_hub_file("model.gguf")
        (True, False, False)
    """
    found = _HUB_ID.fullmatch(source)
    return found is not None and re.fullmatch(_GGUF_FILE, found["repo"]) is not None


def local_file(source: str, name: str) -> Path:
    """One file of a folder or of a hub repository; no other file is downloaded.

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
        # Without a network, the error is a FileNotFoundError too.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
            raise ModelNotFoundError(f"{source} has no {name}. {EXPECTED}") from error
        raise ModelNotFoundError(f"cannot load {source!r}: {_reason(error, repo)}. {EXPECTED}") from error


def split_revision(source: str) -> tuple[str, str | None]:
    """Repository (or GGUF file of one) and revision of a hub id.

    Raises:
        ModelNotFoundError: a path that does not exist.

    Example:
        >>> split_revision("owner/name@v1")
        ('owner/name', 'v1')
    """
    found = _HUB_ID.fullmatch(source)
    if found is None:
        raise ModelNotFoundError(f"no model folder {source}. {EXPECTED}")
    return found["repo"], found["revision"]


def with_revision(source: str, revision: str | None) -> str:
    """A hub id with its revision in the name; without a revision, ``source`` as it is.

    Raises:
        UsageError: a revision of a local folder, or a second revision.

    Example:
        >>> with_revision("owner/name", "v1")
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


def absolute_source(source: str) -> tuple[str, str | None]:
    """A name that finds the model from any folder, and its revision: an absolute path and None, or a hub id."""
    return (str(Path(source).resolve()), None) if Path(source).exists() else split_revision(source)


@functools.lru_cache(maxsize=256)
def _snapshot(repo: str, revision: str | None) -> str:
    import httpx2  # the hub client's own
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(SAFE_FILES),
            ignore_patterns=list(_IGNORED),
            library_name="rgtg",
        )
    except (OSError, httpx2.HTTPError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"cannot load {repo if revision is None else f'{repo}@{revision}'!r}: {_reason(error, repo)}. {EXPECTED}"
        ) from error


@functools.lru_cache(maxsize=256)
def _hub_file(name: str, revision: str | None) -> str:
    """Path of a downloaded file, whose name is owner/name/FILE."""
    owner, repo, file = name.split("/", 2)
    return str(local_file(f"{owner}/{repo}" if revision is None else f"{owner}/{repo}@{revision}", file))


def clear_snapshot_cache() -> None:
    """Look up names again: a branch may have moved since this process used it first."""
    _snapshot.cache_clear()
    _hub_file.cache_clear()


def _reason(error: Exception, repo: str) -> str:
    """One line that says why a repository cannot be loaded; the client's own messages are paragraphs."""
    from huggingface_hub import constants
    from huggingface_hub import errors as known

    match error:
        case known.GatedRepoError():
            return f"access has to be requested first, at {constants.ENDPOINT}/{repo}"
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
    """Whether all weights of a folder or hub repository are in formats that can run code when loaded.

    False if there are no weights, or the hub cannot be reached.
    """
    names = _file_names(source)
    return not any(name.endswith(".safetensors") for name in names) and any(name.endswith(_PICKLES) for name in names)


def gguf_names(source: str) -> list[str]:
    """Names of a folder's or hub repository's GGUF files; none if the hub cannot be reached."""
    return sorted(name for name in _file_names(source) if name.lower().endswith(".gguf"))


def _file_names(source: str) -> list[str]:
    """Names of a folder's or hub repository's files; none if the hub cannot be reached."""
    if Path(source).is_dir():
        return [path.name for path in Path(source).iterdir()]
    import httpx2
    from huggingface_hub import HfApi

    repo, revision = split_revision(source)
    try:
        return list(HfApi(library_name="rgtg").list_repo_files(repo, revision=revision))
    except (OSError, httpx2.HTTPError):
        return []
