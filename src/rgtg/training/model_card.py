"""The README of a scorer: what it was trained on and for, how good it is, how to load it."""

import json
from pathlib import Path
from typing import Any

from rgtg.models.loading.scorer_info import ScorerInfo

_CARD = """---
library_name: {library}
pipeline_tag: {task}
base_model: {base}
tags: [reward-model, rgtg, {objective}]
---

# {name}

{intro}

| | |
|---|---|
| objective | `{objective}`: {formula} |
| {kind} | {count} for training, {held_out} held out |
| data fingerprint | `{data}` |
| base fingerprint | `{base_fingerprint}` |
| tokenizer hash | `{tokenizer}` |
| finished completions end with EOS | {append_eos} |

## Evaluation on held-out {kind}

{figures}

{legend}

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
scorer = rgtg.load_scorer("{folder}")
scorer.score(["a prompt"], ["a completion"])
```

"""

_HEAD_USE = """```python
import rgtg
scorer = rgtg.load_scorer("{folder}")  # loads its policy too; policy=... shares one that is loaded
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

_NEXT_TOKENS = """```python
import rgtg
scorer = rgtg.load_scorer("{folder}")
scorer.score(["a prompt"], ["a completion"])
```

Its weights are a causal language model's, so plain transformers reads them too (an adapter with peft's
`AutoPeftModelForCausalLM`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

It is no model to generate with: {reads}."""
_READS = {
    "farma": "its logits are values, Q(h)[v] is what the text is worth once v is appended",
    "autoregressive": "a text's score is its log-probability, and what it likes is what people prefer",
}

_OBJECTIVES = {
    "prefix-bt": ("completions and their prefixes", "mean over prefixes of −log σ(r(x, y^w_{1:i}) − r(x, y^l_{1:i}))"),
    "full-bt": ("finished completions", "−log σ(r(x, y^w) − r(x, y^l))"),
    "farma": (
        "every next token at once",
        "−log σ(V(y^w) − V(y^l)), alternating with ½(V(y^w_{1:i}) − max_v V(y^w_{1:i}⊕v))² over prefixes",
    ),
    "autoregressive": ("every next token at once", "−log σ(β_r [log π_r(y^w) − log π_r(y^l)])"),
    "value": ("completions and their prefixes by expected reward", "(V(y_{1:i}) − target)², mean over prefixes"),
    "cumulative-mse": ("completions and their prefixes from 0 to 1", "Σ i (r(y_{1:i}) − label)² / Σ i"),
    "tcrm": (
        "completions and their prefixes",
        "−log σ(r(y^w) − r(y^l)) plus (r(y_{1:i}) − r(y))² and (r(y_{1:i}) − r(y_{1:i+1}))², weighted",
    ),
}
_PAIR_FIGURES = """Accuracy at p % is the share of pairs whose chosen completion scores higher after ⌈p/100 · T⌉ tokens,
T being the longer completion's length; ties count half, and pairs whose prefixes are still identical there are left
out."""
_ROLLOUT_FIGURES = """mse_p is the mean squared difference between the score after ⌈p/100 · T⌉ of a completion's T
tokens and its reward (scaled to [0, 1] for cumulative-mse); explained_p is the share of the rewards' variance that the
score explains there."""


def model_card(
    folder: Path, info: ScorerInfo, settings: dict[str, Any], figures: dict[str, float], counts: dict[str, int]
) -> str:
    """The README of a scorer: what it was trained on and for, how good it is, how to load it."""
    what, formula = _OBJECTIVES[info.objective]
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    base = Path(info.base_model).name if Path(info.base_model).is_dir() else info.base_model
    intro, use = _INTRO, _USE + (_ADAPTER if settings.get("lora") else _STOCK)
    if info.trunk == "own":
        intro, use = _HEAD_INTRO, _HEAD_USE
    elif info.head == "vocab":
        use = _NEXT_TOKENS.replace("{reads}", _READS[info.objective])
    kind = "rollouts" if counts["rollouts"] else "pairs"
    next_tokens = info.trunk == "separate" and info.head == "vocab"
    return _CARD.format(
        library="rgtg" if info.trunk == "own" else "transformers",
        task="text-generation" if next_tokens else "text-classification",
        base=base, objective=info.objective, name=folder.name, formula=formula, use=use.format(folder=folder.name),
        intro=intro.format(
            what=what, version=info.rgtg_version, base=base, layer=info.layer, reads=_HEADS.get(info.head)
        ),
        kind=kind, count=counts[kind], held_out=counts[f"eval_{kind}"], data=info.data_fingerprint,
        legend=_ROLLOUT_FIGURES if kind == "rollouts" else _PAIR_FIGURES, base_fingerprint=info.base_fingerprint,
        tokenizer=info.tokenizer_hash, append_eos="yes" if info.append_eos else "no",
        figures=f"| figure | value |\n|---|---|\n{rows}" if rows else f"None: no {kind} were held out.",
        settings=json.dumps(settings, indent=2, default=str),
    )  # fmt: skip
