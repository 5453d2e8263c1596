"""Guided stories: every method on unseen prompts, by a gold reward on whole stories that no method saw.

    python benchmarks/stories.py --policy FOLDER_OF_A_STORY_MODEL [--output docs/results] [--seed 0]

Policy: the given pretrained model (docs/results/stories.json was made with llama2.c's stories260K). Pairs: two of its
own sampled completions per prompt, labelled by Bradley–Terry noise on the gold reward. Both scorers start from its
weights, with the same pairs, steps and settings. Gold reward of a whole story, fixed before any run:

    gold = distinct words / 8 + (kind words − harsh words, cut to ±3) / 2 + 1 if it ends with a full stop or quote.

Writes stories.json and stories.png; the command and settings are in the JSON.
"""

import argparse
import json
import math
import random
import re
import tempfile
import warnings
from pathlib import Path

import torch

from rgtg import GuidedPolicy
from rgtg.config import CompareRun, CompareSettings, TrainSettings
from rgtg.evaluation.audit.prefix_accuracy import audit_prefixes
from rgtg.evaluation.compare.comparison import run_method
from rgtg.evaluation.compare.grid import expand_runs
from rgtg.evaluation.plots import COLOURS, draw_intervals, new_figure
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.training.train import train_scorer

KIND = frozenset(
    "happy love loved kind nice good smile smiled hug hugged friend friends help helped fun play played".split()  # noqa: SIM905
)
HARSH = frozenset("sad cry cried mad angry bad scared hurt hit mean afraid broke broken lost".split())  # noqa: SIM905
OPENINGS = ("Once upon a time, there was", "One day,", "Once there was", "In a small house,", "A little")


def gold(text):
    """Reward of a whole story; see the head of this file."""
    words = re.findall(r"[a-z']+", text.lower())
    feeling = sum((w in KIND) - (w in HARSH) for w in words)
    ended = text.rstrip().endswith((".", "!", "?", '"'))
    return len(set(words)) / 8 + max(-3, min(3, feeling)) / 2 + float(ended)


def make_prompts(policy, count, seed):
    """Distinct openings, each a fixed start continued by a few sampled tokens."""
    guided = GuidedPolicy(policy, method="policy", top_k=None)
    starts = [OPENINGS[i % len(OPENINGS)] for i in range(2 * count)]
    done = guided.generate(starts, max_new_tokens=8, seed=seed, batch_size=128)
    texts = [c.prompt + c.text.rstrip() for c in done if c.finish_reason == "length"]
    return list(dict.fromkeys(texts))[:count]


def make_pairs(policy, prompts, tokens, seed):
    guided = GuidedPolicy(policy, method="policy", top_k=None)
    done = guided.generate([p for p in prompts for _ in range(2)], max_new_tokens=tokens, seed=seed, batch_size=128)
    noise = random.Random(seed)
    pairs = []
    for a, b in zip(done[::2], done[1::2], strict=True):
        if not a.text.strip() or not b.text.strip() or a.text == b.text:
            continue
        first = noise.random() < 1 / (1 + math.exp(gold(b.prompt + b.text) - gold(a.prompt + a.text)))
        won, lost = (a, b) if first else (b, a)
        pairs.append({"prompt": a.prompt, "chosen": won.text, "rejected": lost.text})
    return pairs


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(objective, args, folder):
    settings = TrainSettings(
        pairs=str(folder / "pairs.jsonl"), eval_pairs=str(folder / "held.jsonl"), base=args.policy, objective=objective,
        output=folder / objective, seed=args.seed, on_bad="skip",
        train={"num_train_epochs": args.epochs, "learning_rate": args.learning_rate,
               "per_device_train_batch_size": 32},
    )  # fmt: skip
    return train_scorer(settings)


def runs(args):
    return expand_runs(
        [
            CompareRun(method="policy"),
            CompareRun(method="best-of-n", n=10, scorer="full-bt"),
            CompareRun(method="best-of-n", n=10, scorer="prefix-bt", label="best-of-n (prefix-bt)"),
            CompareRun(method="args", beta=args.betas, scorer="full-bt"),
            CompareRun(method="args-sample", beta=args.betas, scorer="full-bt"),
            CompareRun(method="pargs", beta=args.betas, scorer="prefix-bt"),
            CompareRun(method="pargs-greedy", beta=args.betas, scorer="prefix-bt"),
        ]
    )


def plot(results, path):
    """Gold reward against KL, one curve per method, with 95 % intervals."""
    figure, axes = new_figure(7.2, 4.6)
    families = {}
    for row in results:
        families.setdefault(row.label.split(" β=")[0], []).append(row)
    for colour, (label, rows) in zip(COLOURS, families.items(), strict=False):
        x, y = [r.metrics["kl_nats"].mean for r in rows], [r.metrics["reward"] for r in rows]
        draw_intervals(axes, x, y, color=colour, label=label)
    axes.set(xlabel="KL to the policy (nats)", ylabel="gold reward of whole stories")
    axes.legend()
    figure.savefig(path, dpi=150, metadata={"Software": ""})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.5, 1, 2, 4])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    policy = load_policy(args.policy, dtype="float32", device="cpu")
    everything = make_prompts(policy, args.pairs + args.prompts + 500, args.seed)
    test, rest = everything[: args.prompts], everything[args.prompts :]
    print(f"{len(test)} test prompts, {len(rest)} for pairs", flush=True)
    pairs = make_pairs(policy, rest, args.tokens, args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_lines(folder / "held.jsonl", pairs[:500])
        write_lines(folder / "pairs.jsonl", pairs[500:])
        reports = {o: train(o, args, folder) for o in ("full-bt", "prefix-bt")}
        print({o: r.evaluation for o, r in reports.items()}, flush=True)
        scorers = {o: PrefixScorer.from_pretrained(str(folder / o)) for o in reports}
        audits = {
            o: audit_prefixes(s, folder / "held.jsonl", on_bad="skip", seed=args.seed) for o, s in scorers.items()
        }
    settings = CompareSettings(
        prompts=Path("-"), reward="gold", methods=[CompareRun(method="policy")], output=args.output, batch_size=64,
        max_new_tokens=args.tokens, seed=args.seed,
    )  # fmt: skip
    results = []
    for run in runs(args):
        row = run_method(
            policy, scorers.get(run.scorer or ""), run, test, settings,
            lambda done: [gold(c.prompt + c.text) for c in done],
        )  # fmt: skip
        print(row.label, {k: round(v.mean, 3) for k, v in row.metrics.items()}, f"{row.seconds:.0f} s", flush=True)
        results.append(row)
    made = provenance(
        command="python benchmarks/stories.py --policy stories260k", seed=args.seed, data={},
        settings=vars(args) | {"policy": Path(args.policy).name, "output": args.output.name},
        models={"policy": policy.model} | {o: s.model for o, s in scorers.items()},
    )  # fmt: skip
    record = {
        "what": __doc__.splitlines()[0], "prompts": len(test), "pairs": len(pairs) - 500,
        "methods": [r.model_dump() for r in results],
        "training": {o: r.model_dump(exclude={"output", "base"}) for o, r in reports.items()},
        "audits": {o: a.model_dump(exclude={"provenance"}) for o, a in audits.items()},
        "provenance": made.model_dump(),
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "stories.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    plot(results, args.output / "stories.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
