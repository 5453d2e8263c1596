"""From part files to the committed JSON, and its tables in Markdown."""

import json
import re
from itertools import combinations

import numpy as np
from rouge_score import rouge_scorer

from rgtg import GuidedPolicy
from rgtg.evaluation.metrics import holm
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import load_policy
from rgtg.utils.files import write_text

from .figures import plot_positions, plot_rewards
from .intervals import at_kl, interval, paired, reward_at_kl
from .measure import FRONTIER
from .record import named, restored, slim, spread, whole
from .rows import BY_NAME, REAL, ROWS, chosen
from .worlds import GOLD_NAMES, read_rows

BASE = {"toy": "pargs", "real": "pargs, state head"}  # the row that others are compared with
# The row whose scorer differs in its objective only: it was trained on whole replies.
WHOLE = {
    "pargs": "args-sample", "pargs, adapter": "args-sample, adapter", "pargs, state head": "args-sample, state head",
}  # fmt: skip
COMPARED = {"less_policy": "less the policy", "less_whole": "prefixes less whole replies", "less_dpo": "less dpo"}
PREFACE = """# Tables of the study

Every row of [the study](study.md), made from the committed rows by `python -m benchmarks.study tables --json
docs/results/study-human.json docs/results/study-attributes.json docs/results/second-run/study-human.json
docs/results/second-run/study-attributes.json docs/results/study-stories.json docs/results/study-demo.json >
docs/study-tables.md`.

*Seeds* are those of training, samples and label noise. *β or n* is the value chosen at each seed, written once if it
is the same at all. *at 12 nats* is the reward interpolated on the curve through the unguided policy and all measured
values; it says so if the curves of some seeds do not reach this KL. Bold differences have an interval that excludes 0.
"""
REAL_GOLDS = [gold for track in REAL for gold in GOLD_NAMES[track]]
GUIDED = ("pargs", "args-sample", "pargs, state head", "pargs, vocabulary head", "genarm", "farma", "cd")
HALF = re.compile(r"first half of completions it orders ([\d.]+)% of prefixes correctly \(([\d.]+)% to ([\d.]+)%\)")
EQUAL_KL = {"stories": (6.0, 8.0, 12.0, 16.0), "demo": (6.0, 8.0, 12.0, 16.0)}
EQUAL_KL |= dict.fromkeys(REAL, (12.0, 16.0, 20.0))
COMMANDS = {
    "stories": "python -m benchmarks.study stories --policy STORIES260K --work WORK --seeds 0 1 2 "
    "--passes tuned frontier --rows ROWS",
    "human": "python -m benchmarks.study human --policy SMOLLM2 --judge MINILM --data DATA --work WORK --seeds 0 1 2 3 "
    "--passes tuned frontier --rows ROWS",
    "attributes": "python -m benchmarks.study attributes --policy SMOLLM2 --data DATA --work WORK --seeds 0 1 2 3 "
    "--passes tuned frontier --rows ROWS",
    "demo": "python -m benchmarks.study demo --work WORK --rows policy best-of-n pargs args-sample",
}


def read_cell(folder):
    """One gold and seed: what was trained, and every measured row."""
    gold, seed = folder.name.rsplit("-s", 1)
    facts = lambda pattern: {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob(pattern))}  # noqa: E731
    rows = [json.loads(p.read_text()) for p in sorted((folder / "rows").glob("*/*.json"))]
    before = restored(folder)
    return {
        "gold": gold, "seed": int(seed), "training": before["training"] | facts("scorers/*/train.json"),
        "fine_tuned": before["fine_tuned"] | facts("tuned/*/baseline.json"), "rows": rows,
        "audits": before.get("audits", {}) | {
            p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("audits/*.json"))},
        "pairs": len(read_rows(folder / "pairs.jsonl")) if (folder / "pairs.jsonl").exists() else before["pairs"],
    }  # fmt: skip


