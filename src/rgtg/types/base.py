"""What all records share: version, provenance, intervals."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rgtg.errors import DataError

FORMAT_VERSION = 1


class Record(BaseModel):
    """A line or file that rgtg writes. Reading one with an unknown field is an error.

    JSON has no infinity: the log-probability of an excluded candidate is the text "-Infinity", read back as a number.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, ser_json_inf_nan="strings")

    @classmethod
    def from_file(cls, path: Path, what: str, writer: str) -> Self:
        """Read a file that ``writer`` wrote.

        Raises:
            DataError: it cannot be read, or does not have this format.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read the {what} {path}: {error.strerror}") from error
        except ValidationError as error:
            raise DataError(f"{path} is not what {writer} writes: {first_problem(error)}") from error


def is_none(value: Any) -> bool:
    """Whether a field of chats is left out of a record: that of a plain prompt is as before there were chats."""
    return value is None


def first_problem(error: ValidationError) -> str:
    """Where the first problem of a record is, and what it is."""
    problem = error.errors()[0]
    return ": ".join([*filter(None, [".".join(map(str, problem["loc"]))]), problem["msg"]])


class Interval(Record):
    """A mean with its 95 % bootstrap interval; ``n`` is the number of resampled units."""

    mean: float
    low: float
    high: float
    n: int


class FileChecksum(Record):
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


class Provenance(Record):
    """Where a result comes from, so that it can be reproduced."""

    version: str
    git_commit: str | None = None
    command: str
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None
    models: dict[str, str] = Field(default_factory=dict, description="role → fingerprint of the weights")
    data: dict[str, str] = Field(default_factory=dict, description="role → fingerprint of the data")
