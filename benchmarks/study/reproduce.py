"""Measures one row of the committed JSON again, and compares everything except times to the digit."""

import json

from .measure import Models, measure
from .record import slim
from .rows import BY_NAME

SAME = ("settings", "seed", "rewards", "kl", "tokens", "policy_calls", "scorer_calls")


class WithoutProxy(Models):
    """The reward of the full-bt scorer is not compared, so that it need not be trained."""

    def proxy(self, world, done):
        return [0.0] * len(done)


def compare(world, key, output):
    """0 if the row equals the committed one, 1 if not (differences are printed), 2 if there is no such row."""
    path = output / f"study-{world.track}.json"
    record = json.loads(path.read_text())
    cell = next(c for c in record["cells"] if (c["gold"], c["seed"]) == (world.gold_name, world.seed))
    found = [row for row in cell["rows"] if row["key"] == key and row["split"] == "test"]
    if not found:
        known = ", ".join(row["key"] for row in cell["rows"] if row["split"] == "test")
        print(f"{path} has no row {key!r}; choose one of {known}")
        return 2
    committed = found[0]
    part = measure(world, BY_NAME[committed["row"]], committed["value"], world.test, WithoutProxy())
    made = json.loads(json.dumps(slim(part | {"split": "test"}, private=False)))
    different = [name for name in SAME if made[name] != committed[name]]
    if different and made["cpu"] != committed.get("cpu"):
        print(f"measured on another processor: committed {committed.get('cpu', 'not recorded')}, now {made['cpu']}")
    for name in different:
        print(f"{name} differs: committed {str(committed[name])[:200]}, now {str(made[name])[:200]}")
    mean = sum(made["rewards"]) / len(made["rewards"])
    if not different:
        print(f"{key}: {len(made['rewards'])} completions, mean reward {mean:.4f}: the same as committed, to the digit")
    return 1 if different else 0
