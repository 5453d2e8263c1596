"""Finish one prefix from each of several next tokens, many times, with the unguided policy."""

from collections.abc import Sequence

import torch

from rgtg.config import DecodingSettings
from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.request import Request, StoppingCriteria, derive_seed, end_tokens
from rgtg.decoding.runners.model_runner import make_runner
from rgtg.decoding.runners.policy_runner import TorchPolicyRunner
from rgtg.decoding.sampling import SamplingParams, propose
from rgtg.errors import NonFiniteError
from rgtg.models.loading.policy import Policy
from rgtg.models.ops.lm_head import policy_logits


@torch.inference_mode()
def next_candidates(policy: Policy, prefix_ids: Sequence[int], top_k: int) -> tuple[list[int], list[float]]:
    """The policy's ``top_k`` likeliest next tokens and their log-probabilities in nats (over the whole vocabulary).

    Raises:
        NonFiniteError: the policy's logits are NaN or infinite.
    """
    runner = make_runner(policy.model, policy_logits, len(prefix_ids) + 1)
    logits = runner.head(runner.prefill([prefix_ids]).final)
    ids, log_probs = propose(torch.log_softmax(logits.float(), -1), top_k=top_k, vocabulary=policy.vocabulary)
    if not bool(log_probs.isfinite().all()):
        raise NonFiniteError("the policy's logits are NaN or infinite; try dtype=float32")
    return ids[0].tolist(), log_probs[0].tolist()


def roll_out(
    policy: Policy,
    prompt: str,
    prompt_ids: Sequence[int],
    written_ids: Sequence[int],
    candidate_ids: Sequence[int],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 128,
) -> list[list[Request]]:
    """``n`` completions of prompt ⊕ written ⊕ v for each candidate v, sampled from the policy.

    The prefix is read once per batch and its cache repeated for the rows. What a row draws depends on the seed, its
    candidate and its number, not on its neighbours. A candidate that ends the completion is not sampled from.

    Args:
        policy: the frozen policy.
        prompt: text of the prompt, for the record.
        prompt_ids: its token ids.
        written_ids: tokens of the completion so far.
        candidate_ids: next tokens.
        n: completions of each.
        max_new_tokens: tokens of a whole completion, those already written included.
        seed: of this prefix.
        batch_size: completions sampled together.

    Returns:
        Finished requests, ``n`` for each candidate; their ``token_ids`` begin with the written ones.
    """
    stopping = StoppingCriteria(policy.tokenizer, end_tokens(policy), DecodingSettings(max_new_tokens=max_new_tokens))
    params = SamplingParams(vocabulary=policy.vocabulary)
    drawn = []
    for token in candidate_ids:
        written = [*written_ids, token]
        seeds = [derive_seed(seed, token, i) for i in range(n)]
        drawn.append([
            Request(prompt, list(prompt_ids), s, params=params, stopping=stopping, token_ids=list(written))
            for s in seeds
        ])  # fmt: skip
    rows = [request for group in drawn for request in group]
    for request in rows:
        stopping.update(request)
    going = [request for request in rows if request.finish_reason is None]
    for start in range(0, len(going), batch_size):
        _complete(policy, going[start : start + batch_size], max_new_tokens)
    return drawn


@torch.inference_mode()
def _complete(policy: Policy, rows: list[Request], max_new_tokens: int) -> None:
    """Sample these requests of one prefix, whose newest token is still to be read, to their ends."""
    prompt_ids, written = rows[0].prompt_ids, rows[0].token_ids[:-1]
    runner = make_runner(policy.model, policy_logits, len(prompt_ids) + max_new_tokens + 1)
    runner.prefill([[*prompt_ids, *written]])
    runner.select_rows([0] * len(rows))
    reader = TorchPolicyRunner(runner)
    newest = torch.tensor([[row.token_ids[-1]] for row in rows], device=policy.model.device)
    batch = Batch()
    batch.add(rows, Prefilled(reader, reader.step(newest)))
    while batch.requests:
        for request in batch.step():
            if request.error is not None:
                raise request.error
