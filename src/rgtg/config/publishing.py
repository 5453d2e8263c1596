"""Settings of ``rgtg push``."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from rgtg.config.base import Settings


class PushSettings(Settings):
    """``rgtg push``: which folder goes to which repository of the hub."""

    positional: ClassVar[tuple[str, ...]] = ("folder", "repo")

    folder: Path = Field(description="a scorer that rgtg train wrote")
    repo: str = Field(description="owner/name")
    revision: str | None = Field(None, min_length=1, description="branch, made where it is missing; default: main")
    private: bool = Field(False, description="of a repository that is made; an existing public one is refused")
    audit: Path | None = Field(None, description="output of rgtg audit; default: in the folder, or its audit/")
    base_model: str | None = Field(None, description="where others find the model that a head or adapter reads")
    exclude: list[str] = Field(default_factory=list, description="files that stay here")
    message: str = Field("Publish a scorer with rgtg", min_length=1)
    dry_run: bool = False
