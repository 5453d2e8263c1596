"""The figure of the README: reward against KL, and against what it costs, from the results of ``rgtg demo``.

    python benchmarks/demo_figure.py [--results docs/results/demo-smollm.json] [--output docs/results/demo-smollm.png]

The sampled methods only: greedy ones have another control (docs/demo.md has all rows). Nothing is measured here.
"""

import argparse
from pathlib import Path

from rgtg.evaluation.plots import COLOURS, draw_intervals, new_figure
from rgtg.types.comparison import ComparisonResult

NAMES = {
    "policy": "unguided policy",
    "best of 8": "best of 8, scorer of whole replies",
    "args-sample": "guided, scorer of whole replies (ARGS)",
    "pargs": "guided, scorer trained on prefixes (PARGS)",
}
MARKERS = "os^D"


def draw(result, path):
    """Left: a curve through the strengths of each method. Right: each method's best strength."""
    figure, (left, right) = new_figure(9.0, 3.9, columns=2)
    for (curve, name), colour, marker in zip(NAMES.items(), COLOURS, MARKERS, strict=False):
        rows = sorted((row for row in result.methods if row.curve == curve), key=lambda row: row.strength or 0)
        rewards = [row.metrics["reward"] for row in rows]
        kl = [row.metrics["kl_nats"].mean for row in rows]
        draw_intervals(left, kl, rewards, color=colour, marker=marker, label=name)
        best = max(rows, key=lambda row: row.metrics["reward"].mean)
        passes = best.policy_calls / best.tokens
        apart = 0.0 if curve == "best of 8" else 0.07 * (list(NAMES).index(curve) - 2)  # three of them are at 1
        draw_intervals(right, [passes + apart], [best.metrics["reward"]], color=colour, marker=marker)
        if name.startswith("guided"):
            for x, row in zip(kl, rows, strict=True):
                left.annotate(f"β={row.beta:g}", (x, row.metrics["reward"].mean), (5, 5), fontsize=7, color=colour,
                              textcoords="offset points")  # fmt: skip
    left.set(xlabel="KL to the policy (nats)", ylabel=f"{result.reward}, {result.prompts} unseen prompts")
    right.set(xlabel="passes of the policy per token (at 1: drawn apart)", xlim=(0, None), ylim=left.get_ylim())
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": ""})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results/demo-smollm.json"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/demo-smollm.png"))
    args = parser.parse_args()
    draw(ComparisonResult.model_validate_json(args.results.read_text(encoding="utf-8")), args.output)


if __name__ == "__main__":
    main()
