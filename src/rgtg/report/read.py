"""Reads the results that a report shows: a comparison, audits of either kind, and a judge's win rates."""

from pathlib import Path

from rgtg.data.sources import named_path
from rgtg.errors import DataError
from rgtg.evaluation.audit.results import read_audit
from rgtg.types.audit import AuditResult
from rgtg.types.comparison import ComparisonResult
from rgtg.types.judge import JudgeResult
from rgtg.types.rollouts import RolloutAuditResult


def read_comparison(path: Path) -> ComparisonResult:
    """A comparison from results.json, or from the folder that contains it.

    Raises:
        DataError: there is no such file, or it is not a comparison.
    """
    file = path / "results.json" if path.is_dir() else path
    return ComparisonResult.from_file(file, "comparison", "rgtg compare")


def read_judged(path: Path) -> JudgeResult:
    """A judge's figures from judge.json, or from the folder that contains it.

    Raises:
        DataError: there is no such file, it is not a judge's result, or it judges human pairs instead of methods.
    """
    found = JudgeResult.from_file(path / "judge.json" if path.is_dir() else path, "judge's figures", "rgtg judge")
    if found.kind != "win-rate":
        raise DataError(f"{path} holds a judge's agreement with human pairs; a report needs its win rates of methods")
    return found


def read_audits(sources: list[str]) -> tuple[dict[str, AuditResult], dict[str, RolloutAuditResult]]:
    """Audits on pairs and by roll-outs, by name: FILE or NAME=FILE. The default name is the scorer's.

    Raises:
        DataError: a file that is neither kind of audit, or two of one kind with the same name.
    """
    by_pairs: dict[str, AuditResult] = {}
    by_rollouts: dict[str, RolloutAuditResult] = {}
    for source in sources:
        name, path = named_path(source)
        audit = read_audit(path)
        label = audit.scorer if name is None else name
        if label in (by_rollouts if isinstance(audit, RolloutAuditResult) else by_pairs):
            raise DataError(f"{path}: {label} was given before; name the audits apart with NAME=FILE")
        if isinstance(audit, RolloutAuditResult):
            by_rollouts[label] = audit
        else:
            by_pairs[label] = audit
    return by_pairs, by_rollouts
