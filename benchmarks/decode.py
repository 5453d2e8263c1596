"""Tokens per second of guided decoding against unguided decoding and against the loops others publish.

    python benchmarks/decode.py [--dtype bf16] [--layers 12] [--width 768] [--prompt 128] [--top-k 10] [--repeats 5]

Policy and scorer are Llama-shaped with random weights. Every variant decodes in turn, repeat after repeat, so that a
machine that changes speed changes it for all; figures are medians of paired ratios. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rgtg.config import DecodingSettings
from rgtg.decoding.requests import Request, Stopping
from rgtg.decoding.runner import TreeRunner, policy_logits, scorer_scores
from rgtg.decoding.tokenwise import TokenRule, decode

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(args, head):
    config = LlamaConfig(
        hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64, intermediate_size=args.width * 8 // 3, vocab_size=args.vocab,
        max_position_embeddings=8192, num_labels=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return head(config).to(DTYPES[args.dtype]).eval().requires_grad_(False)


def ours(policy, scorer, prompt, args, tokens):
    """rgtg's loop; scorer None is the unguided policy."""
    capacity = len(prompt) + tokens + args.top_k
    runners = [TreeRunner(policy, policy_logits, capacity)]
    runners += [TreeRunner(scorer, scorer_scores, capacity)] if scorer else []
    request = Request("", prompt, 0, [])
    stopping = Stopping(None, set(), DecodingSettings(max_new_tokens=tokens + 1))
    rule = TokenRule(beta=1.0, top_k=args.top_k, top_p=1.0, temperature=1.0, greedy=False)
    logits = runners[0].prefill([prompt])
    if scorer:
        runners[1].prefill([prompt])
    steps = decode([request], runners[0], runners[1] if scorer else None, logits, rule, stopping)
    next(steps)
    start = time.perf_counter()
    for _ in range(tokens - 1):
        next(steps)
    return (time.perf_counter() - start) / (tokens - 1)


@torch.inference_mode()
def transformers_generate(policy, scorer, prompt, args, tokens):
    """Unguided ``generate``: time of many tokens less time of few, so that the prompt does not count."""
    ids = torch.tensor([prompt])
    times = []
    for n in (2, tokens + 1):
        start = time.perf_counter()
        policy.generate(ids, do_sample=True, top_k=args.top_k, min_new_tokens=n, max_new_tokens=n, pad_token_id=0)
        times.append(time.perf_counter() - start)
    return (times[1] - times[0]) / (tokens - 1)


def naive(score):
    """A published loop: the policy keeps its cache, ``score`` gives the candidates' scores in its own way."""

    @torch.inference_mode()
    def run(policy, scorer, prompt, args, tokens):
        ids = torch.tensor([prompt])
        out = policy(ids, use_cache=True, logits_to_keep=1)
        cache, state = out.past_key_values, {}
        start = time.perf_counter()
        for _ in range(tokens):
            log_probs, candidates = out.logits[0, -1].float().log_softmax(-1).topk(args.top_k)
            scores = score(scorer, ids, candidates, state)
            chosen = candidates[torch.multinomial((log_probs + scores.float()).softmax(-1), 1)]
            ids = torch.cat([ids, chosen[None]], 1)
            out = policy(chosen[None], past_key_values=cache, use_cache=True)
        return (time.perf_counter() - start) / tokens

    return run


def whole_text(scorer, ids, candidates, state):
    rows = torch.cat([ids.expand(len(candidates), -1), candidates[:, None]], 1)
    return torch.cat([scorer(row[None]).logits[0] for row in rows])


def whole_text_batched(scorer, ids, candidates, state):
    return scorer(torch.cat([ids.expand(len(candidates), -1), candidates[:, None]], 1)).logits[:, 0]


def cache_copies(scorer, ids, candidates, state):
    """The scorer's cache is kept and copied once per candidate."""
    k = len(candidates)
    if "cache" not in state:
        state["cache"] = scorer.model(ids, use_cache=True).past_key_values
        state["cache"].batch_repeat_interleave(k)
    else:  # the token chosen last enters every copy
        scorer.model(ids[:, -1:].expand(k, -1), past_key_values=state["cache"], use_cache=True)
    states = scorer.model(candidates[:, None], past_key_values=state["cache"], use_cache=True).last_hidden_state
    state["cache"].crop(-1)
    return scorer.score(states)[:, -1, 0]


VARIANTS = {
    "unguided (rgtg)": (ours, None, False),
    "unguided (transformers.generate)": (transformers_generate, None, False),
    "guided (rgtg, one tree pass)": (ours, "scorer", False),
    "guided, k copies of the cache": (naive(cache_copies), "scorer", False),
    "guided, whole texts in one batch": (naive(whole_text_batched), "scorer", True),
    "guided, whole text per candidate": (naive(whole_text), "scorer", True),
}


def measure(args):
    policy, scorer = build(args, LlamaForCausalLM), build(args, LlamaForSequenceClassification)
    prompt = torch.randint(3, args.vocab, (args.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    seconds = {name: [] for name in VARIANTS}
    for repeat in range(args.repeats + 1):
        for name, (run, role, slow) in VARIANTS.items():
            tokens = args.slow_tokens if slow else args.tokens
            took = run(policy, scorer if role else None, prompt, args, tokens)
            if repeat:  # the first round warms up
                seconds[name].append(took)
    return seconds


def summarise(seconds):
    base, guided = seconds["unguided (rgtg)"], seconds["guided (rgtg, one tree pass)"]
    return {
        name: {
            "ms_per_token": round(1e3 * statistics.median(times), 2),
            "of_unguided": round(statistics.median(b / t for b, t in zip(base, times, strict=True)), 3),
            "times_slower_than_guided": round(statistics.median(t / g for t, g in zip(times, guided, strict=True)), 2),
        }
        for name, times in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    for name, value in {
        "layers": 12, "width": 768, "vocab": 32000, "prompt": 128, "top-k": 10, "tokens": 64, "slow-tokens": 4,
        "repeats": 5,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    summary = summarise(measure(args))
    table = Table("variant", "ms per token", "of unguided speed", "× slower than ours guided")
    for name, row in summary.items():
        table.add_row(name, *(str(v) for v in row.values()))
    Console(stderr=True).print(table)
    print(json.dumps({"benchmark": "decode", "settings": vars(args), "torch": torch.__version__, "results": summary}))


if __name__ == "__main__":
    main()
