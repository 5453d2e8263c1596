"""What a server makes of its models: throughput and latency by concurrency, its cost over the engine, long prompts.

    python benchmarks/serve.py [--parts concurrency overhead prefill first] [--dtype bf16] [--repeats 5] [--output FILE]

Policy and scorer are Llama-shaped (12 layers × 768, 32k vocabulary) with random weights, saved to a folder and served
as ``rgtg serve`` does it, in a process of its own; clients speak HTTP from this one, over loopback. Prompts are random
tokens, new ones every time, so that nothing has been read before; no token ends a completion, so that all are equally
long. Requests are guided (pargs, k = 10) unless --unguided. What HTTP costs over the engine is measured on one engine,
by turns: two processes differ by several percent in speed though they do the same. The part ``first`` starts servers of
its own, with and without warm-up, and asks each the same ten times as soon as it is ready. The last line is one JSON
object.
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from decode import DTYPES, build, ratio, table
from rgtg.serving import server as serving
from rgtg.serving.engine.request import TokenEvent
from rgtg.serving.settings import ServeSettings

SHORT, LONG = 16, 1000  # tokens of prompts in the part on prefilling


def tokenizer(vocab):
    """A word for every token, so that text has to be made of them."""
    words = {f"▁w{i}": i for i in range(vocab)}
    raw = Tokenizer(models.WordLevel(words, unk_token="▁w0"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False)


def save(args, folder):
    """Policy and scorer as people have them: folders."""
    for name, head, seed in (("policy", LlamaForCausalLM, 0), ("scorer", LlamaForSequenceClassification, 1)):
        model = build(args, args.dtype, head, seed)
        model.config.eos_token_id = model.config.bos_token_id = None
        if model.can_generate():
            model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
        model.save_pretrained(folder / name)
        tokenizer(args.vocab).save_pretrained(folder / name)


def serve_here(args, folder):
    """What ``rgtg serve`` does, in this process; a prompt on stdin is completed by its engine alone, and timed."""
    if args.cold:
        serving.warm_up = lambda engine, settings: None
    engines, load = [], serving.load_engine
    serving.load_engine = lambda settings: engines.append(load(settings)) or engines[0]

    def alone():
        for line in sys.stdin:
            print(json.dumps({"seconds": by_engine(args, engines[0], json.loads(line))}), flush=True)

    def ready(url, _):
        print(json.dumps({"url": url}), flush=True)
        threading.Thread(target=alone, daemon=True).start()

    settings = ServeSettings(
        policy=str(folder / "policy"), scorer={"scorer": str(folder / "scorer")}, device=args.device, port=0,
        max_batch=args.max_batch, max_queue=256,
    )  # fmt: skip
    serving.serve(settings, ready)


def by_engine(args, engine, prompt):
    """Seconds of one completion without HTTP, text and JSON."""
    method, scorers = ("policy", ()) if args.unguided else ("pargs", ("scorer",))
    settings = {"top_k": args.top_k, "max_new_tokens": args.tokens}
    requests = engine.models.guided(method, scorers).make_requests([prompt], [""], [None], [0], settings)
    ended = threading.Event()
    start = time.perf_counter()
    engine.submit([requests], lambda event: None if isinstance(event, TokenEvent) else ended.set())
    ended.wait()
    return time.perf_counter() - start


class Server:
    """``serve_here`` in a process of its own."""

    def __init__(self, folder, *more):
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, *sys.argv, *more, "--inside", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.url = json.loads(self.process.stdout.readline())["url"]
        self.host, self.port = self.url.removeprefix("http://").split(":")

    def alone(self, prompt):
        """Seconds that its engine takes alone."""
        self.process.stdin.write(json.dumps(prompt) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["seconds"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)


class Answer:
    """Times of one request: when it was sent, and when each event with text came."""

    def __init__(self, start, times):
        self.start, self.times = start, times
        self.first, self.seconds = times[0] - start, times[-1] - start


async def ask(server, args, prompt, tokens, *, stream=True):
    """One request over a connection of its own; raw, so that the client costs next to nothing."""
    model = "policy" if args.unguided else "policy+scorer"
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": stream, "guidance": {"top_k": args.top_k}}
    data = json.dumps(body).encode()
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    reader, writer = await asyncio.open_connection(server.host, int(server.port), limit=2**24)
    start = time.perf_counter()
    writer.write("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
    times, told = [], b""
    while line := await reader.readline():
        if line.startswith(b"{") or (line.startswith(b"data: ") and b'"finish_reason":null' in line):
            times.append(time.perf_counter())
        told = line if line.startswith((b"data: ", b"{", b"HTTP")) else told
    writer.close()
    if not times or (stream and told != b"data: [DONE]\n"):
        raise SystemExit(f"the server answered: {told.decode()}")
    return Answer(start, times)


def prompts(args, length):
    """Random prompts without end, no two alike."""
    draw = random.Random(length)
    while True:
        yield [draw.randrange(3, args.vocab) for _ in range(length)]


def percentiles(values):
    """Milliseconds that so many in a hundred do not exceed."""
    ordered = sorted(values)
    return {f"p{p}": round(1e3 * ordered[math.ceil(len(ordered) * p / 100) - 1], 1) for p in (50, 95, 99)}


def show(title, rows):
    """A table with the three percentiles of a figure in one cell."""
    flat = {
        name: {
            f"{key}: 50/95/99 %" if isinstance(value, dict) else key: " / ".join(map(str, value.values()))
            if isinstance(value, dict) else value
            for key, value in row.items()
        }
        for name, row in rows.items()
    }  # fmt: skip
    table(title, flat)


def by_concurrency(args, server):
    """Clients that ask again as soon as they are answered: tokens per second, and how long they wait."""
    rows, source = {}, prompts(args, args.prompt)

    async def client(answers, requests):
        for _ in range(requests):
            answers.append(await ask(server, args, next(source), args.tokens))

    async def crowd(clients, requests):
        answers = []
        start = time.perf_counter()
        await asyncio.gather(*(client(answers, requests) for _ in range(clients)))
        return answers, time.perf_counter() - start

    asyncio.run(crowd(2, 1))  # warms up
    for clients in args.concurrency:
        answers, seconds = asyncio.run(crowd(clients, args.requests))
        gaps = [b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
        rows[str(clients)] = {
            "tokens per second": round(len(answers) * args.tokens / seconds, 1),
            "latency ms": percentiles([answer.seconds for answer in answers]),
            "first token ms": percentiles([answer.first for answer in answers]),
            "between tokens ms": percentiles(gaps),
        }
        print(f"  {clients} clients done", file=sys.stderr, flush=True)
    one = rows[str(args.concurrency[0])]["tokens per second"]
    for row in rows.values():
        row["× one client"] = round(row["tokens per second"] / one, 2)
    show(f"by clients: prompt {args.prompt}, {args.tokens} tokens", rows)
    return rows


def overhead(args, server):
    """One client: what HTTP, text and JSON cost over the engine alone, in turn, repeat after repeat."""
    source = prompts(args, args.prompt)

    def over_http(stream):
        return asyncio.run(ask(server, args, next(source), args.tokens, stream=stream)).seconds

    ways = {"engine alone": lambda: server.alone(next(source)), "streamed": lambda: over_http(True)}
    ways |= {"at once": lambda: over_http(False)}
    seconds = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):
        for name, run in ways.items():
            took = run()
            if repeat:  # the first round warms up
                seconds[name].append(took)
    rows = {
        name: {
            "ms per request": round(1e3 * statistics.median(took), 1),
            "tokens per second": round(args.tokens / statistics.median(took), 1),
            "over the engine": f"{100 * (ratio(took, seconds['engine alone']) - 1):.1f} %",
            "× engine": ratio(took, seconds["engine alone"]),
        }
        for name, took in seconds.items()
    }
    show(f"one client: prompt {args.prompt}, {args.tokens} tokens", rows)
    return rows


def prefill(args, server):
    """First token of a short request: nothing else runs, or a long prompt is being read."""
    short, long = prompts(args, SHORT), prompts(args, LONG)
    idle, beside, whole = [], [], []

    async def beside_a_long_one():
        begun = asyncio.create_task(ask(server, args, next(long), 1))
        await asyncio.sleep(args.delay)
        answer = await ask(server, args, next(short), 2)
        other = await begun
        if other.times[0] < answer.times[0]:
            raise SystemExit("the long prompt was read before the short request came: give a smaller --delay")
        return answer.first, other.first

    for repeat in range(args.repeats + 1):
        quiet = asyncio.run(ask(server, args, next(short), 2)).first
        busy, read = asyncio.run(beside_a_long_one())
        if repeat:
            idle.append(quiet)
            beside.append(busy)
            whole.append(read)
    rows = {
        "idle": {"first token ms": percentiles(idle), "× idle": 1.0},
        f"beside {LONG} tokens": {"first token ms": percentiles(beside), "× idle": ratio(beside, idle)},
        f"the {LONG} tokens": {"first token ms": percentiles(whole), "× idle": ratio(whole, idle)},
    }
    show(f"first token of a short request ({SHORT} tokens)", rows)
    return rows


def first_requests(args, _):
    """The first ten requests of fresh servers, one after the other: how long the first waits over the tenth."""
    source = prompts(args, SHORT)
    rows = {}
    for how, more in {"warmed up": (), "without": ("--cold",)}.items():
        for kind, unguided in {"guided": False, "unguided": True}.items():
            asked = argparse.Namespace(**vars(args) | {"unguided": unguided})
            took = []
            for _ in range(args.repeats):
                with Server(args.folder, *more) as server:
                    took.append([asyncio.run(ask(server, asked, next(source), args.tokens)) for _ in range(10)])
            times = [[answer.seconds for answer in answers] for answers in took]
            firsts, tenths = [each[0] for each in times], [statistics.median(each[5:]) for each in times]
            rows[f"{kind}, {how}"] = {
                "first ms": round(1e3 * statistics.median(firsts), 1),
                "second ms": round(1e3 * statistics.median(each[1] for each in times), 1),
                "sixth to tenth ms": round(1e3 * statistics.median(tenths), 1),
                "first over tenth ms": round(
                    1e3 * statistics.median(a - b for a, b in zip(firsts, tenths, strict=True)), 1
                ),
                "first token of the first ms": round(1e3 * statistics.median(each[0].first for each in took), 1),
                "× tenth": ratio(firsts, tenths),
            }
            print(f"  {kind}, {how} done", file=sys.stderr, flush=True)
    show(f"first requests of {args.repeats} servers: prompt {SHORT}, {args.tokens} tokens", rows)
    return rows


PARTS = {"concurrency": by_concurrency, "overhead": overhead, "prefill": prefill, "first": first_requests}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS)[:3])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--unguided", action="store_true")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--delay", type=float, default=0.1, help="seconds between the long request and the short one")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    for name, value in {
        "layers": 12, "width": 768, "vocab": 32000, "prompt": 128, "top-k": 10, "tokens": 64, "requests": 6,
        "repeats": 7, "max-batch": 16,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.inside:
        serve_here(args, args.inside)
        return
    with tempfile.TemporaryDirectory(prefix="rgtg-serve-") as made:
        with ThreadPoolExecutor(1) as apart:  # as ServedModels.load does: its OpenMP workers end with it
            apart.submit(save, args, Path(made)).result()
        args.folder, results = Path(made), {}
        if "first" in args.parts:
            results["first"] = first_requests(args, None)
        if rest := [part for part in args.parts if part != "first"]:
            with Server(args.folder) as served:
                results |= {part: PARTS[part](args, served) for part in rest}
    settings = vars(args) | {"output": args.output and args.output.name}
    for name in ("inside", "cold", "folder"):
        del settings[name]
    record = {"benchmark": "serve", "settings": settings, "torch": torch.__version__, "results": results}
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
