"""Which run the others are compared with: sampled runs with the sampled policy, greedy runs with the greedy one."""

from collections.abc import Sequence

from rgtg.decoding.methods import METHODS
from rgtg.types.comparison import MethodResult


def find_baseline(results: Sequence[MethodResult], label: str | None = None) -> str | None:
    """Label of the baseline: the given one, or the first unguided run, or the first run."""
    if label is not None or not results:
        return label
    return next(filter(is_unguided, results), results[0]).label


def greedy_control(results: Sequence[MethodResult]) -> str | None:
    """Label of the first unguided greedy run; None if there is none."""
    return next((result.label for result in results if is_greedy(result) and is_unguided(result)), None)


def is_greedy(result: MethodResult) -> bool:
    """Whether a run takes the likeliest text instead of drawing one; False for a method that is not in the table."""
    method = METHODS.get(result.method)
    if method is None:
        return False
    return not method.random or (method.unit == "token" and result.settings.get("temperature") == 0)


def is_unguided(result: MethodResult) -> bool:
    """Whether a run is the comparison's own policy, without guidance."""
    return result.method == "policy" and "policy" not in result.settings
