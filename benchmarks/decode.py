"""What guidance costs per token: every way to join policy and scorer, beside unguided decoding and published loops.

    python benchmarks/decode.py [--dtypes bf16 fp32] [--parts base k prompt batch draft] [--repeats 5] [--output FILE]

Policy and scorer are Llama-shaped (12 layers × 768, 32k vocabulary) with random weights. Every variant of a part
decodes in turn, repeat after repeat, so that a machine that changes speed changes it for all; figures are medians, and
ratios are medians of paired ratios. Ours run on packed weights where the processor has them (--no-pack keeps the stock
layout); ``transformers.generate`` and the published loops run on the stock model. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rgtg.config import DecodingSettings
from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.engine.speculative import SpeculativeBatch
from rgtg.decoding.request import Request, StoppingCriteria
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.policy_runner import LoraPolicyRunner
from rgtg.decoding.runners.scorer_runner import VocabHeadRunner
from rgtg.decoding.sampling import SamplingParams
from rgtg.evaluation.benchmark import bytes_per_token, memory_bandwidth, seconds_per_token, start_batch
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.models.ops.lm_head import policy_logits
from rgtg.models.ops.packed_linear import pack_linears
from rgtg.models.scorers.heads import StateHead, VocabularyHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNGUIDED, STOCK = "unguided (rgtg)", "unguided (transformers.generate)"
SEPARATE = "separate scorer"
HEADS = ("state head on the policy", "vocabulary head on the policy")


def config(args, layers=None, width=None):
    width = width or args.width
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers or args.layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, intermediate_size=width * 8 // 3, vocab_size=args.vocab,
        max_position_embeddings=8192, num_labels=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip


def build(args, dtype, head, seed=0, **size):
    torch.manual_seed(seed)
    with torch.device(args.device):
        return head(config(args, **size)).to(DTYPES[dtype]).eval().requires_grad_(False)


def lora(model, rank=16):
    """A random adapter on every linear layer of the trunk, and a scalar head."""
    adapter = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model."):
            out, inside = module.weight.shape
            adapter[name] = (torch.randn(rank, inside) * 0.02, torch.randn(out, rank) * 0.02)
    return adapter, torch.randn(1, model.config.hidden_size) * 0.02


class Models:
    """Everything a part decodes with, of one dtype; stock models beside the ones that rgtg lays out for decoding."""

    def __init__(self, args, dtype):
        self.args = args
        self.stock = build(args, dtype, LlamaForCausalLM)
        self.stock_scorer = build(args, dtype, LlamaForSequenceClassification, 1)
        lay = pack_linears if args.pack else (lambda model: model)
        adapter, head = lora(self.stock)
        self.policy = Policy(lay(self.stock), None)
        self.separate = PrefixScorer(lay(self.stock_scorer), None)
        self.own_vocab_scorer = VocabularyScorer(Policy(build(args, dtype, LlamaForCausalLM, 2), None))
        self.own_vocab_scorer.model = lay(self.own_vocab_scorer.model)
        self.fused = SharedTrunkScorer(self.policy, adapter, head)
        width = args.width
        info = ScorerInfo(
            rgtg_version="", objective="prefix-bt", base_model="", base_fingerprint="", tokenizer_hash="",
            data_fingerprint="", trunk="own", head="state", layer=args.layers,
        )  # fmt: skip
        self.state_head = OwnStateScorer(self.policy, StateHead(width, 256), info)
        self.table = VocabularyHead(width, 256, 64, args.vocab).to(args.device)
        self.vocab_head = OwnStateScorer(self.policy, self.table, info.model_copy(update={"head": "vocab"}))

    def ways(self):
        """Name → scorer of each kind that rgtg chooses the runners for."""
        return {
            UNGUIDED: None,
            SEPARATE: self.separate,
            "vocabulary scorer of its own": self.own_vocab_scorer,
            "fused trunk, scalar head": self.fused,
            "state head on the policy": self.state_head,
            "vocabulary head on the policy": self.vocab_head,
        }

    def step(self, name, *, prompt, k, tokens, batch=1):
        """Seconds per step of one variant."""
        prompts = [random_prompt(self.args, prompt, i) for i in range(batch)]
        if name == "fused trunk, vocabulary head":
            runner = TreeRunner(self.fused.model, policy_logits, prompt + tokens + 3, layer=self.args.layers)
            head = {"scorer": VocabHeadRunner(self.fused.model, self.table)}
            running = batch_of(LoraPolicyRunner(runner), {}, prompts, k=k, tokens=tokens, heads=head)
        else:
            overlap = name.endswith("at once")
            scorer = self.separate if overlap else self.ways()[name]
            running = start_batch(self.policy, scorer, prompts, top_k=k, tokens=tokens, overlap=overlap)
        return seconds_per_token(running, tokens)


@torch.inference_mode()
def batch_of(policy, scorers, prompts, *, k, tokens, heads=None):
    """``start_batch`` for runners that rgtg does not choose by itself; all scorers steer all requests."""
    names = (*scorers, *(heads or {}))
    requests = [request(prompt, seed, k=k, tokens=tokens, names=names) for seed, prompt in enumerate(prompts)]
    for scorer in scorers.values():
        scorer.prefill(requests, prompts)
    batch = Batch(heads=heads)
    batch.add(requests, Prefilled(policy, policy.prefill(prompts), scorers))
    return batch


def request(prompt, seed, *, k, tokens, names=(), beta=1.0):
    """A request that no token ends before ``tokens`` timed ones."""
    stopping = StoppingCriteria(None, set(), DecodingSettings(max_new_tokens=tokens + 2))
    params = SamplingParams(beta=beta, top_k=k)
    return Request("", prompt, seed, params=params, stopping=stopping, scorers=names, betas=(beta,) * len(names))


def random_prompt(args, length, seed=0):
    return torch.randint(3, args.vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# Published loops, written anew: the policy keeps its cache, the scorer is called in their way


@torch.inference_mode()
def seconds_of_generate(model, ids, k, tokens):
    """Seconds per step of unguided sampling: time of many tokens less time of few, without that of the prompt."""
    times = []
    for n in (2, tokens + 2):
        start = time.perf_counter()
        model.generate(ids, do_sample=True, top_k=k, min_new_tokens=n, max_new_tokens=n, pad_token_id=0)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / tokens


def transformers_generate(models, *, prompt, k, tokens):
    """Unguided ``generate`` after a random prompt."""
    ids = torch.tensor([random_prompt(models.args, prompt)], device=models.args.device)
    return seconds_of_generate(models.stock, ids, k, tokens)


def published(score):
    @torch.inference_mode()
    def run(models, *, prompt, k, tokens):
        ids = torch.tensor([random_prompt(models.args, prompt)], device=models.args.device)
        policy, scorer = models.stock, models.stock_scorer
        out = policy(ids, use_cache=True, logits_to_keep=1)
        cache, state = out.past_key_values, {}
        score(scorer, ids, ids[0, :k], state)  # the prompt is not timed
        start = time.perf_counter()
        for _ in range(tokens):
            log_probs, candidates = out.logits[0, -1].float().log_softmax(-1).topk(k)
            scores = score(scorer, ids, candidates, state)
            chosen = candidates[torch.multinomial((log_probs + scores.float()).softmax(-1), 1)]
            ids = torch.cat([ids, chosen[None]], 1)
            state["newest"] = chosen
            out = policy(chosen[None], past_key_values=cache, use_cache=True)
        return (time.perf_counter() - start) / tokens

    return run


def whole_text(scorer, ids, candidates, state):
    rows = torch.cat([ids.expand(len(candidates), -1), candidates[:, None]], 1)
    return torch.cat([scorer(row[None]).logits[0] for row in rows])


def whole_text_batched(scorer, ids, candidates, state):
    return scorer(torch.cat([ids.expand(len(candidates), -1), candidates[:, None]], 1)).logits[:, 0]


def cache_copies(scorer, ids, candidates, state):
    """The scorer's cache is kept, and copied once per candidate."""
    k = len(candidates)
    if "cache" not in state:
        state["cache"] = scorer.model(ids, use_cache=True).past_key_values
        state["cache"].batch_repeat_interleave(k)
    if "newest" in state:  # the token chosen last enters every copy
        scorer.model(state["newest"].expand(k, 1), past_key_values=state["cache"], use_cache=True)
    states = scorer.model(candidates[:, None], past_key_values=state["cache"], use_cache=True).last_hidden_state
    state["cache"].crop(-1)
    return scorer.score(states)[:, -1, 0]


