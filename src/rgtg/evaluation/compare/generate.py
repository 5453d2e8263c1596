"""Generates one shard of a comparison: the completions of one run with one seed."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rgtg.config import DecodingSettings, validate
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.request import Prompt
from rgtg.decoding.runners.factory import require_all_tokens
from rgtg.evaluation.compare.grid import MethodRun
from rgtg.evaluation.compare.shards import Shard
from rgtg.models.loading.engine_model import ReadableModel
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.base import AnyScorer
from rgtg.tokenization.conversation import encode_source
from rgtg.tokenization.encoding import require_same_tokenizer
from rgtg.tokenization.padding import batches_by_length
from rgtg.types.generation import Completion

_AT_CONSTRUCTION = ("top_k", "n")  # settings that GuidedPolicy takes when it is made, not with every call


def make_guided_policy(policy: Policy, scorers: Sequence[AnyScorer], run: MethodRun) -> GuidedPolicy:
    """The run's policy and scorers, with its method."""
    scorer: Any = None if not scorers else scorers[0] if len(scorers) == 1 else list(scorers)
    given = {name: run.given[name] for name in _AT_CONSTRUCTION if name in run.given}
    beta: Any = run.beta
    return GuidedPolicy(policy, scorer, method=run.method, beta=beta, **given)


def call_settings(run: MethodRun) -> dict[str, Any]:
    """The run's settings for each call of ``GuidedPolicy.generate``."""
    return {name: value for name, value in run.given.items() if name not in _AT_CONSTRUCTION}


def full_settings(guided: GuidedPolicy, run: MethodRun, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Every decoding setting of a run, defaults included; ``names`` maps models to their short names."""
    short = names or {}
    resolved = validate(DecodingSettings, guided.defaults | run.decoding())
    scorers = {"scorers": [short.get(name, name) for name in run.scorers]} if run.scorers else {}
    own = {} if run.policy is None else {"policy": short.get(run.policy, run.policy)}
    return resolved.model_dump(mode="json", exclude={"seed"}) | scorers | own


def complete(
    guided: GuidedPolicy, run: MethodRun, prompts: Sequence[Prompt], *, seed: int, batch_size: int
) -> tuple[list[Completion], float]:
    """One completion for each prompt, and the seconds they took. Runs with the same seed share their random numbers."""
    start = time.perf_counter()
    completions = guided.generate(list(prompts), seed=seed, batch_size=batch_size, **call_settings(run))
    return completions, time.perf_counter() - start


def run_shard(
    guided: GuidedPolicy,
    run: MethodRun,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    batch_size: int,
    reference: Policy | None = None,
    made_with: dict[str, Any] | None = None,
) -> Shard:
    """Complete the prompts with one seed. ``reference`` is the policy of the KL, where it is not the run's own."""
    completions, seconds = complete(guided, run, prompts, seed=seed, batch_size=batch_size)
    log_probs = None if reference is None else reference_log_probs(reference, guided.policy, completions, batch_size)
    return Shard(
        label=run.label, seed=seed, made_with=made_with or {}, seconds=seconds, completions=completions,
        reference_log_probs=log_probs,
    )  # fmt: skip


@torch.inference_mode()
def reference_log_probs(
    reference: Policy, policy: Policy, completions: Sequence[Completion], batch_size: int = 8
) -> list[float]:
    """Log π_ref(completion | prompt) in nats under another policy with the same tokenizer, in one forward pass each.

    The other policy reads a chat by its own chat template.

    Raises:
        TokenizerMismatchError: the two policies have different tokenizers.
        UsageError: the other policy has no embedding for a token that this one writes.
    """
    require_same_tokenizer(reference.tokenizer, policy.tokenizer)
    require_all_tokens(policy, reference.model, "the policy of the KL")
    rows = [
        (encode_source(reference.tokenizer, c.source, template_kwargs=c.chat_template_kwargs)[1], c.token_ids)
        for c in completions
    ]
    totals = [0.0] * len(rows)
    for indices, ids, mask in batches_by_length(rows, batch_size, reference.model.device):
        # 1. Logits of every position: (B, L, V).
        if isinstance(reference.model, ReadableModel):
            logits = reference.model.logits(ids, mask)
        else:
            logits = reference.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        # 2. Log-probability of every next token: (B, L - 1).
        chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0].double()
        # 3. Sum over the completion's tokens; position i predicts token i + 1.
        for row, i in enumerate(indices):
            first, last = len(rows[i][0]) - 1, len(rows[i][0]) + len(rows[i][1]) - 1
            totals[i] = float(chosen[row, first:last].sum())
    return totals
