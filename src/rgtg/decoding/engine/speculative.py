"""Exact speculation: draft several tokens, verify policy and scorer in one pass each, keep what the rule accepts.

The output has the distribution of the plain loop, whatever drafted: each drafted token meets the *guided* distribution
at its place (arXiv 2211.17192, with p the guided distribution), and the first rejected one is drawn anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgtg.decoding.candidates import propose
from rgtg.decoding.engine.drafters import MAX_DRAFT, Acceptance, Choice, Costs, Draft, Drafter, no_draft
from rgtg.decoding.engine.tokenwise import TokenRule, require_finite, step_trace
from rgtg.decoding.request import Request, Stopping, process
from rgtg.decoding.runners.model_runner import Runner, read
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.decoding.sampling import accept_draft, greedy, sample


@dataclass
class _Verified:
    """What is known at every place of the drafts, on the host: places 0 … n, each with its K candidates."""

    ids: Tensor  # (B, n + 1, K)
    candidate_log_probs: Tensor
    scores: Tensor | None
    guided: Tensor
    policy_log_probs: Tensor  # (B, n + 1, K), over the whole vocabulary and before the processors


@torch.inference_mode()
def speculate(
    requests: list[Request],
    policy: Runner,
    scorer: Runner | None,
    drafter: Drafter,
    costs: Costs,
    rule: TokenRule,
    stopping: Stopping,
    length: int | None = None,
) -> Iterator[list[Request]]:
    """Complete all requests; yields the rows active after each round (one to n + 1 new tokens each).

    Args:
        requests: the rows.
        policy: the policy's runner.
        scorer: the scorer's, or None for the policy alone.
        drafter: where drafts come from.
        costs: of passes, to choose how many tokens to draft.
        rule: candidates and choice.
        stopping: when a row ends.
        length: tokens per draft; None adapts it to each row's acceptance and the costs.

    Raises:
        NonFiniteError: the policy or the scorer gave NaN or infinite values.
    """
    active = list(requests)
    temperature = 0.0 if rule.greedy else rule.temperature
    choose = Choice(rule.top_k, rule.top_p, temperature)
    records = [Acceptance() for _ in active]
    prices = [drafter.cost(n) + costs.verify(n) for n in range(MAX_DRAFT + 1)]
    # 0. the prompts; the first token has no draft
    prompts = [row.prompt_ids for row in active]
    states = policy.prefill(prompts)
    if scorer:
        scorer.prefill(prompts)
    drafter.prefill(active)
    draft = no_draft(len(active), states.device)
    logits = policy.readout(policy.model, states)[:, None]
    while True:
        # 1. verify: the candidates of every place, scored in one pass
        places = _verify(active, logits, draft, scorer, rule)
        # 2. rule: accept from the left, then draw one token from what a rejection left, or one more behind the last
        accepted, choice = _accept(active, draft, places, temperature)
        _emit(active, draft, accepted, choice, places, rule, stopping)
        _count(active, draft, accepted, scored=scorer is not None)
        for record, kept, tried in zip(records, accepted, draft.counts, strict=True):
            record.update(kept, tried)
        yield active
        going = [i for i, row in enumerate(active) if row.finish_reason is None]
        if not going:
            return
        # 3. commit: the accepted tokens stay in every cache, and the one drawn after them in the scorer's
        policy.forget([draft.tokens.shape[1] - n for n in accepted])
        drafter.keep(accepted)
        if scorer:
            scorer.keep(_path(draft, accepted, choice, places.ids.shape[2]), [n + 1 for n in accepted])
        if len(going) < len(active):
            rows = torch.tensor(going)
            policy.select_rows(rows)
            drafter.select_rows(rows)
            if scorer:
                scorer.select_rows(rows)
            active, records = [active[i] for i in going], [records[i] for i in going]
        # 4. draft, and read the policy's logits at every place
        newest = torch.tensor([[row.token_ids[-1]] for row in active], device=states.device)
        counts = [_length(row, record, prices, length, stopping) for row, record in zip(active, records, strict=True)]
        draft = drafter.draft(active, newest, counts, choose)
        logits = draft.logits if draft.logits is not None else _read_chain(policy, newest, draft)


def _verify(rows: Sequence[Request], logits: Tensor, draft: Draft, scorer: Runner | None, rule: TokenRule) -> _Verified:
    """Guided distribution at each of the n + 1 places of every row."""
    batch, places, _ = logits.shape
    whole = torch.log_softmax(logits.float(), -1)
    ahead = draft.tokens.tolist()
    allowed = torch.stack(
        [process(rows, logits[:, i], whole[:, i], [mine[:i] for mine in ahead]) for i in range(places)], 1
    )
    ids, log_probs = propose(allowed.flatten(0, 1), top_k=rule.top_k, top_p=rule.top_p)
    ids, log_probs = (t.view(batch, places, -1) for t in (ids, log_probs))
    scores = _score(scorer, draft, ids) if scorer else None
    used = torch.arange(places, device=ids.device) <= torch.tensor(draft.counts, device=ids.device)[:, None]
    finite = scores is None or bool(scores[used].isfinite().all())
    require_finite(bool(log_probs[used][:, 0].isfinite().all()), finite)
    steering = scores.nan_to_num().flatten(0, 1) if scores is not None else None
    guided = rule.guide(log_probs.flatten(0, 1), steering)
    return _Verified(
        ids.cpu(), log_probs.cpu(), scores.cpu() if scores is not None else None,
        guided.view(batch, places, -1).cpu(), whole.gather(-1, ids).cpu(),
    )  # fmt: skip


def _score(scorer: Runner, draft: Draft, ids: Tensor) -> Tensor:
    """Scores (B, n + 1, K): one pass over the chain of drafted tokens with the candidates of each place hung on it."""
    batch, places, k = ids.shape
    n = places - 1
    parents = (*range(-1, n - 1), *(place - 1 for place in range(places) for _ in range(k)))
    tree = TokenTree(torch.cat([draft.tokens, ids.flatten(1)], 1), parents)
    return read(scorer, tree)[:, n:].reshape(batch, places, k).float().to(ids.device)


def _accept(rows: Sequence[Request], draft: Draft, places: _Verified, temperature: float) -> tuple[list[int], Tensor]:
    """How many drafted tokens of each row are accepted, and which candidate of the place behind them is drawn."""
    accepted = [0] * len(rows)
    rejected = [False] * len(rows)
    last = torch.stack([places.guided[b, n] for b, n in enumerate(draft.counts)])
    tokens, q_ids, q = draft.tokens.cpu(), draft.ids.cpu(), draft.log_probs.cpu()
    for place in range(tokens.shape[1]):
        open_ = [not gone and place < n for gone, n in zip(rejected, draft.counts, strict=True)]
        uniforms = torch.tensor([row.uniform() if o else 0.0 for row, o in zip(rows, open_, strict=True)])
        on_candidates = _on(places.ids[:, place], q_ids[:, place], q[:, place])
        found = places.ids[:, place] == tokens[:, place, None]
        drafted = torch.where(found.any(-1), found.long().argmax(-1), -1)
        kept, rest = accept_draft(places.guided[:, place], on_candidates, drafted, uniforms.double())
        for b in (b for b, o in enumerate(open_) if o):
            if kept[b]:
                accepted[b] += 1
            else:
                rejected[b], last[b] = True, rest[b]
    draws = torch.tensor([row.uniform() for row in rows], dtype=torch.float64)
    return accepted, greedy(last) if temperature == 0 else sample(last, draws)


def _on(ids: Tensor, support: Tensor, log_probs: Tensor) -> Tensor:
    """A draft distribution's log-probabilities (B, K) at other candidates (B, K)."""
    matches = ids[:, :, None] == support[:, None]
    return (matches * log_probs.double().exp()[:, None]).sum(-1).log()