def arrays(cells, gold):
    """{row name: {value: {seed: part}}} of the test prompts, and {row name: {seed: tuned value}}.

    Values that were not chosen were measured on the first ``FRONTIER`` of them.
    """
    parts, tuned = {}, {}
    for cell in (c for c in cells if c["gold"] == gold):
        scores, tested = {}, {}
        for part in cell["rows"]:
            if part["split"] == "tune":
                scores.setdefault(part["row"], {})[part["value"]] = part
            else:
                parts.setdefault(part["row"], {}).setdefault(part["value"], {})[cell["seed"]] = part
            if part["split"] == "test":
                tested.setdefault(part["row"], []).append(part["value"])
        for name, values in tested.items():
            row = BY_NAME[name]
            if row.group == "best-of-n":
                best = row.grid_of(REAL[0] if gold in REAL_GOLDS else "stories")[-1]
            elif name in scores and row.group != "policy":
                cut = scores.get("policy", {}).get(None) or parts["policy"][None][cell["seed"]]
                best = chosen(row, scores[name], cut)
            else:
                best = values[0]  # nothing was tuned
            tuned.setdefault(name, {})[cell["seed"]] = best
    return parts, tuned


def stack(parts, tuned, name, field, seeds):
    """(seeds, prompts) of a row at each seed's tuned value; None where one is missing."""
    found = [parts.get(name, {}).get(tuned.get(name, {}).get(s), {}).get(s) for s in seeds]
    return None if any(p is None for p in found) else np.array([p[field] for p in found], dtype=float)


def summarise(cells, gold, targets):
    """The table of one gold: one line per row at its tuned value, reward at equal KL, differences to pargs and dpo."""
    parts, tuned = arrays(cells, gold)
    lines, tests = [], []
    slope, typical = length_effect(parts)
    first = BASE["real" if gold in REAL_GOLDS else "toy"]
    for row in ROWS:
        seeds = sorted(s for s, value in tuned.get(row.name, {}).items() if s in parts[row.name].get(value, {}))
        if not seeds:
            continue
        rewards, kl = (stack(parts, tuned, row.name, f, seeds) for f in ("rewards", "kl"))
        taken = [parts[row.name][tuned[row.name][s]][s] for s in seeds]
        tokens = sum(sum(p["tokens"]) for p in taken)
        line = {
            "row": row.name, "group": row.group, "seeds": seeds, "values": [tuned[row.name][s] for s in seeds],
            "reward": interval(rewards), "kl": interval(kl),
            "seed_rewards": [round(float(r.mean()), 3) for r in rewards],
            "policy_calls_per_token": round(sum(p["policy_calls"] for p in taken) / tokens, 3),
            "scorer_calls_per_token": round(sum(p["scorer_calls"] for p in taken) / tokens, 3),
            "megabytes_per_token": round(sum(megabytes(p) for p in taken) / tokens, 3),
            "seconds": round(float(np.mean([p["seconds"] for p in taken])), 1),
            "proxy": None if not taken[0]["proxy"] else round(float(np.mean([np.mean(p["proxy"]) for p in taken])), 3),
            "perplexity": None if "perplexity" not in taken[0] else round(
                float(np.mean([p["perplexity"] for p in taken])), 2),
            "distinct_2": round(float(np.mean([p["distinct_2"] for p in taken])), 3),
            "length": round(float(np.mean([np.mean(p["tokens"]) for p in taken])), 1),
            "at_policy_length": None if slope is None else interval(
                rewards - slope * (np.array([lengths(p) for p in taken]) - typical)),
            "self_rouge": self_rouge(taken),
            "at_kl": {str(t): curve_at(parts, row.name, t) for t in targets},
        }  # fmt: skip
        if row.group == "fine-tuned":
            line["guided_at_its_kl"] = {n: curve_at(parts, n, line["kl"]["mean"]) for n in GUIDED if n in parts}
        if row.name in WHOLE:
            line["less_whole_at_kl"] = {str(t): difference_at(parts, row.name, WHOLE[row.name], t) for t in targets}
        others = {"less_pargs": first, "less_dpo": "dpo", "less_policy": "policy", "less_whole": WHOLE.get(row.name)}
        for key, name in others.items():
            both = [s for s in seeds if s in tuned.get(name, {})]
            if both and row.name != name:
                line[key] = paired(*(stack(parts, tuned, n, "rewards", both) for n in (row.name, name)))
        if "less_pargs" in line:
            tests.append(line)
        lines.append(line)
    for line, p in zip(tests, holm([t["less_pargs"]["p"] for t in tests]), strict=True):
        line["less_pargs"]["p_holm"] = round(p, 5)
    return lines


