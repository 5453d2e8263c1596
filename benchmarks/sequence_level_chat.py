"""Methods that sample or search whole texts beside PARGS and best-of-n, on a chat model: the demo's friendly replies.

    OMP_NUM_THREADS=1 python benchmarks/sequence_level_chat.py --policy SMOLLM2 --demo DEMO_OUTPUT --output OUT.json

``--demo`` names the output of ``rgtg demo``, whose pairs train a vocabulary head for every seed (another start, another
order). Each seed draws its own unseen prompts. The gold reward, points for friendliness, reads finished replies and is
read by no method. Strengths were written here before the first run, except the budget: a trial with 16 prompts showed
that the cut to ten candidates takes 7 of the 8 nats that were given first. Thresholds of vfd are quantiles of the
head's scores over all prefixes of the demo's audit pairs.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import torch

from rgtg.config import CompareRun, CompareSettings, TrainSettings
from rgtg.data.pairs import read_pairs, tokenize_pairs
from rgtg.decoding.loading import lay_out_policy
from rgtg.demo.friendliness import friendliness
from rgtg.demo.messages import UNSEEN, draw_prompts
from rgtg.demo.real import as_chat
from rgtg.evaluation.compare.grid import expand_runs
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.base import load_scorer
from rgtg.training.train import train_scorer
from sequence_level import measure

HEAD = {"trunk": "own", "head": "vocab", "layer": "final", "width": 256, "eval_fraction": 0.2}
QUANTILES = (0.25, 0.5)


def runs_of(thresholds):
    """All strengths of all methods."""
    return expand_runs([
        CompareRun(method="best-of-n", n=8, scorer="head"),
        CompareRun(method="pargs", beta=[2, 4], scorer="head"),
        CompareRun(method="pargs", label="pargs, budget", kl_budget=[12], scorer="head"),
        CompareRun(method="smc", label="smc, pargs, n=8", n=8, beta=[2], scorer="head"),
        CompareRun(method="smc", label="smc, policy, n=8", n=8, beta=[4], scorer="head", proposal="policy"),
        CompareRun(method="beam", n=4, beta=[2], scorer="head"),
        *(
            CompareRun(method="vfd", label=f"vfd, quantile {quantile}", value_threshold=threshold, scorer="head")
            for quantile, threshold in thresholds.items()
        ),
    ])  # fmt: skip


def thresholds_of(scorer, policy, pairs):
    """Quantiles of the scores of all prefixes of the pairs' replies."""
    read = read_pairs(str(pairs), tokenizer=policy.tokenizer).pairs
    rows = [row for pair in tokenize_pairs(read, policy.tokenizer) for row in pair.rows]
    scores = torch.cat(scorer.score_prefixes([p for p, _ in rows], [c for _, c in rows], batch_size=16))
    return {quantile: float(scores.quantile(quantile)) for quantile in QUANTILES}


def gold(completions):
    """Points of each reply."""
    return [friendliness(c.messages[-1]["content"], c.text, finished=c.finish_reason == "stop") for c in completions]


def one_seed(args, policy, seed, folder):
    """Train the head, and measure every run."""
    prompts = list(map(as_chat, draw_prompts(UNSEEN, args.prompts, seed)))
    settings = CompareSettings(
        prompts=Path("-"), reward="gold", methods=[CompareRun(method="policy")], output=Path("-"),
        batch_size=args.prompts, max_new_tokens=args.tokens, top_k=10, seed=seed, bootstrap=1000,
    )  # fmt: skip
    report = train_scorer(
        TrainSettings(
            pairs=str(args.demo / "pairs.jsonl"), base=str(args.policy), seed=seed, output=folder / f"head-{seed}",
            states=folder / "states", **HEAD,
        ),
        show=False,
    )  # fmt: skip
    scorer = load_scorer(str(folder / f"head-{seed}"), policy=policy)
    thresholds = thresholds_of(scorer, policy, args.demo / "audit-pairs.jsonl")
    rows = [measure(policy, None, expand_runs([CompareRun(method="policy")])[0], prompts, settings, "none", gold)]
    rows += [measure(policy, scorer, run, prompts, settings, "head", gold) for run in runs_of(thresholds)]
    return {
        "seed": seed, "prompts": len(prompts), "evaluation": report.evaluation, "thresholds": thresholds,
        "runs": rows,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, type=Path)
    parser.add_argument("--demo", required=True, type=Path, help="output folder of rgtg demo")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, default in (("prompts", 32), ("tokens", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    policy = lay_out_policy(load_policy(str(args.policy), device="cpu"), grouped=False)
    about = provenance(
        command="python benchmarks/sequence_level_chat.py", seed=None, models={"policy": policy.model}, data={},
        settings={"seeds": args.seeds, "prompts": args.prompts, "tokens": args.tokens, "head": HEAD},
    )  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in args.seeds:
            found.append(one_seed(args, policy, seed, Path(temporary)))
            made = {"made_with": about.model_dump(mode="json"), "seeds": found}
            args.output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
