"""Token-by-token traces of a comparison's first completions, for the report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.methods import METHODS
from rgtg.decoding.request import Prompt, any_chat
from rgtg.evaluation.compare.generate import call_settings
from rgtg.evaluation.compare.grid import MethodRun
from rgtg.evaluation.compare.shards import Shard
from rgtg.tokenization.token_bytes import TokenBytes
from rgtg.types.generation import Completion, StepTrace

# Steps with more candidates than this are not kept: a whole vocabulary per step would fill the results file.
_MOST_CANDIDATES = 50
_DIGITS = 5


def trace_shard(shard: Shard, guided: GuidedPolicy, run: MethodRun, prompts: Sequence[Prompt], count: int) -> bool:
    """Generate a shard's first completions again with a trace of every step; returns whether anything changed.

    The measured time of a shard is that of completions without a trace. A completion keeps no trace if the second run
    gives other tokens (another batch size can cause this below float32), or if a step has too many candidates.
    """
    wanted = [i for i in range(min(count, len(prompts))) if shard.completions[i].trace is None]
    if METHODS[run.method].unit != "token" or not wanted:
        return False
    settings = call_settings(run)
    if not any_chat(prompts[i] for i in wanted):
        settings.pop("chat_template_kwargs", None)
    traced = guided.generate(
        [prompts[i] for i in wanted], seed=[shard.completions[i].seed for i in wanted], trace=True, **settings
    )
    changed = False
    for i, completion in zip(wanted, traced, strict=True):
        steps = completion.trace or []
        small = all(len(step.candidate_ids) <= _MOST_CANDIDATES for step in steps)
        if small and completion.token_ids == shard.completions[i].token_ids:
            shard.completions[i].trace = steps
            changed = True
    return changed


def sample_steps(completion: Completion, token_bytes: TokenBytes) -> list[dict[str, Any]] | None:
    """A completion's steps in the format of the trace viewer: rounded, with the candidates' texts."""
    return None if completion.trace is None else [_step(step, token_bytes) for step in completion.trace]


def decision_rule(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the trace viewer needs to recompute a step: scorers, betas, temperature and the method's rule."""
    row, scorers = METHODS[method], list(settings.get("scorers", []))
    beta = settings["beta"]
    betas = list(beta) if isinstance(beta, list) else [beta] * len(scorers)
    return {
        "scorers": scorers, "betas": betas, "temperature": settings["temperature"], "greedy": row.rule == "greedy",
        "clip": row.clip,
    }  # fmt: skip


def _step(step: StepTrace, token_bytes: TokenBytes) -> dict[str, Any]:
    texts = [token_bytes.text(i) for i in step.candidate_ids]
    raw = [token_bytes.of(i) for i in step.candidate_ids]
    valid_utf8 = all(text.encode() == held for text, held in zip(texts, raw, strict=True))
    each = step.scores_of_each
    return {
        "token_id": step.token_id,
        "candidate_ids": step.candidate_ids,
        "policy_log_probs": _rounded(step.policy_log_probs),
        "scores": None if step.scores is None else _rounded(step.scores),
        "scores_of_each": None if each is None else [_rounded(scores) for scores in each],
        "guided_log_probs": _rounded(step.guided_log_probs),
        "candidate_texts": texts,
        "candidate_bytes": None if valid_utf8 else [list(held) for held in raw],
    }


def _rounded(values: Sequence[float]) -> list[float | str]:
    """Rounded numbers. JSON has no infinity: the log-probability of an excluded candidate is the text "-Infinity"."""
    return [round(value, _DIGITS) if math.isfinite(value) else "-Infinity" for value in values]
