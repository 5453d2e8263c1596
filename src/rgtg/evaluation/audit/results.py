"""Reads the results of both audits; loads no models."""

import json
from pathlib import Path

from rgtg.types.audit import AuditResult
from rgtg.types.rollouts import RolloutAuditResult


def read_audit(path: Path) -> AuditResult | RolloutAuditResult:
    """A file that ``rgtg audit`` wrote, of either kind.

    Raises:
        DataError: it cannot be read, or is not an audit.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None  # from_file says what is wrong
    by_rollouts = isinstance(content, dict) and "by_position" in content
    kind: type[AuditResult | RolloutAuditResult] = RolloutAuditResult if by_rollouts else AuditResult
    return kind.from_file(path, "audit", "rgtg audit")
