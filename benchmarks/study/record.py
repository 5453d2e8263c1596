"""Converts measured rows to the committed JSON, and the committed JSON back to parts."""

import json
from hashlib import sha256

import numpy as np

from rgtg.utils.files import write_text

from .measure import file_of
from .rows import REAL

MEANS = {"tune": ("kl", "kl_cut", "proxy", "rewards", "tokens"), "test": ("kl_cut", "proxy")}


def slim(part, private):
    """A row for the JSON: figures per prompt only where the tables need them, tokens once if all are equal."""
    part = dict(part)
    part.pop("texts", None)
    # values are chosen by these means; figures per prompt are needed for the test prompts only
    tune = part["split"] == "tune"
    for name in MEANS["tune" if tune else "test"]:
        part[name] = round(float(np.mean(part[name])), 4) if part.get(name) else None
    if private or part["split"] != "test":
        part.pop("samples", None)
    if not tune:
        part["kl"], part["rewards"] = ([round(v, 3) for v in part[k]] for k in ("kl", "rewards"))
        part["tokens"] = part["tokens"][0] if len(set(part["tokens"])) == 1 else part["tokens"]
    return part


def spread(row):
    """The inverse of ``slim``: averaged figures become lists of one.

    >>> spread({"split": "test", "rewards": [1, 2], "kl": [3, 4], "kl_cut": 2.5, "proxy": None, "tokens": 64})["tokens"]
    [64, 64]
    """
    part = dict(row)
    for name in MEANS["tune" if part["split"] == "tune" else "test"]:
        if part.get(name) is not None and not isinstance(part[name], list):
            part[name] = [part[name]]
    if not isinstance(part["tokens"], list):
        part["tokens"] = [part["tokens"]] * len(part["rewards"])
    return part


def whole(value):
    """The same numbers, with integral ones as integers: a third smaller for files of counts.

    >>> whole({"a": [1.0, 0.5, "1.0"]})
    {'a': [1, 0.5, '1.0']}
    """
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def named(prompts, private):
    """Prompts, or their hashes if the text must not be published."""
    texts = [p if isinstance(p, str) else json.dumps(p) for p in prompts]
    return [sha256(text.encode()).hexdigest()[:16] for text in texts] if private else prompts


def restored(folder):
    """What ``restore`` wrote about a cell's training."""
    path = folder / "restored.json"
    return json.loads(path.read_text()) if path.exists() else {"training": {}, "fine_tuned": {}}


def restore(work, track, output):
    """Recreate lost parts in WORK from the committed JSON; existing parts are kept.

    The prompts of this run (its setup.json) must be those of the committed study.
    """
    record = json.loads((output / f"study-{track}.json").read_text())
    setup = json.loads((work / track / "setup.json").read_text())
    for split in ("tune", "test"):
        if named(setup[split], track in REAL) != record["prompts"][split]["prompts"]:
            print(f"the {split} prompts of {work / track} are not those of the committed study; nothing was restored")
            return 1
    count = 0
    for cell in record["cells"]:
        folder = work / track / f"{cell['gold']}-s{cell['seed']}"
        write_text(
            folder / "restored.json",
            json.dumps({k: cell[k] for k in ("training", "fine_tuned", "audits", "pairs") if k in cell}) + "\n",
        )
        for row in cell["rows"]:
            path = folder / "rows" / row["split"] / file_of(row["key"])
            if not path.exists():
                count += 1
                write_text(path, json.dumps(spread(row)) + "\n")
    print(f"{count} rows restored")
    return 0
