"""The scorers that a server offers: a file that the environment variable RGTG_VLLM_SCORERS names.

It maps names to folders, as JSON or YAML: ``{"helpful": "heads/helpful"}``. Folders are relative to the file. All of
vLLM's processes read it: the one that takes requests checks names, and the workers load the scorers.
"""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rgtg.config.base import read_yaml
from rgtg.errors import UsageError
from rgtg.models.scorers.head_file import read_info
from rgtg.types.scorer import ScorerInfo

VARIABLE = "RGTG_VLLM_SCORERS"
_NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class NamedScorer:
    """One line of the file.

    Attributes:
        name: that requests use.
        folder: a path or a hub id.
        info: contents of its rgtg.json.
    """

    name: str
    folder: str
    info: ScorerInfo

    @property
    def on_policy_states(self) -> bool:
        """Whether it is a head on the policy's own states."""
        return self.info.trunk == "own"

    @property
    def scores_vocabulary(self) -> bool:
        """Whether one call scores all next tokens."""
        return self.info.head == "vocab"


def scorers_of_server() -> dict[str, NamedScorer]:
    """The scorers in the file that the environment variable names, by name.

    Raises:
        UsageError: no such variable or file, or a line that names no scorer trained here.
        DataError: a damaged description.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        raise UsageError(f'set {VARIABLE} to a file of scorers, such as {{"helpful": "heads/helpful"}}')
    return _read(path)


@functools.lru_cache(maxsize=8)
def _read(path: str) -> dict[str, NamedScorer]:
    scorers = {}
    for name, folder in read_yaml(Path(path)).items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"{path}: {name!r} is no name of a scorer; use letters, digits, dots, - and _")
        if not isinstance(folder, str) or not folder:
            raise UsageError(f"{path}: {name} must name a folder, not {folder!r}")
        beside = Path(path).resolve().parent / folder
        source = str(beside) if beside.exists() else folder
        info = read_info(source)
        if info is None:
            raise UsageError(f"{path}: {folder} ({name}) has no rgtg.json; expected a scorer that rgtg train made")
        scorers[name] = NamedScorer(name, source, info)
    if not scorers:
        raise UsageError(f'{path} names no scorers; expected name: folder, such as {{"helpful": "heads/helpful"}}')
    return scorers
