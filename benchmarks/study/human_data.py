"""Human preferences as chats, in three splits by conversation: for scorers, for the judge, and for prompts.

Every conversation hashes to a number in [0, 1) by its first human turn. Below 0.40 its pairs train scorers and
fine-tuned policies; below 0.85 they train the judge; the rest are prompts for tuning and testing, and pairs for the
audit. Rows with long sides are left out, so that a reply of the length that is generated here can be compared with
them. The rejected summaries of ``summary`` are synthetic: they are the summaries of other posts.
"""

import gzip
import hashlib
import json
import lzma
import random
from pathlib import Path

# The policy's own replies are essays; the annotators' are a sentence or three.
SYSTEM = "Answer in one or two short sentences."
LONGEST = 500  # characters of a reply
LONGEST_PROMPT = 600  # characters of a conversation before the reply
LONGEST_ASKED = 200  # of a conversation that is answered here
LONGEST_JUDGED = 1500  # of conversation and reply; the judge trains on longer rows too
SCORER_PART, JUDGE_PART = 0.40, 0.85
HH_FILES = ("helpful-base", "helpful-online", "helpful-rejection-sampled")
SOURCES = ("dialogue", "instruction", "summary")


def lines(path):
    """JSON rows of a .jsonl, .gz or .xz file."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def part_of(conversation):
    """``scorers``, ``judge`` or ``prompts``: every row of one conversation is on one side."""
    at = int.from_bytes(hashlib.sha256(f"study\0{conversation}".encode()).digest()[:6], "big") / 2**48
    return "scorers" if at < SCORER_PART else "judge" if at < JUDGE_PART else "prompts"


def hh_rows(folder):
    """(turns, chosen, rejected) of HH-RLHF's helpful dialogues, whole."""
    for name in HH_FILES:
        for row in lines(folder / "hh" / f"{name}.test.jsonl.gz"):
            before, chosen = row["chosen"].rsplit("\n\nAssistant:", 1)
            other, rejected = row["rejected"].rsplit("\n\nAssistant:", 1)
            if before == other:
                yield [turn.strip() for turn in split_turns(before)], chosen, rejected


def split_turns(text):
    r"""Turns of a dialogue in turn, the human's first.

    >>> split_turns("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye")
    [' hi', ' hello', ' bye']
    """
    return text.replace("\n\nAssistant:", "\n\nHuman:").split("\n\nHuman:")[1:]


def instruction_rows(folder, per_instruction=4):
    """UltraFeedback, and a few comparisons (by GPT-4-class annotators) of each AlpacaEval instruction."""
    for row in lines(folder / "instructions/ultrafeedback_1200.jsonl.xz"):
        yield [row["prompt"]], row["chosen"], row["rejected"]
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
        yield [asked[one[0]]], first[1], second[1]


def summary_rows(folder, count=2500):
    """Posts with their authors' summaries, and the summaries of other posts as rejected sides."""
    rows = [r for r in lines(folder / "tldr/reddit_tldr.jsonl.xz") if 20 < len(r["summary"]) <= 200 and r["post"]]
    rows = random.Random(0).sample(rows, count)
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        text = " ".join(row["post"].split())[: LONGEST_PROMPT - 20]
        yield [f"Summarise: {text}"], row["summary"], other["summary"]


READERS = {"dialogue": hh_rows, "instruction": instruction_rows, "summary": summary_rows}


def all_rows(folder, source):
    """{part: rows} of a source, each part shuffled once; a row has ``turns``, ``chosen`` and ``rejected``."""
    parts = {"scorers": [], "judge": [], "prompts": []}
    seen = set()
    for turns, chosen, rejected in READERS[source](folder):
        chosen, rejected = chosen.strip(), rejected.strip()
        part, asked = part_of(turns[0]), sum(map(len, turns))
        replies = max(len(chosen), len(rejected))
        fits = asked + replies <= LONGEST_JUDGED if part == "judge" else asked <= LONGEST_PROMPT and replies <= LONGEST
        if not fits or not chosen or not rejected or chosen == rejected or not all(turns):
            continue
        row = {"turns": turns, "chosen": chosen, "rejected": rejected}
        if (key := json.dumps(row)) not in seen:
            seen.add(key)
            parts[part].append(row)
    for rows in parts.values():
        random.Random(0).shuffle(rows)
    return parts


def short_chats(rows):
    """The chats of rows that are short enough to be answered here, each once; in batches of similar length."""
    found = {json.dumps(row["turns"]): row["turns"] for row in rows if sum(map(len, row["turns"])) <= LONGEST_ASKED}
    return [as_chat(turns) for turns in found.values()]


def by_length(chats):
    """Chats from short to long, so that a batch has little padding."""
    return sorted(chats, key=lambda chat: sum(len(m["content"]) for m in chat))


def as_chat(turns):
    """Messages of a conversation, as the policy reads it.

    >>> [m["role"] for m in as_chat(["hi", "hello", "bye"])]
    ['system', 'user', 'assistant', 'user']
    """
    roles = ("user", "assistant")
    return [{"role": "system", "content": SYSTEM}] + [
        {"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]


def as_pair(row):
    """A row in the conversational format of ``rgtg train`` and TRL."""
    sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": as_chat(row["turns"]), **sides}


def as_text(messages):
    r"""A conversation as the judge reads it, up to where the reply begins.

    >>> as_text([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}])
    'Human: hi\n\nAssistant:'
    """
    who = {"user": "Human", "assistant": "Assistant"}
    said = [f"{who[m['role']]}: {m['content']}" for m in messages if m["role"] in who]
    return "\n\n".join([*said, "Assistant:"])


def as_judged(row):
    """A row as plain text, for the judge."""
    sides = {side: f" {row[side]}" for side in ("chosen", "rejected")}
    return {"prompt": as_text(as_chat(row["turns"])), **sides}
