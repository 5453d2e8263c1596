"""What a request says about its guidance: ``vllm_xargs`` over HTTP, ``SamplingParams.extra_args`` in Python.

Everything is checked when a request arrives, because an error in vLLM's worker would end the engine.
"""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rgtg.config.engines import ENGINES
from rgtg.decoding.methods import METHODS, Method
from rgtg.errors import UsageError

PREFIX = "rgtg"
NAMES = ("rgtg_scorers", "rgtg_betas", "rgtg_top_k", "rgtg_method")
WHOLE_VOCABULARY = "all"
MOST_SCORERS = 16
MOST_CANDIDATES = 256  # of a scorer that scores one prefix at a time
LARGEST_BETA = 1e30  # β·r must not overflow
_DEFAULT = "pargs"


@dataclass(frozen=True)
class Guide:
    """How one request is guided.

    Attributes:
        scorers: names, at least one.
        betas: one for each scorer.
        top_k: number of candidates; None is the whole vocabulary.
        method: row of the methods table: candidates, clipping, and whether the maximum is taken.
    """

    scorers: tuple[str, ...]
    betas: tuple[float, ...]
    top_k: int | None
    method: Method


def read_guide(arguments: Mapping[str, Any] | None, known: Mapping[str, bool]) -> Guide | None:
    """The guidance that a request's arguments ask for; None if they ask for none.

    Args:
        arguments: all extra arguments of a request; those of other plug-ins are passed over.
        known: name of each scorer that the server has, and whether it scores all next tokens in one call.

    Raises:
        UsageError: an unknown argument or scorer, a value that is not allowed, or arguments that contradict each other.
    """
    given = {name: value for name, value in (arguments or {}).items() if str(name).startswith(PREFIX)}
    if unknown := sorted(str(name) for name in given if name not in NAMES):
        near = difflib.get_close_matches(unknown[0], NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(NAMES)}"
        raise UsageError(f"unknown argument {_brief(unknown[0])}; {hint}")
    if not given:
        return None
    method = _method(given)
    if method is None:
        return None
    scorers = _scorers(given, known)
    betas = _betas(given, scorers)
    slow = [name for name in scorers if not known[name]]
    if method.vocabulary and slow:
        raise UsageError(
            f"{method.name} asks for the scores of all next tokens in one call, and {slow[0]} scores one prefix at a "
            "time: use pargs with it"
        )
    top_k = _top_k(given, method)
    if slow and (top_k is None or top_k > MOST_CANDIDATES):
        raise UsageError(
            f"rgtg_top_k = {top_k or WHOLE_VOCABULARY}: {slow[0]} scores one prefix at a time, so it takes at most "
            f"{MOST_CANDIDATES} candidates"
        )
    return Guide(scorers, betas, top_k, method)


def require_sampling(guide: Guide, params: Any) -> None:
    """Check sampling parameters of vLLM that would change what guidance means.

    Raises:
        UsageError: a repetition penalty, or a temperature for a method that takes the maximum.
    """
    if params.repetition_penalty != 1:
        raise UsageError(
            "repetition_penalty scales logits, and guided ones are shifted: leave it out, or use presence_penalty or "
            "frequency_penalty, which subtract"
        )
    if guide.method.rule == "greedy" and params.temperature not in (0, 1):
        raise UsageError(
            f"{guide.method.name} takes the maximum and has no temperature; sample with pargs or args-sample"
        )


def xargs(
    scorers: str | Sequence[str],
    betas: float | Sequence[float] = 1.0,
    *,
    top_k: int | str | None = None,
    method: str = _DEFAULT,
) -> dict[str, Any]:
    """Arguments of a guided request, for ``extra_body={"vllm_xargs": ...}`` of an OpenAI client.

    Args:
        scorers: names in the server's file of scorers.
        betas: guidance strength of each; one number applies to all of them.
        top_k: number of candidates; ``all`` is the whole vocabulary, None the method's own number.
        method: that decides token by token (``rgtg methods``).

    Example:
        >>> xargs("helpful", 2.0)
        {'rgtg_scorers': ['helpful'], 'rgtg_betas': [2.0], 'rgtg_method': 'pargs'}
    """
    names = [scorers] if isinstance(scorers, str) else list(scorers)
    strengths = list(betas) if isinstance(betas, Sequence) else [betas] * len(names)
    chosen = {} if top_k is None else {"rgtg_top_k": top_k}
    return {"rgtg_scorers": names, "rgtg_betas": strengths, **chosen, "rgtg_method": method}


