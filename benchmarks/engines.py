"""The same policy in several engines, unguided and with the same vocabulary head, in one run and by turns.

    OMP_NUM_THREADS=2 python benchmarks/engines.py --policy model.gguf [--folder CONVERTED] [--vllm-python PYTHON]
        [--prompts 1 8] [--length 128] [--tokens 64] [--repeats 5] [--clock wall] [--output FILE] [--figure PNG]

The policy is a GGUF file, quantised as it is in llama.cpp and dequantised to bf16 in transformers, rgtg's torch engine
and vLLM (``--folder`` names the converted folder, else ``rgtg generate --cache-gguf`` makes it beside the file). The
head has random weights: they change what is drawn, not how long it takes. Every way decodes in turn, repeat after
repeat, so that a machine that changes speed changes it for all; figures are medians, and ratios are medians of paired
ratios. Reading the prompt is not timed. vLLM runs in an environment of its own, in a process that waits for its turns.

On a machine that does other work, ``--clock cpu`` with OMP_NUM_THREADS=1 counts the seconds that each way computes
instead of those that pass.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from decode import paired, ratio, seconds_of_generate
from rgtg.evaluation.benchmark import seconds_per_token, start_batch
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.gguf import converted_folder
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.policy_files import describe_policy_files
from rgtg.models.loading.scorer_info import ScorerInfo, fingerprint_weights, write_info
from rgtg.models.ops.packed_linear import pack_linears
from rgtg.models.scorers.heads import VocabularyHead, load_head, save_head
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.tokenization.encoding import tokenizer_hash

TOP_K, WIDTH, RANK = 10, 256, 64
STOCK, TORCH, LLAMA, ALONE, VLLM = (
    "transformers.generate", "rgtg, torch", "rgtg, llama.cpp", "llama.cpp alone", "rgtg, vLLM",
)  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", required=True, type=Path, help="GGUF file")
    parser.add_argument("--folder", type=Path, help="the same weights dequantised to bf16")
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vLLM and rgtg")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="seconds that pass, or of computing")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    return parser.parse_args()


def prompts_of(policy, args, count):
    """Random prompts that have nothing in common."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(64, min(vocabulary, 49152), (count, args.length), generator=generator).tolist()


def write_random_head(folder, policies, sources):
    """One head of the format that every engine reads, for all of these policies."""
    sizes = policies[0].model.config.get_text_config()
    torch.manual_seed(0)
    head = VocabularyHead(sizes.hidden_size, WIDTH, RANK, sizes.vocab_size)
    torch.nn.init.normal_(head.bias, 0, 0.5)
    save_head(folder, head)
    policies[0].tokenizer.save_pretrained(folder)
    info = ScorerInfo(
        rgtg_version="0", objective="prefix-bt", base_model=str(sources[0]), data_fingerprint="", trunk="own",
        base_fingerprint=fingerprint_weights(policies[0].model), tokenizer_hash=tokenizer_hash(policies[0].tokenizer),
        head="vocab", layer=sizes.num_hidden_layers, policy_layers=sizes.num_hidden_layers, hidden=sizes.hidden_size,
        width=WIDTH, rank=RANK, vocabulary=sizes.vocab_size, normalisation="standardize", activation="gelu",
        policy_files=[describe_policy_files(str(source)) for source in sources],
    )  # fmt: skip
    write_info(folder, info)
    return OwnStateScorer(policies[0], load_head(folder, info), info), info


def llama_alone(model, prompts, tokens):
    """Seconds per step of llama.cpp's own functions: a pass for each token of all prompts, and its own sampler."""
    lib, context = model._lib, model.context
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(TOP_K))
    lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(0))
    runner = model.runner(len(prompts[0]) + tokens + 2, None)
    runner.prefill(prompts)
    batch, pointer = context._batch, context._context
    lib.llama_set_embeddings(pointer, False)
    context._embeddings = False
    newest, rows = [prompt[-1] for prompt in prompts], runner.sequences

    def step(place):
        for i, (token, row) in enumerate(zip(newest, rows, strict=True)):
            batch.tokens[i], batch.positions[i], batch.counts[i] = token, row.length + place, 1
            batch.sequences[i, 0], batch.outputs[i] = row.number, 1
        batch.struct.n_tokens = len(rows)
        assert lib.llama_decode(pointer, batch.struct) == 0
        for i in range(len(rows)):
            newest[i] = lib.llama_sampler_sample(chain, pointer, i)

    step(0)
    start = time.perf_counter()
    for place in range(1, tokens + 1):
        step(place)
    took = (time.perf_counter() - start) / tokens
    lib.llama_sampler_free(chain)
    return took


