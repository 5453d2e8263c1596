"""A learnable synthetic preference: chosen completions are made of other letters than rejected ones."""

import json
import random


def synthetic_rows(count, seed=0):
    """The chosen completion draws its letters from a–f, the other from g–l; half of the pairs open alike."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        better, worse = ("".join(draw.choices(letters, k=draw.randint(4, 9))) for letters in ("abcdef", "ghijkl"))
        first, second = draw.choice(["so ", "it "]), draw.choice(["so ", "it "])
        prompt = "".join(draw.choices("mnopqrst", k=4)) + f"{'xyz'[i % 3]}? "
        rows.append({"prompt": prompt, "chosen": first + better, "rejected": second + worse})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
