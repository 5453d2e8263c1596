"""Results of `rgtg audit`."""

from pydantic import Field

from rgtg.types.base import FORMAT_VERSION, Interval, Provenance, Record


class AuditPoint(Record):
    """Pairwise accuracy and margin of a scorer at one prefix length."""

    position: float = Field(description="in tokens, or as a fraction of the completion")
    accuracy: Interval
    margin: Interval
    ties: int
    pairs: int


class AuditResult(Record):
    """audit.json of ``rgtg audit``."""

    version: int = FORMAT_VERSION
    scorer: str
    objective: str
    pairs: int
    by_tokens: list[AuditPoint]
    by_fraction: list[AuditPoint]
    full_accuracy: Interval
    calibration_error: float = Field(description="expected calibration error of σ(r_w − r_l), all prefixes")
    length_correlation: Interval | None = Field(
        default=None, description="of the difference of scores with that of lengths in tokens, within pairs"
    )
    label_length_correlation: Interval | None = Field(
        default=None, description="the same of the labels: +1 where the chosen completion is the longer one"
    )
    verdict: str
    provenance: Provenance