def lengths(part):
    """Tokens of every completion of a part."""
    return part["tokens"] if isinstance(part["tokens"], list) else [part["tokens"]] * len(part["rewards"])


def length_effect(parts):
    """Reward per token among the unguided policy's completions (least squares), and their mean length.

    With them, a row's reward is compared at the policy's length: reward − slope · (tokens − mean).
    """
    policy = list(parts.get("policy", {}).get(None, {}).values())
    tokens = np.array([t for part in policy for t in lengths(part)], dtype=float)
    if not len(tokens) or not tokens.std():
        return None, None
    rewards = np.array([r for part in policy for r in part["rewards"]])
    return float(np.cov(tokens, rewards)[0, 1] / tokens.var(ddof=1)), float(tokens.mean())


def self_rouge(taken):
    """Mean ROUGE-L (F) between the completions that different seeds gave one prompt: lower is more diverse."""
    if len(taken) < 2 or any("texts" not in part for part in taken):
        return None
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    pairs = [pair for texts in zip(*(p["texts"] for p in taken), strict=True) for pair in combinations(texts, 2)]
    return round(float(np.mean([scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs])), 4)


def keep_self_rouge(tables, committed):
    """Texts are not committed: rows that were restored keep the diversity that the committed tables give."""
    if not committed.exists():
        return
    for gold, lines in json.loads(committed.read_text())["tables"].items():
        before = {line["row"]: line for line in lines}
        for line in tables.get(gold, []):
            old = before.get(line["row"])
            if line["self_rouge"] is None and old and (old["seeds"], old["values"]) == (line["seeds"], line["values"]):
                line["self_rouge"] = old.get("self_rouge")


def megabytes(part):
    """Weights that one prompt at a time would read: calls × bytes, in MB."""
    return (part["policy_calls"] * part["policy_bytes"] + part["scorer_calls"] * part["scorer_bytes"]) / 1e6


def curve_of(parts, name, seed):
    """(kl, reward) per strength of one seed, the unguided policy with the same candidates as strength 0."""
    row = BY_NAME[name]
    start = "policy, whole vocabulary" if row.settings.get("top_k", 10) is None else "policy"
    found = [parts[start][None][seed]] if seed in parts.get(start, {}).get(None, {}) else []
    found += [by_seed[seed] for by_seed in parts.get(name, {}).values() if seed in by_seed]
    return [(np.array(p["kl"][:FRONTIER]), np.array(p["rewards"][:FRONTIER])) for p in found]


def curves_of(parts, name):
    """{seed: curve} of a row with at least two points; empty for rows without strengths."""
    if BY_NAME[name].group in ("policy", "greedy", "fine-tuned"):
        return {}
    seeds = sorted({s for by_seed in parts.get(name, {}).values() for s in by_seed})
    found = {s: curve_of(parts, name, s) for s in seeds}
    return {s: curve for s, curve in found.items() if len(curve) > 1}


def reaching(curves, target):
    """The seeds whose curves reach a KL."""
    return {s for s, curve in curves.items() if at_kl([(k.mean(), r.mean()) for k, r in curve], target) is not None}


def curve_at(parts, name, target):
    """The reward at a KL, over the seeds whose curves reach it; None if none does."""
    curves = curves_of(parts, name)
    seeds = sorted(reaching(curves, target))
    return reward_at_kl([curves[s] for s in seeds], target) | {"seeds": len(seeds)} if seeds else None


def difference_at(parts, name, other, target):
    """A row's reward less another's at the same KL, over the seeds with two strengths or more whose curves reach it."""
    one, two = ({s: c for s, c in curves_of(parts, n).items() if len(c) > 2} for n in (name, other))
    seeds = sorted(reaching(one, target) & reaching(two, target))
    if not seeds:
        return None
    return reward_at_kl([one[s] for s in seeds], target, less=[two[s] for s in seeds]) | {"seeds": len(seeds)}


