"""Time to start and to resume a large job, and time and memory to check a large file of pairs.

Each measurement runs in its own process and reports seconds and peak resident memory, libraries included. Prompts and
pairs are sentences of made-up words. The tokenizer is a byte-level BPE of 4,096 tokens trained on them. The policy and
its scorer are tiny, because the benchmark measures the work around them.

    python benchmarks/jobs.py [--prompts 100000] [--pairs 1000000] [--work DIR] [--only NAME …]

The last line of stdout is one JSON object.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

NAMES = ("begin", "resume", "check", "check with tokenizer", "tokenise for training")
TRAINED_ON = 20_000  # sentences for training the tokenizer
RECORD = 900  # bytes of a finished row


def words() -> list[str]:
    draw = random.Random(0)
    parts = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return ["".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(5000)]


def sentence(draw: random.Random, vocabulary: list[str], low: int, high: int) -> str:
    return " ".join(draw.choices(vocabulary, k=draw.randint(low, high))) + "."


def write_rows(work: Path, prompts: int, pairs: int) -> None:
    vocabulary, draw = words(), random.Random(1)
    with (work / "prompts.jsonl").open("w") as file:
        for i in range(prompts):
            file.write(json.dumps({"id": f"p{i}", "prompt": sentence(draw, vocabulary, 5, 60)}) + "\n")
    with (work / "pairs.jsonl").open("w") as file:
        for _ in range(pairs):
            sides = (sentence(draw, vocabulary, 20, 80), *(" " + sentence(draw, vocabulary, 10, 60) for _ in "ab"))
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), sides, strict=True))) + "\n")


def write_models(work: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    vocabulary, draw = words(), random.Random(2)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<pad>", "</s>"], show_progress=False)
    raw.train_from_iterator((sentence(draw, vocabulary, 5, 60) for _ in range(TRAINED_ON)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, kind in (("policy", LlamaForCausalLM), ("scorer", LlamaForSequenceClassification)):
        kind(config).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)


class Begun(BaseException):
    """Raised once the first batch is finished: the job has started."""


def begin(work: Path, *, resumed: bool) -> dict[str, float]:
    """Read, check and plan a job, and finish one batch. ``resumed``: half of the rows are finished already."""
    from rgtg.batch.output import JobOutput
    from rgtg.batch.run import run_job
    from rgtg.cli.common import hush_libraries
    from rgtg.config import GenerateSettings
    from rgtg.data.prompts import read_prompt_rows
    from rgtg.decoding.guided_policy import GuidedPolicy

    hush_libraries()
    settings = GenerateSettings(policy="policy", output=work / "out.jsonl", batch_size=8)
    decoding = {"max_new_tokens": 4}
    journal = JobOutput(settings.output).journal
    journal.unlink(missing_ok=True)
    guided = GuidedPolicy.from_pretrained(str(work / "policy"), str(work / "scorer"))

    def once() -> tuple[float, dict]:
        start, state = time.perf_counter(), {}

        def on_progress(now) -> None:
            state.update(before=now.before, rows=now.rows)
            if now.done > now.before:
                raise Begun

        rows = read_prompt_rows(work / "prompts.jsonl")
        state["read"] = time.perf_counter() - start
        try:
            run_job(settings, decoding, rows, guided, progress=on_progress)
        except Begun:
            return time.perf_counter() - start, state
        raise AssertionError("the job ended without a batch")

    seconds, state = once()
    if resumed:
        finish_half(journal, state["rows"])
        seconds, state = once()
        assert state["before"] >= state["rows"] // 2, state
    return {"seconds": seconds, "seconds_reading": state["read"], "rows": state["rows"], "finished": state["before"]}


def finish_half(journal: Path, rows: int) -> None:
    """Append journal lines of realistic size for half of the rows, in random order."""
    record = json.dumps({"version": 1, "text": "x" * RECORD}).encode()
    crc = f"{zlib.crc32(record):08x}".encode()
    order = list(range(rows // 2))
    random.Random(3).shuffle(order)
    with journal.open("ab") as file:
        for index in order:
            file.write(b'{"index":%d,"counts":[0,0,0],"crc":"%s","record":%s}\n' % (index, crc, record))


def check(work: Path, *, tokenizer: bool) -> dict[str, float]:
    """Run the reading of ``rgtg data check``."""
    from rgtg.cli.data import _read
    from rgtg.config import DataCheckSettings

    given = {"tokenizer": str(work / "policy")} if tokenizer else {}
    start = time.perf_counter()
    found = _read(DataCheckSettings(file=str(work / "pairs.jsonl"), **given), None, quiet=False)
    summary = found.summary
    return {"seconds": time.perf_counter() - start, "rows": summary.kept, "mean_prompt": summary.prompt.mean}


def tokenise(work: Path) -> dict[str, float]:
    """Do what ``rgtg train`` does before training: check, tokenize and split, then make the dataset for trl."""
    from types import SimpleNamespace

    from rgtg.config import TrainSettings
    from rgtg.models.loading.pretrained import load_tokenizer
    from rgtg.training.data.dataset import pairs_dataset, read_data

    settings = TrainSettings(base=str(work / "policy"), pairs=str(work / "pairs.jsonl"), output=work / "out")
    tokenizer = load_tokenizer(settings.base, "policy")
    start = time.perf_counter()
    data = read_data(settings, SimpleNamespace(eval_strategy="no"), tokenizer, 1024, show=True)
    read = time.perf_counter() - start
    train, held_out = pairs_dataset(data.train), pairs_dataset(data.held_out)
    rows = len(train) + len(held_out)
    return {"seconds": time.perf_counter() - start, "seconds_reading": read, "rows": rows}


MEASURES = {
    "begin": lambda work: begin(work, resumed=False),
    "resume": lambda work: begin(work, resumed=True),
    "check": lambda work: check(work, tokenizer=False),
    "check with tokenizer": lambda work: check(work, tokenizer=True),
    "tokenise for training": tokenise,
}


def measured(name: str, work: Path) -> dict[str, float]:
    ran = subprocess.run(
        [sys.executable, __file__, "--measure", name, "--work", str(work)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        found = MEASURES[args.measure](args.work)
        found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="rgtg-jobs-") as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        write_rows(work, args.prompts, args.pairs)
        write_models(work)
        size = (work / "pairs.jsonl").stat().st_size
        print(f"{args.prompts:,} prompts, {args.pairs:,} pairs ({size / 1e6:,.0f} MB)")
        print(f"{'':<26}{'rows':>12}{'seconds':>10}{'peak MiB':>10}")
        results = {}
        for name in args.only:
            results[name] = found = measured(name, work)
            print(f"{name:<26}{found['rows']:>12,}{found['seconds']:>10.1f}{found['peak_mib']:>10.0f}", flush=True)
    result = {"prompts": args.prompts, "pairs": args.pairs, "pairs_megabytes": size / 1e6, "results": results}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
