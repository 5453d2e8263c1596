"""The file formats of batch generation, except the completions."""

from typing import Any

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, FileChecksum, Provenance, Record


class RowFailure(Record):
    """A line of ``OUTPUT.errors.jsonl``: a row without a completion, and why."""

    version: int = FORMAT_VERSION
    id: str | None = Field(description="of the row; None if it cannot be read")
    line: int = Field(description="or row of the file of prompts, from 1")
    reason: str = Field(description="one of few fixed texts, to count by")
    error: str


class JobResult(Record):
    """``OUTPUT.job.json``: what a finished output was made from, and its numbers of rows."""

    version: int = FORMAT_VERSION
    rows: int = Field(description="in the file of prompts: completions + failed")
    completions: int
    failed: int = Field(description="lines of the file of errors")
    undecoded: int = Field(description="of those, how many failed during decoding; a rerun tries them again")
    counts: dict[str, int] = Field(description="sums over the completions: candidates, retokenised, unscored")
    content: FileChecksum | None = Field(None, description="of OUTPUT; None in files of early versions")
    made_with: dict[str, Any] = Field(description="everything that the completions depend on")
    provenance: Provenance
