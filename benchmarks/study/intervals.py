"""Statistics of the study: intervals over prompts and training seeds, reward at equal KL, paired differences.

Arrays have the shape (seeds, prompts). Prompts are the same for every seed, method and strength, so that all of them
use the same resamples of prompts and seeds.
"""

import itertools
from functools import cache

import numpy as np

from rgtg.evaluation.metrics import sign_flip_p_values

RESAMPLES = 1000


@cache
def draws(seeds, prompts, seed=0):
    """Index pairs of ``RESAMPLES`` bootstrap samples: seeds with replacement, and prompts with replacement."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(seeds, size=seeds), rng.integers(prompts, size=prompts)) for _ in range(RESAMPLES)]


def interval(values):
    """Mean over all, with a 95 % interval that resamples seeds and prompts.

    >>> interval(np.ones((2, 3)))
    {'mean': 1.0, 'low': 1.0, 'high': 1.0}
    """
    samples = [values[s][:, p].mean() for s, p in draws(*values.shape)]
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"mean": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def at_kl(points, kl):
    """Reward at a KL, interpolated linearly between the two nearest points; None outside the measured range.

    Args:
        points: (kl, reward) in any order.
        kl: in nats.

    >>> at_kl([(4, 1.0), (8, 3.0)], 6)
    2.0
    """
    points = sorted(points)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= kl <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (kl - x0) / (x1 - x0)
    return None


def reward_at_kl(curves, kl, less=None):
    """Mean over seeds of the reward at a KL, with an interval; None if the curve of a seed does not reach it.

    Args:
        curves: per seed a list of (kl (prompts,), reward (prompts,)), one per strength, the unguided policy included.
        kl: in nats.
        less: curves of another method for the same seeds, whose reward at this KL is subtracted on the same resamples.
    """

    def mean(seeds, p):
        """Over the seeds whose resampled curves reach the KL; None if none does."""
        values = []
        for s in seeds:
            found = [at_kl([(k[p].mean(), r[p].mean()) for k, r in c[s]], kl) for c in (curves, less) if c is not None]
            if None not in found:
                values.append(found[0] - sum(found[1:]))
        return float(np.mean(values)) if values else None

    exact = [mean([s], slice(None)) for s in range(len(curves))]
    if None in exact:
        return None
    samples = [mean(*drawn) for drawn in draws(len(curves), len(curves[0][0][0]))]
    low, high = np.percentile([value for value in samples if value is not None], [2.5, 97.5])
    return {"mean": round(float(np.mean(exact)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def paired(a, b):
    """Mean of a − b over prompts (averaged over seeds first), its interval, and a sign-flip test's p.

    >>> paired(np.ones((1, 4)), np.ones((1, 4)))["p"]
    1.0
    """
    difference = a - b
    (p,) = sign_flip_p_values([difference.mean(0).tolist()])
    return interval(difference) | {"p": round(p, 5), "seeds": [round(float(d.mean()), 4) for d in difference]}
