"""The finished shards of a comparison: one file for each run and seed, so that a stopped comparison can continue."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rgtg.errors import DataError, UsageError
from rgtg.types.base import Record
from rgtg.types.generation import Completion
from rgtg.utils.files import write_text

SHARD_VERSION = 1


class ShardRewards(Record):
    """One reward of every completion of a shard; ``fingerprint`` is None for a Python function: call it again."""

    fingerprint: str | None
    values: list[float]


class Shard(Record):
    """The completions of one run with one seed, in the order of the prompts, and their rewards.

    ``made_with`` holds everything that the completions depend on, except the seed.
    """

    version: int = SHARD_VERSION
    label: str
    seed: int
    made_with: dict[str, Any]
    seconds: float
    completions: list[Completion]
    reference_log_probs: list[float] | None = Field(
        default=None, description="nats, under the policy that KL is measured to; None where it is the run's own policy"
    )
    scores: dict[str, ShardRewards] = Field(default_factory=dict, description="reward, proxy:NAME → values")


class ShardFolder:
    """Reads and writes the finished shards of one folder; ``force`` ignores shards made with other settings."""

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        self.folder, self.force = folder, force

    def find(self, label: str, seed: int, made_with: dict[str, Any]) -> Shard | None:
        """The finished shard of a run and seed, or None if it must still be made.

        Raises:
            UsageError: a shard of that name that was made with other settings or models.
            DataError: a file that is not a shard.
        """
        path = self._path(label, seed)
        if not path.is_file():
            return None
        try:
            shard = Shard.model_validate_json(path.read_bytes())
        except ValidationError as error:
            if self.force:
                return None
            raise DataError(f"{path} is not a finished part of a comparison; delete it, or give --force") from error
        changed = sorted(key for key in made_with | shard.made_with if made_with.get(key) != shard.made_with.get(key))
        if not changed:
            return shard
        if self.force:
            return None
        was, now = shard.made_with.get(changed[0]), made_with.get(changed[0])
        raise UsageError(
            f"{self.folder} holds {label} made with another {', '.join(changed)} ({changed[0]}: {was} there, {now} "
            "now): give another --output, or --force to compute it again"
        )

    def save(self, shard: Shard) -> None:
        """Write a shard atomically."""
        write_text(self._path(shard.label, shard.seed), shard.model_dump_json() + "\n")

    def _path(self, label: str, seed: int) -> Path:
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-")[:60]
        return self.folder / f"{readable}-{hashlib.sha256(label.encode()).hexdigest()[:8]}-seed{seed}.json"


def fingerprint_prompts(prompts: Sequence[str | list[dict[str, Any]]]) -> str:
    """Short hash of texts and chats in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = prompt if isinstance(prompt, str) else json.dumps(prompt)
        digest.update(content.encode() + b"\0")
    return digest.hexdigest()[:16]
