"""Fingerprints of a policy's weight files: what identifies it for engines that load it in a way of their own.

An engine may fuse, shard or quantise the weights it loads, so its tensors cannot be compared with those of training;
the files they come from can. Nothing here needs torch. docs/head-format.md defines both fingerprints.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgtg.errors import ModelNotFoundError
from rgtg.models.loading.hub import local_folder
from rgtg.types.scorer import PolicyFiles

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_SAMPLES = 64  # values of a tensor, at least, if it has as many
_GGUF_HEAD, _GGUF_BLOCK, _GGUF_BLOCKS = 2**23, 2**12, 256
_HEADER_LIMIT = 100 * 2**20  # bytes; the limit of the safetensors library
_BF16 = "BF16"
_FLOATS: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", _BF16: "<u2"}


def describe_policy_files(source: str) -> PolicyFiles:
    """Fingerprints of the weight files of a policy: a GGUF file, or a folder or hub id with safetensors or one GGUF.

    Raises:
        ModelNotFoundError: no such files, or damaged ones.
    """
    try:
        paths = _weight_files(Path(local_folder(source)))
        if paths[0].suffix.lower() == ".gguf":
            return PolicyFiles(format="gguf", fingerprint=_fingerprint_gguf(paths))
        tensors = sorted((tensor for path in paths for tensor in _tensors(path)), key=lambda one: one.name.encode())
        casts = {"bfloat16": _round_to_bfloat16, "float16": _round_to_float16}
        return PolicyFiles(
            format="safetensors",
            fingerprint=_fingerprint(tensors, lambda values: values),
            casts={name: _fingerprint(tensors, cast) for name, cast in casts.items()},
        )
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise ModelNotFoundError(f"cannot read the weights of {source}: {error.strerror or error}") from error


def _weight_files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _parts_of_gguf(path)
    if (path / _INDEX).is_file():
        try:
            names = set(json.loads((path / _INDEX).read_bytes())["weight_map"].values())
            if any(Path(name).name != name for name in names):
                raise ValueError("it names files outside of the folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelNotFoundError(f"{path / _INDEX} is damaged: it does not map weights to files") from error
        return [path / name for name in sorted(names)]
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    found = sorted(path.glob("*.safetensors"))
    models = [one for one in sorted(path.glob("*.gguf")) if _part(one) in (None, 1) and one.name[:6] != "mmproj"]
    if not found and len(models) == 1:
        found = _parts_of_gguf(models[0])
    if not found:
        raise ModelNotFoundError(f"{path} holds neither safetensors weights nor one GGUF model: it is no policy")
    return found


def _part(path: Path) -> int | None:
    """Which part of a split GGUF model a file is, counted from 1 (NAME-00002-of-00005.gguf); None if it is whole."""
    name, _, total = path.stem.rpartition("-of-")
    number = name.rpartition("-")[2]
    return int(number) if total.isdigit() and number.isdigit() else None


def _parts_of_gguf(path: Path) -> list[Path]:
    if _part(path) is None:
        return [path]
    name, total = path.stem.rpartition("-of-")[0].rpartition("-")[0], path.stem.rpartition("-of-")[2]
    return [path.with_name(f"{name}-{i:0{len(total)}d}-of-{total}.gguf") for i in range(1, int(total) + 1)]


def _fingerprint_gguf(paths: list[Path]) -> str:
    """Of each file: its size, its first 8 MiB, and 256 blocks of 4 KiB spread evenly over it."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            digest.update(file.read(_GGUF_HEAD))
            for i in range(_GGUF_BLOCKS):
                file.seek(max(0, size - _GGUF_BLOCK) * i // (_GGUF_BLOCKS - 1))
                digest.update(file.read(_GGUF_BLOCK))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a safetensors file: where it is, and evenly spaced values of it.

    ``samples`` are fp32 for floating dtypes, and bytes of the tensor for all others (FP8, packed integers).
    """

    name: str
    shape: tuple[int, ...]
    samples: Any


def _tensors(path: Path) -> Iterator[_Tensor]:
    """The tensors of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        size = path.stat().st_size
        if length > min(_HEADER_LIMIT, size - 8):
            raise ModelNotFoundError(f"{path} is damaged: its header is longer than the file")
        try:
            header = json.loads(file.read(length))
            entries = [
                (name, str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelNotFoundError(f"{path} is damaged: its header does not describe tensors") from error
    data = np.memmap(path, np.uint8, "r", 8 + length) if size > 8 + length else np.zeros(0, np.uint8)
    for name, dtype, shape, start, end in entries:
        if not 0 <= start <= end <= len(data):
            raise ModelNotFoundError(f"{path} is damaged: the tensor {name} lies outside of the file")
        stored = _FLOATS.get(dtype, "u1")
        if (end - start) % np.dtype(stored).itemsize:
            raise ModelNotFoundError(f"{path} is damaged: the tensor {name} ends inside a value")
        values = data[start:end].view(stored)
        samples = values[:: max(1, len(values) // _SAMPLES)]
        if dtype == _BF16:
            samples = (samples.astype("<u4") << np.uint32(16)).view("<f4")
        elif dtype in _FLOATS:
            with np.errstate(over="ignore"):
                samples = samples.astype("<f4")
        yield _Tensor(name, shape, np.array(samples))


def _fingerprint(tensors: list[_Tensor], cast: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        shape = "x".join(map(str, tensor.shape))
        digest.update(f"{tensor.name}\0{shape}\0".encode())
        digest.update((cast(tensor.samples) if tensor.samples.dtype == "<f4" else tensor.samples).tobytes())
    return digest.hexdigest()[:16]


def _round_to_bfloat16(values: Any) -> Any:
    """fp32 values rounded to the nearest bfloat16 (ties to even), as fp32."""
    bits = values.view("<u4").astype("<u8")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype("<u4").view("<f4")
    return np.where(np.isnan(values), values, rounded).astype("<f4")


def _round_to_float16(values: Any) -> Any:
    with np.errstate(over="ignore"):
        return values.astype("<f2").astype("<f4")