def one_at_a_time(scorer, ids, candidates, state):
    """The scorer's cache is kept, and every candidate is a call of its own."""
    if "cache" not in state:
        state["cache"] = scorer.model(ids, use_cache=True).past_key_values
    if "newest" in state:
        scorer.model(state["newest"][None], past_key_values=state["cache"], use_cache=True)
    scores = []
    for candidate in candidates:
        states = scorer.model(candidate[None, None], past_key_values=state["cache"], use_cache=True).last_hidden_state
        state["cache"].crop(-1)
        scores.append(scorer.score(states)[:, -1, 0])
    return torch.cat(scores)


PUBLISHED = {
    "loop: k copies of the cache": (published(cache_copies), 16),
    "loop: one candidate at a time": (published(one_at_a_time), 8),
    "loop: whole texts in one batch": (published(whole_text_batched), 2),
    "loop: whole text per candidate": (published(whole_text), 2),
}


def paired(args, runs, repeats=None):
    """Seconds of every variant, in turn, repeat after repeat; the first round warms up."""
    seconds = {name: [] for name in runs}
    for repeat in range((repeats or args.repeats) + 1):
        for name, run in runs.items():
            took = run()
            if repeat:
                seconds[name].append(took)
        print(f"  round {repeat} done", file=sys.stderr, flush=True)
    return seconds


