"""The figures of a study: reward against KL, and accuracy by position."""

import numpy as np

from rgtg.evaluation.plots import COLOURS, draw_band, new_figure
from rgtg.types.base import Interval

from .measure import FRONTIER
from .rows import ROWS

DRAWN = ("policy", "best-of-n", "guided", "heads", "fine-tuned", "newer")
MOST_DRAWN = 45.0  # nats
# Scorers that differ in their objective only: whole replies against prefixes.
COUPLES = {
    "separate model": ("full-bt", "prefix-bt"), "adapter": ("full-bt-adapter", "adapter"),
    "state head": ("full-bt-head", "state-head"),
}  # fmt: skip


def plot_rewards(measured, path):
    """Reward against KL: one panel per gold, means over seeds. A row has one colour and marker in all of them.

    Args:
        measured: by gold, the parts of every row as ``tables.arrays`` gives them.
        path: of the figure.
    """
    figure, panels = new_figure(4.6 * len(measured), 5.6, columns=len(measured))
    drawn = [row.name for row in ROWS if row.group in DRAWN]
    names, lines = [n for n in drawn if any(n in parts for parts in measured.values())], {}
    for (gold, parts), axes in zip(measured.items(), np.atleast_1d(panels), strict=True):
        for index, name in enumerate(names):
            if name not in parts:
                continue
            points = []
            for by_seed in parts[name].values():
                cut = [{f: np.mean(p[f][:FRONTIER]) for f in ("kl", "rewards")} for p in by_seed.values()]
                points.append(tuple(np.mean([p[f] for p in cut]) for f in ("kl", "rewards")))
            x, y = zip(*sorted(p for p in points if p[0] <= MOST_DRAWN) or [(np.nan, np.nan)], strict=True)
            style = {"color": COLOURS[index % len(COLOURS)], "marker": "ox^sD*"[index // len(COLOURS)]}
            lines[name] = axes.plot(x, y, markersize=4, label=name, **style)[0]
        axes.set(xlabel="KL to the policy (nats)", ylabel="held-out reward", title=gold)
    shown = [lines[name] for name in names]
    figure.legend(handles=shown, fontsize=7, loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=140, metadata={"Software": ""})


def plot_positions(audits, path):
    """Accuracy on held-out pairs by share of the reply, full-bt beside prefix-bt; a panel for each kind of scorer.

    Args:
        audits: of one cell, by scorer; a kind is drawn if both of its scorers were audited.
        path: of the figure; none is written if no kind is drawn.
    """
    found = {kind: names for kind, names in COUPLES.items() if all(name in audits for name in names)}
    if not found:
        return
    figure, panels = new_figure(3.6 * len(found), 3.6, columns=len(found))
    for axes, (kind, names) in zip(np.atleast_1d(panels), found.items(), strict=True):
        for colour, name, label in zip(COLOURS[1::-1], names, ("whole replies", "prefixes"), strict=True):
            places = [(p["position"], p["accuracy"]) for p in audits[name]["by_fraction"]]
            x, y = [100 * at for at, _ in places], [Interval.model_validate(accuracy) for _, accuracy in places]
            draw_band(axes, x, y, colour, f"trained on {label}")
        axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        axes.set(title=kind, xlabel="share of the reply read (%)", ylim=(0.25, 0.8))
    np.atleast_1d(panels)[0].set_ylabel("held-out pairs in the humans' order")
    np.atleast_1d(panels)[0].legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=140, metadata={"Software": ""})
