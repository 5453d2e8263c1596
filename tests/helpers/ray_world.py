"""Ray on loopback only; tiny models in folders, and prompts for them."""

import json
import random
from pathlib import Path

from helpers.naive import info
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.integrations.ray_cluster import _set_environment
from rgtg.models.loading.scorer_info import write_info

_set_environment(local=True)  # before any test imports Ray


def save_models(folder: Path) -> Path:
    """``policy`` and ``scorer`` in a folder."""
    tiny_policy().save_pretrained(folder / "policy")
    tiny_reward_model().save_pretrained(folder / "scorer")
    write_info(folder / "scorer", info())
    for name in ("policy", "scorer"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def write_prompts(path, rows):
    """A file of so many prompts of many lengths, and a last row that is none."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdef ghij", k=draw.randint(2, 40))) + "." for _ in range(rows)]
    lines = [json.dumps({"prompt": text, "id": f"p{i}"}) for i, text in enumerate(texts)]
    path.write_text("".join(f"{line}\n" for line in [*lines, '{"prompt": ""}']))
