"""Is ``rgtg plan`` right? Compares its times for every method with measured times on this processor.

    python benchmarks/plan.py [--rounds 2] [--batches 1 8] [--output docs/results/plan.json]

Policies and scorers are Llamas with random weights, in shapes that calibration does not use (CASES). Each round and
case first measures the machine's rates (``rgtg.planning.calibrate``), and then decodes every row of a plan from prompt
to last token with ``GuidedPolicy``; the median of the rounds' ratios counts. A plan needs to know how much cards draws
and scores: here it is what the job drew and scored. The benchmark uses one thread and its own processor time, to reduce
the effect of other programs; their memory traffic still counts. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rgtg import GuidedPolicy
from rgtg.config import PlanSettings
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.models.ops.packed_linear import pack_linears
from rgtg.models.scorers.heads import StateHead, VocabularyHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.planning.calibrate import measure_device
from rgtg.planning.method_costs import HEAD_RANK, HEAD_WIDTH, LORA_RANK, PlannedBatch, batch_time, method_variants
from rgtg.planning.model_shapes import count_shape

# name: dtype, and layers, width and key-value heads of policy and scorer
CASES = {
    "bf16, 12x768 with 6x512": ("bfloat16", (12, 768, 12), (6, 512, 8)),
    "bf16, grouped heads, 6x1280 with 12x768": ("bfloat16", (6, 1280, 4), (12, 768, 3)),
    "fp32, 12x768 with 6x512": ("float32", (12, 768, 12), (6, 512, 8)),
}
TINY = {"fp32, 2x128 with 2x64": ("float32", (2, 128, 2), (2, 64, 1))}
KINDS = {"none", "separate", "vocabulary", "adapter", "state head", "vocabulary head"}
PROMPT, TOKENS, N, WITHIN = 96, 16, 4, 0.25


class Case:
    """Policy and scorers, packed for decoding, and their shapes for a plan."""

    def __init__(self, dtype, policy, scorer, vocabulary):
        self.dtype, self.vocabulary, self.tokenizer = dtype, vocabulary, words(vocabulary)
        stock = self.build(LlamaForCausalLM, policy)
        self.policy_shape = count_shape(stock, "policy")
        self.policy = Policy(pack_linears(stock), self.tokenizer)
        self.scorer_shape = count_shape(self.build(LlamaForCausalLM, scorer), "scorer")
        language_model = self.build(LlamaForCausalLM, scorer, 2)
        table = VocabularyScorer(Policy(language_model, self.tokenizer), info=info(head="vocab"))
        table.model = pack_linears(language_model)
        width = policy[1]
        self.scorers = {
            "none": None,
            "separate": PrefixScorer(
                pack_linears(self.build(LlamaForSequenceClassification, scorer, 1)), self.tokenizer, info=info()
            ),
            "vocabulary": table,
            "adapter": SharedTrunkScorer(self.policy, adapter_of(stock), torch.randn(1, width) * 0.02, info=info()),
            "state head": OwnStateScorer(
                self.policy, StateHead(width, HEAD_WIDTH), info(trunk="own", head="state", layer=policy[0])
            ),
            "vocabulary head": OwnStateScorer(
                self.policy, VocabularyHead(width, HEAD_WIDTH, HEAD_RANK, vocabulary),
                info(trunk="own", head="vocab", layer=policy[0]),
            ),
        }  # fmt: skip

    def build(self, kind, size, seed=0):
        torch.manual_seed(seed)
        layers, width, kv_heads = size
        config = LlamaConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=kv_heads,
            intermediate_size=width * 8 // 3, vocab_size=self.vocabulary, max_position_embeddings=2048, num_labels=1,
            pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
        )  # fmt: skip
        return kind(config).to(getattr(torch, self.dtype)).eval().requires_grad_(False)

    def guided(self, variant):
        return GuidedPolicy.from_pretrained(self.policy, scorer=self.scorers[variant.kind], method=variant.method.name)


def words(vocabulary):
    """A tokenizer with so many words; every word is a token."""
    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    assert len(made(prompts(1, vocabulary)[0]).input_ids) == PROMPT
    return made


def info(objective="prefix-bt", **about):
    same = dict.fromkeys(("rgtg_version", "base_model", "base_fingerprint", "tokenizer_hash", "data_fingerprint"), "")
    return ScorerInfo(**same, objective=objective, append_eos=False, **about)


def adapter_of(model):
    """A random adapter on every linear layer of the trunk."""
    return {
        name: (torch.randn(LORA_RANK, m.weight.shape[1]) * 0.02, torch.randn(m.weight.shape[0], LORA_RANK) * 0.02)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name.startswith("model.")
    }


def prompts(batch, vocabulary):
    draw = torch.Generator().manual_seed(0)
    return [" ".join(f"w{i}" for i in row) for row in torch.randint(3, vocabulary, (batch, PROMPT), generator=draw)]


def settings_of(variant):
    settings = {"max_new_tokens": TOKENS}
    settings |= {"n": N} if "n" in variant.method.takes else {}
    settings |= {"reward_threshold": 0.0} if variant.method.rule == "accept" else {}
    settings |= {"value_threshold": 0.0} if variant.method.rule == "filter" else {}
    return settings


def measured(guided, variant, batch, vocabulary):
    """Processor time of a job, and the completions."""
    start = time.process_time()
    done = guided.generate(prompts(batch, vocabulary), batch_size=batch, **settings_of(variant))
    return time.process_time() - start, done


def predicted(case, variant, device, batch, done):
    given = {"policy": "", "prompt_tokens": PROMPT, "new_tokens": TOKENS, "n": N}
    if variant.method.rule == "accept":
        tokens = sum(len(row.token_ids) for row in done)
        given["cards_drawn"] = sum(row.drafted for row in done) / tokens
        given["cards_scored"] = sum(row.scorer_calls for row in done) / tokens
    planned = PlannedBatch(PlanSettings(**given), case.policy_shape, case.scorer_shape, device, 1, batch)
    return batch_time(variant, planned).seconds


def compare(cases, args):
    """(case, method, scorer, batch) → predicted and measured seconds of every round; and the rates measured last."""
    found, devices = {}, {}
    for name, (dtype, policy, scorer) in cases.items():
        case = Case(dtype, policy, scorer, args.vocabulary)
        rows = [(variant, case.guided(variant)) for variant in method_variants(KINDS)]
        for variant, guided in rows:  # warm up: what a process does only once is not part of a plan
            guided.generate(prompts(1, args.vocabulary), **settings_of(variant) | {"max_new_tokens": 2})
        for number in range(args.rounds):
            device = devices[name] = measure_device("cpu", dtype, args.tries, clock=time.process_time)
            for batch in args.batches:
                for variant, guided in rows:
                    took, done = measured(guided, variant, batch, args.vocabulary)
                    said = predicted(case, variant, device, batch, done)
                    found.setdefault((name, variant.method.name, variant.kind, batch), []).append((said, took))
            print(f"  {name}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    return found, devices


def record_of(found, devices, args):
    rows = [
        {
            "case": case, "method": method, "scorer": kind, "batch": batch,
            "predicted_ms": round(1e3 * statistics.median(said for said, _ in pairs) / TOKENS, 2),
            "measured_ms": round(1e3 * statistics.median(took for _, took in pairs) / TOKENS, 2),
            "ratio": round(statistics.median(said / took for said, took in pairs), 3),
        }
        for (case, method, kind, batch), pairs in found.items()
    ]  # fmt: skip
    worst = max(rows, key=lambda row: max(row["ratio"], 1 / row["ratio"]))
    return {
        "benchmark": "plan", "command": "python benchmarks/plan.py", "torch": torch.__version__, "threads": 1,
        "load_before": args.load, "settings": {"prompt": PROMPT, "tokens": TOKENS, "n": N,
        "vocabulary": args.vocabulary, "rounds": args.rounds, "batches": args.batches}, "worst": worst,
        "within_25_percent": [sum(abs(row["ratio"] - 1) <= WITHIN for row in rows), len(rows)],
        "rows": rows, "devices": {name: device.model_dump() for name, device in devices.items()},
    }  # fmt: skip


def show(record):
    table = Table(title="ms per token of every row, prompts included: plan / measured")
    for heading in ("case", "method", "scorer", "batch", "plan", "measured", "ratio"):
        table.add_column(heading, no_wrap=True)
    for row in record["rows"]:
        style = "" if abs(row["ratio"] - 1) <= WITHIN else "bold"
        table.add_row(*(str(row[name]) for name in ("case", "method", "scorer", "batch")), f"{row['predicted_ms']:.1f}",
                      f"{row['measured_ms']:.1f}", f"{row['ratio']:.2f}", style=style)  # fmt: skip
    Console(width=140).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="two layers, one round: only checks that it runs")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    args.load, args.vocabulary, args.tries = round(os.getloadavg()[0], 2), 32_000, 12
    cases = {name: CASES[name] for name in args.cases}
    if args.tiny:
        cases, args.rounds, args.batches, args.vocabulary, args.tries = TINY, 1, [2], 500, 1
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    record = record_of(*compare(cases, args), args)
    show(record)
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
