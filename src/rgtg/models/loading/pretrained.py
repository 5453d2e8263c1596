"""Models through ``from_pretrained``: where a model's files are, which are refused, and why loading failed."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.errors import ModelNotFoundError, RgtgError, UsageError, first_line
from rgtg.models.loading.gguf import as_dense, gguf_arguments
from rgtg.models.loading.hub import EXPECTED, gguf_names, holds_only_pickles, is_hub_file, local_folder
from rgtg.models.loading.tensor_parallel import require_divisible
from rgtg.types.scorer import HEAD_FILE, INFO_FILE

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip
# What a language model can do instead of having a reward model of its family.
_OTHER_WAYS = (
    "train a head on the policy's own states (rgtg train --trunk own --head vocab, or state), train a scorer of next "
    "tokens (--objective farma, or autoregressive), or start from a model of another family (--base)"
)


def load_pretrained(auto_class: Any, source: str, role: str, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained`` with safe settings, and errors that say what to do.

    Raises:
        ModelNotFoundError: the folder or hub id cannot be loaded.
        UsageError: a model that cannot be sharded as requested, or of a family that cannot have this role.
    """
    from transformers import AutoConfig

    sharding = kwargs.get("distributed_config")
    if sharding is not None:
        config = load_pretrained(AutoConfig, source, role)
        require_divisible(config, sharding.tp_plan, f"the {role} {source}")
    gguf = find_gguf(source)
    located = (
        nullcontext((require_safe_weights(source), kwargs))
        if gguf is None
        else gguf_arguments(gguf, auto_class, kwargs)
    )
    with located as (folder, kwargs):
        try:
            if hasattr(auto_class, "_model_mapping") and (gguf or (Path(folder) / "config.json").is_file()):
                of_file = {"gguf_file": kwargs["gguf_file"]} if "gguf_file" in kwargs else {}
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **of_file)
                _require_family(auto_class, config, source, role)
            loaded = auto_class.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **kwargs)
        except RgtgError:
            raise
        except Exception as error:  # a damaged checkpoint can lead to any of them
            raise _explain(error, source, role) from error
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if folder != source:  # later files name the repository or the file, not a folder of a cache
        model.name_or_path = source
    if gguf is not None and isinstance(model, torch.nn.Module):
        as_dense(model)
    return loaded


def load_tokenizer(source: str, role: str) -> Any:
    """The tokenizer of a model's folder or hub repository."""
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, source, f"tokenizer of the {role}")


def find_gguf(source: str) -> Path | None:
    """The GGUF file that a name stands for; None if it stands for another kind of model.

    Args:
        source: a GGUF file, a folder whose only weights are one, or a file of a hub repository (owner/name/FILE.gguf).

    Raises:
        ModelNotFoundError: a file of a repository that cannot be reached.
        UsageError: a folder with several GGUF files and no other weights.
    """
    path = Path(source)
    if path.is_dir():
        return None if any(path.glob("*.safetensors")) else _only_gguf(path)
    if path.suffix.lower() != ".gguf" and not is_hub_file(source):
        return None
    return Path(local_folder(source))


def _only_gguf(folder: Path) -> Path | None:
    # projectors of images (mmproj) belong to a model and are not one
    found = sorted(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4]) + (" …" if len(found) > 4 else "")
        raise UsageError(f"{folder} holds {len(found)} GGUF files ({names}): name one of them")
    return found[0] if found else None


def _local_path(source: str) -> Path:
    """A model's folder: the one that is named, or else what the hub gives."""
    return Path(source) if Path(source).is_dir() else Path(local_folder(source))


def is_adapter(source: str) -> bool:
    """Whether a folder or hub repository holds a LoRA adapter, whose base model is elsewhere."""
    return (_local_path(source) / "adapter_config.json").is_file()


def require_safe_weights(source: str) -> str:
    """The local folder of a model, after checking that its files are safe to load.

    Raises:
        ModelNotFoundError: no such folder or repository, or no model in it.
        UsageError: weights in a pickle format, which can run code when loaded; or a head, which is no model.
    """
    path = _local_path(source)
    if path.is_file():
        raise ModelNotFoundError(f"{source} is a file; expected a model folder, a GGUF file or a hub id")
    if (path / HEAD_FILE).is_file():
        if not (path / INFO_FILE).is_file():
            raise UsageError(f"{source} has no {INFO_FILE}: saving the head was interrupted; train it again")
        raise UsageError(
            f"{source} is a head on its policy's own states (rgtg train --trunk own), not a model of its own: use it "
            "as a scorer, with that policy"
        )
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        if files := gguf_names(source):
            name, at, revision = source.partition("@")
            raise ModelNotFoundError(f"{source} holds GGUF files: name one, as in {name}/{files[0]}{at}{revision}")
        raise ModelNotFoundError(f"{source} has no config.json; expected a folder saved by save_pretrained")
    if not any(path.glob("*.safetensors")) and holds_only_pickles(source):
        raise UsageError(
            f"{source} holds pickled weights only, which can run code when loaded; convert them to safetensors"
        )
    for index in path.glob("*.safetensors.index.json"):
        _require_inside(index)
    return str(path)