def _emit(
    rows: Sequence[Request], draft: Draft, accepted: list[int], choice: Tensor, places: _Verified, rule: TokenRule,
    stopping: Stopping,
) -> None:  # fmt: skip
    """Write each row's new tokens into it one by one, until it ends."""
    for b, row in enumerate(rows):
        drafted = draft.tokens[b, : accepted[b]].tolist()
        for place, token in enumerate([*drafted, int(places.ids[b, accepted[b], choice[b]])]):
            j = int((places.ids[b, place] == token).nonzero()[0])
            row.token_ids.append(token)
            row.policy_log_prob += float(places.policy_log_probs[b, place, j])
            row.guided_log_prob += float(places.guided[b, place, j])
            here = places.candidate_log_probs[b, place]
            row.candidates_log_prob += float(here[j] - here.logsumexp(-1))
            scores = places.scores[b, place] if places.scores is not None else None
            row.score = float(scores[j]) if scores is not None else None
            if rule.trace:
                known = (places.ids[b, place], places.candidate_log_probs[b, place], scores, places.guided[b, place])
                row.trace.append(step_trace(token, *known))
            stopping.update(row)
            if row.finish_reason is not None:
                break


def _count(rows: Sequence[Request], draft: Draft, accepted: list[int], *, scored: bool) -> None:
    """Passes and drafts of the round, in each row's record."""
    for b, row in enumerate(rows):
        row.policy_calls += draft.policy_passes(b)
        row.scorer_calls += int(scored)
        row.drafted += draft.counts[b]
        row.accepted += accepted[b]


def _path(draft: Draft, accepted: list[int], choice: Tensor, k: int) -> Tensor:
    """Nodes (B, n + 1) of the scorer's tree down to the token drawn: accepted drafts, then a candidate."""
    n = draft.tokens.shape[1]
    return torch.tensor(
        [[*range(kept), n + kept * k + int(j), *[0] * (n - kept)] for kept, j in zip(accepted, choice, strict=True)]
    )


def _read_chain(policy: Runner, newest: Tensor, draft: Draft) -> Tensor:
    """The policy's logits (B, n + 1, V) at the newest token and at every drafted one, in one pass; all are kept."""
    chain = TokenTree.chain(torch.cat([newest, draft.tokens], 1))
    logits = read(policy, chain)
    policy.keep(torch.arange(chain.width).expand(len(newest), -1))
    return logits


def _length(row: Request, record: Acceptance, prices: Sequence[float], length: int | None, stopping: Stopping) -> int:
    """Tokens to draft: never more than the row may still need behind the one that is drawn anyway."""
    room = max(stopping.limit - len(row.token_ids) - 1, 0)
    return min(room, length if length is not None else record.best_length(prices))
