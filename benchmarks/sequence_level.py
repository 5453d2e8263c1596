"""Methods that sample or search whole texts, beside token-wise guidance and best-of-n, on the stories of stories.py.

    python benchmarks/sequence_level.py --policy FOLDER_OF_A_STORY_MODEL --output OUT.json [--seeds 0 1 2]

One vocabulary head, trained on pairs that a gold reward on whole stories labelled with Bradley–Terry noise, serves every
method. All complete the same unseen prompts. Gold reward, KL to the policy cut to ten candidates, and calls are reported
for every strength, so that methods can be compared at equal KL or at equal cost.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch

import stories
from rgtg.config import CompareRun, CompareSettings, TrainSettings
from rgtg.evaluation.compare.comparison import run_method
from rgtg.evaluation.compare.grid import expand_runs
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.base import load_scorer
from rgtg.training.train import train_scorer

RUNS = [
    CompareRun(method="policy"),
    CompareRun(method="best-of-n", n=8, scorer="head"),
    CompareRun(method="pargs", beta=[0.5, 1, 2, 4, 8], scorer="head"),
    CompareRun(method="smc", label="smc, pargs, n=8", n=8, beta=[0.5, 1, 2, 4], scorer="head"),
    CompareRun(method="smc", label="smc, policy, n=8", n=8, beta=[0.5, 1, 2, 4], proposal="policy", scorer="head"),
    CompareRun(method="smc", label="smc, pargs, n=8, finished apart", n=8, beta=[1, 2], resample_finished=False,
               scorer="head"),
    CompareRun(method="pargs", label="pargs, budget", kl_budget=[12, 20], scorer="head"),
    CompareRun(method="beam", n=4, beta=[1, 4], scorer="head"),
]  # fmt: skip


def one_seed(args, policy, seed):
    """Train a head, and measure every run with it."""
    everything = stories.make_prompts(policy, args.pairs + args.prompts + 100, seed)
    test, rest = everything[: args.prompts], everything[args.prompts :]
    pairs = stories.make_pairs(policy, rest, args.tokens, seed)
    settings = CompareSettings(
        prompts=Path("-"), reward="gold", methods=[CompareRun(method="policy")], output=Path("-"), batch_size=64,
        max_new_tokens=args.tokens, seed=seed, bootstrap=100,
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stories.write_lines(folder / "held.jsonl", pairs[:100])
        stories.write_lines(folder / "pairs.jsonl", pairs[100:])
        report = train_scorer(
            TrainSettings(
                pairs=str(folder / "pairs.jsonl"), eval_pairs=str(folder / "held.jsonl"), base=args.policy, seed=seed,
                output=folder / "head", on_bad="skip", trunk="own", head="vocab", layer="final",
            )
        )  # fmt: skip
        scorer = load_scorer(str(folder / "head"), policy=policy, join=True)
        for run in expand_runs(RUNS):
            start = time.process_time()
            row = run_method(
                policy, scorer if run.scorers else None, run, test, settings,
                lambda done: [stories.gold(c.prompt + c.text) for c in done],
            )  # fmt: skip
            found = {name: round(value.mean, 3) for name, value in row.metrics.items()}
            rows.append({
                "label": row.label, "reward": found["reward"], "kl_nats": found["kl_nats"],
                "kl_cut_nats": found.get("kl_cut_nats"), "tokens": row.tokens, "length": found["length_tokens"],
                "policy_calls_per_token": round(row.policy_calls / row.tokens, 2),
                "scorer_calls_per_token": round(row.scorer_calls / row.tokens, 2),
                "cpu_seconds": round(time.process_time() - start, 1),
            })  # fmt: skip
            print(seed, rows[-1], flush=True)
    return {"seed": seed, "pairs": len(pairs) - 100, "evaluation": report.evaluation, "runs": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, default in (("pairs", 1000), ("prompts", 64), ("tokens", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    policy = load_policy(args.policy, dtype="float32", device="cpu")
    found = []
    about = provenance(
        command="python benchmarks/sequence_level.py", settings={k: str(v) for k, v in vars(args).items()}, seed=None,
        models={"policy": policy.model}, data={},
    )  # fmt: skip
    for seed in args.seeds:
        found.append(one_seed(args, policy, seed))
        made = {"made_with": about.model_dump(mode="json"), "seeds": found}
        args.output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
