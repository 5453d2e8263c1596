"""Track B's data: human and synthetic pairs in three splits by prompt, and the texts that the small policy reads.

Every prompt hashes to a number in [0, 1). Below 0.45 its pairs train scorers, fine-tuned baselines and the policy;
below 0.90 they train the judge; the rest are prompts for tuning and testing. Dialogues keep only their last human turn,
and rows with long sides are left out, so that they fit a small context. The rejected summaries of ``tldr`` are
synthetic: they are summaries of other posts.
"""

import gzip
import hashlib
import json
import lzma
import random
from pathlib import Path

LONGEST = 500  # characters of a completion
LONGEST_READ = 1000  # of a reply that only the policy reads
LONGEST_PROMPT = 400  # characters of a turn or instruction
SCORER_PART, JUDGE_PART = 0.45, 0.90
HH_FILES = ("helpful-base", "helpful-online", "helpful-rejection-sampled")


def lines(path):
    """JSON rows of a .jsonl, .gz or .xz file."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def place(key):
    """A number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(f"study\0{key}".encode()).digest()[:6], "big") / 2**48


def part_of(prompt):
    """``scorers``, ``judge`` or ``prompts``: every row of one prompt is on one side."""
    at = place(prompt)
    return "scorers" if at < SCORER_PART else "judge" if at < JUDGE_PART else "prompts"


def as_dialogue(turn):
    return f"\n\nHuman: {turn.strip()}\n\nAssistant:"


def hh_pairs(folder):
    for name in HH_FILES:
        for row in lines(folder / "hh" / f"{name}.test.jsonl.gz"):
            before, chosen = row["chosen"].rsplit("\n\nAssistant:", 1)
            rejected = row["rejected"].rsplit("\n\nAssistant:", 1)[1]
            turn = before.rsplit("\n\nHuman:", 1)[-1]
            if "\n\nAssistant:" not in turn:
                yield "dialogue", turn, chosen, rejected


def instruction_pairs(folder, per_instruction=4):
    """UltraFeedback, and a few comparisons (by GPT-4-class annotators) of each AlpacaEval instruction."""
    for row in lines(folder / "instructions/ultrafeedback_1200.jsonl.xz"):
        yield "instruction", row["prompt"], row["chosen"], row["rejected"]
    asked = {r["instruction_id"]: r["instruction"] for r in lines(folder / "instructions/instructions.jsonl.xz")}
    outputs = {
        r["output_id"]: (r["instruction_id"], r["output"])
        for r in lines(folder / "instructions/outputs.jsonl.xz")
        if len(r["output"]) <= LONGEST
    }
    used = {}
    for row in lines(folder / "instructions/comparisons.jsonl.xz"):
        one, two = outputs.get(row["output_1"]), outputs.get(row["output_2"])
        if not one or not two or used.get(one[0], 0) >= per_instruction or 1.4 < row["preference"] < 1.6:
            continue
        used[one[0]] = used.get(one[0], 0) + 1
        first, second = (one, two) if row["preference"] < 1.5 else (two, one)
        yield "instruction", asked[one[0]], first[1], second[1]


def summary_pairs(folder, count=2500):
    rows = [r for r in lines(folder / "tldr/reddit_tldr.jsonl.xz") if 20 < len(r["summary"]) <= 200 and r["post"]]
    rows = random.Random(0).sample(rows, count)
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        text = " ".join(row["post"].split())[: LONGEST_PROMPT - 20]
        yield "summary", f"Summarise: {text}", row["summary"], other["summary"]


def all_pairs(folder):
    """{part: [{prompt, chosen, rejected, source}]}, each part shuffled once."""
    parts = {"scorers": [], "judge": [], "prompts": []}
    seen = set()
    for reader in (hh_pairs, instruction_pairs, summary_pairs):
        for source, turn, chosen, rejected in reader(folder):
            chosen, rejected = chosen.strip(), rejected.strip()
            long = max(len(chosen), len(rejected)) > LONGEST or len(turn) > LONGEST_PROMPT
            if long or not chosen or not rejected or chosen == rejected or not turn.strip():
                continue
            prompt = as_dialogue(turn)
            row = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}", "source": source}
            if (key := json.dumps(row)) not in seen:
                seen.add(key)
                parts[part_of(prompt)].append(row)
    for rows in parts.values():
        random.Random(0).shuffle(rows)
    return parts


def policy_texts(folder, parts, dialogues=4000, novels=1_000_000):
    """Texts in dialogue form that the policy reads: the scorers' half of the pairs, and text beside the pairs."""
    texts = [row["prompt"] + row[side] for row in parts["scorers"] for side in ("chosen", "rejected")]
    asked = {r["instruction_id"]: r["instruction"] for r in lines(folder / "instructions/instructions.jsonl.xz")}
    for row in lines(folder / "instructions/outputs.jsonl.xz"):
        prompt = as_dialogue(asked[row["instruction_id"]])
        if len(row["output"]) <= LONGEST_READ and part_of(prompt) == "scorers":
            texts.append(f"{prompt} {row['output'].strip()}")
    for row in lines(folder / "tldr/reddit_tldr.jsonl.xz"):
        text = " ".join(row["post"].split())[: LONGEST_PROMPT - 20]
        prompt = as_dialogue(f"Summarise: {text}")
        if len(row["summary"]) <= 200 and part_of(prompt) == "scorers":
            texts.append(f"{prompt} {row['summary'].strip()}")
    who = {"USER": "Human", "SYSTEM": "Assistant"}
    for index, row in enumerate(lines(folder / "text/sgd_dialogues.jsonl.xz")):
        if index >= dialogues:
            break
        texts.append("".join(f"\n\n{who[name]}: {said}" for name, said in row["turns"]))
    taken = 0
    for row in lines(folder / "text/litbank_novels.jsonl.xz"):
        if taken > novels:
            break
        text = row.get("text") or ""
        texts.append(text[:20_000])
        taken += len(texts[-1])
    random.Random(0).shuffle(texts)
    return texts
