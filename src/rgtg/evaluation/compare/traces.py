"""A comparison's first completions token by token: what the report shows of single steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.evaluation.compare.grid import MethodRun
from rgtg.evaluation.compare.shards import Shard
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.generation import Completion, StepTrace

# Candidates of a step from which it is not kept: a whole vocabulary would swamp the results.
_MOST = 50
_DIGITS = 5


def trace_shard(part: Shard, guided: GuidedPolicy, row: MethodRun, prompts: Sequence[str], count: int) -> bool:
    """Keep the steps of a part's first completions, by making these once more; whether anything changed.

    A part's time is that of completions without a trace. A completion that comes out as other tokens (which another
    batch may cause below float32), and a step of too many candidates, gets none.
    """
    wanted = [i for i in range(min(count, len(prompts))) if part.completions[i].trace is None]
    if METHODS[row.method].unit != "token" or not wanted:
        return False
    again = guided.generate(
        [prompts[i] for i in wanted], seed=[part.completions[i].seed for i in wanted], trace=True,
        **{name: value for name, value in row.given.items() if name not in ("top_k", "n")},
    )  # fmt: skip
    kept = 0
    for i, completion in zip(wanted, again, strict=True):
        steps = completion.trace or []
        small = all(len(step.candidate_ids) <= _MOST for step in steps)
        if small and completion.token_ids == part.completions[i].token_ids:
            part.completions[i].trace = steps
            kept += 1
    return kept > 0


def sample_steps(completion: Completion, known: TokenBytes) -> list[dict[str, Any]] | None:
    """A completion's steps as the renderer reads them: rounded, with the candidates' texts."""
    return None if completion.trace is None else [_step(step, known) for step in completion.trace]


def rule_of(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a row's steps are decided, for recomputing one: its scorers with their betas, and the method's own."""
    row, scorers = METHODS[method], list(settings.get("scorers", []))
    beta = settings["beta"]
    betas = list(beta) if isinstance(beta, list) else [beta] * len(scorers)
    return {
        "scorers": scorers, "betas": betas, "temperature": settings["temperature"], "greedy": row.rule == "greedy",
        "clip": row.clip,
    }  # fmt: skip


def _step(step: StepTrace, known: TokenBytes) -> dict[str, Any]:
    texts = [known.text(i) for i in step.candidate_ids]
    raw = [known.of(i) for i in step.candidate_ids]
    plain = all(text.encode() == held for text, held in zip(texts, raw, strict=True))
    each = step.scores_of_each
    return {
        "token_id": step.token_id,
        "candidate_ids": step.candidate_ids,
        "policy_log_probs": _rounded(step.policy_log_probs),
        "scores": None if step.scores is None else _rounded(step.scores),
        "scores_of_each": None if each is None else [_rounded(scores) for scores in each],
        "guided_log_probs": _rounded(step.guided_log_probs),
        "candidate_texts": texts,
        "candidate_bytes": None if plain else [list(held) for held in raw],
    }


def _rounded(values: Sequence[float]) -> list[float | str]:
    """JSON knows no infinity: an excluded candidate has the text "-Infinity", as in rgtg's files."""
    return [round(value, _DIGITS) if math.isfinite(value) else "-Infinity" for value in values]
