"""Trains every scorer and fine-tuned policy of a cell once; later runs keep finished folders.

All see the same pairs. ``value`` and ``cumulative-mse`` also see the policy's samples that the pairs were made of,
with the rewards that this cell's own full-bt scorer gives them: no gold reward reaches a method.
"""

import json
import shutil
import time
from contextlib import nullcontext

from benchmarks.baselines import tune

from rgtg.config import TrainSettings
from rgtg.config.base import validate
from rgtg.evaluation.audit.prefix_accuracy import audit_prefixes
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.base import load_scorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.training.train import train_scorer
from rgtg.utils.files import write_text

from .rows import FINE, REAL
from .shared_states import shared_states
from .worlds import once, read_rows

# The same epochs for every scorer of one kind; written down before the first run.
SEPARATE = {
    "stories": {"num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 32},
    "human": {"num_train_epochs": 1, "learning_rate": 3e-5, "per_device_train_batch_size": 16, "bf16": True},
    "attributes": {"num_train_epochs": 1, "learning_rate": 3e-5, "per_device_train_batch_size": 16, "bf16": True},
    "demo": {"num_train_epochs": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 16},
}
# Learning rates of adapters. On a real model 3e-3 gave constant scores; 5e-4 is the package's default.
ADAPTERS = {"stories": 3e-3, "human": 5e-4, "attributes": 5e-4, "demo": 3e-3}
AUDITED = 200  # held-out pairs
HEAD = {"trunk": "own", "layer": "final", "width": 256}
SCORERS = {
    "full-bt": {"objective": "full-bt"},
    "prefix-bt": {"objective": "prefix-bt"},
    "state-head": {"objective": "prefix-bt", "head": "state", **HEAD},
    "vocab-head": {"objective": "prefix-bt", "head": "vocab", **HEAD},
    "full-bt-head": {"objective": "full-bt", "head": "state", **HEAD},
    "farma-head": {"objective": "farma", "head": "vocab", **HEAD},
    "value-head": {"objective": "value", "head": "vocab", "rollouts": True, **HEAD},
    "adapter": {"objective": "prefix-bt", "trunk": "shared"},
    "full-bt-adapter": {"objective": "full-bt", "trunk": "shared"},
    "farma": {"objective": "farma"},
    "autoregressive": {"objective": "autoregressive", "train": {"learning_rate": 3e-4}},
    "value": {"objective": "value", "rollouts": True},
    "cumulative-mse": {"objective": "cumulative-mse", "rollouts": True},
    "tcrm": {"objective": "tcrm"},
}
TUNED = {
    "sft": ("sft", {}),
    **{f"{kind} β={b}": (kind, {"beta": b}) for kind, betas in FINE.items() for b in betas},
}
# Of a real model: adapters, merged into the weights that are saved. Small batches have little padding.
ADAPTED = {
    "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_length": 512,
    "lora": 16, "bf16": True,
}  # fmt: skip
LORA = {
    "sft": ADAPTED | {"learning_rate": 2e-4},
    "dpo": ADAPTED | {"learning_rate": 1e-4, "precompute_ref_log_probs": False},
}
TUNED_TRACK = {
    "stories": {},
    "human": LORA,
    "attributes": LORA,
    "demo": {"rloo": {"max_completion_length": 96, "max_steps": 5}, "dpo": {"num_train_epochs": 1}},
}  # fmt: skip


def train(world, name):
    """Folder of a scorer; trains it where there is none. Its facts are in train.json beside it."""
    folder = world.folder / "scorers" / name
    if (folder / "train.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # cut off half-way
    recipe = dict(SCORERS[name])
    own = recipe.get("trunk") == "own"
    rate = {"learning_rate": ADAPTERS[world.track]} if recipe.get("trunk") == "shared" else {}
    values = {
        "base": world.policy, "output": folder, "seed": world.seed, "eval_fraction": 0.05, "on_bad": "skip",
        "train": ({} if own else SEPARATE[world.track]) | rate | recipe.pop("train", {}),
    }  # fmt: skip
    source = {"rollouts": str(rollouts(world))} if recipe.pop("rollouts", False) else {"pairs": str(pairs_file(world))}
    if recipe["objective"] == "cumulative-mse":  # its labels are in [0, 1]: the lowest and the highest reward it sees
        rewards = [row["reward"] for row in read_rows(rollouts(world))]
        recipe["cumulative_mse"] = {"reward_range": (min(rewards), max(rewards))}
    start = time.perf_counter()
    share = shared_states(world.states) if own and world.states else nullcontext()
    with share:
        report = train_scorer(validate(TrainSettings, values | source | recipe))
    facts = report.model_dump(mode="json", exclude={"output", "base", "choices"})
    facts |= {"settings": recipe | {"train": values["train"]}, "wall_seconds": round(time.perf_counter() - start, 1)}
    facts["weights_bytes"] = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    (folder / "train.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
    return folder


def pairs_file(world):
    path = world.folder / "pairs.jsonl"
    once(path, lambda: world.pairs)
    return path


def rollouts(world):
    """The pairs' completions with the rewards of the full-bt scorer; on a real model, of the full-bt head."""
    path = world.folder / "rollouts.jsonl"

    def make():
        if world.track in REAL:
            policy = load_policy(world.policy, dtype=world.dtype, device="cpu")
            scorer = load(world, policy, "full-bt-head")
        else:
            scorer = PrefixScorer.from_pretrained(str(train(world, "full-bt")), dtype="float32", device="cpu")
        text = lambda side: side if isinstance(side, str) else side[0]["content"]  # noqa: E731
        rows = [(p["prompt"], text(p[side])) for p in world.pairs for side in ("chosen", "rejected")]
        rewards = scorer.score([p for p, _ in rows], [t for _, t in rows], batch_size=64)
        return [
            {"prompt": p, "text": t, "reward": r, "finish_reason": "stop"}
            for (p, t), r in zip(rows, rewards, strict=True)
        ]

    once(path, make)
    return path


def fine_tune(world, name):
    """Folder of a fine-tuned policy, with baseline.json in it."""
    folder = world.folder / "tuned" / name.replace(" β=", "-")
    if (folder / "baseline.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    kind, settings = TUNED[name]
    scorer = train(world, "full-bt") if kind == "rloo" else None
    settings = TUNED_TRACK[world.track].get(kind, {}) | settings
    tune(kind, world.original, world.pairs, folder, seed=world.seed, scorer=scorer, **settings)
    return folder


def audit(world, policy, name):
    """Accuracy of a scorer by position on held-out pairs, as ``rgtg audit`` gives it; written once."""
    path = world.folder / "audits" / f"{name}.json"
    if not path.exists():
        # an adapter alone, merged into its base: one that is joined to the policy scores candidates only
        adapter = SCORERS[name].get("trunk") == "shared"
        scorer = load_scorer(str(train(world, name)), device="cpu") if adapter else load(world, policy, name)
        pairs = world.folder / "held-out.jsonl"
        once(pairs, lambda: world.held_out[:AUDITED])
        result = audit_prefixes(scorer, pairs, batch_size=16)
        kept = {"pairs", "by_fraction", "full_accuracy", "length_correlation", "verdict"}
        write_text(path, json.dumps(result.model_dump(mode="json", include=kept)) + "\n")
    return json.loads(path.read_text())


def load(world, policy, name):
    """A scorer beside a loaded policy."""
    dtype = "float32" if world.dtype == "float32" else None
    return load_scorer(str(train(world, name)), policy=policy, dtype=dtype, device="cpu", join=True)
