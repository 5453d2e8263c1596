"""The file formats of batch generation, beside the completions themselves."""

from typing import Any

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, FileChecksum, Provenance, Record


class RowFailure(Record):
    """A line of ``OUTPUT.errors.jsonl``: a row that got no completion, and why."""

    version: int = FORMAT_VERSION
    id: str | None = Field(description="of the row; None where it has none that can be read")
    line: int = Field(description="or row number in the file of prompts, from 1")
    reason: str = Field(description="in a few words that can be counted")
    error: str


class JobResult(Record):
    """Contents of ``OUTPUT.job.json``: what a finished output was made from, and how its rows add up."""

    version: int = FORMAT_VERSION
    rows: int = Field(description="in the file of prompts: completions + failed")
    completions: int
    failed: int = Field(description="lines of the file of errors")
    undecoded: int = Field(description="of those, how many failed while they were decoded; a rerun tries them again")
    counts: dict[str, int] = Field(description="sums over the completions: candidates, retokenised, unscored")
    content: FileChecksum | None = Field(None, description="of OUTPUT; None in records that did not keep it yet")
    made_with: dict[str, Any] = Field(description="all that the completions depend on")
    provenance: Provenance
