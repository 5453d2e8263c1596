"""Methods that sample or search whole texts, beside token-wise guidance and best-of-n, on the stories of stories.py.

    python benchmarks/sequence_level.py --policy FOLDER_OF_A_STORY_MODEL --output OUT.json [--seeds 0 1 2]

A vocabulary head and a reward model of its own, trained on prefixes of pairs that a gold reward on whole stories
labelled with Bradley–Terry noise, serve every method in turn. All complete the same unseen prompts. Gold reward, KL to
the policy (whole, and cut to ten candidates) and calls are reported for every strength, so that methods can be compared
at equal KL or at equal cost.
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

SCORERS = {
    "vocabulary head": {"trunk": "own", "head": "vocab", "layer": "final"},
    "prefix-bt": {"trunk": "separate", "train": {"num_train_epochs": 3, "learning_rate": 1e-3,
                                                 "per_device_train_batch_size": 32}},
}  # fmt: skip


def runs_of(scorer):
    """All strengths of all methods with one scorer."""
    return expand_runs([
        CompareRun(method="best-of-n", n=8, scorer=scorer),
        CompareRun(method="pargs", beta=[1, 2, 4, 8], scorer=scorer),
        CompareRun(method="pargs", label="pargs, budget", kl_budget=[8, 16], scorer=scorer),
        CompareRun(method="smc", label="smc, pargs, n=8", n=8, beta=[1, 2, 4, 8, 16], scorer=scorer),
        CompareRun(method="smc", label="smc, policy, n=8", n=8, beta=[1, 2, 4, 8, 16], scorer=scorer,
                   proposal="policy"),
        CompareRun(method="beam", n=4, beta=[1, 4], scorer=scorer),
    ])  # fmt: skip


def story_rewards(done):
    """The gold reward of whole stories."""
    return [stories.gold(c.prompt + c.text) for c in done]


def measure(policy, scorer, run, test, settings, name, gold=story_rewards):
    """One run, in a few figures."""
    start = time.process_time()
    row = run_method(policy, scorer, run, test, settings, gold)
    found = {metric: round(value.mean, 3) for metric, value in row.metrics.items()}
    reward = row.metrics["reward"]
    figures = {
        "scorer": name, "label": row.label, "reward": found["reward"],
        "interval": [round(reward.low, 3), round(reward.high, 3)], "kl_nats": found["kl_nats"],
        "kl_cut_nats": found.get("kl_cut_nats"), "length": found["length_tokens"],
        "policy_calls_per_token": round(row.policy_calls / row.tokens, 2),
        "scorer_calls_per_token": round(row.scorer_calls / row.tokens, 2),
        "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip
    print(settings.seed, figures, flush=True)
    return figures


def one_seed(args, policy, seed):
    """Train both scorers, and measure every run with each."""
    everything = stories.make_prompts(policy, args.pairs + args.prompts + 200, seed)
    test, rest = everything[: args.prompts], everything[args.prompts :]
    pairs = stories.make_pairs(policy, rest, args.tokens, seed)
    settings = CompareSettings(
        prompts=Path("-"), reward="gold", methods=[CompareRun(method="policy")], output=Path("-"), batch_size=64,
        max_new_tokens=args.tokens, seed=seed, bootstrap=100,
    )  # fmt: skip
    rows = [measure(policy, None, expand_runs([CompareRun(method="policy")])[0], test, settings, "none")]
    evaluations = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stories.write_lines(folder / "held.jsonl", pairs[:200])
        stories.write_lines(folder / "pairs.jsonl", pairs[200:])
        for name, given in SCORERS.items():
            report = train_scorer(
                TrainSettings(
                    pairs=str(folder / "pairs.jsonl"), eval_pairs=str(folder / "held.jsonl"), base=args.policy,
                    seed=seed, output=folder / name, on_bad="skip", **given,
                )
            )  # fmt: skip
            evaluations[name] = report.evaluation
            scorer = load_scorer(str(folder / name), policy=policy, join=True)
            rows += [measure(policy, scorer, run, test, settings, name) for run in runs_of(name)]
    return {"seed": seed, "pairs": len(pairs) - 200, "prompts": len(test), "evaluation": evaluations, "runs": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, default in (("pairs", 3000), ("prompts", 200), ("tokens", 64)):
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
