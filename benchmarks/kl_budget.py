"""How well completions keep to a KL budget: mean KL, what is sampled, and what the cut to the candidates takes.

    python benchmarks/kl_budget.py --policy POLICY --scorer SCORER --prompts PROMPTS.jsonl --output OUT.json \
        --runs 4:all 8:all 8:10
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch

import rgtg
from rgtg.data.prompts import read_prompts
from rgtg.evaluation.provenance import provenance
from rgtg.utils.files import file_checksum


def measure(guided, prompts, budget, max_new_tokens, seed):
    """One run, as figures per completion in nats."""
    start = time.perf_counter()
    done = guided.generate(prompts, seed=seed, max_new_tokens=max_new_tokens, kl_budget=budget)
    share = [len(c.token_ids) / max_new_tokens for c in done]
    spent = [c.expected_kl_nats for c in done]
    ratio = [s / (budget * part) for s, part in zip(spent, share, strict=True)]
    sampled = [c.guided_log_prob - c.policy_log_prob for c in done]
    return {
        "budget": budget, "completions": len(done), "seconds": round(time.perf_counter() - start, 1),
        "mean_share_of_tokens": mean(share), "mean_kl": mean(spent), "mean_budget": mean([budget * s for s in share]),
        "mean_kl_over_budget": mean(ratio), "sd_kl_over_budget": round(statistics.pstdev(ratio), 4),
        "mean_sampled": mean(sampled), "error_of_mean_sampled": round(statistics.stdev(sampled) / len(done) ** 0.5, 3),
        "mean_cut": mean([c.candidates_log_prob - c.policy_log_prob for c in done]),
    }  # fmt: skip


def mean(values):
    return round(statistics.fmean(values), 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("policy", "scorer", "prompts", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--runs", nargs="+", default=["8:all"], metavar="NATS:K", help="budgets and candidates")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = read_prompts(Path(args.prompts))[: args.limit]
    runs = []
    for run in args.runs:
        nats, k = run.split(":")
        top_k = None if k == "all" else int(k)
        guided = rgtg.GuidedPolicy.from_pretrained(args.policy, scorer=args.scorer, top_k=top_k)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = measure(guided, prompts, float(nats), args.max_new_tokens, args.seed)
        warned = [str(one.message) for one in caught if "kl_budget" in str(one.message)]
        runs.append({"top_k": top_k, **found, "warned": warned})
        print(json.dumps(runs[-1]), flush=True)
    about = provenance(
        command="python benchmarks/kl_budget.py", settings=vars(args), seed=args.seed,
        models={"policy": guided.policy.model}, data={"prompts": str(file_checksum(Path(args.prompts)))},
    )  # fmt: skip
    made = {"made_with": about.model_dump(mode="json"), "runs": runs}
    Path(args.output).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
