"""Whether ``torch.compile`` would pay in the torch engine: a trunk compiled for one shape, against the trunk as it is.

    OMP_NUM_THREADS=1 python benchmarks/compile.py --policy SMOLLM2 [--rows 1 8] [--output FILE]

The compiled trunk writes into the same cache and attends to 128 columns more than it needs at most, so that one graph
serves a whole text; weights stay packed. Both decode in turn, token after token, with seconds of computing on one
thread (of wall clock with more). This is what such an engine could gain, not an engine: rgtg does not offer it, because
it gains little and every number of rows and candidates has to be compiled for itself (docs/results/README.md).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import load_policy
from rgtg.models.ops import packed_linear
from rgtg.models.ops.lm_head import policy_logits, trunk
from rgtg.models.ops.packed_linear import pack_linears, structural_copy

PROMPT, TOKENS, COLUMNS = 64, 24, 128


class Columns:
    """Keys and values of all layers, as long as a graph was compiled for."""

    def __init__(self, layers):
        self.layers = [SimpleNamespace() for _ in range(layers)]

    def update(self, keys, values, layer, *args, **kwargs):
        """Write a pass where it belongs; all columns."""
        mine = self.layers[layer]
        mine.keys[self.rows, :, self.columns] = keys.transpose(1, 2)
        mine.values[self.rows, :, self.columns] = values.transpose(1, 2)
        return mine.keys, mine.values


def let_torch_compile_packed_products():
    """Packed weights are opaque to torch.compile: their product becomes an operation of its own."""
    library = torch.library.Library("rgtg_benchmark", "DEF")
    library.define("linear(Tensor x, Tensor weight, Tensor? bias, int rows) -> Tensor")
    for key in ("CPU", "MkldnnCPU"):
        library.impl("linear", lambda x, w, b, rows: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], ""), key)
    torch.library.register_fake(
        "rgtg_benchmark::linear", lambda x, w, b, rows: x.new_empty((*x.shape[:-1], rows)), lib=library
    )
    as_it_is = packed_linear.StackedWeights.__call__

    def product(self, x):
        if self.packed and torch.compiler.is_compiling():
            return torch.ops.rgtg_benchmark.linear(x, self._weight, self.bias, self.rows)
        return as_it_is(self, x)

    packed_linear.StackedWeights.__call__ = product
    return library


def compiled_copy(model):
    """A copy of a model whose trunk is compiled for decoding steps."""
    copied = structural_copy(model)
    inner = trunk(copied)
    as_it_is, columns = type(inner).forward, Columns(model.config.num_hidden_layers)

    def run(ids, positions, mask, cache):
        return as_it_is(
            inner, input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state

    options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe, "size_asserts": False}
    compiled = torch.compile(run, dynamic=False, fullgraph=True, options=options)

    def forward(input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, **more):
        cache = past_key_values
        if cache is None or not cache.layers[0].is_initialized:
            return as_it_is(
                inner, input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask,
                past_key_values=cache, **more,
            )  # fmt: skip
        for mine, layer in zip(columns.layers, cache.layers, strict=True):
            mine.keys, mine.values = layer.keys[:, :, :COLUMNS], layer.values[:, :, :COLUMNS]
        columns.rows = torch.arange(len(cache.lengths))[:, None]
        columns.columns = torch.tensor(cache.lengths)[:, None]
        hidden = COLUMNS - attention_mask.shape[3]
        hides = attention_mask.new_full((*attention_mask.shape[:3], hidden), torch.finfo(attention_mask.dtype).min)
        states = compiled(input_ids, position_ids, torch.cat([attention_mask, hides], -1), columns)
        return SimpleNamespace(last_hidden_state=states)

    inner.forward = forward
    return copied


def started(model, rows):
    """A runner that has read prompts, its next tokens, and the seconds of its steps."""
    runner = TreeRunner(model, policy_logits, COLUMNS)
    runner._cache_argument = "past_key_values"
    runner.prefill([list(range(100 + i, 100 + i + PROMPT)) for i in range(rows)])
    return SimpleNamespace(runner=runner, tokens=torch.full((rows, 1), 5), seconds=[], drawn=[])


def step(one, clock):
    """One greedy token for every row."""
    start = clock()
    states = one.runner.read(TokenTree.chain(one.tokens))
    one.tokens = one.runner.head(states.final[:, -1]).argmax(-1)[:, None]
    one.runner.commit(torch.zeros(len(one.tokens), 1, dtype=torch.long))
    one.seconds.append(clock() - start)
    one.drawn.append(one.tokens.tolist())


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    library = let_torch_compile_packed_products()
    policy = load_policy(args.policy, device="cpu")
    packed = pack_linears(policy.model)
    compiled, found = compiled_copy(packed), {}
    for rows in args.rows:
        start = time.perf_counter()
        step(started(compiled, rows), clock)
        compiling = time.perf_counter() - start
        ways = {"as it is": started(packed, rows), "compiled": started(compiled, rows)}
        for _ in range(TOKENS):
            for one in ways.values():
                step(one, clock)
        plain, other = ways["as it is"], ways["compiled"]
        ratios = [a / b for a, b in zip(plain.seconds[2:], other.seconds[2:], strict=True)]
        found[rows] = {
            "compile_seconds": round(compiling, 1), "same_tokens": plain.drawn == other.drawn,
            "ms_per_step": {name: round(1e3 * statistics.median(one.seconds[2:]), 1) for name, one in ways.items()},
            "speed_up": round(statistics.median(ratios), 2),
        }  # fmt: skip
        print(rows, found[rows], flush=True)
    made = provenance(
        command="python benchmarks/compile.py", seed=None, models={"policy": policy.model}, data={},
        settings={"rows": args.rows, "threads": torch.get_num_threads(), "prompt": PROMPT, "tokens": TOKENS},
    )  # fmt: skip
    if args.output:
        text = json.dumps({"rows": found, "provenance": made.model_dump(mode="json")}, indent=1)
        args.output.write_text(text + "\n", encoding="utf-8")
    del library


if __name__ == "__main__":
    main()
