"""Scorers by weight: what each kind of scorer costs and what it gains, on the stories of benchmarks/stories.py.

    python benchmarks/scorers_by_weight.py --policy FOLDER_OF_A_STORY_MODEL [--seeds 0 1] [--golds story alliteration]

Four scorers see the same pairs, labelled with Bradley–Terry noise by a gold reward on whole stories: a model of its
own, an adapter on the policy's trunk, and a state head and a vocabulary head on the frozen policy's states. All guide
the same policy on the same unseen prompts (k = 10, 64 tokens, sampled). Golds, fixed before any run: ``story`` is that
of stories.py; ``alliteration`` counts words that begin with the letter that the word before them begins with, to see
whether heads on a frozen policy keep up where its states have little reason to know the answer.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import tempfile
import time
import warnings
from pathlib import Path

import torch

import stories
from rgtg.config import CompareRun, CompareSettings, TrainSettings
from rgtg.evaluation.benchmark import seconds_per_token, start_batch
from rgtg.evaluation.compare.comparison import run_method
from rgtg.evaluation.compare.grid import expand_runs
from rgtg.evaluation.plots import COLOURS, draw_intervals, new_figure
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.base import load_scorer
from rgtg.training.train import train_scorer
from rgtg.types.base import Interval

KINDS = {
    "separate scorer": {"trunk": "separate", "train": {"num_train_epochs": 3, "learning_rate": 1e-3}},
    "adapter on the policy": {"trunk": "shared", "train": {"num_train_epochs": 3, "learning_rate": 3e-3}},
    "state head": {"trunk": "own", "head": "state"},
    "vocabulary head": {"trunk": "own", "head": "vocab"},
}
BETAS = [1.0, 2.0, 4.0, 8.0, 16.0]


def alliteration(text):
    """Half a point for every word that begins with the letter of the word before it."""
    words = re.findall(r"[a-z']+", text.lower())
    return sum(a[0] == b[0] for a, b in itertools.pairwise(words)) / 2


GOLDS = {"story": stories.gold, "alliteration": alliteration}


def train(name, args, folder, seed):
    settings = dict(KINDS[name])
    batch = {"per_device_train_batch_size": 32} if settings["trunk"] != "own" else {}
    start = time.perf_counter()
    report = train_scorer(
        TrainSettings(
            pairs=str(folder / "pairs.jsonl"), eval_pairs=str(folder / "held.jsonl"), base=args.policy, seed=seed,
            output=folder / name.replace(" ", "-"), on_bad="skip",
            **settings | {"train": batch | settings.get("train", {})},
        )
    )  # fmt: skip
    weights = sum(p.stat().st_size for p in (folder / name.replace(" ", "-")).glob("*.safetensors"))
    facts = {
        "seconds": round(time.perf_counter() - start, 1),
        "weights_bytes": weights,
        "evaluation": report.evaluation,
    }
    return facts | {"choices": [c.model_dump() for c in report.choices]}


def one_gold(name, args, seed):
    """Train every kind of scorer on one gold, and guide with each at every beta; in a process of its own."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    policy = load_policy(args.policy, dtype="float32", device="cpu")
    gold = stories.gold = GOLDS[name]
    everything = stories.make_prompts(policy, args.pairs + args.prompts + 500, seed)
    test, rest = everything[: args.prompts], everything[args.prompts :]
    pairs = stories.make_pairs(policy, rest, args.tokens, seed)
    settings = CompareSettings(
        prompts=Path("-"), reward="gold", methods=[CompareRun(method="policy")], output=args.output, batch_size=64,
        max_new_tokens=args.tokens, seed=seed,
    )  # fmt: skip

    def measure(scorer, run):
        row = run_method(policy, scorer, run, test, settings, lambda done: [gold(c.prompt + c.text) for c in done])
        print(seed, name, row.label, {k: round(v.mean, 3) for k, v in row.metrics.items()}, flush=True)
        return row.model_dump(exclude={"samples"})

    rows = [measure(None, expand_runs([CompareRun(method="policy")])[0])]
    training, milliseconds = {}, {"policy": step_time(policy, None, test, args)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stories.write_lines(folder / "held.jsonl", pairs[:500])
        stories.write_lines(folder / "pairs.jsonl", pairs[500:])
        for kind in KINDS:
            training[kind] = train(kind, args, folder, seed)
            scorer = load_scorer(str(folder / kind.replace(" ", "-")), policy=policy, join=True)
            milliseconds[kind] = step_time(policy, scorer, test, args)
            runs = expand_runs([CompareRun(method="pargs", beta=args.betas, label=kind)])
            rows += [measure(scorer, run) for run in runs]
    return {
        "gold": name, "seed": seed, "pairs": len(pairs) - 500, "prompts": len(test), "training": training,
        "ms_per_token": milliseconds, "methods": rows,
    }  # fmt: skip


def step_time(policy, scorer, prompts, args):
    """Milliseconds per token of one prompt (median of five); this tiny model is all overhead: see decode.json."""
    ids = policy.tokenizer(prompts[0]).input_ids
    took = sorted(seconds_per_token(start_batch(policy, scorer, [ids], top_k=10, tokens=60), 60) for _ in range(5))
    return round(1e3 * took[2], 3)


def plot(results, path):
    """Gold against KL, and gold against time, one curve per kind; one row of panels per gold."""
    golds = list(dict.fromkeys(r["gold"] for r in results))
    figure, axes = new_figure(9.6, 4.2 * len(golds), rows=len(golds), columns=2)
    for (left, right), gold in zip(axes.reshape(-1, 2), golds, strict=True):
        first = next(r for r in results if r["gold"] == gold)
        for colour, kind in zip(COLOURS, ["policy", *KINDS], strict=False):
            rows = [m for m in first["methods"] if m["label"].split(" β=")[0] == kind]
            y = [Interval.model_validate(m["metrics"]["reward"]) for m in rows]
            draw_intervals(left, [m["metrics"]["kl_nats"]["mean"] for m in rows], y, color=colour, label=kind)
            draw_intervals(right, [first["ms_per_token"][kind]], [max(y, key=lambda v: v.mean)], color=colour)
        left.set(xlabel="KL to the policy (nats)", ylabel=f"gold reward ({gold})", xscale="log")
        left.minorticks_off()
        left.set_xticks([5, 10, 20, 50], labels=["5", "10", "20", "50"])
        right.set(xlabel="ms per token, one prompt", ylabel="best gold reward over β")
        left.legend(fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": ""})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--golds", nargs="+", choices=list(GOLDS), default=list(GOLDS))
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    policy = load_policy(args.policy, dtype="float32", device="cpu")
    work = [(gold, args, seed) for gold in args.golds for seed in args.seeds]
    with multiprocessing.get_context("spawn").Pool(min(len(work), os.cpu_count() or 1)) as pool:
        results = pool.starmap(one_gold, work, chunksize=1)
    made = provenance(
        command="python benchmarks/scorers_by_weight.py --policy STORIES260K", seed=args.seeds[0], data={},
        settings=vars(args) | {"policy": Path(args.policy).name, "output": args.output.name},
        models={"policy": policy.model},
    )  # fmt: skip
    record = {"what": __doc__.splitlines()[0], "results": results, "provenance": made.model_dump()}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "scorers-by-weight.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    plot(results, args.output / "scorers-by-weight.png")


if __name__ == "__main__":
    main()
