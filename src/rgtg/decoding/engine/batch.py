"""THE loop: requests join and leave a running batch at any step; each step draws one token for every request.

``GuidedPolicy.generate`` adds all rows and steps until none is left; a job adds fixed batches; the server adds and
removes requests at any step. What a request draws depends on neither its neighbours nor the moment it came. An
exception belongs to the request that caused it: the others go on.
"""

import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from rgtg.decoding.engine.prefix_cache import PrefixCache
from rgtg.decoding.request import Request, process
from rgtg.decoding.runners.base import PolicyRunner, PolicyState, ScorerRunner
from rgtg.decoding.runners.model_runner import CachedRunner, has_cache
from rgtg.decoding.runners.scorer_runner import StateHeadRunner, VocabHeadRunner, concat_states, select_state
from rgtg.decoding.runners.token_tree import States
from rgtg.decoding.sampling import (
    NO_FINITE_PROBABILITY,
    Candidates,
    Draws,
    SamplingParams,
    draw,
    propose_candidates,
    take,
)
from rgtg.errors import NonFiniteError

T = TypeVar("T")


@dataclass
class Prefilled:
    """Prompts that have been read: the policy, what it says after them, and the scorers that make passes of their own.

    Attributes:
        policy: its rows have read the prompts.
        state: of the policy at the prompts' ends.
        scorers: by name.
        shared: whether a prefix cache holds the same keys and values, so that they must be copied.
    """

    policy: PolicyRunner
    state: PolicyState
    scorers: dict[str, Any] = field(default_factory=dict)
    shared: bool = False


@dataclass(eq=False)
class ScorerRows:
    """A scorer that makes passes of its own, and the requests that it scores, in the order of its rows."""

    runner: ScorerRunner
    requests: list[Request] = field(default_factory=list)
    scored: Tensor | None = None  # (rows, K) candidates of this step


@dataclass(eq=False)
class Group:
    """Requests with the same sampling parameters and as many scorers.

    Attributes:
        params: shared by them.
        rows: b rows of the batch.
        candidates: of this step.
        scores: (b, K) by scorer name; zero in rows without it.
        draws: of this step.
    """

    params: SamplingParams
    rows: list[int]
    candidates: Candidates
    scores: dict[str, Tensor] = field(default_factory=dict)
    draws: Draws | None = None

    def set_scores(self, name: str, mine: list[int], scores: Tensor) -> None:
        """Scores (m, K) of m of its rows."""
        if len(mine) < len(self.rows):
            whole = torch.zeros(self.candidates.ids.shape, device=scores.device)
            whole[mine] = scores
            scores = whole
        self.scores[name] = scores


class Chooser(Protocol):
    """Chooses tokens for all rows together, where rows compete for their places."""

    def due(self, candidates: Candidates) -> Tensor:
        """(R,) whether the candidates of each row are scored in this step."""
        ...

    def choose(self, candidates: Candidates, scores: Tensor | None) -> list[tuple[int, int, Request]]:
        """The rows that go on: (row that is copied, its candidate, the request that takes it).

        Raises:
            NonFiniteError: candidates that cannot be compared.
        """
        ...