def _require_inside(index: Path) -> None:
    """Check that an index of weights names only files in its own folder.

    Raises:
        UsageError: a path instead of a file name, or a damaged index.
    """
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        outside = sorted(name for name in names if Path(name).name != name or "\\" in name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{index} is damaged: it does not map weights to files") from error
    if outside:
        raise UsageError(f"{index} names {outside[0]!r}: weights must lie in the model's own folder")


def _require_family(auto_class: Any, config: Any, source: str, role: str) -> None:
    """Check that transformers has a class of this kind for a model's family.

    Args:
        auto_class: ``AutoModelForCausalLM`` or ``AutoModelForSequenceClassification``.
        config: of the model.
        source: its folder or hub id.
        role: of the model, for errors.

    Raises:
        UsageError: it has none, or the model is an encoder-decoder, of which it would load a part.
    """
    is_language_model = auto_class.__name__ == "AutoModelForCausalLM"
    if is_language_model and getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{source} is an encoder-decoder ({config.model_type}): the {role} has to be a causal language model, "
            "which continues its prompt"
        )
    if type(config) in auto_class._model_mapping:
        return
    if is_language_model:
        raise UsageError(
            f"{source} is a {config.model_type} model, which does not continue text: the {role} has to be a causal "
            "language model (AutoModelForCausalLM of transformers)"
        )
    if role == "scorer":
        raise UsageError(
            f"{source} is a {config.model_type} model, a family without a reward model (sequence-classification) class "
            "in transformers: use it by its log-probabilities (--method genarm, "
            f'load_scorer(..., kind="autoregressive")), or {_OTHER_WAYS}'
        )
    raise UsageError(
        f"transformers has no reward model (sequence-classification) class for the family of {source} "
        f"({config.model_type}): {_OTHER_WAYS}"
    )


def _explain(error: Exception, source: str, role: str) -> ModelNotFoundError:
    """One line that says why transformers cannot load a model, and what to do.

    Args:
        error: whatever ``from_pretrained`` raised.
        source: folder, file or hub id.
        role: of the model.
    """
    reason, advice = first_line(error), EXPECTED
    if "ignore_mismatched_sizes" in str(error):  # transformers logs the names, and raises this hint at its setting
        reason = "the sizes of its weights are not those that its config gives"
    elif "trust_remote_code" in str(error) or "contains custom code" in reason:
        reason = "it needs code of its own (auto_map in its config.json), which is never run"
        advice = "Use a model whose family transformers knows."
    elif "does not recognize this architecture" in reason:
        import transformers

        family = reason.partition("`")[2].partition("`")[0]
        reason = f"transformers {transformers.__version__} does not know the family {family}"
        advice = "Update transformers, or use a model of another family."
    elif isinstance(error, ImportError):
        advice = "Install it in this environment."
    elif role.startswith("tokenizer") and isinstance(error, KeyError | ValueError) and (file := _damaged(source)):
        reason, advice = f"{file} is damaged ({type(error).__name__}: {reason})", "Download the model again."
    elif isinstance(error, AttributeError) and "torch" in reason and "dtype" not in reason:
        reason = f"its config names a dtype that torch does not have ({reason})"
    elif missing := _missing_shard(source):
        reason = f"{missing}, which its index of weights names, is missing"
        advice = "Download the model again."
    return ModelNotFoundError(f"cannot load the {role} {source!r}: {reason}. {advice}")


def _damaged(source: str) -> str | None:
    """The first of a tokenizer's files that is no JSON object, or a tokenizer.json without its parts."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
    for path in filter(Path.is_file, (Path(source) / name for name in names)):
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            return path.name
        if not isinstance(content, dict) or (path.name == "tokenizer.json" and "model" not in content):
            return path.name
    return None


def _missing_shard(source: str) -> str | None:
    for index in Path(source).glob("*.safetensors.index.json"):
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return next((name for name in sorted(names) if not (index.parent / name).is_file()), None)
    return None


def resolve_dtype(dtype: "str | torch.dtype | None") -> "torch.dtype | str":
    """A torch dtype from its name; None and ``auto`` mean the dtype of the checkpoint (see `finish_loading`).

    Raises:
        UsageError: an unknown name.
    """
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; choose one of {', '.join(sorted(DTYPES))}")
    return DTYPES[dtype]


def require_dense(model: Any, source: str, role: str) -> None:
    """Check that a model's weights can be changed: trained, or merged with an adapter.

    Raises:
        UsageError: they are quantised.
    """
    method = getattr(model, "quantization_method", None)
    if method is not None:
        raise UsageError(
            f"{source} is quantised ({getattr(method, 'value', method)}), and the {role} has to be trained or merged: "
            "start from the checkpoint that it was made from, or train a head on its states (rgtg train --trunk own "
            "--head vocab, or state)"
        )


def reads_ahead(outputs: Float[Tensor, "texts length *features"]) -> bool:
    """Whether a model's outputs at a position depend on later tokens; False if they are not numbers.

    Args:
        outputs: logits or scores of two texts that differ in their last token only.
    """
    one, other = outputs[:, :-1].float()
    scale = (outputs.float() - outputs.float().mean()).abs().max()
    # rounding differs where a layer mixes the rows, as experts do
    tolerance = 1e-3 if outputs.dtype == torch.float32 else 3e-2
    return bool((one - other).abs().max() > tolerance * scale)


def max_sequence_length(model: Any) -> int | None:
    """Longest sequence that a model reads, in tokens; None if it has no limit.

    Positions of RoBERTa and its relatives (XLM-R, CamemBERT, Longformer, MPNet …) begin after the padding token's id:
    512 of the 514 that their configs name are usable. Their tables of positions say so by a padding index.
    """
    limits = [context_length(model.config)]
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        table: Any = getattr(module, "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        # LXMERT's table has a padding index too, and its positions begin at 0; it has no id of its own for that
        if padding is not None and getattr(module, "padding_idx", None) == padding:
            limits.append(int(table.weight.shape[0]) - int(padding) - 1)
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def context_length(config: Any) -> int | None:
    """Number of positions that a config names; None if it names none. See ``max_sequence_length`` for a model's."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(limit) if limit and limit > 0 else None  # XLNet's −1 is no limit
