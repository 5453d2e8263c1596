"""Write a finished scorer: its weights and tokenizer, a model card, and rgtg.json last."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rgtg.errors import OutputError
from rgtg.models.checkpoint import INFO_FILE, ScorerInfo, write_info
from rgtg.models.heads import Head, save_head

_CARD = """---
library_name: {library}
pipeline_tag: text-classification
base_model: {base}
tags: [reward-model, rgtg, {objective}]
---

# {name}

{intro}

| | |
|---|---|
| objective | `{objective}`: {formula} |
| pairs | {pairs} for training, {eval_pairs} held out |
| data fingerprint | `{data}` |
| base fingerprint | `{base_fingerprint}` |
| tokenizer hash | `{tokenizer}` |
| finished completions end with EOS | {append_eos} |

## Evaluation on held-out pairs

{figures}

Accuracy at p % is the share of pairs whose chosen completion scores higher after ⌈p/100 · T⌉ tokens, T being the longer
completion's length; ties count half, and pairs whose prefixes are still identical there are left out.

## Use

{use}

## Settings

```json
{settings}
```
"""

_INTRO = "A reward model that scores {what}, trained by rgtg {version} from `{base}`."
_HEADS = {
    "state": "r(y_{1:i}) = Q(h_i): it reads the state at the last token of the prefix it scores",
    "vocab": "r(y_{1:i}) = Q(h_{i-1})[y_i]: it reads the state before a token and scores every next token at once",
}
_HEAD_INTRO = """A small head on the frozen hidden states of `{base}` (layer {layer}) that scores {what}, trained by
rgtg {version}: {reads}. It means nothing to any other model."""

_USE = """```python
import rgtg
scorer = rgtg.PrefixScorer.from_pretrained("{folder}")
scorer.score(["a prompt"], ["a completion"])
```

"""

_HEAD_USE = """```python
from rgtg.models.scorer import load_scorer
scorer = load_scorer("{folder}")  # loads its policy too; policy=... shares one that is loaded
scorer.score(["a prompt"], ["a completion"])
```"""

_STOCK = """It is a stock sequence-classification model, so plain transformers reads it too:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

_ADAPTER = """It is a LoRA adapter of the base model; with plain transformers and peft:

```python
from peft import AutoPeftModelForSequenceClassification
model = AutoPeftModelForSequenceClassification.from_pretrained("{folder}", num_labels=1)
```"""

_OBJECTIVES = {
    "prefix-bt": ("completions and their prefixes", "mean over prefixes of −log σ(r(x, y^w_{1:i}) − r(x, y^l_{1:i}))"),
    "full-bt": ("finished completions", "−log σ(r(x, y^w) − r(x, y^l))"),
}


def save_scorer(
    folder: Path, model: Any, tokenizer: Any, info: ScorerInfo, card: str, *, settings: dict[str, Any] | None = None
) -> None:
    """Save a model of the scorer's own, whole or not at all.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    # The row a padding token may have added to the embedding is never read: an adapter need not carry it.
    extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with _staged(folder) as stage:
        model.save_pretrained(stage, **extra)
        _write_rest(stage, tokenizer, info, card, settings)


def save_own_state(
    folder: Path, head: Head, tokenizer: Any, info: ScorerInfo, card: str, *, settings: dict[str, Any]
) -> None:
    """Save a head on the policy's own states, whole or not at all.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    with _staged(folder) as stage:
        save_head(stage, head)
        _write_rest(stage, tokenizer, info, card, settings)


def _write_rest(stage: Path, tokenizer: Any, info: ScorerInfo, card: str, settings: dict[str, Any] | None) -> None:
    tokenizer.save_pretrained(stage)
    (stage / "README.md").write_text(card, encoding="utf-8")
    if settings is not None:
        (stage / "settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
    write_info(stage, info)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a folder inside ``folder``; what is in it afterwards moves out, rgtg.json last.

    Raises:
        OutputError: something cannot be written; nothing half-written is left.
    """
    stage: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=".unfinished-"))
        yield stage
        for path in sorted(stage.iterdir(), key=lambda path: path.name == INFO_FILE):
            path.chmod(0o644)  # safetensors leaves weights to their owner alone
            path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write the scorer to {folder}: {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def model_card(
    folder: Path, info: ScorerInfo, settings: dict[str, Any], figures: dict[str, float], pairs: tuple[int, int]
) -> str:
    """The README of a scorer: what it was trained on and for, how good it is, how to load it."""
    what, formula = _OBJECTIVES[info.objective]
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    base = Path(info.base_model).name if Path(info.base_model).is_dir() else info.base_model
    intro, use = _INTRO, _USE + (_ADAPTER if settings.get("lora") else _STOCK)
    if info.trunk == "own":
        intro, use = _HEAD_INTRO, _HEAD_USE
    return _CARD.format(
        library="rgtg" if info.trunk == "own" else "transformers", base=base, objective=info.objective,
        name=folder.name, formula=formula, use=use.format(folder=folder.name),
        intro=intro.format(
            what=what, version=info.rgtg_version, base=base, layer=info.layer, reads=_HEADS.get(info.head)
        ),
        pairs=pairs[0], eval_pairs=pairs[1], data=info.data_fingerprint, base_fingerprint=info.base_fingerprint,
        tokenizer=info.tokenizer_hash, append_eos="yes" if info.append_eos else "no",
        figures=f"| figure | value |\n|---|---|\n{rows}" if rows else "None: no pairs were held out.",
        settings=json.dumps(settings, indent=2, default=str),
    )  # fmt: skip
