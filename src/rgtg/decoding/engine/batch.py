"""Rows that come and go: the loop's four words for requests that share the policy's pass, each with its own rule.

Where ``tokenwise.decode`` completes one batch under one rule, a lane takes rows in at any step and lets them out at any
step. What a row draws depends on neither its neighbours nor the moment it came.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rgtg.decoding.engine.prefix_cache import PrefixStore, policy_key
from rgtg.decoding.engine.tokenwise import Drawn, Proposal, TokenRule, draw, propose_next
from rgtg.decoding.request import Request, Stopping, process
from rgtg.decoding.runners.kv_cache import TreeCache
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.policy_runner import JoiningStepper
from rgtg.decoding.runners.scorer_runner import JoiningReader, PrefixReader, score_at
from rgtg.decoding.runners.text_scorer_runner import BranchReader


@dataclass(eq=False)
class Member:
    """One row of a lane.

    Attributes:
        request: what is completed.
        rule: how its tokens are drawn; of several scorers, their sum is weighted before the rule sees it.
        stopping: when it ends.
        scorers: names of those that steer it, in the order of its betas.
        betas: one for each scorer.
        unsound: what returned NaN in the last step: the policy, or the name of a scorer.
        fallback: tokens that were left to the policy, since a scorer returned NaN.
    """

    request: Request
    rule: TokenRule
    stopping: Stopping
    scorers: tuple[str, ...] = ()
    betas: tuple[float, ...] = ()
    unsound: str | None = None
    fallback: int = 0


@dataclass
class Beside:
    """A scorer that is a model of its own, and the members that it scores, in the order of its rows."""

    reader: JoiningReader
    members: list[Member] = field(default_factory=list)
    scored: Tensor | None = None  # (rows, K) candidates of this step


@dataclass
class Group:
    """Members with one rule and as many scorers each: their places in the lane, and this step's candidates."""

    rule: TokenRule
    places: list[int]
    proposal: Proposal
    scores: dict[str, Tensor] = field(default_factory=dict)  # name of a scorer → (b, K), zero for rows without it


