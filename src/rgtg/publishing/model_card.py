"""The model card and settings of a published scorer: with its audits, and without paths of this machine."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rgtg.errors import DataError
from rgtg.evaluation.audit.results import read_audit
from rgtg.evaluation.provenance import without_folders
from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.types.audit import AuditResult
from rgtg.types.base import Interval
from rgtg.types.rollouts import RolloutAuditResult

_JSON = re.compile(r"(## Settings\s+```json\n)(.*?)(\n```)", re.DOTALL)
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
NO_AUDIT = "No audit was published with this scorer. `rgtg audit --scorer {repo} --pairs FILE` makes one."


@dataclass(frozen=True)
class PublishedAudit:
    """An audit to publish: its result, and its files (name → path)."""

    result: AuditResult | RolloutAuditResult
    files: dict[str, Path]


def read_audits(source: Path) -> list[PublishedAudit]:
    """The audits in a folder that ``rgtg audit`` wrote, or in one file, with their plots.

    Raises:
        DataError: no audit, or a file that is not one.
    """
    names = ("audit.json", "rollout-audit.json")
    paths = [path for path in map(source.joinpath, names) if path.is_file()] if source.is_dir() else [source]
    if not paths:
        raise DataError(f"{source} holds no audit.json and no rollout-audit.json; make one with rgtg audit --output")
    return [_read(path) for path in paths]


def _read(path: Path) -> PublishedAudit:
    found = read_audit(path)
    name = "rollout-audit" if isinstance(found, RolloutAuditResult) else "audit"
    plot = path.with_suffix(".png")
    return PublishedAudit(found, {f"{name}.json": path} | ({f"{name}.png": plot} if plot.is_file() else {}))


def is_public(name: str) -> bool:
    """Whether a base model's name is valid on other machines: owner/name, with or without a revision."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\S+)?", name) is not None and not Path(name).exists()


def published_settings(text: str) -> str:
    """The contents of settings.json, with folders reduced to their last part."""
    return json.dumps(without_folders(json.loads(text)), indent=2) + "\n"


def published_card(
    text: str,
    info: ScorerInfo,
    repo: str,
    revision: str | None,
    audits: Sequence[PublishedAudit],
    *,
    folder: str,
    trained_from: str,
) -> str:
    """The README of the repository, from the one in the scorer's folder.

    Its examples load ``repo``, an audit section precedes them, its metadata name a base model that exists, and its
    settings contain no folder of this machine. ``folder`` and ``trained_from`` are the names that the README may use
    for the scorer and its base model now.
    """
    for old in (trained_from, Path(trained_from).name):
        text = text.replace(f"`{old}`", f"`{info.base_model}`")
    text = _JSON.sub(lambda found: found[1] + published_settings(found[2]).rstrip() + found[3], text)
    text = _with_metadata(text, info)
    text = "\n".join(_renamed(line, folder, repo, revision) for line in text.split("\n"))
    text = text.replace(f"\n# {folder}\n", f"\n# {repo}\n")
    return _with_section(text, "\n\n".join(_audit_text(audit) for audit in audits) or NO_AUDIT.format(repo=repo))


def _with_metadata(text: str, info: ScorerInfo) -> str:
    front = _FRONT.match(text)
    data = yaml.safe_load(front[1]) if front else {}
    if not isinstance(data, dict):
        raise DataError("the README's metadata (between --- lines) must be 'name: value' lines")
    data.pop("base_model", None)
    if is_public(info.base_model):
        data["base_model"] = info.base_model.partition("@")[0]
    data["tags"] = sorted({"rgtg", "reward-model", info.objective, *(data.get("tags") or [])})
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n" + (text[front.end() :] if front else "\n" + text)


def _renamed(line: str, folder: str, repo: str, revision: str | None) -> str:
    """A line of an example, changed to load the repository instead of the folder."""
    call = f'("{folder}"'
    if revision is None:
        return line.replace(call, f'("{repo}"')
    ours = "rgtg" in line or "load_scorer" in line
    return line.replace(call, f'("{repo}@{revision}"' if ours else f'("{repo}", revision="{revision}"')


def _with_section(text: str, section: str) -> str:
    block = f"## Audit\n\n{section}\n\n"
    head, use, rest = text.partition("\n## Use\n")
    return f"{head}\n{block}## Use\n{rest}" if use else f"{text.rstrip()}\n\n{block.rstrip()}\n"


def _audit_text(given: PublishedAudit) -> str:
    audit, about = given.result, given.result.provenance
    image = "".join(f"\n\n![{audit.verdict}]({name})" for name in given.files if name.endswith(".png"))
    facts = (
        f"data `{', '.join(about.data.values())}`, weights `{about.models.get('scorer', 'unknown')}` in {about.dtype}, "
        f"rgtg {about.version}"
    )
    if isinstance(audit, AuditResult):
        rows = "\n".join(f"| {p.position:.0%} | {_interval(p.accuracy)} | {p.pairs} |" for p in audit.by_fraction)
        return (
            f"**On {audit.pairs} held-out pairs** ({facts}): {audit.verdict}\n\n"
            f"| share of the completion read | accuracy (95 %) | pairs |\n|---|---|---|\n{rows}{image}"
        )
    overall = audit.overall
    return (
        f"**On the policy's own candidates** at {audit.prefixes} prefixes, against roll-outs under the reward "
        f"`{audit.reward}` ({facts}): {audit.verdict}\n\n"
        "| rank correlation (95 %) | at most | gain of a guided token (95 %) | β |\n|---|---|---|---|\n"
        f"| {_interval(overall.spearman)} | {overall.ceiling:.2f} | {_interval(overall.guided.gain)} "
        f"| {audit.beta:.3g} |{image}"
    )


def _interval(value: Interval) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"