def markdown(gold, lines, targets):
    """The table that docs/study.md shows."""
    show = lambda i: f"{i['mean']:.2f} ({i['low']:.2f} to {i['high']:.2f})" if i else "–"  # noqa: E731
    real = gold in REAL_GOLDS
    head = ["method", "seeds", "β or n", "reward (95 %)", "KL", *(f"at {t:g} nats" for t in targets), "calls per token",
            "MB per token", f"less {BASE['real' if real else 'toy']} (95 %; p)"]  # fmt: skip
    if real:
        head += [
            "less the policy (95 %)",
            "at the policy's length",
            "tokens",
            "perplexity",
            "distinct bigrams",
            "self-ROUGE",
        ]
    fewer = lambda i, line: f", {counted(i['seeds'])}" if i and i["seeds"] < len(line["seeds"]) else ""  # noqa: E731
    text = [f"### {gold}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        values = [f"{v:g}" if isinstance(v, float | int) else "–" for v in line["values"]]
        less = line.get("less_pargs")
        cells = [line["row"], str(len(line["seeds"])), values[0] if len(set(values)) == 1 else "/".join(values),
                 show(line["reward"]), f"{line['kl']['mean']:.1f}",
                 *(show(i) + fewer(i, line) for i in (line["at_kl"][str(t)] for t in targets)),
                 f"{line['policy_calls_per_token']:.2g} + {line['scorer_calls_per_token']:.2g}",
                 f"{line['megabytes_per_token']:.3g}",
                 f"{show(less)}; {less['p_holm']:.3g}" if less else "–"]  # fmt: skip
        if real:
            again = f"{line['self_rouge']:.2f}" if line["self_rouge"] else "–"
            cells += [show(line.get("less_policy")), show(line["at_policy_length"]), f"{line['length']:.1f}",
                      f"{line['perplexity']:.1f}", f"{line['distinct_2']:.2f}", again]  # fmt: skip
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def counted(seeds):
    """A number of seeds in words."""
    return f"{seeds} seed{'s' * (seeds > 1)}"


def audits(cells, gold):
    """Accuracy of every scorer by position on held-out pairs, a line for each seed; empty if none was audited."""
    lines = []
    for cell in (c for c in cells if c["gold"] == gold):
        for name, found in cell.get("audits", {}).items():
            half = HALF.search(found["verdict"])
            by = [f"{p['accuracy']['mean']:.2f}" for p in found["by_fraction"]]
            early = "{:.3f} ({:.3f} to {:.3f})".format(*(float(x) / 100 for x in half.groups())) if half else "–"
            whole = f"{found['full_accuracy']['mean']:.2f}"
            lines.append((f"{name} (seed {cell['seed']}, {found['pairs']} pairs)", *by[:9], whole, early))
    if not lines:
        return ""
    head = ["scorer", *(f"{share} %" for share in range(10, 100, 10)), "whole", "first half (95 %)"]
    rows = ["| " + " | ".join(row) + " |" for row in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]]) + "\n"