def guided_params(
    scorers: str | Sequence[str],
    betas: float | Sequence[float] = 1.0,
    *,
    top_k: int | str | None = None,
    method: str = _DEFAULT,
    **sampling: Any,
) -> Any:
    """A ``vllm.SamplingParams`` of a guided request; the arguments are those of `xargs` and of ``SamplingParams``."""
    from vllm import SamplingParams

    extra = {**(sampling.pop("extra_args", None) or {}), **xargs(scorers, betas, top_k=top_k, method=method)}
    return SamplingParams(**sampling, extra_args=extra)


def _method(given: dict[str, Any]) -> Method | None:
    """The row of the methods table; None for unguided requests."""
    name = given.get("rgtg_method", _DEFAULT)
    if not isinstance(name, str) or name not in METHODS:
        usable = [name for name, row in METHODS.items() if row.unit == "token" and name not in ENGINES["vllm"].lacks]
        raise UsageError(f"rgtg_method = {_brief(name)}: expected one of {', '.join(usable)}")
    method = METHODS[name]
    if name in (lacks := ENGINES["vllm"].lacks) and method.unit == "token":
        raise UsageError(f"rgtg_method = {name}: vLLM cannot carry it: {lacks[name]}")
    if method.unit != "token":
        raise UsageError(f"{name} decides on a whole {method.unit}; in vLLM a method decides token by token, as pargs")
    if method.scorer is None:
        if others := sorted(set(given) - {"rgtg_method"}):
            raise UsageError(f"method {name} is not guided: leave {', '.join(others)} out")
        return None
    return method


def _scorers(given: dict[str, Any], known: Mapping[str, bool]) -> tuple[str, ...]:
    value = given.get("rgtg_scorers")
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"rgtg_scorers = {_brief(value)}: expected a name, or a list of names: {_list(known)}")
    if len(names) > MOST_SCORERS:
        raise UsageError(f"rgtg_scorers has {len(names)} names; expected at most {MOST_SCORERS}")
    for name in names:
        if name not in known:
            raise UsageError(f"unknown scorer {_brief(name)}; this server has {_list(known)}")
    if len(set(names)) != len(names):
        raise UsageError("rgtg_scorers names a scorer twice; give its betas as one sum")
    return tuple(names)


def _betas(given: dict[str, Any], scorers: tuple[str, ...]) -> tuple[float, ...]:
    value = given.get("rgtg_betas", [1.0] * len(scorers))
    betas = value if isinstance(value, list | tuple) else [value]
    if not all(_usable(beta) for beta in betas):
        raise UsageError(
            f"rgtg_betas = {_brief(value)}: expected finite numbers (up to {LARGEST_BETA:g}), one for each scorer"
        )
    if len(betas) != len(scorers):
        raise UsageError(f"rgtg_betas has {len(betas)} numbers for {len(scorers)} scorers; give one for each")
    return tuple(float(beta) for beta in betas)


def _top_k(given: dict[str, Any], method: Method) -> int | None:
    value = given.get("rgtg_top_k", method.top_k or WHOLE_VOCABULARY)
    if value == WHOLE_VOCABULARY:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"rgtg_top_k = {_brief(value)}: expected a whole number from 1, or {WHOLE_VOCABULARY}")
    return value


def _usable(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST_BETA <= value <= LARGEST_BETA  # of NaN and infinities, false


def _list(names: Mapping[str, bool]) -> str:
    return ", ".join(sorted(names)) or "no scorers"


def _brief(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())
