"""Statistics of the study: intervals over prompts and training seeds, reward at equal KL, paired differences.

Arrays have the shape (seeds, prompts). Prompts are the same for every seed, method and strength, so that all of them
use the same resamples of prompts and seeds.
"""

import itertools

import numpy as np

from rgtg.evaluation.metrics import sign_flip_p_values

RESAMPLES = 1000


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


def reward_at_kl(curves, kl):
    """Mean over seeds of the reward at a KL, with an interval; None if the curve of a seed does not reach it.

    Args:
        curves: per seed a list of (kl (prompts,), reward (prompts,)), one per strength, the unguided policy included.
        kl: in nats.
    """
    exact = [at_kl([(k.mean(), r.mean()) for k, r in curve], kl) for curve in curves]
    if any(value is None for value in exact):
        return None
    samples = []
    for chosen, p in draws(len(curves), len(curves[0][0][0])):
        values = [at_kl([(k[p].mean(), r[p].mean()) for k, r in curves[s]], kl) for s in chosen]
        values = [v for v in values if v is not None]  # a resampled curve may not reach the KL
        if values:
            samples.append(float(np.mean(values)))
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"mean": round(float(np.mean(exact)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def paired(a, b):
    """Mean of a − b over prompts (averaged over seeds first), its interval, and a sign-flip test's p.

    >>> paired(np.ones((1, 4)), np.ones((1, 4)))["p"]
    1.0
    """
    difference = a - b
    (p,) = sign_flip_p_values([difference.mean(0).tolist()])
    return interval(difference) | {"p": round(p, 5), "seeds": [round(float(d.mean()), 4) for d in difference]}