def ratio(a, b):
    return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 3)


def table(title, rows):
    shown = Table(title=title)
    for column in ("variant", *next(iter(rows.values()))):
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in rows.items():
        shown.add_row(name, *(str(v) for v in row.values()))
    Console(stderr=True).print(shown)


def base(args, models, dtype):
    """Every way at the settings of the head of this file."""
    runs = {STOCK: lambda: transformers_generate(models, prompt=args.prompt, k=args.top_k, tokens=args.tokens)}
    names = [*models.ways(), "fused trunk, vocabulary head", "separate scorer, at once"]
    for name in names:
        runs[name] = lambda name=name: models.step(name, prompt=args.prompt, k=args.top_k, tokens=args.tokens)
    for name, (run, tokens) in PUBLISHED.items():
        runs[name] = lambda run=run, tokens=tokens: run(models, prompt=args.prompt, k=args.top_k, tokens=tokens)
    seconds = paired(args, runs)
    read = {name: bytes_per_token(models.policy, scorer) for name, scorer in models.ways().items()}
    rows = {}
    for name, took in seconds.items():
        rows[name] = {
            "ms per token": round(1e3 * statistics.median(took), 2),
            "of unguided": ratio(seconds[UNGUIDED], took),
            "of transformers.generate": ratio(seconds[STOCK], took),
            "limit by bytes": round(read[UNGUIDED] / read[name], 3) if name in read else "",
            "× separate": ratio(took, seconds[SEPARATE]),
        }
    table(f"{dtype}: prompt {args.prompt}, k = {args.top_k}, {args.tokens} tokens", rows)
    return rows