class Lane:
    """Members over one cache of the policy; scorers beside it hold only the rows that they score.

    ``lead`` is the one scorer whose pass is the policy's own (a state head, an adapter): every member has it. ``heads``
    read the policy's state at the prefix, those members that name them.
    """

    def __init__(
        self,
        stepper: JoiningStepper,
        new_reader: Callable[[str], JoiningReader],
        *,
        lead: str | None = None,
        heads: dict[str, Any] | None = None,
        on_nan: Literal["fail", "unguided"] = "fail",
        store: PrefixStore | None = None,
    ) -> None:
        """Set up.

        Args:
            stepper: of the policy, without rows.
            new_reader: one without rows, for a scorer's name.
            lead: name of the scorer that is part of ``stepper``.
            heads: on the policy's state at the prefix, by name.
            on_nan: whether a scorer's NaN ends the row, or leaves the token to the policy.
            store: where texts that have been read are kept for others that begin alike.
        """
        self.stepper, self.lead, self.heads, self.on_nan = stepper, lead, heads or {}, on_nan
        self.new_reader, self.store = new_reader, store
        self.members: list[Member] = []
        self.beside: dict[str, Beside] = {}
        self.logits = torch.zeros(0)
        self._lead_ids: Tensor | None = None
        self.seconds: dict[str, float] = defaultdict(float)  # spent by each scorer

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(cache.nbytes for cache in self._caches())

    @torch.inference_mode()
    def join(self, member: Member, stepper: JoiningStepper, readers: dict[str, JoiningReader], logits: Tensor) -> None:
        """Take a row in whose prompt has been read: its policy's logits (1, V), and each reader of one row."""
        self.stepper.join(stepper)
        for name, reader in readers.items():
            if name not in self.beside:
                self.beside[name] = Beside(self.new_reader(name))
            self.beside[name].reader.join(reader)
            self.beside[name].members.append(member)
        self.logits = torch.cat([self.logits, logits]) if self.members else logits
        self.members.append(member)

    @torch.inference_mode()
    def leave(self, leaving: Iterable[Member]) -> None:
        """Let rows go, between two steps."""
        gone = set(leaving)
        order = self._drop(gone)
        if order is not None and self.members:
            self.logits = self.logits[torch.tensor(order, device=self.logits.device)]

    @torch.inference_mode()
    def step(self, told: Callable[[list[Member]], None] = lambda members: None) -> None:
        """Draw one token for every member.

        Args:
            told: called with those that stepped, finished ones and unsound ones included, as soon as their tokens are
                drawn: before the models read these.
        """
        stepped = list(self.members)
        # 1. propose
        groups = self._propose()
        # 2. score
        self._score(groups)
        # 3. rule
        drawn = [self._draw(group) for group in groups]
        # 4. commit
        for member in stepped:
            member.stopping.update(member.request)
        told(stepped)
        staying = [m for m in stepped if m.request.finish_reason is None and m.unsound is None]
        if staying:
            self._commit(groups, drawn)
        self._drop(set(stepped) - set(staying))
        if staying:
            self.logits = self.stepper.advance()

    def _propose(self) -> list[Group]:
        whole = torch.log_softmax(self.logits.float(), -1)
        allowed = process([member.request for member in self.members], self.logits, whole)
        by_rule: dict[tuple[TokenRule, int], list[int]] = defaultdict(list)
        for place, member in enumerate(self.members):
            by_rule[member.rule, len(member.scorers)].append(place)
        groups = []
        for (rule, _), places in by_rule.items():
            at = slice(None) if len(by_rule) == 1 else torch.tensor(places, device=whole.device)
            groups.append(Group(rule, places, propose_next(whole[at], allowed[at], rule)))
        return groups

    # -- scores ----------------------------------------------------------------------------------------------------

    def _score(self, groups: list[Group]) -> None:
        if self.lead is not None:
            with self._timing(self.lead):
                self._score_by_lead(self.lead, groups)
        for name, head in self.heads.items():
            with self._timing(name):
                self._score_by_head(name, head, groups)
        for name, beside in self.beside.items():
            with self._timing(name):
                self._score_beside(name, beside, groups)

    @contextmanager
    def _timing(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def _score_by_lead(self, name: str, groups: list[Group]) -> None:
        """All members' candidates in the policy's own pass; nothing where no member is steered."""
        self._lead_ids = None
        if any(group.proposal.is_steered for group in groups):
            self._lead_ids = _rectangle([(group.places, group.proposal.ids) for group in groups])
            scores = self.stepper.score(self._lead_ids)
            assert scores is not None, "the lead has a scorer"
            for group in groups:
                if group.proposal.is_steered:
                    group.scores[name] = scores[group.places, : group.proposal.ids.shape[1]]

    def _score_by_head(self, name: str, head: Any, groups: list[Group]) -> None:
        """Candidates of the members that name a head, at the policy's state."""
        seen = self.stepper.policy.seen
        for group in groups:
            mine = [i for i, place in enumerate(group.places) if name in self.members[place].scorers]
            if mine and group.proposal.is_steered:
                assert seen is not None, "a head reads an observed layer"
                states = seen[torch.tensor([group.places[i] for i in mine]), -1]
                self._give(group, name, mine, score_at(head, states, group.proposal.ids[mine]))

    def _score_beside(self, name: str, beside: Beside, groups: list[Group]) -> None:
        """One pass of a scorer beside the policy over the candidates of its members, if any of them is steered."""
        beside.scored = None
        row_of = {member: row for row, member in enumerate(beside.members)}
        blocks = []  # (group, places in the group, rows of the reader)
        for group in groups:
            members = [self.members[place] for place in group.places]
            if mine := [i for i, member in enumerate(members) if member in row_of]:
                blocks.append((group, mine, [row_of[members[i]] for i in mine]))
        steered = [block for block in blocks if block[0].proposal.is_steered]  # the others ask nothing, as when alone
        if not steered:
            return
        if isinstance(beside.reader, PrefixReader):  # any number of candidates, block by block
            beside.reader.catch_up()
            for group, mine, rows in steered:
                self._give(group, name, mine, beside.reader.score_rows(torch.tensor(rows), group.proposal.ids[mine]))
            return
        beside.scored = _rectangle([(rows, group.proposal.ids[mine]) for group, mine, rows in blocks])
        scores = beside.reader.score(beside.scored)
        for group, mine, rows in steered:
            self._give(group, name, mine, scores[rows, : group.proposal.ids.shape[1]])

    def _give(self, group: Group, name: str, mine: list[int], scores: Tensor) -> None:
        given = torch.zeros(group.proposal.ids.shape, device=scores.device)
        given[mine] = scores
        group.scores[name] = given

    # -- rule ------------------------------------------------------------------------------------------------------

    def _draw(self, group: Group) -> Drawn:
        """Draw for one group; what is not finite is noted in its member alone."""
        members = [self.members[place] for place in group.places]
        steered = self._sound(group, members)
        proposal = Proposal(group.proposal.whole, group.proposal.ids, group.proposal.log_probs, steered)
        scores, each = self._sums(group, members)
        drawn = draw([member.request for member in members], proposal, scores, each, group.rule)
        for member, finite in zip(members, drawn.finite_policy, strict=True):
            member.unsound = member.unsound if finite else "policy"
        return drawn

    def _sound(self, group: Group, members: list[Member]) -> Tensor | None:
        """Which rows are steered (b,), None for all: those whose scores are finite; the others' become zero."""
        steered = group.proposal.steered
        for name, scores in group.scores.items():
            finite = scores.isfinite().all(-1)
            if bool(finite.all()):
                continue
            scores[~finite] = 0
            hit = ~finite if group.proposal.steered is None else ~finite & group.proposal.steered
            steered = finite if steered is None else steered & finite
            for i in hit.nonzero()[:, 0].tolist():
                if self.on_nan == "unguided":
                    members[i].fallback += 1
                else:
                    members[i].unsound = name
        return steered

    def _sums(self, group: Group, members: list[Member]) -> tuple[Tensor | None, Tensor | None]:
        """Scores (b, K) that the rule weighs, and those of each scorer (S, b, K) where members have several."""
        if not group.scores:
            return None, None
        if len(members[0].scorers) == 1:  # every scorer has given its own members' scores, and zeros to the others
            return torch.stack(list(group.scores.values())).sum(0), None
        each = torch.stack([torch.stack([group.scores[m.scorers[j]][i] for i, m in enumerate(members)])
                            for j in range(len(members[0].scorers))])  # fmt: skip
        betas = torch.tensor([member.betas for member in members]).to(each)
        return torch.einsum("bs,sbk->bk", betas, each), each

    # -- commit ----------------------------------------------------------------------------------------------------

    def _commit(self, groups: list[Group], drawn: list[Drawn]) -> None:
        """Tell the policy and every reader what was chosen."""
        pairs = list(zip(groups, drawn, strict=True))
        tokens = _rectangle([(group.places, d.tokens) for group, d in pairs])
        choice = _rectangle([(group.places, d.choice[:, None]) for group, d in pairs])[:, 0]
        if self._lead_ids is not None:
            self.stepper.keep(self._lead_ids, choice)
        else:
            self.stepper.skip(tokens)
        place_of = {member: place for place, member in enumerate(self.members)}
        for beside in self.beside.values():
            places = [place_of[member] for member in beside.members]
            if beside.scored is None:
                beside.reader.skip(tokens[places])
            else:
                beside.reader.keep(beside.scored, choice[places])

    def _drop(self, gone: set[Member]) -> list[int] | None:
        """Let rows go everywhere; the order of those that stay, None where nobody left."""
        if not gone:
            return None
        self._store(gone)
        order = _order_without(self.members, gone)
        self.stepper.select_rows(torch.tensor(order, dtype=torch.long))
        self.members = [self.members[i] for i in order]
        for name in list(self.beside):
            beside = self.beside[name]
            if gone.isdisjoint(beside.members):
                continue
            mine = _order_without(beside.members, gone)
            if not mine:
                del self.beside[name]
                continue
            beside.reader.select_rows(torch.tensor(mine, dtype=torch.long))
            beside.members = [beside.members[i] for i in mine]
        return order

    def _store(self, gone: set[Member]) -> None:
        """Keep what was read of the texts that finished."""
        if self.store is None:
            return
        for member in gone:
            if member.request.finish_reason is None or member.unsound or member.fallback:
                continue
            text = [*member.request.prompt_ids, *member.request.token_ids]
            for name, runner, rows in self._rows_of(member):
                reader = self.beside[name].reader if name in self.beside else None
                read = reader.rows[rows[0]].held if isinstance(reader, BranchReader) else text
                self.store.keep_rows(name, runner, read, rows)

    def _rows_of(self, member: Member) -> Iterator[tuple[str, TreeRunner, list[int]]]:
        """Every cache that holds a member: the model's name in the store, its runner, and the member's rows there."""
        policy, batch = self.stepper.policy, len(self.members)
        if isinstance(policy, TreeRunner):
            first = self.members.index(member)
            yield policy_key(self.lead), policy, list(range(first, batch * self.stepper.copies, batch))
        for name, beside in self.beside.items():
            runner = getattr(beside.reader, "runner", None)
            if member in beside.members and isinstance(runner, TreeRunner):
                yield name, runner, [beside.members.index(member)]

    def _caches(self) -> list[TreeCache]:
        readers = (getattr(beside.reader, "runner", None) for beside in list(self.beside.values()))
        return [runner.cache for runner in (self.stepper.policy, *readers) if isinstance(runner, TreeRunner)]


def _order_without(members: Sequence[Member], gone: set[Member]) -> list[int]:
    """Places of those that stay: each keeps its own but the last ones, which fill the gaps."""
    staying = [i for i, member in enumerate(members) if member not in gone]
    order, last = list(range(len(staying))), [i for i in staying if i >= len(staying)]
    for place in range(len(staying)):
        if members[place] in gone:
            order[place] = last.pop()
    return order


def _rectangle(blocks: list[tuple[list[int], Tensor]]) -> Tensor:
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
