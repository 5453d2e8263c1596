"""``push_scorer``: publishes a scorer's folder as one commit of a hub repository."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import Field

from rgtg.config.commands import PushSettings
from rgtg.errors import DataError, EndpointError, RgtgError, UsageError, first_line
from rgtg.models.loading.scorer_info import INFO_FILE, ScorerInfo, fingerprint_weights
from rgtg.publishing.files import AUDITS, WEIGHTS, SelectedFiles, select_files
from rgtg.publishing.model_card import PublishedAudit, is_public, published_card, published_settings, read_audits
from rgtg.types.base import Record

_ADAPTER = "adapter_config.json"
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class PushReport(Record):
    """What was published, or would be published."""

    repo: str
    revision: str
    private: bool | None = Field(description="visibility of the repository; None: a dry run without --private")
    files: dict[str, int] = Field(description="name → bytes")
    left_out: list[str] = Field(description="files of the folder that are not published")
    removed: list[str] = Field(description="files of an earlier scorer, deleted in this revision")
    audited: bool
    commit: str | None = Field(description="of the hub; None: a dry run")
    url: str | None


def push_scorer(settings: PushSettings) -> PushReport:
    """Publish a scorer. ``dry_run`` only reports what would be published, and sends nothing.

    Raises:
        UsageError: an invalid repository name, files that must not be published, no token, or a public repository
            where a private one was asked for.
        DataError: an audit of other weights.
        EndpointError: the hub refuses, or cannot be reached.
    """
    if not _REPO.fullmatch(settings.repo):
        raise UsageError(f"{settings.repo!r} is no name of a repository; expected owner/name (--revision for a branch)")
    found = select_files(settings.folder, settings.exclude)
    audits = _audits(settings, found)
    contents = _contents(settings, found, audits)
    report = PushReport(
        repo=settings.repo, revision=settings.revision or "main", private=True if settings.private else None,
        files={name: _size(content) for name, content in sorted(contents.items())}, left_out=found.left_out,
        removed=[], audited=bool(audits), commit=None, url=None,
    )  # fmt: skip
    return report if settings.dry_run else _publish(settings, contents, report)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _audits(settings: PushSettings, found: SelectedFiles) -> list[PublishedAudit]:
    """The audits that the settings name, or that are in the folder; an audit of other weights is an error."""
    source = settings.audit
    if source is None:
        places = (settings.folder, settings.folder / "audit")
        source = next((place for place in places if any((place / name).is_file() for name in AUDITS)), None)
    audits = read_audits(source) if source is not None else []
    for audit in audits:
        about = audit.result.provenance
        weights = _fingerprint(settings.folder, found.info, about.dtype)
        if about.models.get("scorer") != weights:
            raise DataError(
                f"{next(iter(audit.files.values()))} is of other weights ({about.models.get('scorer')}) than "
                f"{settings.folder} holds ({weights}): audit this scorer again, or give its own --audit"
            )
    return audits


def _fingerprint(folder: Path, info: ScorerInfo, dtype: str | None) -> str:
    """Fingerprint of the weights as the audit loaded them; a head needs no policy."""
    from rgtg.models.scorers.base import load_scorer, weights_of
    from rgtg.models.scorers.heads import load_head

    if info.trunk == "own":
        return fingerprint_weights(load_head(folder, info))
    return fingerprint_weights(weights_of(load_scorer(str(folder), dtype=dtype, device="cpu")))


def _contents(
    settings: PushSettings, found: SelectedFiles, audits: Sequence[PublishedAudit]
) -> dict[str, Path | bytes]:
    """The contents of each published file: weights and tokenizer as they are, the rest without local folders."""
    contents: dict[str, Path | bytes] = dict(found.published)
    info = found.info
    adapter = json.loads(found.published[_ADAPTER].read_text("utf-8")) if _ADAPTER in found.published else None
    base = settings.base_model or (adapter or {}).get("base_model_name_or_path") or info.base_model
    if (adapter is not None or info.trunk != "separate") and not is_public(base):
        raise UsageError(
            f"this scorer is read beside its base {base}, which is no hub repository: publish that model, and say "
            "where (--base-model owner/name)"
        )
    info = info.model_copy(update={"base_model": base if is_public(base) else Path(base).name})
    contents[INFO_FILE] = (info.model_dump_json(indent=2) + "\n").encode()
    if adapter is not None:
        repo, _, revision = base.partition("@")
        named = adapter | {"base_model_name_or_path": repo, "revision": revision or adapter.get("revision")}
        contents[_ADAPTER] = (json.dumps(named, indent=2) + "\n").encode()
    if (kept := found.published.get("settings.json")) is not None:
        contents["settings.json"] = published_settings(kept.read_text("utf-8")).encode()
    contents["README.md"] = published_card(
        found.published["README.md"].read_text("utf-8"), info, settings.repo, settings.revision, audits,
        folder=settings.folder.resolve().name, trained_from=found.info.base_model,
    ).encode()  # fmt: skip
    return contents | {name: path for audit in audits for name, path in audit.files.items()}


def _publish(settings: PushSettings, contents: dict[str, Path | bytes], report: PushReport) -> PushReport:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise UsageError("no token of the hub: log in with hf auth login, or set HF_TOKEN to one that may write")
    api = HfApi(library_name="rgtg")
    with _explained(api.endpoint, settings.repo):
        private = _prepare(api, settings)
        stale = _stale(api, report)
        operations: list[Any] = [
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        done = api.create_commit(settings.repo, operations, commit_message=settings.message, revision=settings.revision)
    return report.model_copy(
        update={"private": private, "removed": stale, "commit": done.oid, "url": f"{api.endpoint}/{settings.repo}"}
    )


def _prepare(api: Any, settings: PushSettings) -> bool:
    """Create the repository and branch if they do not exist; return whether the repository is private.

    Raises:
        UsageError: it is already public, and a private one was asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = bool(api.repo_info(settings.repo).private)
    except RepositoryNotFoundError:
        api.create_repo(settings.repo, private=settings.private)
        private = settings.private
    if settings.private and not private:
        raise UsageError(
            f"{settings.repo} exists and is public, and --private asks for a private repository: choose another name, "
            "or change its visibility on the hub"
        )
    if settings.revision is not None:
        api.create_branch(settings.repo, branch=settings.revision, exist_ok=True)
    return private


def _stale(api: Any, report: PushReport) -> list[str]:
    """Weights and audits of another scorer in the repository, with which this one would not load correctly."""
    there = api.list_repo_files(report.repo, revision=report.revision)
    ours = (*WEIGHTS, INFO_FILE, *AUDITS)
    return sorted(name for name in there if name not in report.files and any(fnmatch(name, one) for one in ours))


@contextmanager
def _explained(endpoint: str, repo: str) -> Iterator[None]:
    """Turn errors of the hub or the network into one line that says what to do.

    Raises:
        EndpointError: in place of the client's own errors.
    """
    import httpx2  # the hub client's own
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except RgtgError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "the token is not known there: hf auth login, or set HF_TOKEN",
            403: f"the token may not write to {repo}: use one with write access, or another owner",
        }.get(status, "nothing was committed; try again")
        reason = (error.server_message or "").strip().partition("\n")[0]
        raise EndpointError(f"{endpoint} refuses ({status}{f', {reason}' if reason else ''}): {remedy}") from error
    except HFValidationError as error:
        raise UsageError(first_line(error)) from error
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        message = ": ".join(first_line(one) for one in (error, error.__cause__) if one is not None)
        raise EndpointError(f"cannot publish to {endpoint}: {message} (nothing was committed)") from error
