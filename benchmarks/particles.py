"""What smc costs beside best-of-n: seconds and bytes of KV cache per prompt, for n completions each.

    python benchmarks/particles.py --policy POLICY --scorer SCORER --prompts PROMPTS.jsonl --output OUT.json

The ways take turns, and of each the fastest turn counts. Seconds are of the process (``time.process_time``), so that
other work on the machine disturbs little.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch

import rgtg
from rgtg.data.prompts import read_prompts
from rgtg.decoding.runners.kv_cache import TreeCache
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.base import load_scorer

WAYS = {
    "best-of-n": {"method": "best-of-n"},
    "smc, policy, every 16": {"method": "smc", "proposal": "policy", "segment_length": 16},
    "smc, policy, every token": {"method": "smc", "proposal": "policy", "segment_length": 1},
    "smc, pargs": {"method": "smc", "proposal": "pargs"},
}


class Caches:
    """Bytes of all KV caches that are made while it is entered."""

    def __enter__(self):
        self.found, self.reset = {}, TreeCache.reset

        def noted(cache, rows):
            self.found[id(cache)] = cache
            self.reset(cache, rows)

        TreeCache.reset = noted
        return self

    def __exit__(self, *_):
        TreeCache.reset = self.reset

    @property
    def nbytes(self):
        return sum(cache.nbytes for cache in self.found.values())


def measure(policy, scorer, prompts, args):
    """The fastest of some turns of each way."""
    guided = {}
    for name, way in WAYS.items():
        guided[name] = rgtg.GuidedPolicy(policy, scorer, method=way["method"], n=args.n)
    settings = {"max_new_tokens": args.max_new_tokens, "min_new_tokens": args.max_new_tokens, "seed": 0}
    found = {name: {"seconds": float("inf")} for name in WAYS}
    for turn in range(args.turns + 1):  # the first one warms up
        for name, way in WAYS.items():
            given = {key: value for key, value in way.items() if key != "method"}
            if way["method"] == "smc":
                given["beta"] = args.beta
            with Caches() as caches:
                start = time.process_time()
                done = [guided[name].generate(prompt, **settings, **given)[0] for prompt in prompts]
                seconds = (time.process_time() - start) / len(prompts)
            if turn:
                figures = {"seconds": seconds, "cache_mib": round(caches.nbytes / len(prompts) / 2**20, 1)}
                figures |= {"policy_calls": done[0].policy_calls, "scorer_calls": done[0].scorer_calls}
                found[name] = min(found[name], figures, key=lambda one: one["seconds"])
                print(name, {key: round(value, 3) for key, value in figures.items()}, flush=True)
    for one in found.values():
        one["of_best_of_n"] = round(one["seconds"] / found["best-of-n"]["seconds"], 3)
        one["seconds"] = round(one["seconds"], 3)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("policy", "scorer", "prompts", "output"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("n", 8), ("limit", 2), ("turns", 3), ("max-new-tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--beta", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    policy = load_policy(args.policy)
    scorer = load_scorer(args.scorer, policy=policy)
    prompts = read_prompts(Path(args.prompts))[: args.limit]
    found = measure(policy, scorer, prompts, args)
    about = provenance(
        command="python benchmarks/particles.py", settings=vars(args), seed=0, models={"policy": policy.model}, data={}
    )
    made = {"made_with": about.model_dump(mode="json"), "ways": found}
    Path(args.output).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
