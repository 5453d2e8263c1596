"""Read back what the commands wrote, for a report: a comparison, audits of either kind, a judge's figures."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rgtg.data.sources import named_path
from rgtg.errors import DataError
from rgtg.types.audit import AuditResult
from rgtg.types.comparison import ComparisonResult
from rgtg.types.judge import JudgeResult
from rgtg.types.rollouts import RolloutAuditResult


def read_comparison(path: Path) -> ComparisonResult:
    """A comparison from results.json, or from the folder that holds it.

    Raises:
        DataError: it is not there, or not what it should be.
    """
    found: ComparisonResult = _read(ComparisonResult, path / "results.json" if path.is_dir() else path)
    return found


def read_judged(path: Path) -> JudgeResult:
    """A judge's figures from judge.json, or from the folder that holds it.

    Raises:
        DataError: it is not there, not what it should be, or of human pairs and not of methods.
    """
    found: JudgeResult = _read(JudgeResult, path / "judge.json" if path.is_dir() else path)
    if found.kind != "win-rate":
        raise DataError(f"{path} holds a judge's agreement with human pairs; a report needs its win rates of methods")
    return found


def read_audits(sources: list[str]) -> tuple[dict[str, AuditResult], dict[str, RolloutAuditResult]]:
    """Audits on pairs and by roll-outs, by name: FILE or NAME=FILE, the scorer's own name where none is given.

    Raises:
        DataError: a file that is neither kind of audit, or two of one kind under one name.
    """
    by_pairs: dict[str, AuditResult] = {}
    by_rollouts: dict[str, RolloutAuditResult] = {}
    for source in sources:
        name, path = named_path(source)
        audit = _read(RolloutAuditResult if _is_rollouts(path) else AuditResult, path)
        held: dict[str, Any] = by_rollouts if isinstance(audit, RolloutAuditResult) else by_pairs
        label = audit.scorer if name is None else name
        if label in held:
            raise DataError(f"{path}: {label} was given before; name the audits apart with NAME=FILE")
        held[label] = audit
    return by_pairs, by_rollouts


def _is_rollouts(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # what is wrong with it is said when it is read
    return isinstance(found, dict) and "by_position" in found


def _read(kind: Any, path: Path) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path} is not a valid {kind.__name__}: {where}: {first['msg']}") from error
