"""A scorer with a tokenizer of its own beside the policy: candidates become text, and text the scorer's tokens.

Each candidate's text is tokenised as the scorer's tokenizer would write it from scratch. A causal scorer keeps in its
cache the tokens that stay as they were; only the tail that changes is read, as a branch. An encoder reads whole texts.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from rgtg.decoding.request import Request, source_of
from rgtg.decoding.runners.branches import BranchBatch, Branches
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.scorer_runner import MAX_WIDTH
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer, RenderedPrompt
from rgtg.tokenization.retokenizer import CompletionText, Detokenizer, TokenizedText, TokenSuffix

# Kept tokens that may wait to be read with the next candidates; more are read in a pass of their own.
_MAY_WAIT = 16


@dataclass
class Candidate:
    """A completion with one more token, as the scorer reads it."""

    token: int
    text: str
    tail: TokenSuffix
    finished: bool


@dataclass
class Row:
    """One completion as the policy wrote it and as the scorer reads it.

    Attributes:
        turn: what the scorer reads around it.
        spoken: policy tokens and their text.
        reading: scorer tokens of the text so far.
        request: whose counts are kept.
        held: scorer tokens in the cache, special ones included.
        score: the last one.
        full: whether the scorer's context has no more room, so that nothing is scored.
        candidates: those scored last.
    """

    turn: RenderedPrompt
    spoken: CompletionText
    reading: TokenizedText
    request: Request
    held: list[int] = field(default_factory=list)
    score: float = 0.0
    full: bool = False
    candidates: list[Candidate] = field(default_factory=list)


class TextReader:
    """Whole texts of all candidates of all rows: any reward model, encoders included, without a cache."""

    def __init__(
        self, scorer: CrossTokenizerScorer, policy: Policy, eos_ids: set[int], requests: Sequence[Request] = ()
    ) -> None:
        """Set up.

        Args:
            scorer: what reads the texts.
            policy: whose tokens they are made of.
            eos_ids: policy tokens that finish a completion.
            requests: of the prompts in order, for their texts and to count in; without them, a prompt's text is what
                its tokens say.
        """
        self.scorer, self.eos_ids, self.requests = scorer, eos_ids, list(requests)
        self.policy_tokenizer = policy.tokenizer
        self.detokenizer = Detokenizer(policy.tokenizer)
        self.rows: list[Row] = []
        self._calls = 0

    @property
    def calls(self) -> int:
        """Passes so far."""
        return self._calls

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Note the prompts, and read them where there is a cache."""
        if (unread := self.begin(prompts)) is not None:
            runner, texts = unread
            runner.prefill(texts)

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[TreeRunner, list[list[int]]] | None:
        """Note the prompts; there is nothing to read without a cache."""
        requests = self.requests or [Request("", list(prompt), 0, []) for prompt in prompts]
        turns = [self.scorer.render(source_of(request, self.policy_tokenizer)) for request in requests]
        readings = self.scorer.retokenizer.tokenize([self.scorer.full_text(turn, "", finished=False) for turn in turns])
        self.rows = [
            Row(turn, self.detokenizer.start(prompt), reading, request)
            for turn, prompt, reading, request in zip(turns, prompts, readings, requests, strict=True)
        ]
        return None

    def again(self, request: Request) -> Self:
        """The same read prompt for another completion of it, which has a text and counts of its own."""
        other = copy.copy(self)
        other.requests = [request]
        other.begin([request.prompt_ids])
        return other

    def join(self, other: "TextReader") -> None:
        """Append another reader's rows."""
        self.rows += other.rows

    def score(self, candidate_ids: Tensor) -> Tensor:
        """Scores (B, K) of the candidates, fp32, on their device."""
        # 1. what each candidate says, and its tokens
        self._look_at(candidate_ids.tolist())
        # 2. rows whose candidates no longer fit are left alone from here on
        for row in self.rows:
            self._count(row)
        # 3. the scores; where there is no room, the same for all
        scored = self._scores() if any(not row.full for row in self.rows) else torch.zeros(candidate_ids.shape)
        for i, row in enumerate(self.rows):
            if row.full:
                scored[i] = row.score
        self._scored = scored
        return scored.to(candidate_ids.device)

    def _look_at(self, candidate_ids: list[list[int]]) -> None:
        """Set each row's candidates."""
        texts = self.detokenizer.with_next([row.spoken for row in self.rows], candidate_ids)
        ended = [[token in self.eos_ids for token in mine] for mine in candidate_ids]
        whole = [
            [self.scorer.full_text(row.turn, said, finished=end) for said, end in zip(mine, ends, strict=True)]
            for row, mine, ends in zip(self.rows, texts, ended, strict=True)
        ]
        tails = self.scorer.retokenizer.encode_continuations([row.reading for row in self.rows], whole)
        for row, *columns in zip(self.rows, candidate_ids, texts, tails, ended, strict=True):
            row.candidates = [Candidate(*each) for each in zip(*columns, strict=True)]

    def _count(self, row: Row) -> None:
        """How many candidates are exactly one token more; whether all of them fit."""
        lengths = []
        for candidate in {candidate.token: candidate for candidate in row.candidates}.values():  # padding repeats one
            tail = candidate.tail
            self.scorer.check_ids(tail.ids)
            before, after = self.scorer.special_tokens(row.turn, finished=candidate.finished)
            lengths.append(len(before) + tail.kept + len(tail.ids) + len(after))
            if not candidate.finished:
                row.request.candidates += 1
                row.request.retokenised += tail.ids[:-1] != row.reading.ids[tail.kept :] or not tail.ids
        if not row.full and not self.scorer.fits(max(lengths)):
            row.full = True
            warnings.warn(
                f"the scorer {self.scorer.name} has a context of {self.scorer.max_length} of its own tokens, which a "
                "completion has filled: the rest of it is not steered (Completion.unscored counts the tokens)",
                stacklevel=2,
            )
        row.request.unscored += row.full

    def _ids(self, row: Row, candidate: Candidate) -> list[int]:
        """All that the scorer reads of a candidate."""
        before, after = self.scorer.special_tokens(row.turn, finished=candidate.finished)
        return [*before, *row.reading.ids[: candidate.tail.kept], *candidate.tail.ids, *after]

    def _scores(self) -> Tensor:
        """Scores (B, K) of all candidates, on the CPU; those of full rows do not matter."""
        self._calls += 1
        reading = [not row.full for row in self.rows]
        ids = [self._ids(row, candidate) for row in self.rows if not row.full for candidate in row.candidates]
        scores = torch.zeros(len(self.rows), len(self.rows[0].candidates))
        scores[torch.tensor(reading)] = self.scorer.score_ids(ids).reshape(sum(reading), -1)
        return scores

    def keep(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Commit candidate ``choice[b]`` of row b, after ``score``."""
        chosen = choice.tolist()
        self._keep(chosen)
        for i, (row, j) in enumerate(zip(self.rows, chosen, strict=True)):
            row.score = float(self._scored[i, j])
            self._grow(row, row.candidates[j])

    def _keep(self, choice: list[int]) -> None:
        """Keep what was read of the chosen candidates, where there is a cache."""

    def _grow(self, row: Row, candidate: Candidate) -> None:
        text = self.scorer.full_text(row.turn, candidate.text, finished=candidate.finished)
        row.reading = self.scorer.retokenizer.append(row.reading, text, candidate.tail)
        row.spoken.token_ids.append(candidate.token)
        row.spoken.text = candidate.text

    def skip(self, tokens: Tensor) -> None:
        """Commit tokens (B, 1) without having scored any; they are read with the next candidates."""
        self._look_at(tokens.tolist())
        for row in self.rows:
            self._grow(row, row.candidates[0])

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.rows = [self.rows[i] for i in rows.tolist()]


class BranchReader(TextReader):
    """A causal scorer with a cache: the tails of all candidates of all rows are branches, read in one pass."""

    def __init__(
        self,
        scorer: CrossTokenizerScorer,
        policy: Policy,
        eos_ids: set[int],
        requests: Sequence[Request] = (),
        *,
        runner: TreeRunner,
    ) -> None:
        """As ``TextReader``; ``runner`` reads the scorer's model."""
        super().__init__(scorer, policy, eos_ids, requests)
        self.runner = runner
        self._read: list[tuple[Branches, list[int]]] | None = None

    @property
    def calls(self) -> int:
        """Passes so far."""
        return self.runner.calls

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[TreeRunner, list[list[int]]] | None:
        """Note the prompts; their texts in the scorer's tokens, to be read by the runner."""
        super().begin(prompts)
        for row in self.rows:
            row.held = [*self.scorer.special_tokens(row.turn, finished=False)[0], *row.reading.ids]
        self.runner.reserve(max(len(row.held) for row in self.rows))
        return self.runner, [list(row.held) for row in self.rows]

    def join(self, other: TextReader) -> None:
        """Append another reader's rows."""
        super().join(other)
        assert isinstance(other, BranchReader), "both have caches"
        self.runner.join(other.runner)

    def _scores(self) -> Tensor:
        """One pass over all branches (several where they are more than ``MAX_WIDTH`` nodes)."""
        if any(not row.full and len(row.reading.ids) - len(row.held) > _MAY_WAIT for row in self.rows):
            self._catch_up()
        places = [self._leaves_at(row) for row in self.rows]
        parts: list[Tensor] = []
        first = 0
        while first < len(self.rows[0].candidates):
            last, read = self._grow_branches(places, first)
            parts.append(self._pass(read))
            self._read = read if first == 0 and last == len(self.rows[0].candidates) else None
            first = last
        return torch.cat(parts, 1)

    def _grow_branches(self, places: list[int], first: int) -> tuple[int, list[tuple[Branches, list[int]]]]:
        """Branches of each row for as many candidates from ``first`` on as one pass reads, and each one's end."""
        read: list[tuple[Branches, list[int]]] = [(Branches(), []) for _ in self.rows]
        for j in range(first, len(self.rows[0].candidates)):
            for row, place, (branches, ends) in zip(self.rows, places, read, strict=True):
                ends.append(-1 if row.full else branches.add(*self._branch(row, row.candidates[j], place)))
            if max(len(branches.tokens) for branches, _ in read) >= MAX_WIDTH:
                return j + 1, read
        return len(self.rows[0].candidates), read

    def _leaves_at(self, row: Row) -> int:
        """How many of the tokens read so far are those of the text so far."""
        text = [*self.scorer.special_tokens(row.turn, finished=False)[0], *row.reading.ids]
        if row.held[: len(text)] == text:
            return len(text)
        return _shared(row.held, text, 0)

    def _branch(self, row: Row, candidate: Candidate, place: int) -> tuple[int, list[int]]:
        """Where a candidate leaves what is held, and its tokens from there: at least the last one."""
        before, after = self.scorer.special_tokens(row.turn, finished=candidate.finished)
        kept = len(before) + candidate.tail.kept
        if place >= kept:
            start, rest = kept, [*candidate.tail.ids, *after]
        else:
            start, rest = 0, self._ids(row, candidate)
        shared = _shared(row.held, rest, start)
        leaves = min(shared, start + len(rest) - 1)
        if leaves < start:  # nothing new at all: the last token is read once more
            return leaves, self._ids(row, candidate)[leaves:]
        return leaves, rest[leaves - start :]

    def _pass(self, read: list[tuple[Branches, list[int]]]) -> Tensor:
        """Scores at the ends of all branches, (B, candidates)."""
        batch = BranchBatch([branches for branches, _ in read], self.runner.cache.lengths)
        self.runner.reserve(self.runner.cache.longest + batch.width)
        states = self.runner.forward(batch.ids, batch.positions, batch.sees)
        scores = self.runner.readout(self.runner.model, states).float().cpu()
        return scores.gather(1, torch.tensor([ends for _, ends in read]).clamp(min=0))

    def _keep(self, choice: list[int]) -> None:
        """Keep the chosen branches; of several passes, the chosen ones are read again with the next candidates."""
        if self._read is None or all(row.full for row in self.rows):
            return
        nodes = [
            [] if row.full else branches.path(ends[j])
            for row, (branches, ends), j in zip(self.rows, self._read, choice, strict=True)
        ]
        self._keep_nodes([branches for branches, _ in self._read], nodes)

    def _keep_nodes(self, branches: list[Branches], nodes: list[list[int]]) -> None:
        """Keep a path of each row behind the place where it leaves what is held (nothing of an empty one)."""
        stays = []
        for row, mine, path in zip(self.rows, branches, nodes, strict=True):
            stays.append(mine.places[path[0]] if path else len(row.held))
            row.held = [*row.held[: stays[-1]], *(mine.tokens[node] for node in path)]
        depth = max(map(len, nodes))
        padded = torch.tensor([[*path, *[0] * (depth - len(path))] for path in nodes])
        self.runner.cache.keep_path(padded, [len(path) for path in nodes], stays)

    def _catch_up(self) -> None:
        """Read the text so far of all rows, and keep it."""
        read = []
        for row in self.rows:
            text = [*self.scorer.special_tokens(row.turn, finished=False)[0], *row.reading.ids]
            place = _shared(row.held, text, 0)
            branches = Branches()
            if not row.full and (unread := text[place : self.scorer.max_length]):
                branches.add(place, unread)
            read.append(branches)
        self._pass([(branches, [len(branches.tokens) - 1]) for branches in read])
        self._keep_nodes(read, [list(range(len(branches.tokens))) for branches in read])

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows."""
        super().select_rows(rows)
        self.runner.select_rows(rows)


def _shared(held: list[int], tokens: list[int], start: int) -> int:
    """How many tokens of ``held`` are those of a text, whose tokens from ``start`` on are given and before it agree."""
    n = 0
    while n < len(tokens) and start + n < len(held) and held[start + n] == tokens[n]:
        n += 1
    return start + n