def differences(tables, key):
    """Paired differences of every row to another one on the seeds that both have, a column for each gold.

    Bold: the interval excludes 0.

    Args:
        tables: by gold, the lines of ``summarise``.
        key: a key of ``COMPARED``.
    """
    by_gold = {gold: {line["row"]: line for line in lines} for gold, lines in tables.items()}
    text = [f"| {COMPARED[key]} (95 %) at KL | {' | '.join(by_gold)} |", "|" + "---|" * (len(by_gold) + 1)]
    for name in BY_NAME:
        cells = [difference(lines.get(name), key) for lines in by_gold.values()]
        if set(cells) != {"–"}:
            text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def at_equal_kl(tables, targets):
    """Prefix training less training on whole replies at the same KL, for each couple of ``WHOLE``."""
    text = [f"| prefixes less whole replies (95 %) | nats | {' | '.join(tables)} |", "|" + "---|" * (len(tables) + 2)]
    for name in WHOLE:
        for target in targets:
            found = [
                next((line["less_whole_at_kl"][str(target)] for line in lines if line["row"] == name), None)
                for lines in tables.values()
            ]
            if any(found):
                cells = [emphasised(less, less["seeds"]) if less else "–" for less in found]
                text.append(f"| {name} | {target:g} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def emphasised(less, seeds, kl=None):
    """A difference with its interval, KL and number of seeds, bold if the interval excludes 0."""
    mean = f"{less['mean']:.2f}"
    sure = f"**{mean}**" if less["low"] > 0 or less["high"] < 0 else mean
    at = "" if kl is None else f" at {kl:.1f}"
    return f"{sure} ({less['low']:.2f} to {less['high']:.2f}){at}; {counted(seeds)}"


def difference(line, key):
    """One cell of ``differences``."""
    if line is None or key not in line:
        return "–"
    return emphasised(line[key], len(line[key]["seeds"]), line["kl"]["mean"])


def show(paths, golds=None):
    """The page docs/study-tables.md, from the rows of committed JSONs, on stdout."""
    print(page(paths, golds))
    return 0


def page(paths, golds=None):
    """Tables of committed JSONs, made again from their rows; of real models, the differences in all golds too."""
    text, real = [PREFACE], {}
    for path in paths:
        record = json.loads(path.read_text())
        track = path.stem.split("-")[1]
        run = "" if path.parent.name == "results" else f", {path.parent.name.replace('-', ' ')}"
        cells = [c | {"rows": [spread(r) for r in c["rows"]]} for c in record["cells"]]
        names = golds or list(dict.fromkeys(c["gold"] for c in cells))
        tables = {gold: summarise(cells, gold, EQUAL_KL[track]) for gold in names}
        keep_self_rouge(tables, path)
        if track in REAL:
            real[run] = real.get(run, {}) | tables
        text.append(f"## Track {track}{run}\n")
        for gold, lines in tables.items():
            text += [markdown(gold, lines, EQUAL_KL[track]), *filter(None, [audits(cells, gold)])]
    for run, tables in real.items():
        text.append(f"## Differences in all golds of the tracks human and attributes{run}\n")
        found = [*(differences(tables, key) for key in COMPARED), at_equal_kl(tables, EQUAL_KL[REAL[0]])]
        text += [table for table in found if table.count("\n") > 2]
    return "\n".join(text).rstrip()


def write(work, track, output):
    """study-TRACK.json, .png and the tables on stdout."""
    folders = sorted(p for p in (work / track).iterdir() if (p / "rows" / "test").is_dir())
    cells = [read_cell(f) for f in folders]
    golds = list(dict.fromkeys(c["gold"] for c in cells))
    targets = EQUAL_KL[track]
    # from the figures as they are committed, so that the tables come out of them again; texts are not committed
    as_kept = [c | {"rows": [spread(slim(p, True)) | {k: p[k] for k in ("texts",) if k in p} for p in c["rows"]]}
               for c in cells]  # fmt: skip
    tables = {gold: summarise(as_kept, gold, targets) for gold in golds}
    keep_self_rouge(tables, output / f"study-{track}.json")
    setup = json.loads((work / track / "setup.json").read_text())
    policy = load_policy(setup["policy"], dtype="float32", device="cpu")
    guided, private = GuidedPolicy(policy, method="policy"), track in REAL
    seeds = sorted({c["seed"] for c in cells})
    prompts = {
        split: {
            "prompts": named(setup[split], private),
            "row_seeds": {str(s): guided.row_seeds(setup[split], s) for s in seeds},
        }
        for split in ("tune", "test")
    }
    made = provenance(
        command=COMMANDS[track], seed=None, data={}, models={"policy": policy.model},
        settings={k: v for k, v in setup.items() if k not in ("tune", "test", "policy")},
    )  # fmt: skip
    record = {
        "what": f"The study, track {track}: see docs/study.md", "format": 1, "command": COMMANDS[track],
        "tables": tables, "prompts": prompts,
        "cells": [c | {"rows": [slim(p, private) for p in c["rows"]]} for c in cells], "provenance": made.model_dump(),
    }  # fmt: skip
    if track == "human":
        record["judges"] = {p.parent.name: json.loads(p.read_text()) for p in work.glob("human/judge-*/judge.json")}
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(whole(json.loads(json.dumps(record, default=str))), separators=(",", ":"))
    write_text(output / f"study-{track}.json", text + "\n")
    plot_rewards({gold: arrays(cells, gold)[0] for gold in golds}, output / f"study-{track}.png")
    if track == "human":
        plot_positions(cells[0]["audits"], output / "study-human-positions.png")
    for gold, lines in tables.items():
        print(markdown(gold, lines, targets), audits(cells, gold), sep="\n")
    return 0
