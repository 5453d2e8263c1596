"""Models in GGUF files: transformers dequantises the weights, and the tokenizer comes from the same file.

A GGUF file is loaded as the bf16 model that it converts to. Converting takes longer than loading, so the result can be
kept beside the file (`convert_gguf`); it is used as long as the file has the size and SHA-256 that it was made from.
"""

import functools
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from rgtg.errors import ModelNotFoundError, OutputError, first_line
from rgtg.types.base import FORMAT_VERSION, FileChecksum, Record
from rgtg.utils.files import file_checksum, replace_file, sync_folders, sync_tree, write_text_synced
from rgtg.version import __version__

CONVERTED = ".bf16"  # model.gguf is converted to the folder model.gguf.bf16
CONVERSION_FILE = "gguf.json"
_MAGIC = b"GGUF"


class Conversion(Record):
    """Contents of gguf.json in a converted folder: the file that it was made from."""

    version: int = FORMAT_VERSION
    rgtg_version: str
    source: str
    checksum: FileChecksum


@contextmanager
def gguf_arguments(path: Path, auto_class: Any, kwargs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The folder and the arguments with which ``auto_class.from_pretrained`` loads a GGUF file in this block.

    They name the converted folder if there is one that fits the file, and the wanted dtype is bf16. Weights in another
    dtype are dequantised to it from the file, so that they are not rounded to bf16 first.

    Args:
        path: the file.
        auto_class: of transformers: a model, a config or a tokenizer.
        kwargs: further arguments of ``from_pretrained``; ``dtype`` is "auto" or absent for bf16.

    Raises:
        ModelNotFoundError: the file is not one that can be loaded.
    """
    is_model = hasattr(auto_class, "_model_mapping")
    dtype = kwargs.get("dtype", "auto")
    wanted = torch.bfloat16 if dtype in ("auto", None) else dtype
    if (not is_model or wanted == torch.bfloat16) and (folder := converted_folder(path)):
        yield str(folder), kwargs
        return
    require_model(path)
    kwargs = kwargs | {"gguf_file": path.name}
    if is_model:
        from transformers import GgufConfig

        kwargs |= {"dtype": wanted, "quantization_config": GgufConfig(dequantize=True)}
        kwargs.pop("use_safetensors", None)
    # transformers also reads tokenizer files beside the GGUF file, which may be those of another model
    with tempfile.TemporaryDirectory(prefix="rgtg-gguf-") as alone:
        _link(path.resolve(), Path(alone) / path.name)
        yield alone, kwargs


def _link(path: Path, link: Path) -> None:
    for make in (link.symlink_to, link.hardlink_to):  # Windows may allow no symbolic links, and hard ones
        try:
            make(path)
            return
        except OSError:
            continue
    shutil.copyfile(path, link)


def require_model(path: Path) -> None:
    """Check that a GGUF file holds a model, judged by its header.

    Raises:
        ModelNotFoundError: a damaged file, a part of a model, or something else than a model.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelNotFoundError(f"{path} is not a GGUF file (its first bytes are not GGUF): download it again")
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        metadata, tensors = read_gguf_metadata(str(path))
        parts, kind = int(metadata.get("split.count", 0)), str(metadata.get("general.type", "model"))
        layers = metadata.get(f"{metadata['general.architecture']}.block_count")
    except Exception as error:  # whatever a header that lies leads to
        raise ModelNotFoundError(f"{path} is damaged or cut off ({first_line(error)}): download it again") from error
    if parts > 1:
        raise ModelNotFoundError(
            f"{path} is one of {parts} parts of a model: merge them first (llama-gguf-split --merge FIRST ALL)"
        )
    if kind != "model":
        raise ModelNotFoundError(f"{path} holds no language model but a GGUF {kind}: name the file of the model")
    if not isinstance(layers, int) or not 0 < layers <= len(tensors):
        raise ModelNotFoundError(f"{path} states {layers} layers and holds {len(tensors)} tensors: download it again")


def as_dense(model: Any) -> Any:
    """A dequantised model without its traces of the quantisation, so that it can be trained, merged and saved."""
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False
    return model


def save_dense(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save a dequantised model and its tokenizer, with the permissions of new files.

    Raises:
        OSError: the folder cannot be written.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors' files are their owner's alone
        replace_file(file.rename(folder / f".{file.name}"), file)


def converted_folder(path: Path) -> Path | None:
    """The folder beside a GGUF file that holds its conversion; None if there is none or the file has changed."""
    folder = path.with_name(path.name + CONVERTED)
    try:
        made_from = Conversion.model_validate_json((folder / CONVERSION_FILE).read_bytes()).checksum
        if made_from.bytes == path.stat().st_size and made_from == _checksum(path):
            return folder
    except (OSError, ValidationError, UnicodeDecodeError):
        pass
    return None


def write_converted(path: Path, model: Any, tokenizer: Any) -> Path:
    """Save the conversion of a GGUF file beside it, as a folder that appears whole.

    Args:
        path: the file.
        model: loaded from it, in bf16.
        tokenizer: loaded from it.

    Returns:
        The folder, which every command can also use by its name.

    Raises:
        OutputError: it cannot be written.
    """
    folder = path.with_name(path.name + CONVERTED)
    about = Conversion(rgtg_version=__version__, source=path.name, checksum=_checksum(path))
    partial, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}") for _ in range(2))
    try:
        # 1. write everything under another name; the description is last, and marks the rest as complete
        partial.mkdir()
        save_dense(partial, model, tokenizer)
        write_text_synced(partial / CONVERSION_FILE, about.model_dump_json(indent=2) + "\n")
        sync_tree(partial)
        # 2. put it in the place of an older one
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync_folders(folder.parent)
    except OSError as error:
        raise OutputError(
            f"cannot write {folder}: {first_line(error)}; leave cache_gguf out, or move {path.name} into a folder that "
            "can be written"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _checksum(path: Path) -> FileChecksum:
    found = path.stat()
    return _checksum_of(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _checksum_of(path: Path, _size: int, _modified: int) -> FileChecksum:
    """Reading the whole file takes a second per gigabyte; model, config and tokenizer ask for it in turn."""
    return file_checksum(path)
