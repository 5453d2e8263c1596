"""Which audit figure predicts the gain of guidance? A dozen scorers are audited in both ways and then guide.

    python benchmarks/audit_predicts.py --policy FOLDER_OF_A_STORY_MODEL [--work FOLDER] [--golds story alliteration]

Policy, prompts, pairs and golds are those of scorers_by_weight.py. The scorers differ in objective, kind, number of
pairs and epochs; one is untrained and one saw shuffled labels. Each is audited on held-out pairs and on the candidates
of held-out prefixes (with roll-outs of the policy, made once). Then it guides the policy (pargs, k = 10, 64 tokens,
sampled) on new prompts, with the beta that costs ``--kl`` nats per completion (to the policy renormalised over its
candidates), found on other prompts. The gain over the unguided cut policy is scaled to that KL by its square root. The
figures that are correlated with it (FIGURES) were fixed before any run. Finished parts are kept in the work folder, so
that a run that was stopped can continue.
"""

import argparse
import json
import math
import random
import time
import warnings
from pathlib import Path

import torch

import stories
from rgtg import GuidedPolicy
from rgtg.config import TrainSettings
from rgtg.evaluation.audit.candidate_ranking import audit_rollouts
from rgtg.evaluation.audit.candidate_rollouts import make_rollouts, rescore_rollouts
from rgtg.evaluation.audit.prefix_accuracy import audit_prefixes
from rgtg.evaluation.audit.ranking_metrics import mid_ranks
from rgtg.evaluation.metrics import bootstrap_interval, paired_difference
from rgtg.evaluation.plots import COLOURS, new_figure
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import load_policy
from rgtg.models.scorers.base import load_scorer
from rgtg.training.train import train_scorer
from rgtg.utils.files import write_text
from scorers_by_weight import GOLDS

SEPARATE = {"trunk": "separate", "train": {"num_train_epochs": 3, "learning_rate": 1e-3}}
ONCE = {"trunk": "separate", "train": {"num_train_epochs": 1, "learning_rate": 1e-3}}
STATE, VOCABULARY = {"trunk": "own", "head": "state"}, {"trunk": "own", "head": "vocab"}
FEW = 400
# name → (settings of rgtg train, training pairs or None for all, shuffled labels)
SCORERS = {
    "prefix-bt": (SEPARATE, None, False),
    "prefix-bt, 1 epoch": (ONCE, None, False),
    "prefix-bt, few pairs": (SEPARATE, FEW, False),
    "full-bt": (SEPARATE | {"objective": "full-bt"}, None, False),
    "full-bt, 1 epoch": (ONCE | {"objective": "full-bt"}, None, False),
    "adapter": ({"trunk": "shared", "train": {"num_train_epochs": 3, "learning_rate": 3e-3}}, None, False),
    "state head": (STATE, None, False),
    "state head, few pairs": (STATE, FEW, False),
    "vocabulary head": (VOCABULARY, None, False),
    "vocabulary head, few pairs": (VOCABULARY, FEW, False),
    "shuffled labels": (ONCE, None, True),
    "untrained": (SEPARATE | {"train": {"max_steps": 1, "learning_rate": 1e-12}}, FEW, False),
}
# What is correlated with the gain: name → reader of one scorer's record.
FIGURES = {
    "pair accuracy, first half": lambda r: mean(p["accuracy"]["mean"] for p in r["pairs"]["by_fraction"][:5]),
    "pair accuracy, whole": lambda r: r["pairs"]["full_accuracy"]["mean"],
    "Spearman of candidates": lambda r: r["rollouts"]["overall"]["spearman"]["mean"],
    "Kendall of candidates": lambda r: r["rollouts"]["overall"]["kendall"]["mean"],
    "1 − normalised regret, argmax": lambda r: 1 - r["rollouts"]["overall"]["scorer"]["normalised_regret"]["mean"],
    "gain per token at equal KL": lambda r: r["rollouts"]["overall"]["guided"]["gain"]["mean"],
}
PLAIN = "pair accuracy, first half"
CONTROLS = ("shuffled labels", "untrained")
SHOWN = ("pair accuracy, first half", "pair accuracy, whole", "Spearman of candidates", "gain per token at equal KL")


