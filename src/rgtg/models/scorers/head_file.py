"""A head's folder, read and checked without torch: what every engine loads (docs/head-format.md is the specification).

`read_head` checks everything that needs no policy, ``HeadFile.require_policy_files`` the weight files that an engine
has loaded, and ``HeadFile.score`` turns states (B, H) into scores (B, V).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from rgtg.errors import DataError, TokenizerMismatchError, UsageError, one_line
from rgtg.models.loading.hub import local_folder
from rgtg.models.loading.policy_files import describe_policy_files
from rgtg.types.base import FORMAT_VERSION, first_problem
from rgtg.types.scorer import HEAD_FILE, INFO_FILE, ScorerInfo

# Every tensor of a head by its kind, with the letters of its shape: H hidden, W width, R rank, V vocabulary, 1 one.
_MLP = {
    "mlp.mean": "H", "mlp.std": "H", "mlp.first.weight": "WH", "mlp.first.bias": "W",
}  # fmt: skip
_TENSORS = {
    "state": {**_MLP, "mlp.second.weight": "1W", "mlp.second.bias": "1"},
    "vocab": {**_MLP, "mlp.second.weight": "RW", "mlp.second.bias": "R", "table.weight": "VR", "bias": "V"},
}
_DTYPES = ("F16", "F32")
_NAMES = {"H": "hidden", "W": "width", "R": "rank", "V": "vocabulary"}


def read_info(folder: str | Path) -> ScorerInfo | None:
    """Contents of rgtg.json in a folder or hub repository; None if there is no such file (a stock reward model).

    Raises:
        DataError: the file is not a valid description, or one of a later version.
    """
    path = Path(local_folder(str(folder))) / INFO_FILE
    if not path.is_file():
        return None
    try:
        info = ScorerInfo.model_validate_json(path.read_bytes())
    except (ValidationError, UnicodeDecodeError) as error:
        why = first_problem(error) if isinstance(error, ValidationError) else one_line(error)
        raise DataError(f"{path} is not a valid scorer description: {why}") from error
    if info.version > FORMAT_VERSION:
        raise DataError(f"{path} has format {info.version}, and this rgtg reads {FORMAT_VERSION}: install a newer rgtg")
    return info


def read_tensors(folder: Path, info: ScorerInfo) -> dict[str, Any]:
    """The tensors of head.safetensors as fp32 arrays, after checking them against each other and against rgtg.json.

    Raises:
        DataError: the file is missing or damaged, or holds another head than the one that ``info`` describes.
    """
    path = folder / HEAD_FILE
    expected = _TENSORS[info.head]
    try:
        with safe_open(str(path), framework="np") as file:
            names = set(file.keys())
            if names != set(expected):
                missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
                raise DataError(
                    f"{path} holds no {info.head} head: it lacks {missing or 'nothing'} and has {extra or 'nothing'} "
                    "besides"
                )
            tensors = {}
            for name in sorted(names):
                if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                    raise DataError(f"{path}: {name} has dtype {dtype}; a head's tensors are {' or '.join(_DTYPES)}")
                tensors[name] = file.get_tensor(name).astype(np.float32)
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is missing or damaged, or no {info.head} head: {one_line(error)}; copy or train it again"
        ) from error
    _check_shapes(path, tensors, expected, info)
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise DataError(f"{path}: {name} holds values that are not finite; train the head again")
    if not (tensors["mlp.std"] > 0).all():
        raise DataError(f"{path}: mlp.std holds deviations that are not positive; train the head again")
    return tensors


def _check_shapes(path: Path, tensors: dict[str, Any], expected: dict[str, str], info: ScorerInfo) -> None:
    sizes: dict[str, tuple[int, str]] = {"1": (1, "the definition")}
    for letter, field in _NAMES.items():
        if (told := getattr(info, field)) is not None:
            sizes[letter] = (told, f"{field} of {INFO_FILE}")
    for name, letters in expected.items():
        shape = tensors[name].shape
        if len(shape) != len(letters):
            raise DataError(f"{path}: {name} has shape {list(shape)}; a {info.head} head's has {len(letters)} sizes")
        for size, letter in zip(shape, letters, strict=True):
            wanted, by = sizes.setdefault(letter, (size, name))
            if size != wanted:
                raise DataError(f"{path}: {name} has shape {list(shape)}, and {by} says {wanted} instead of {size}")


@dataclass(frozen=True)
class HeadFile:
    """A head on the states of a policy, as numpy arrays in fp32.

    Attributes:
        folder: where it lies; messages name it.
        info: contents of rgtg.json.
        kind: ``vocab``, or ``state`` for a head on the candidate's state.
        layer: whose states it reads; ``info.policy_layers`` is the final state, after the last norm.
        mean: (H,) subtracted from a state.
        std: (H,) what the difference is divided by.
        first_weight: (W, H).
        first_bias: (W,).
        second_weight: (R, W); R is 1 in a state head.
        second_bias: (R,).
        table: (V, R) of a vocabulary head, else None.
        bias: (V,) of a vocabulary head, else None.
    """

    folder: str
    info: ScorerInfo
    mean: Any
    std: Any
    first_weight: Any
    first_bias: Any
    second_weight: Any
    second_bias: Any
    table: Any = None
    bias: Any = None

    @property
    def kind(self) -> str:
        """``vocab`` or ``state``."""
        return self.info.head

    @property
    def layer(self) -> int:
        """Whose states the head reads."""
        assert self.info.layer is not None, "read_head checks it"
        return self.info.layer

    @property
    def reads_final_state(self) -> bool:
        """Whether the head reads what the policy's output layer reads: the state after the last norm."""
        return self.info.layer == self.info.policy_layers

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that a vocabulary head scores."""
        return None if self.bias is None else len(self.bias)

    def query(self, states: Any) -> Any:
        """MLP(h), (B, R), of states (B, H) of any floating dtype, in fp32."""
        standardized = (np.asarray(states, np.float32) - self.mean) / self.std
        hidden = gelu(standardized @ self.first_weight.T + self.first_bias)
        return hidden @ self.second_weight.T + self.second_bias

    def score(self, states: Any, candidate_ids: Any = None) -> Any:
        """Scores in fp32 at states (B, H).

        A state head gives (B,). A vocabulary head gives (B, V), or (B, K) for candidates (B, K).
        """
        query = self.query(states)
        if self.table is None:
            return query[:, 0]
        if candidate_ids is None:
            return query @ self.table.T + self.bias
        return (self.table[candidate_ids] @ query[..., None])[..., 0] + self.bias[candidate_ids]

    def require_vocabulary_of_final_states(self, engine: str) -> None:
        """Check that an engine which gives only final states, and no states at candidates, can carry this head.

        Raises:
            UsageError: a state head, or one that reads another layer.
        """
        if self.kind != "vocab":
            raise UsageError(
                f"{self.folder} is a {self.kind} head, which reads the state at every candidate, and {engine} gives "
                f"only the prefix's: train a vocabulary head (rgtg train --trunk own --head vocab --layer final "
                f"--base {self.info.base_model})"
            )
        if not self.reads_final_state:
            raise UsageError(
                f"{self.folder} reads layer {self.layer} of {self.info.policy_layers}, and {engine} gives only the "
                f"final state: train it with --layer final"
            )

    def require_policy_files(self, source: str) -> None:
        """Check that weight files (a GGUF file, a folder or a hub id) hold the policy that the head was trained on.

        Raises:
            UsageError: other weights, or a head that names no files.
            ModelNotFoundError: no weights there.
        """
        known = self.info.policy_file_fingerprints
        if not known:
            raise UsageError(
                f"{self.folder} names no policy files (an earlier rgtg trained it), so it cannot be checked against "
                f"{source}: train it again"
            )
        if (found := describe_policy_files(source).fingerprint) not in known:
            trained = ", ".join(f"{files.format} {files.fingerprint}" for files in self.info.policy_files)
            raise UsageError(
                f"{self.folder} was trained on the states of {self.info.base_model} ({trained}), and {source} holds "
                f"other weights ({found}), whose states mean nothing to it: serve {self.info.base_model}, or train a "
                f"head for this policy (rgtg train --trunk own --head {self.kind} --layer final --base {source})"
            )

    def require_tokenizer(self, fingerprint: str) -> None:
        """Check the fingerprint that `rgtg.tokenization.encoding` gives the engine's tokenizer.

        Raises:
            TokenizerMismatchError: the head was trained with another tokenizer.
        """
        if fingerprint != self.info.tokenizer_hash:
            raise TokenizerMismatchError(
                f"{self.folder} was trained with another tokenizer ({self.info.tokenizer_hash}) than the engine's "
                f"({fingerprint}): use the tokenizer of {self.info.base_model}, which is saved with the head"
            )


def read_head(folder: str) -> HeadFile:
    """Read a head's folder (or hub id), after checking everything that can be checked without its policy.

    Raises:
        ModelNotFoundError: no such folder.
        UsageError: no head on a policy's states, or one that an earlier rgtg trained and that says too little.
        DataError: damaged files, or files that contradict each other.
    """
    info = read_info(folder)
    if info is None and (Path(local_folder(folder)) / HEAD_FILE).exists():
        raise UsageError(f"{folder} has no {INFO_FILE}: saving it was interrupted; train the head again")
    if info is None or info.trunk != "own" or info.head == "scalar":
        raise UsageError(f"{folder} holds no head on a policy's own states; make one with rgtg train --trunk own")
    told: tuple[str, ...] = ("layer", "policy_layers", "hidden", "width", "normalisation", "activation")
    told += ("rank", "vocabulary") if info.head == "vocab" else ()
    if missing := [name for name in told if getattr(info, name) is None]:
        raise UsageError(
            f"{folder}/{INFO_FILE} does not say {', '.join(missing)}: an earlier rgtg trained this head for the torch "
            "engine alone; train it again"
        )
    assert info.layer is not None, "checked above"
    assert info.policy_layers is not None, "checked above"
    if not 0 <= info.layer <= info.policy_layers:
        raise DataError(f"{folder}/{INFO_FILE}: layer {info.layer} is not one of 0 to {info.policy_layers}")
    tensors = read_tensors(Path(local_folder(folder)), info)
    return HeadFile(
        folder, info, tensors["mlp.mean"], tensors["mlp.std"], tensors["mlp.first.weight"], tensors["mlp.first.bias"],
        tensors["mlp.second.weight"], tensors["mlp.second.bias"], tensors.get("table.weight"), tensors.get("bias"),
    )  # fmt: skip


def gelu(x: Any) -> Any:
    """x·Φ(x), with the exact normal distribution function Φ, in the dtype of ``x``.

    Example:
        >>> gelu(np.array([0.0, 1.0])).round(6).tolist()
        [0.0, 0.841345]
    """
    flat = np.fromiter((math.erf(value) for value in (x.ravel() / math.sqrt(2)).tolist()), np.float64, x.size)
    return (x * (0.5 * (1 + flat.reshape(x.shape)))).astype(x.dtype)