def sweep(args, title, models, values, names, settings, per=lambda value: 1):
    """Milliseconds per token of each way, for each value of one setting."""
    runs = {
        (name, value): lambda name=name, value=value: models.step(name, **settings(value)) / per(value)
        for value in values
        for name in names
    }
    seconds = paired(args, runs, repeats=max(2, args.repeats // 2))
    rows = {
        name: {str(value): round(1e3 * statistics.median(seconds[name, value]), 2) for value in values}
        | {f"{values[-1]} / {values[0]}": ratio(seconds[name, values[-1]], seconds[name, values[0]])}
        for name in names
    }
    table(title, rows)
    return rows


def by_k(args, models, dtype):
    names = [SEPARATE, "fused trunk, scalar head", *HEADS]
    rows = sweep(
        args, f"{dtype}: ms per token by number of candidates", models, [1, 2, 4, 10, 16, 32, 64], names,
        lambda k: {"prompt": args.prompt, "k": k, "tokens": args.tokens // 2},
    )  # fmt: skip
    return {"ms_per_token": rows, "scorer_cache_bytes": {str(k): cache_bytes(args, models, k) for k in (1, 10, 64)}}


@torch.inference_mode()
def cache_bytes(args, models, k):
    """Bytes of the separate scorer's cache after 16 steps over k candidates, and of one column of it."""
    batch = start_batch(models.policy, models.separate, [random_prompt(args, args.prompt)], top_k=k, tokens=18)
    seconds_per_token(batch, 16)
    cache = batch.separate["scorer"].runner.runner.cache
    return {"bytes": cache.nbytes, "columns": cache.capacity, "bytes_per_column": cache.nbytes // cache.capacity}


def by_prompt(args, models, dtype):
    names = [UNGUIDED, SEPARATE, "fused trunk, scalar head", "vocabulary head on the policy"]
    lengths = [64, 128, 512, 1024, 4096]
    rows = sweep(
        args, f"{dtype}: ms per token by prompt length", models, lengths, names,
        lambda length: {"prompt": length, "k": args.top_k, "tokens": args.tokens // 4},
    )  # fmt: skip
    loops = {"loop: whole text per candidate": whole_text, "loop: k copies of the cache": cache_copies}
    runs = {name: lambda f=f: published(f)(models, prompt=512, k=args.top_k, tokens=1) for name, f in loops.items()}
    runs[SEPARATE] = lambda: models.step(SEPARATE, prompt=512, k=args.top_k, tokens=args.tokens // 4)
    seconds = paired(args, runs, repeats=3)
    slower = {name: ratio(took, seconds[SEPARATE]) for name, took in seconds.items()}
    return {"ms_per_token": rows, "times_slower_than_separate_at_512": slower}


def by_batch(args, models, dtype):
    names = [
        UNGUIDED,
        SEPARATE,
        "fused trunk, scalar head",
        "state head on the policy",
        "vocabulary head on the policy",
    ]
    return sweep(
        args, f"{dtype}: ms per token by batch", models, [1, 2, 4, 8, 16, 32], names,
        lambda batch: {"prompt": args.prompt, "k": args.top_k, "tokens": args.tokens // 4, "batch": batch},
        per=lambda batch: batch,
    )  # fmt: skip


def by_draft(args, models, dtype):
    """Speculation where the scorer costs four times the policy: unguided drafts, a new seed each repeat."""
    lay = pack_linears if args.pack else (lambda model: model)
    small = Policy(lay(build(args, dtype, LlamaForCausalLM, 3, layers=args.layers // 3, width=args.width // 2)), None)
    scorer = models.separate
    betas = {f"beta {beta:g}": beta for beta in (0.5, 1.0, 2.0, 8.0)}

    longest, prompt = args.prompt + 2 * args.tokens, random_prompt(args, args.prompt)

    def run(length, beta):
        kept = acceptance.setdefault(length, [])
        drafted = request(prompt, len(kept), k=args.top_k, tokens=2 * args.tokens - 2, names=("scorer",), beta=beta)
        batch = SpeculativeBatch(small, scorer, "policy", longest, top_k=args.top_k, length=length)
        batch.start([drafted])
        batch.step()
        start = time.perf_counter()
        while len(drafted.token_ids) <= args.tokens:
            batch.step()
        kept.append((drafted.accepted, drafted.drafted))
        return (time.perf_counter() - start) / (len(drafted.token_ids) - 1)

    def plain(scorer, beta):
        batch = start_batch(small, scorer, [prompt], top_k=args.top_k, tokens=args.tokens, beta=beta)
        return seconds_per_token(batch, args.tokens)

    results = {}
    for label, beta in betas.items():
        acceptance = {}
        runs = {
            "policy alone": lambda beta=beta: plain(None, beta),
            "plain loop": lambda beta=beta: plain(scorer, beta),
        }
        lengths = {f"draft {n}": n for n in (1, 2, 3, 4, 6)} | {"adaptive": None}
        runs |= {name: lambda n=n, beta=beta: run(n, beta) for name, n in lengths.items()}
        seconds = paired(args, runs)
        rows = {}
        for name, took in seconds.items():
            counted = acceptance[lengths[name]] if name in lengths else []
            kept, tried = sum(a for a, _ in counted), sum(b for _, b in counted)
            rows[name] = {
                "ms per token": round(1e3 * statistics.median(took), 2),
                "× plain loop": ratio(seconds["plain loop"], took),
                "accepted": round(kept / tried, 3) if tried else "",
                "drafted per run": round(tried / len(counted), 1) if counted else "",
            }
        table(f"{dtype}: speculation, scorer dearer than the policy, {label}", rows)
        results[label] = rows
    return results


PARTS = {"base": base, "k": by_k, "prompt": by_prompt, "batch": by_batch, "draft": by_draft}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--pack", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    for name, value in {
        "layers": 12, "width": 768, "vocab": 32000, "prompt": 128, "top-k": 10, "tokens": 64, "repeats": 5,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = {"memory_bandwidth_gb_per_s": round(memory_bandwidth(torch.device(args.device)) / 1e9, 1)}
    for dtype in args.dtypes:
        models = Models(args, dtype)
        results[dtype] = {part: PARTS[part](args, models, dtype) for part in args.parts}
    settings = vars(args) | {"output": args.output and args.output.name}
    record = {"benchmark": "decode", "settings": settings, "torch": torch.__version__, "results": results}
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
