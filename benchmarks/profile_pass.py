"""Where one pass spends its time: matrix products by rows and layout, and the operators of a policy's and a fused pass.

    python benchmarks/profile_pass.py [--output docs/results/decode-profile.json]

Shapes are those of benchmarks/decode.py. Products run over twelve layers of weights, so that no cache holds them.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import decode
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.evaluation.benchmark import memory_bandwidth
from rgtg.models.ops.lm_head import policy_logits
from rgtg.models.ops.packed_linear import StackedWeights

ROWS = (1, 2, 10, 20, 40, 80)


def median_ms(run, repeats=20):
    for _ in range(4):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times), 2)


def products(args, dtype):
    """Milliseconds for all products of the trunk, by rows: stock, packed, and packed with siblings stacked."""
    w, m = args.width, args.width * 8 // 3
    layouts = {
        "stock": ([(w, w)] * 4 + [(m, w)] * 2 + [(w, m)], False),
        "packed": ([(w, w)] * 4 + [(m, w)] * 2 + [(w, m)], True),
        "packed, siblings stacked": ([(3 * w, w), (w, w), (2 * m, w), (w, m)], True),
    }
    found = {}
    for name, (shapes, pack) in layouts.items():
        weights = [
            StackedWeights(torch.randn(shape).mul(0.02).to(dtype), None, pack=pack)
            for _ in range(args.layers)
            for shape in shapes
        ]
        inside = [shape[1] for _ in range(args.layers) for shape in shapes]
        found[name] = {}
        for rows in ROWS:
            x = {n: torch.randn(1, rows, n).to(dtype) for n in (w, m)}
            pairs = list(zip(weights, inside, strict=True))
            found[name][rows] = median_ms(lambda x=x, pairs=pairs: [weight(x[n]) for weight, n in pairs])
    return found


def operators(runner, tree, repeats=10):
    """Milliseconds per pass of the dearest operators, of all operators, and of the pass as a whole."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            runner.read(tree)
    events = profiler.key_averages()
    own = sorted(((e.self_cpu_time_total / 1e3 / repeats, e.key) for e in events), reverse=True)
    return {
        "wall": median_ms(lambda: runner.read(tree)),
        "all operators": round(sum(t for t, _ in own), 2),
        "dearest": {name: round(t, 2) for t, name in own[:10]},
    }


@torch.inference_mode()
def measure(args, dtype):
    models = decode.Models(args, dtype)
    prompt = decode.random_prompt(args, args.prompt)
    candidates = torch.arange(args.top_k)[None] + 5
    passes = {
        "policy, one row": (models.policy.model, [prompt], candidates[:, :1]),
        "separate scorer, k rows": (models.separate.model, [prompt], candidates),
        "fused trunk, 2 rows": (models.fused.model, [prompt] * 2, candidates[:, :1].repeat(2, 1)),
        "fused trunk, 2k rows": (models.fused.model, [prompt] * 2, candidates.repeat(2, 1)),
    }
    found = {}
    for name, (model, prompts, ids) in passes.items():
        runner = TreeRunner(model, policy_logits, args.prompt + 64)
        runner.prefill(prompts)
        found[name] = operators(runner, TokenTree.leaves(ids))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=sorted(decode.DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    shape = argparse.Namespace(layers=12, width=768, vocab=32000, prompt=128, top_k=10, device="cpu", pack=True)
    with torch.inference_mode():
        record = {
            "what": __doc__.splitlines()[0], "torch": torch.__version__, "threads": torch.get_num_threads(),
            "memory_bandwidth_gb_per_s": round(memory_bandwidth(torch.device("cpu")) / 1e9, 1),
            "products_ms": {name: products(shape, decode.DTYPES[name]) for name in args.dtypes},
            "passes_ms": {name: measure(shape, name) for name in args.dtypes},
            "command": "python benchmarks/profile_pass.py",
        }  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