class Vllm:
    """vLLM in a process of its own: one line of JSON asks for a measurement, one line answers."""

    def __init__(self, python, folder, head, args):
        script = Path(__file__).with_name("engines_vllm.py")
        self.process = subprocess.Popen(
            [str(python), str(script), str(folder), str(head), str(max(args.prompts)), str(TOP_K), args.clock],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def _answer(self):
        for line in self.process.stdout:
            if line.startswith("rgtg:"):
                return json.loads(line[5:])
        raise SystemExit("vLLM has ended")

    def step(self, prompts, tokens, guided):
        self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens, "guided": guided}) + "\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]


def rows_of(seconds, count):
    """Figures of each way; ratios are of tokens per second."""
    rows = {}
    for name, took in seconds.items():
        engine, _, guided = name.partition(" + ")
        row = {"tokens_per_second": round(count / statistics.median(took), 1), "seconds_per_step": took}
        row["of_transformers"] = ratio(seconds[STOCK], took)
        row["of_torch_unguided"] = ratio(seconds[TORCH], took)
        if guided:
            row["of_unguided"] = ratio(seconds[engine], took)
        if engine == LLAMA:
            row["of_llama_alone"] = ratio(seconds[ALONE], took)
        rows[name] = row
    return rows


def draw(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 3.4), constrained_layout=True)
    for axis, (count, rows) in zip([axes] if len(results) == 1 else axes, results.items(), strict=True):
        names = list(rows)[::-1]
        bars = axis.barh(
            names, [rows[name]["tokens_per_second"] for name in names],
            color=["#0b7a75" if " + " in name else "#b8c4c2" for name in names],
        )  # fmt: skip
        axis.bar_label(bars, padding=3)
        axis.set_title(f"{count} prompt{'s' if int(count) > 1 else ''}")
        axis.set_xlabel("tokens per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.savefig(path, dpi=130)


def main():
    args = arguments()
    if args.clock == "cpu":
        time.perf_counter = time.process_time  # of all measurements of this process
    folder = args.folder or converted_folder(args.policy)
    if folder is None:
        load_policy(str(args.policy), cache_gguf=True)
        folder = converted_folder(args.policy)
    stock = load_policy(str(folder))
    torch_policy = load_policy(str(folder))
    torch_policy.model = pack_linears(torch_policy.model)
    llama = load_policy(str(args.policy), engine="llama-cpp")
    with tempfile.TemporaryDirectory() as work:
        head, info = write_random_head(Path(work), [torch_policy, llama], [folder, args.policy])
        on_llama = OwnStateScorer(llama, load_head(Path(work), info), info)
        vllm = Vllm(args.vllm_python, folder, work, args) if args.vllm_python else None
        results = {}
        for count in args.prompts:
            prompts = prompts_of(stock, args, count)
            ids = torch.tensor(prompts)

            def run(policy, scorer, prompts=prompts):
                batch = start_batch(policy, scorer, prompts, top_k=TOP_K, tokens=args.tokens)
                return seconds_per_token(batch, args.tokens)

            runs = {
                STOCK: lambda ids=ids: seconds_of_generate(stock.model, ids, TOP_K, args.tokens),
                TORCH: lambda run=run: run(torch_policy, None),
                f"{TORCH} + head": lambda run=run: run(torch_policy, head),
                ALONE: lambda prompts=prompts: llama_alone(llama.model, prompts, args.tokens),
                LLAMA: lambda run=run: run(llama, None),
                f"{LLAMA} + head": lambda run=run: run(llama, on_llama),
            }
            if vllm is not None:
                runs[VLLM] = lambda prompts=prompts: vllm.step(prompts, args.tokens, False)
                runs[f"{VLLM} + head"] = lambda prompts=prompts: vllm.step(prompts, args.tokens, True)
            results[str(count)] = rows_of(paired(args, runs), count)
            for name, row in results[str(count)].items():
                print(f"{count} × {name}: {json.dumps({k: v for k, v in row.items() if k[0] != 's'})}", file=sys.stderr)
        if vllm is not None:
            vllm.process.stdin.close()
    settings = {"policy": args.policy.name, "length": args.length, "tokens": args.tokens, "repeats": args.repeats}
    settings |= {
        "clock": args.clock,
        "top_k": TOP_K,
        "threads": torch.get_num_threads(),
        "head": {"width": WIDTH, "rank": RANK},
    }
    origin = provenance(
        command="python benchmarks/engines.py", settings=settings, seed=0,
        models={"policy": llama.model, "torch": stock.model}, data={},
    )  # fmt: skip
    report = {"prompts": results, "provenance": origin.model_dump(mode="json")}
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if args.figure:
        draw(results, args.figure)
    print(json.dumps({count: {n: r["tokens_per_second"] for n, r in rows.items()} for count, rows in results.items()}))


if __name__ == "__main__":
    main()
