"""Result of `rgtg calibrate`."""

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, Provenance, Record


class CalibrationResult(Record):
    """A score threshold that leaves all but a share of good completions alone."""

    version: int = FORMAT_VERSION
    scorer: str
    alpha: float = Field(description="largest share of good completions that may be touched")
    threshold: float = Field(description="for value_threshold (vfd) and abstain_below: scores below it are bad")
    good: int = Field(description="completions that the threshold was found on")
    bad: int = Field(description="the others")
    touched_good: float = Field(description="share of these good completions with a score below the threshold")
    touched_bad: float | None = Field(description="share of the bad ones; None if there are none")
    provenance: Provenance