class Batch:
    """Running requests over one cache of the policy; scorers of their own hold only the rows that they score.

    Attributes:
        requests: that are running, in the order of the policy's rows.
        policy: reads the policy; None while there are no requests.
        state: what the policy says after each request's newest token.
        separate: scorers that make passes of their own, by name.
        seconds: spent by each scorer.
    """

    def __init__(
        self,
        *,
        fused: tuple[str, StateHeadRunner] | None = None,
        heads: dict[str, VocabHeadRunner] | None = None,
        overlap: bool = False,
        on_nan: Literal["fail", "unguided"] = "fail",
        prefix_cache: PrefixCache | None = None,
        keep_order: bool = True,
        ends_early: Callable[[list[Request], Tensor, Tensor], list[Request]] | None = None,
        score_every: int | None = None,
        chooser: Chooser | None = None,
    ) -> None:
        """Start without requests; the first ones bring the runners.

        Args:
            fused: name and head of the scorer that reads the policy's states at the candidates; all requests have it.
            heads: vocabulary heads on the policy's state at the prefix, by name.
            overlap: let the policy read the candidates while the one separate scorer scores them, in two threads.
            on_nan: whether a scorer's NaN fails the request, or leaves the token to the policy.
            prefix_cache: where texts that have been read are kept for others that begin alike.
            keep_order: whether rows keep their order when one leaves, so that a batch gives the same bits each time;
                else the last row takes the free place, and only that one is copied.
            ends_early: called before each draw with the requests, the policy's logits and log-probabilities (B, V);
                returns those that it has ended.
            score_every: draw from the policy, and let the scorers read drawn tokens only: every so many of them, and
                where a text ends. None scores the candidates before the draw.
            chooser: chooses the tokens of all rows together, and which rows go on; None draws for each row. All rows
                have the same parameters and scorers, and an error is raised.
        """
        self.score_every, self.chooser = score_every, chooser
        self.fused, self.heads, self.on_nan, self.ends_early = fused, heads or {}, on_nan, ends_early
        self.prefix_cache, self.keep_order = prefix_cache, keep_order
        self.requests: list[Request] = []
        self.policy: PolicyRunner | None = None
        self.state: PolicyState | None = None
        self.separate: dict[str, ScorerRows] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self._tree: tuple[Tensor, States] | None = None  # this step's candidates (B, K), which the policy has read
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rgtg-scorer") if overlap else None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        runners = [self.policy, *(entry.runner for entry in list(self.separate.values()))]
        return sum(found.cache.nbytes for runner in runners if (found := _cached_runner(runner)) is not None)

    # -- add and remove --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def read_pending(self) -> list[Request]:
        """Read the tokens that wait for a scorer, so that requests can join; between two steps.

        Returns:
            Requests that left, because reading their own tokens failed; each has its error.
        """
        failed: dict[Request, None] = {}
        for entry in self.separate.values():
            probe = lambda row, runner=entry.runner: runner.copy_rows([row]).read_pending()  # noqa: E731
            failed |= dict.fromkeys(self._attempt(entry.runner.read_pending, probe, entry.requests)[1])
        self.remove(failed)
        return list(failed)

    @torch.inference_mode()
    def add(self, requests: Sequence[Request], prefilled: Prefilled) -> None:
        """Add requests whose prompts have been read, between two steps; all of them, or none where it raises.

        Args:
            requests: one for each row that was prefilled, with the same scorers; or several that share one row.
            prefilled: its runners are taken over where the batch is empty and nothing else uses them, else copied.
        """
        if self.policy is None and not prefilled.shared and len(prefilled.state.logits) == len(requests):
            self.requests, self.policy, self.state = list(requests), prefilled.policy, prefilled.state
            for name, runner in prefilled.scorers.items():
                if name in requests[0].scorers:
                    self.separate[name] = ScorerRows(runner, list(requests))
            return
        assert len(prefilled.state.logits) == 1, "rows join a running batch one by one"
        for i, request in enumerate(requests):
            try:
                self._add_row(request, prefilled, forked=i > 0)
            except Exception:
                self._undo_add(request)
                self.remove(requests[:i])
                raise

    def _add_row(self, request: Request, prefilled: Prefilled, *, forked: bool) -> None:
        # 1. the policy's row
        if self.policy is None:
            self.policy = prefilled.policy.copy_rows([0])
        else:
            self.policy.add(prefilled.policy)
        # 2. those of the scorers that steer the request
        for name, runner in prefilled.scorers.items():
            if name not in request.scorers:
                continue
            mine = runner.fork(request) if forked else runner
            if name in self.separate:
                self.separate[name].runner.add(mine)
            else:
                self.separate[name] = ScorerRows(mine.copy_rows([0]))
            self.separate[name].requests.append(request)
        # 3. what the policy says after the prompt
        self.state = concat_states(self.state, prefilled.state)
        self.requests.append(request)

    def _undo_add(self, request: Request) -> None:
        """Remove the rows of a request that could not be added everywhere; the others stay as they were."""
        if not self.requests:
            self.policy, self.separate = None, {}
            return
        self._policy.select_rows(range(len(self.requests)))
        for name, entry in list(self.separate.items()):
            entry.requests = [one for one in entry.requests if one is not request]
            if entry.requests:
                entry.runner.select_rows(range(len(entry.requests)))
            else:
                del self.separate[name]

    @torch.inference_mode()
    def remove(self, requests: Iterable[Request]) -> None:
        """Remove requests, between two steps."""
        kept = self._drop(requests)
        if self.state is not None:
            self.state = select_state(self.state, kept)

    @torch.inference_mode()
    def replace_rows(self, rows: Sequence[int], requests: Sequence[Request]) -> None:
        """Let row i be a copy of the row that was ``rows[i]``, for ``requests[i]``, between two steps.

        All requests have the same scorers. No rows at all empties the batch.
        """
        if not rows:
            self.remove(list(self.requests))
            return
        for entry in self.separate.values():
            places = {request: place for place, request in enumerate(entry.requests)}
            entry.runner.select_rows([places[self.requests[row]] for row in rows])
            entry.runner.set_requests(requests)
            entry.requests, entry.scored = list(requests), None
        self._policy.select_rows(rows)
        self.state, self.requests = select_state(self._state, rows), list(requests)

    def _drop(self, leaving: Iterable[Request]) -> list[int] | None:
        """Remove requests everywhere but in ``state``; rows of those that stay in their new order, None if all stay."""
        gone = set(leaving)
        if not gone:
            return None
        if self.prefix_cache is not None:
            with suppress(RuntimeError):  # a text for which there is no memory is read again
                self._keep_texts(gone, self.prefix_cache)
        if len(gone) == len(self.requests):
            self.requests, self.policy, self.state, self.separate = [], None, None, {}
            return []
        # 1. the policy's rows
        kept = _rows_without(self.requests, gone, self.keep_order)
        self.requests = [self.requests[row] for row in kept]
        self._policy.select_rows(kept)
        # 2. those of the scorers
        for name, entry in list(self.separate.items()):
            if not gone.isdisjoint(entry.requests):
                rows = _rows_without(entry.requests, gone, self.keep_order)
                entry.requests = [entry.requests[row] for row in rows]
                if rows:
                    entry.runner.select_rows(rows)
                else:
                    del self.separate[name]
        return kept

    # -- one step --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, on_draw: Callable[[list[Request]], None] | None = None) -> list[Request]:
        """Draw one token for every request.

        Args:
            on_draw: called with the requests as soon as their tokens are drawn, before the models read these.

        Returns:
            The requests that have left the batch: ended, or failed (``Request.error``).
        """
        before = list(self.requests)
        # 1. propose the policy's likely next tokens, and
        # 2. score them; a request that cannot be scored leaves, and the others start over
        groups = self._propose()
        while self.score_every is None and (failed := self._score(groups)):
            if self.chooser is not None:
                raise failed[0].error or RuntimeError("a request failed without an error")
            self.remove(failed)
            groups = self._propose()
        # 3. draw from π·exp(β·r)
        if self.chooser is not None:
            self._choose(groups, self.chooser)
            before = list(self.requests)
        for group in groups if self.chooser is None else ():
            self._draw(group)
        # 4. end what is complete
        going = 0
        for request in self.requests:
            try:
                if request.error is None and request.stopping is not None:
                    request.stopping.update(request)
            except Exception as error:
                request.error = error
            going += request.finish_reason is None and request.error is None
        if self.score_every is not None:
            self._score_drawn(groups, self.score_every)
        if on_draw is not None and self.requests:
            on_draw(list(self.requests))
        # 5. commit the tokens everywhere; the policy reads those of the requests that go on
        if going:
            self._commit(groups)
        else:
            self._drop(self.requests)
        left = []
        for request in before:
            if request.finish_reason is not None or request.error is not None:
                left.append(request)
        return left

    # -- 1. propose ------------------------------------------------------------------------------------------------

    def _propose(self) -> list[Group]:
        """Candidates of all requests, in groups that share their sampling parameters."""
        if self.ends_early is not None and self.state is not None:
            logits = self.state.logits
            self.remove(self.ends_early(self.requests, logits, torch.log_softmax(logits.float(), -1)))
        if self.state is None:
            return []
        log_probs = torch.log_softmax(self.state.logits.float(), -1)
        # 1. requests by their parameters
        by_params: dict[tuple[SamplingParams, int], list[int]] = {}
        processed = False
        for row, request in enumerate(self.requests):
            by_params.setdefault((request.params, len(request.scorers)), []).append(row)
            processed = processed or bool(request.processors)
        # 2. their candidates
        allowed = self._process(log_probs) if processed else log_probs
        groups = []
        for (params, _), rows in by_params.items():
            if len(by_params) == 1:
                mine = propose_candidates(log_probs, allowed, params)
            else:
                at = torch.tensor(rows, device=log_probs.device)
                mine = propose_candidates(log_probs[at], allowed[at], params)
            if self.chooser is not None:
                mine = replace(mine, steered=self.chooser.due(mine).to(log_probs.device))
            groups.append(Group(params, rows, mine))
        return groups

    def _process(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities (B, V) after each request's processors; a processor that raises fails its request."""
        logits = self._state.logits
        try:
            return process(self.requests, logits, log_probs)
        except Exception:
            allowed = log_probs.clone()
            for row, request in enumerate(self.requests):
                try:
                    allowed[row] = process([request], logits[row : row + 1], log_probs[row : row + 1])[0]
                except Exception as error:
                    request.error = error
            return allowed

    # -- 2. score --------------------------------------------------------------------------------------------------

    def _score(self, groups: list[Group]) -> list[Request]:
        """Set the scores of each group; returns requests that failed."""
        self._tree = None
        # 1. the policy's pass over the candidates: a fused scorer reads its states, or it runs beside another's pass
        reads = self.fused is not None or self._thread is not None
        if reads and any(g.candidates.any_steered() for g in groups) and (failed := self._read_candidates(groups)):
            return failed
        if self._tree is not None and self.fused is not None and (failed := self._score_fused(groups, *self.fused)):
            return failed
        # 2. heads that read the policy's state at the prefix
        for name, head in self.heads.items():
            for group in groups:
                if failed := self._score_by_head(name, head, group):
                    return failed
        # 3. scorers that make passes of their own
        if self._thread is None:
            for name, entry in self.separate.items():
                if failed := self._score_separate(name, entry, groups):
                    return failed
        for entry in self.separate.values():
            if entry.scored is not None and entry.runner.record is not None:  # a step that starts over counts once
                steered = {self.requests[group.rows[i]] for group in groups for i in group.candidates.steered_rows()}
                entry.runner.record([row for row, request in enumerate(entry.requests) if request in steered])
        return []

    def _read_candidates(self, groups: list[Group]) -> list[Request]:
        """Let the policy read all candidates, beside the separate scorer's pass where passes overlap."""
        ids = rectangle([(group.rows, group.candidates.ids) for group in groups])
        other = self._score_in_thread(groups) if self._thread is not None else None
        tree, failed = self._attempt(
            lambda: self._policy.tree(ids),
            lambda row: self._policy.copy_rows([row]).tree(ids[row : row + 1]),
            self.requests,
        )
        self._tree = None if tree is None else (ids, tree)
        return [*failed, *other()] if other is not None else failed

    def _score_fused(self, groups: list[Group], name: str, head: StateHeadRunner) -> list[Request]:
        """Scores from the policy's states at the candidates; returns requests that failed."""
        assert self._tree is not None, "the policy has read the candidates"
        start, tree = time.perf_counter(), self._tree[1]
        scores, failed = self._attempt(lambda: head.score(tree), lambda row: head.score(tree.at([row])), self.requests)
        for group in groups:
            if scores is not None and group.candidates.any_steered():
                one = len(groups) == 1  # its rows are those of the batch: nothing to index
                group.scores[name] = scores if one else scores[group.rows, : group.candidates.ids.shape[1]]
        self.seconds[name] += time.perf_counter() - start
        return failed

    def _score_by_head(self, name: str, head: VocabHeadRunner, group: Group) -> list[Request]:
        """Scores of a group's requests from the policy's states at their prefixes; returns requests that failed."""
        mine = [i for i, row in enumerate(group.rows) if name in self.requests[row].scorers]
        if not mine or not group.candidates.any_steered():
            return []
        start = time.perf_counter()
        states, ids = self._hidden, group.candidates.ids
        if len(mine) < len(self.requests):  # else there is nothing to index
            states, ids = states[[group.rows[i] for i in mine]], ids[mine]
        scores, failed = self._attempt(
            lambda: head.score(states, ids),
            lambda row: head.score(states[row : row + 1], ids[row : row + 1]),
            [self.requests[group.rows[i]] for i in mine],
        )
        if scores is not None:
            group.set_scores(name, mine, scores)
        self.seconds[name] += time.perf_counter() - start
        return failed

    def _score_separate(self, name: str, entry: ScorerRows, groups: list[Group]) -> list[Request]:
        """Scores of a scorer of its own, if any of its requests is steered; returns requests that failed."""
        start = time.perf_counter()
        entry.scored = None
        # 1. all requests are one group: its candidates are the scorer's rows as they stand
        if len(groups) == 1 and entry.requests == self.requests and groups[0].candidates.steered is None:
            try:
                groups[0].scores[name] = entry.runner.score(groups[0].candidates.ids)
                entry.scored = groups[0].candidates.ids
                self.seconds[name] += time.perf_counter() - start
                return []
            except Exception:  # once more below, where it is found out whose error it is
                entry.scored = None
        # 2. else: each block is (group, places in the group, rows of the scorer)
        blocks = self._blocks(entry, groups)
        steered = [block for block in blocks if block[0].candidates.any_steered()]
        if not steered:
            return []

        def probe(row: int) -> None:
            group, place = next((group, mine[rows.index(row)]) for group, mine, rows in blocks if row in rows)
            entry.runner.copy_rows([row]).score(group.candidates.ids[place : place + 1])

        _, failed = self._attempt(lambda: self._score_blocks(name, entry, blocks, steered), probe, entry.requests)
        self.seconds[name] += time.perf_counter() - start
        return failed

    def _blocks(self, entry: ScorerRows, groups: list[Group]) -> list[tuple[Group, list[int], list[int]]]:
        row_of = {request: row for row, request in enumerate(entry.requests)}
        blocks = []
        for group in groups:
            mine = [i for i, row in enumerate(group.rows) if self.requests[row] in row_of]
            if mine:
                blocks.append((group, mine, [row_of[self.requests[group.rows[i]]] for i in mine]))
        return blocks

    def _score_blocks(
        self,
        name: str,
        entry: ScorerRows,
        blocks: list[tuple[Group, list[int], list[int]]],
        steered: list[tuple[Group, list[int], list[int]]],
    ) -> None:
        if entry.runner.scores_any_rows:  # each group for itself, since one may have all tokens as candidates
            for group, mine, rows in steered:
                group.set_scores(name, mine, entry.runner.score(group.candidates.ids[mine], rows))
            return
        ids = rectangle([(rows, group.candidates.ids[mine]) for group, mine, rows in blocks])
        scores = entry.runner.score(ids)
        entry.scored = ids
        for group, mine, rows in steered:
            group.set_scores(name, mine, scores[rows, : group.candidates.ids.shape[1]])

    def _score_in_thread(self, groups: list[Group]) -> Callable[[], list[Request]]:
        """Start the only scorer's pass in the other thread; the result waits for it."""
        assert self._thread is not None
        (name,) = self.separate

        def score() -> list[Request]:
            with torch.inference_mode():  # the caller's does not hold in this thread
                return self._score_separate(name, self.separate[name], groups)

        return self._thread.submit(score).result

    # -- 3. draw ---------------------------------------------------------------------------------------------------

    def _draw(self, group: Group) -> None:
        """Draw for one group; what is not finite fails its own request."""
        requests, uniforms = [], []
        for row in group.rows:
            requests.append(self.requests[row])
            uniforms.append(self.requests[row].uniform())
        # 1. the score: of the only scorer, or a weighted sum
        scores, each = next(iter(group.scores.values()), None), None
        if len(group.scores) > 1:
            scores, each = self._weighted(group, requests)
        # 2. the draw, and again without scores that are not finite
        allowed = None if group.params.kl_budget is None else [request.allowed_nats() for request in requests]
        draws = draw(group.candidates, scores, uniforms, group.params, each, allowed)
        if not draws.finite:
            candidates = self._without_nan(group, requests)
            if scores is not None:
                scores, each = self._weighted(group, requests)
            draws = draw(candidates, scores, uniforms, group.params, each, allowed)
            for row, request in enumerate(requests):
                if not draws.figures[row][4] and request.error is None:
                    request.error = NonFiniteError(NO_FINITE_PROBABILITY)
        # 3. to the requests
        group.draws = draws
        for row, request in enumerate(requests):
            request.record(draws, row)

    def _weighted(self, group: Group, requests: list[Request]) -> tuple[Tensor | None, Tensor | None]:
        """Scores (b, K), and those of each scorer (S, b, K) where requests have several: then a weighted sum."""
        if len(requests[0].scorers) == 1:  # every scorer has scored its own rows, and is zero in the others
            scores = list(group.scores.values())
            return (scores[0] if len(scores) == 1 else torch.stack(scores).sum(0)), None
        each = torch.stack([
            torch.stack([group.scores[request.scorers[j]][i] for i, request in enumerate(requests)])
            for j in range(len(requests[0].scorers))
        ])  # fmt: skip
        betas = torch.tensor([request.betas for request in requests]).to(each)
        return torch.einsum("bs,sbk->bk", betas, each), each

    def _without_nan(self, group: Group, requests: list[Request]) -> Candidates:
        """Set scores that are not finite to zero, and leave their rows to the policy; requests that need them fail."""
        given = group.candidates
        steered = given.steered
        for name, scores in group.scores.items():
            finite = scores.isfinite().all(-1)
            if bool(finite.all()):
                continue
            group.scores[name] = scores.masked_fill(~finite[:, None], 0.0)
            needed = ~finite if given.steered is None else ~finite & given.steered
            steered = finite if steered is None else steered & finite
            for i in needed.nonzero()[:, 0].tolist():
                if self.on_nan == "unguided":
                    requests[i].scores_not_finite += 1
                elif requests[i].error is None:
                    requests[i].error = NonFiniteError(
                        f"the scorer {name} returned NaN or infinite scores for this text; try dtype=float32, or check "
                        "its training"
                    )
        return Candidates(given.policy_log_probs, given.ids, given.log_probs, steered)

    def _choose(self, groups: list[Group], chooser: Chooser) -> None:
        """Let the rows that go on be copies of the chosen ones, each with its token."""
        (group,) = groups
        scores = self._weighted(group, self.requests)[0] if group.scores else None
        chosen = chooser.choose(group.candidates, scores)
        rows = [row for row, _, _ in chosen]
        # 1. the rows everywhere, with what has been read of their candidates
        for entry in self.separate.values():
            places = {request: place for place, request in enumerate(entry.requests)}
            mine = [places[self.requests[row]] for row in rows]
            entry.runner.select_rows(mine)
            entry.runner.set_requests([request for _, _, request in chosen])
            entry.requests = [request for _, _, request in chosen]
            entry.scored = None if entry.scored is None else entry.scored[mine]
        self._policy.select_rows(rows)
        if self._tree is not None:
            self._tree = self._tree[0][rows], self._tree[1].at(rows)
        self.state, self.requests = select_state(self._state, rows), [request for _, _, request in chosen]
        # 2. their tokens
        given = group.candidates
        ids, log_probs = given.ids[rows], given.log_probs[rows]
        whole = given.policy_log_probs[rows]
        group.rows = list(range(len(rows)))
        group.candidates = Candidates(whole, ids, log_probs, None if given.steered is None else given.steered[rows])
        choice = torch.tensor([column for _, column, _ in chosen], device=ids.device)
        group.draws = take(group.candidates, choice, None if scores is None else scores[rows])
        for row, request in enumerate(self.requests):
            request.record(group.draws, row)

    def _score_drawn(self, groups: list[Group], every: int) -> None:
        """Score the tokens that were drawn, in the rows whose score is due."""
        due = [one.ended or len(one.token_ids) % every == 0 for one in self.requests]
        # 1. the drawn tokens are the only candidates
        self._tree = None
        for group in groups:
            assert group.draws is not None, "tokens have been drawn"
            ids, choice = group.draws.tokens, torch.zeros_like(group.draws.choice)
            steered = torch.tensor([due[row] for row in group.rows], device=ids.device)
            group.candidates = Candidates(group.candidates.policy_log_probs, ids, torch.zeros(ids.shape), steered)
            group.draws = replace(group.draws, choice=choice)
        for entry in self.separate.values():
            entry.scored = None
        if not any(due):
            return
        # 2. their scores; an error also fails a request whose text has just ended
        reasons = [(request, request.finish_reason) for request in self.requests]
        for request, _ in reasons:
            request.finish_reason = None
        failed = self._score(groups)
        for request, reason in reasons:
            request.finish_reason = reason if request.error is None else None
        if failed:
            return
        # 3. to the requests
        for group in groups:
            requests = [self.requests[row] for row in group.rows]
            self._without_nan(group, requests)
            scores, _ = self._weighted(group, requests)
            assert scores is not None, "requests have scorers"
            for row, score in zip(group.rows, scores[:, 0].tolist(), strict=True):
                if due[row]:
                    self.requests[row].score = score
                    self.requests[row].scorer_calls += 1

    # -- 5. commit -------------------------------------------------------------------------------------------------

    def _commit(self, groups: list[Group]) -> None:
        """Commit what was drawn in every cache, let ended requests go, and let the policy read the new tokens."""
        drawn = [(group.rows, group.draws) for group in groups if group.draws is not None]
        tokens = rectangle([(rows, draws.tokens) for rows, draws in drawn])
        choice = rectangle([(rows, draws.choice[:, None]) for rows, draws in drawn])[:, 0]
        # 1. the scorers' caches
        row_of = {request: row for row, request in enumerate(self.requests)}
        for name, entry in list(self.separate.items()):
            self._commit_scorer(entry, tokens, choice, row_of)
            if not entry.requests:
                del self.separate[name]
        # 2. the policy's cache, where it has read the candidates, and its states at the chosen ones
        chosen = None
        if self._tree is not None:
            ids, tree = self._tree
            tree = tree if self.heads else States(tree.final, None)  # no head reads the prefix
            with suppress(Exception):  # below, the policy reads the tokens again, or shows whose fault it is
                self._policy.commit(ids, choice)
                chosen = tree.at((torch.arange(len(choice), device=tree.final.device), choice.to(tree.final.device)))
        # 3. ended requests leave
        kept = self._drop([request for request in self.requests if request.ended])
        if kept is not None:
            tokens, chosen = tokens[kept], None if chosen is None else chosen.at(kept)
        # 4. what the policy says next
        self._advance(tokens, chosen)

    def _commit_scorer(self, entry: ScorerRows, tokens: Tensor, choice: Tensor, row_of: dict[Request, int]) -> None:
        """Commit the drawn tokens with a scorer of its own: candidates that it has read, or tokens to read later."""

        def commit() -> None:
            mine, chosen = tokens, choice
            if entry.requests != self.requests:  # else the rows are those of the batch: nothing to index
                rows = [row_of[request] for request in entry.requests]
                mine, chosen = tokens[rows], choice[rows]
            if entry.scored is None:
                entry.runner.append(mine)
            else:
                entry.runner.commit(entry.scored, chosen)

        def probe(row: int) -> None:
            runner, at = entry.runner.copy_rows([row]), row_of[entry.requests[row]]
            if entry.scored is None:
                runner.append(tokens[at : at + 1])
            else:  # a copy holds no candidates
                runner.score(entry.scored[row : row + 1])
                runner.commit(entry.scored[row : row + 1], choice[at : at + 1])

        while failed := self._attempt(commit, probe, entry.requests)[1]:
            rows = [row for row, request in enumerate(entry.requests) if request not in failed]
            entry.requests = [entry.requests[row] for row in rows]
            if not rows:
                return
            entry.runner.select_rows(rows)
            entry.scored = None if entry.scored is None else entry.scored[rows]

    def _advance(self, tokens: Tensor, chosen: States | None) -> None:
        """Set what the policy says next: at states (B, H) that are there, or after reading one token (B, 1) each."""

        def advance() -> PolicyState:
            state: PolicyState = self._policy.step(tokens) if chosen is None else self._policy.predict(chosen)
            return state

        def probe(row: int) -> None:
            if chosen is None:
                self._policy.copy_rows([row]).step(tokens[row : row + 1])
            else:
                self._policy.predict(chosen.at([row]))

        while self.requests:
            state, failed = self._attempt(advance, probe, self.requests)
            if not failed:
                self.state = state
                return
            if (kept := self._drop(failed)) is not None:
                tokens, chosen = tokens[kept], None if chosen is None else chosen.at(kept)

    # -- whose error it is -----------------------------------------------------------------------------------------

    def _attempt(
        self, run: Callable[[], T], probe: Callable[[int], Any], requests: Sequence[Request]
    ) -> tuple[T | None, list[Request]]:
        """Run something for all rows; its result, or the requests that failed.

        If it raises, requests whose row raises alone fail with their own error. If none does, it was not a row's fault:
        what is raised a second time fails all.

        Args:
            run: changes nothing where it raises.
            probe: does the same for a copy of one row.
            requests: of the rows.
        """
        try:
            return run(), []
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # the tensors of the failed pass leave room for the probes
        if failed := self._find_failed(probe, requests):
            return None, failed
        try:
            return run(), []
        except Exception as error:
            for request in requests:
                _fail(request, error)
            return None, list(requests)

    def _find_failed(self, probe: Callable[[int], Any], requests: Sequence[Request]) -> list[Request]:
        """Requests whose row raises alone, with their own error."""
        errors: dict[Request, Exception] = {}
        for row, request in enumerate(requests if len(requests) > 1 else ()):
            try:
                probe(row)
            except NotImplementedError:  # this runner's rows cannot be copied
                return []
            except Exception as error:
                traceback.clear_frames(error.__traceback__)
                errors[request] = error
        for request, own in errors.items():
            _fail(request, own)
        return list(errors)

    # -- the prefix cache ------------------------------------------------------------------------------------------

    def _keep_texts(self, leaving: set[Request], cache: PrefixCache) -> None:
        """Keep what was read of texts that are complete."""
        for request in leaving:
            if request.finish_reason is None or request.error is not None or request.scores_not_finite:
                continue
            text = [*request.prompt_ids, *request.token_ids]
            row, batch = self.requests.index(request), len(self.requests)
            if (runner := _cached_runner(self.policy)) is not None:
                rows = list(range(row, runner.rows, batch))  # two of a doubled batch
                doubled = self.fused[0] if self.fused is not None and len(rows) > 1 else None
                cache.add_rows(("policy", doubled), runner, text, rows)
            for name, entry in self.separate.items():
                if request in entry.requests and (runner := _cached_runner(entry.runner)) is not None:
                    row, batch = entry.requests.index(request), len(entry.requests)
                    rows = list(range(row, runner.rows, batch))
                    cache.add_rows(("scorer", name), runner, entry.runner.cached_text(row, text), rows)

    @property
    def _policy(self) -> PolicyRunner:
        assert self.policy is not None, "a batch with requests has a policy runner"
        return self.policy

    @property
    def _state(self) -> PolicyState:
        assert self.state is not None, "a batch with requests has the policy's state"
        return self.state

    @property
    def _hidden(self) -> Tensor:
        assert self._state.hidden is not None, "the policy's pass gives the states that heads read"
        return self._state.hidden


def _fail(request: Request, error: Exception) -> None:
    """Fail a request, unless it is complete already."""
    if request.finish_reason is None:
        request.error = error


def rectangle(blocks: list[tuple[list[int], Tensor]]) -> Tensor:
    """Blocks (b, K) of some rows each, as one tensor (B, K); narrower ones repeat their last column."""
    if len(blocks) == 1 and blocks[0][0] == list(range(len(blocks[0][0]))):
        return blocks[0][1]
    width = max(block.shape[1] for _, block in blocks)
    first = blocks[0][1]
    out = first.new_zeros(sum(len(rows) for rows, _ in blocks), width)
    for rows, block in blocks:
        out[rows, : block.shape[1]] = block
        out[rows, block.shape[1] :] = block[:, -1:]
    return out


def _rows_without(requests: Sequence[Request], gone: set[Request], keep_order: bool) -> list[int]:
    """Rows of those that stay: in their order, or in their places but for the last ones, which fill the gaps."""
    staying = [row for row, request in enumerate(requests) if request not in gone]
    if keep_order:
        return staying
    order, last = list(range(len(staying))), [row for row in staying if row >= len(staying)]
    for row in range(len(staying)):
        if requests[row] in gone:
            order[row] = last.pop()
    return order


def _cached_runner(runner: Any) -> CachedRunner | None:
    """The model runner with a cache that a policy or scorer runner reads with, if it has one."""
    found = getattr(runner, "runner", None)
    return found if has_cache(found) else None
