"""Seconds for the states of heads on human pairs: shared prompts read once, compared with both sides read whole.

    python benchmarks/train.py --states --base SMOLLM --pairs helpful-base.test.jsonl.gz [--count 2000]
        [--dtype float32] [--output FILE]

HH dialogues are read as chats with the base's template, whose own system message all prompts share; it is read once for
all. "whole" reads each completion with its prompt in a row of its
own, in batches of the same number of tokens; "whole-8192" does so in batches of 8,192 tokens, as rgtg did before it
packed rows. They alternate on slices of the pairs. Times are CPU seconds of the process, so
that other work on the machine matters less. A few pairs are read in fp32 too, and compared with rows that are read
alone: the largest difference, as a share of the largest state, is rounding if it is that of rows read whole in batches.

The last line of stdout is one JSON object; ``--output`` writes it to a file.
"""

import argparse
import gzip
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch

from rgtg.data.pairs import read_pairs, tokenize_pairs
from rgtg.models.loading.policy import load_policy
from rgtg.models.ops.tree_attention import shared_length
from rgtg.training.data import state_cache

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def as_chat(text: str) -> list[dict[str, str]]:
    """The messages of a dialogue in HH's format."""
    parts = _TURN.split(text)[1:]
    return [{"role": _ROLES[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def read_chats(path: str, tokenizer, max_length: int, count: int):
    """Pairs of a file of dialogues, evenly spaced in it, as token ids of chats."""
    with gzip.open(path, "rt", encoding="utf-8") as lines, tempfile.TemporaryDirectory() as folder:
        rows = [json.loads(line) for line in lines]
        file = Path(folder) / "chats.jsonl"
        file.write_text(
            "".join(json.dumps({side: as_chat(row[side]) for side in ("chosen", "rejected")}) + "\n" for row in rows)
        )
        rejects = Path(folder) / "rejects.jsonl"
        read = read_pairs(file, tokenizer=tokenizer, max_length=max_length, on_bad="skip", rejects=rejects)
    pairs = tokenize_pairs(read.pairs, tokenizer)
    count = min(count, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]


def run(model, pairs, layer: int, how: str):
    """States of pairs and the CPU seconds they took."""
    before = state_cache.reads_packed_rows, state_cache.reads_shared_prefix, state_cache.CPU_TOKENS
    if how != "packed":
        state_cache.reads_packed_rows = state_cache.reads_shared_prefix = lambda _model: False
    state_cache.CPU_TOKENS = {"whole-8192": 8192, "alone": 1}.get(how, before[2])
    try:
        start = time.process_time()
        cache = state_cache.cache_states(model, pairs, [layer], "vocab")
        return cache.states[layer], time.process_time() - start
    finally:
        state_cache.reads_packed_rows, state_cache.reads_shared_prefix, state_cache.CPU_TOKENS = before


def summarise(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Total seconds of each way, and how many times as fast ``base`` is: medians of paired ratios."""
    return {
        "seconds": {way: sum(found) for way, found in seconds.items()},
        "speedup": {
            way: statistics.median(w / b for w, b in zip(found, seconds[base], strict=True))
            for way, found in seconds.items()
            if way != base
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--slices", type=int, default=10, help="each is evenly spaced in the pairs")
    parser.add_argument("--measured", type=int, help="measure this many slices only; default: all")
    parser.add_argument("--compared", type=int, default=4, help="pairs whose states are compared in fp32")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the timed passes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)

    policy = load_policy(args.base, dtype=args.dtype, device="cpu")
    model, layer = policy.model, policy.model.config.num_hidden_layers
    pairs = read_chats(args.pairs, policy.tokenizer, args.max_length, args.count)
    whole = sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    packed = whole - sum(len(pair.prompt_ids) for pair in pairs)
    shared = shared_length([pair.prompt_ids for pair in pairs])
    once = packed - shared * (len(pairs) - 1)
    print(f"{len(pairs)} pairs, {whole} tokens with both sides whole, {packed} with each prompt once, {once} with the "
          f"{shared} tokens once with which all begin", flush=True)  # fmt: skip
    run(model, pairs[:2], layer, "packed")  # the load-time check, and caches of the libraries

    seconds = {"packed": [], "whole": [], "whole-8192": []}
    for i in range(args.measured or args.slices):
        for way in ("packed", "whole", "whole-8192")[:: 1 if i % 2 else -1]:
            seconds[way].append(run(model, pairs[i :: args.slices], layer, way)[1])
        print(i, {way: round(found[-1], 1) for way, found in seconds.items()}, flush=True)

    exact = load_policy(args.base, dtype="float32", device="cpu").model
    few = sorted(pairs, key=lambda pair: len(pair.prompt_ids))[: args.compared]
    states = {way: run(exact, few, layer, way)[0] for way in ("packed", "whole", "alone")}
    largest = float(states["alone"].abs().max())
    result = {
        "command": "python benchmarks/train.py --states --base SMOLLM "
        f"--pairs {Path(args.pairs).name} --count {args.count} --slices {args.slices}"
        + (f" --measured {args.measured}" if args.measured else "")
        + (f" --dtype {args.dtype}" if args.dtype != "bfloat16" else ""),
        "pairs": len(pairs), "slices": args.slices, "measured": args.measured or args.slices,
        "tokens": {"whole": whole, "each-prompt-once": packed, "packed": once},
        **summarise(seconds, "packed"),
        "fp32": {
            "pairs": len(few), "largest_state": largest,
            "difference": {
                way: float((states[way] - states["alone"]).abs().max()) / largest for way in ("packed", "whole")
            },
        },
        "dtype": args.dtype, "device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