def mean(values):
    known = [v for v in map(float, values) if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def cached(path, make):
    """The JSON at ``path``, made first where it is not there."""
    if not path.exists():
        write_text(path, json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def split_prompts(policy, args):
    """Disjoint prompts by use."""
    sizes = {"test": args.prompts, "tuning": args.tuning, "rollouts": args.rollout_prompts, "pairs": args.pairs + 500}
    everything = stories.make_prompts(policy, sum(sizes.values()), args.seed)
    uses = {}
    for use, size in sizes.items():
        uses[use], everything = everything[:size], everything[size:]
    return uses


def train(name, args, folder, pairs):
    settings, count, shuffled = SCORERS[name]
    output = folder / name.replace(", ", "-").replace(" ", "-")
    if (output / "rgtg.json").exists():
        return output, 0.0
    rows = pairs[500:][:count]
    if shuffled:
        flip = random.Random(args.seed)
        rows = [r if flip.random() < 0.5 else r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    stories.write_lines(folder / "train.jsonl", rows)
    stories.write_lines(folder / "held.jsonl", pairs[:500])
    batch = {"per_device_train_batch_size": 32} if settings["trunk"] != "own" else {}
    start = time.perf_counter()
    train_scorer(
        TrainSettings(
            pairs=str(folder / "train.jsonl"), eval_pairs=str(folder / "held.jsonl"), base=args.policy, seed=args.seed,
            output=output, on_bad="skip", **settings | {"train": batch | settings.get("train", {})},
        )
    )  # fmt: skip
    return output, time.perf_counter() - start


def guide(policy, scorer, beta, prompts, gold, args, seed):
    """Gold of every completion, and the KL in nats per completion to the policy cut to its candidates."""
    method = {"method": "pargs", "beta": beta} if scorer is not None else {"method": "policy"}
    done = GuidedPolicy(policy, scorer, top_k=10, **method).generate(
        prompts, seed=seed, batch_size=100, max_new_tokens=args.tokens
    )
    kl = mean(c.guided_log_prob - c.candidates_log_prob for c in done)
    return [gold(c.prompt + c.text) for c in done], kl


def match_kl(policy, scorer, beta, prompts, gold, args):
    """The beta that costs ``--kl``, from a first guess: KL grows about as its square."""
    for attempt in range(4):
        kl = guide(policy, scorer, beta, prompts, gold, args, args.seed + attempt)[1]
        if abs(math.log(max(kl, 1e-3) / args.kl)) < 0.1:
            break
        beta *= min(4.0, max(0.25, math.sqrt(args.kl / max(kl, 1e-3))))
    return beta


def examine(name, args, folder, prompts, pairs, rollouts, gold, policy):
    """Train one scorer, audit it both ways, and guide with it."""
    trained, seconds = train(name, args, folder, pairs)
    own = policy if SCORERS[name][0]["trunk"] == "own" else None
    alone = load_scorer(str(trained), policy=own)
    by_pairs = audit_prefixes(alone, folder / "held.jsonl", on_bad="skip", seed=args.seed, batch_size=32)
    by_rollouts = audit_rollouts(alone, rollouts, seed=args.seed)
    joined = load_scorer(str(trained), policy=policy, join=True)
    beta = match_kl(policy, joined, by_rollouts.beta, prompts["tuning"], gold, args)
    golds, kl = guide(policy, joined, beta, prompts["test"], gold, args, args.seed)
    print(f"{name}: gold {mean(golds):.3f} at {kl:.2f} nats; {by_rollouts.verdict}", flush=True)
    drop = {"provenance", "by_tokens"}
    return {
        "scorer": name, "seconds": round(seconds, 1), "beta": beta, "kl_nats": kl, "golds": golds,
        "pairs": by_pairs.model_dump(mode="json", exclude=drop),
        "rollouts": by_rollouts.model_dump(mode="json", exclude=drop),
    }  # fmt: skip


def one_gold(name, args, policy, prompts, rollouts):
    gold = stories.gold = GOLDS[name]
    folder = args.work / name
    folder.mkdir(parents=True, exist_ok=True)
    pairs = cached(folder / "pairs.json", lambda: stories.make_pairs(policy, prompts["pairs"], args.tokens, args.seed))
    unguided = cached(
        folder / "unguided.json", lambda: guide(policy, None, None, prompts["test"], gold, args, args.seed)[0]
    )
    scored = rescore_rollouts(rollouts, gold)
    records = []
    for scorer in SCORERS:
        part = folder / f"{scorer}.json"
        record = cached(part, lambda s=scorer: examine(s, args, folder, prompts, pairs, scored, gold, policy))
        golds = record.pop("golds")
        record["rollouts"].pop("by_position")
        gain = paired_difference(golds, unguided, seed=args.seed).model_dump()
        # the KL is not exactly --kl: to first order the gain grows with its square root
        scale = math.sqrt(args.kl / record["kl_nats"])
        matched = {k: v if k == "n" else v * scale for k, v in gain.items()}
        records.append(record | {"gold": mean(golds), "gain": gain, "gain_at_kl": matched})
    return {"gold": name, "unguided": bootstrap_interval(unguided).model_dump(), "scorers": records}


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def correlate(groups, seed, resamples=2000):
    """Spearman and Pearson over the scorers of each gold, averaged over golds, and the same of resampled scorers.

    ``groups`` holds one (figures, gains) per gold. The same scorers are drawn for every gold, and for every figure.
    """
    draw = torch.Generator().manual_seed(seed)
    count = len(groups[0][0])

    def both(chosen):
        found = []
        for x, y in groups:
            x, y = torch.tensor(x, dtype=torch.float64)[chosen], torch.tensor(y, dtype=torch.float64)[chosen]
            found.append((pearson(mid_ranks(x[None])[0], mid_ranks(y[None])[0]), pearson(x, y)))
        return torch.tensor(found, dtype=torch.float64).mean(0)

    drawn = [both(torch.randint(count, (count,), generator=draw)) for _ in range(resamples)]
    return both(torch.arange(count)), torch.stack(drawn), count


def described(found, drawn, count):
    bounds = torch.nanquantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return {
        kind: {"mean": float(found[i]), "low": float(bounds[0, i]), "high": float(bounds[1, i]), "n": count}
        for i, kind in enumerate(("spearman", "pearson"))
    }


def tabulate(results, seed, without=()):
    """Correlation of every figure with the gain, by gold and averaged; and how much it exceeds that of PLAIN."""
    table = {}
    for name, read in FIGURES.items():
        groups = []
        for result in results:
            kept = [r for r in result["scorers"] if r["scorer"] not in without]
            groups.append(([read(r) for r in kept], [r["gain_at_kl"]["mean"] for r in kept]))
        parts = {result["gold"]: [group] for result, group in zip(results, groups, strict=True)}
        table[name] = {part: correlate(some, seed) for part, some in (parts | {"mean of golds": groups}).items()}
    found = {name: {part: described(*of) for part, of in row.items()} for name, row in table.items()}
    for name, row in ((n, r) for n, r in table.items() if n != PLAIN):
        (here, drawn, count), (other, others, _) = row["mean of golds"], table[PLAIN]["mean of golds"]
        found[name][f"less that of {PLAIN}"] = described(here - other, drawn - others, count)
    return found


def plot(results, path):
    """Gain against four audit figures, one row of panels per gold."""
    figure, _ = new_figure(12.8, 3.6 * len(results))
    figure.clear()
    panels = figure.subplots(len(results), len(SHOWN), squeeze=False)
    for line, result in zip(panels, results, strict=True):
        for axes, name in zip(line, SHOWN, strict=True):
            for i, record in enumerate(result["scorers"]):
                gain = record["gain_at_kl"]
                bars = [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]]
                style = {"color": COLOURS[i % len(COLOURS)], "marker": "os"[i // len(COLOURS)], "capsize": 2}
                label = record["scorer"]
                axes.errorbar([FIGURES[name](record)], [gain["mean"]], yerr=bars, linestyle="", label=label, **style)
            axes.axhline(0, color="grey", linestyle=":")
            axes.set_xlabel(name)
        line[0].set_ylabel(f"gain in gold ({result['gold']})")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": ""})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("audit-predicts-work"))
    parser.add_argument("--golds", nargs="+", choices=list(GOLDS), default=list(GOLDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--tuning", type=int, default=50)
    parser.add_argument("--rollout-prompts", type=int, default=400)
    parser.add_argument("--prefixes", type=int, default=400)
    parser.add_argument("--per-candidate", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--kl", type=float, default=5.0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    policy = load_policy(args.policy, dtype="float32", device="cpu")
    prompts = split_prompts(policy, args)
    start = time.perf_counter()
    rollouts = make_rollouts(
        policy, prompts["rollouts"], GOLDS["story"], path=args.work / "rollouts.jsonl", prefixes=args.prefixes,
        per_candidate=args.per_candidate, max_new_tokens=args.tokens, seed=args.seed,
    )  # fmt: skip
    print(f"{len(rollouts.rows)} prefixes rolled out in {time.perf_counter() - start:.0f} s", flush=True)
    results = [one_gold(name, args, policy, prompts, rollouts) for name in args.golds]
    made = provenance(
        command="python benchmarks/audit_predicts.py --policy STORIES260K", seed=args.seed, data={},
        settings=vars(args) | {"policy": Path(args.policy).name, "output": args.output.name, "work": args.work.name},
        models={"policy": policy.model},
    )  # fmt: skip
    record = {
        "what": __doc__.splitlines()[0], "correlations": tabulate(results, args.seed),
        "correlations_without_controls": tabulate(results, args.seed, CONTROLS), "results": results,
        "provenance": made.model_dump(mode="json"),
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "audit-predicts.json", json.dumps(record, indent=1) + "\n")
    plot(results, args.output / "audit-predicts.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
