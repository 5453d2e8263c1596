"""What every record shares: the version, provenance, intervals."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rgtg.errors import DataError

FORMAT_VERSION = 1


class Record(BaseModel):
    """A line or file that rgtg writes; unknown fields are refused when it is read back.

    JSON knows no infinity: an excluded candidate's log-probability is the text "-Infinity", and reads back as a number.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")

    @classmethod
    def from_file(cls, path: Path, what: str, writer: str) -> Self:
        """Read a file that ``writer`` wrote.

        Raises:
            DataError: it cannot be read, or is not what it should be.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read the {what} {path}: {error.strerror}") from error
        except ValidationError as error:
            raise DataError(f"{path} is not what {writer} writes: {error.errors()[0]['msg']}") from error


class Interval(Record):
    """A mean with its bootstrap interval; ``n`` is the number of independent units that were resampled."""

    mean: float
    low: float
    high: float
    n: int


class FileChecksum(Record):
    """Size and hash of one file."""

    bytes: int
    sha256: str


class Provenance(Record):
    """What every written result carries, so that it can be made again."""

    version: str
    git_commit: str | None = None
    command: str
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None
    models: dict[str, str] = Field(default_factory=dict, description="role → fingerprint of the weights")
    data: dict[str, str] = Field(default_factory=dict, description="role → fingerprint of the data")
