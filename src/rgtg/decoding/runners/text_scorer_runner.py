"""Scorers with a tokenizer of their own: candidates become text, and text becomes the scorer's tokens.

Each candidate's text gets the tokens that the scorer's tokenizer gives the whole text. A causal scorer keeps in its
cache the tokens that do not change; only the suffix that changes is read, as a branch of a tree. An encoder reads
whole texts.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from rgtg.decoding.request import Request, prompt_source
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.policy_runner import MAX_WIDTH
from rgtg.decoding.runners.token_tree import RaggedTree, States, TokenTrie
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer, RenderedPrompt
from rgtg.tokenization.retokenizer import CompletionText, Detokenizer, TokenizedText, TokenSuffix

# Tokens that may wait to be read with the next candidates; if there are more, they are read in a pass of their own.
_MAX_PENDING = 16


@dataclass
class Candidate:
    """A completion with one more token, as the scorer reads it."""

    token: int
    text: str
    suffix: TokenSuffix
    finished: bool


@dataclass
class TextRow:
    """One completion as the policy wrote it and as the scorer reads it.

    Attributes:
        prompt: what the scorer reads around the completion.
        completion: policy tokens and their text.
        tokenized: scorer tokens of the text so far.
        request: whose counts are kept.
        cached: scorer tokens in the cache, special ones included.
        score: the last one.
        full: whether the scorer's context has no more room, so that nothing is scored.
        candidates: those scored last.
    """

    prompt: RenderedPrompt
    completion: CompletionText
    tokenized: TokenizedText
    request: Request
    cached: list[int] = field(default_factory=list)
    score: float = 0.0
    full: bool = False
    candidates: list[Candidate] = field(default_factory=list)

    def copy(self) -> "TextRow":
        """A copy for the same request."""
        copied = copy.copy(self)
        copied.completion = copy.copy(self.completion)
        copied.completion.token_ids = list(self.completion.token_ids)
        return copied


class TextScorerRunner:
    """Reads whole texts of all candidates of all rows: any reward model, encoders included, without a cache."""

    scores_any_rows = False

    def __init__(self, scorer: CrossTokenizerScorer, policy: Policy, eos_ids: set[int]) -> None:
        """Set up.

        Args:
            scorer: reads the texts.
            policy: whose tokens they are made of.
            eos_ids: policy tokens that finish a completion.
        """
        self.scorer, self.policy, self.eos_ids = scorer, policy, eos_ids
        self.detokenizer = Detokenizer(policy.tokenizer)
        self.rows: list[TextRow] = []
        self._calls = 0
        self._scored = torch.zeros(0)  # (B, K) the last scores
        self._counts: list[tuple[int, int]] = []  # of each row's last candidates

    @property
    def calls(self) -> int:
        """Forward passes so far."""
        return self._calls

    def fresh(self, longest: int, width: int) -> Self:
        """A runner of the same scorer without rows."""
        other = copy.copy(self)
        other.rows, other._calls = [], 0
        other._forget_scores()
        return other

    def _forget_scores(self) -> None:
        """Forget what was scored last: the next step scores other rows."""
        self._scored, self._counts = torch.zeros(0), []

    def prefill(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]]) -> None:
        """Start rows for these requests, and read their prompts where there is a cache."""
        self.begin(requests)

    def begin(self, requests: Sequence[Request]) -> list[list[int]] | None:
        """Start rows for these requests; there is nothing to prefill without a cache."""
        prompts = [
            self.scorer.render(prompt_source(request, self.policy.tokenizer), request.settings.chat_template_kwargs)
            for request in requests
        ]
        texts = self.scorer.retokenizer.tokenize([self.scorer.full_text(one, "", finished=False) for one in prompts])
        self.rows = [
            TextRow(prompt, self.detokenizer.start(request.prompt_ids), tokenized, request)
            for prompt, request, tokenized in zip(prompts, requests, texts, strict=True)
        ]
        return None

    def prefilled(self, states: States) -> None:
        """The cache, where there is one, has been prefilled."""

    def fork(self, request: Request) -> Self:
        """The same prefilled prompt for another request, which has a text and counts of its own."""
        other = copy.copy(self)
        other.begin([request])
        return other

    def branch(self, n: int, requests: Sequence[Request]) -> Self:
        """A runner of n rows for each row, one for each request; they take this runner's place."""
        other = copy.copy(self)
        other._forget_scores()
        other.select_rows([row for row in range(len(self.rows)) for _ in range(n)])
        other.set_requests(requests)
        return other

    def set_requests(self, requests: Sequence[Request]) -> None:
        """Count what the rows read for these requests from now on."""
        for row, request in zip(self.rows, requests, strict=True):
            row.request = request

    def read_pending(self) -> None:
        """Nothing to do: rows can join without it."""

    def add(self, other: Self) -> None:
        """Append another runner's rows."""
        self._forget_scores()
        self.rows += other.rows

    def score(self, candidate_ids: Tensor) -> Tensor:
        """Scores (B, K) of the candidates, fp32, on their device."""
        # 1. each candidate's text, and its tokens
        self._set_candidates(candidate_ids.tolist())
        # 2. rows whose candidates no longer fit the context are not scored from here on
        counts = [self._count(row) for row in self.rows]
        # 3. the scores; where there is no room, the same for all candidates
        scored = self._scores() if not all(row.full for row in self.rows) else torch.zeros(candidate_ids.shape)
        for i, row in enumerate(self.rows):
            if row.full:
                scored[i] = row.score
        self._scored, self._counts = scored, counts
        return scored.to(candidate_ids.device)

    def record(self, rows: Sequence[int]) -> None:
        """Add the candidates of some rows that were scored last to their requests' counts."""
        for i in rows:
            row, (candidates, retokenized) = self.rows[i], self._counts[i]
            row.request.candidates += candidates
            row.request.retokenised += retokenized
            row.request.unscored += row.full

    def cached_text(self, row: int, text: list[int]) -> list[int]:
        """The tokens that a row's cache was filled with: the scorer's own."""
        return self.rows[row].cached

    def _set_candidates(self, candidate_ids: list[list[int]]) -> None:
        """Set each row's candidates."""
        texts = self.detokenizer.with_next([row.completion for row in self.rows], candidate_ids)
        ended = [[self._ends(row, token) for token in mine] for row, mine in zip(self.rows, candidate_ids, strict=True)]
        whole = [
            [self.scorer.full_text(row.prompt, text, finished=end) for text, end in zip(mine, ends, strict=True)]
            for row, mine, ends in zip(self.rows, texts, ended, strict=True)
        ]
        suffixes = self.scorer.retokenizer.encode_continuations([row.tokenized for row in self.rows], whole)
        for row, *columns in zip(self.rows, candidate_ids, texts, suffixes, ended, strict=True):
            row.candidates = [Candidate(*each) for each in zip(*columns, strict=True)]

    def _ends(self, row: TextRow, token: int) -> bool:
        """Whether a token finishes a row's completion."""
        stopping = row.request.stopping
        return token in self.eos_ids or (stopping is not None and stopping.ends_at(row.request, token))

    def _count(self, row: TextRow) -> tuple[int, int]:
        """Number of unfinished candidates, and of those that are not exactly one token more; checks that all fit."""
        lengths, candidates, retokenized = [], 0, 0
        for candidate in {candidate.token: candidate for candidate in row.candidates}.values():  # padding repeats one
            suffix = candidate.suffix
            self.scorer.check_ids(suffix.ids)
            before, after = self.scorer.special_tokens(row.prompt, finished=candidate.finished)
            lengths.append(len(before) + suffix.kept + len(suffix.ids) + len(after))
            if not candidate.finished:
                candidates += 1
                retokenized += suffix.ids[:-1] != row.tokenized.ids[suffix.kept :] or not suffix.ids
        if not row.full and not self.scorer.fits(max(lengths)):
            row.full = True
            warnings.warn(
                f"the scorer {self.scorer.name} has a context of {self.scorer.max_length} of its own tokens, which a "
                "completion has filled: the rest of it is not steered (Completion.unscored counts the tokens)",
                stacklevel=2,
            )
        return candidates, retokenized

    def _ids(self, row: TextRow, candidate: Candidate) -> list[int]:
        """All tokens that the scorer reads of a candidate."""
        before, after = self.scorer.special_tokens(row.prompt, finished=candidate.finished)
        return [*before, *row.tokenized.ids[: candidate.suffix.kept], *candidate.suffix.ids, *after]

    def _scores(self) -> Tensor:
        """Scores (B, K) of all candidates, on the CPU; those of full rows do not matter."""
        self._calls += 1
        reading = [not row.full for row in self.rows]
        ids = [self._ids(row, candidate) for row in self.rows if not row.full for candidate in row.candidates]
        scores = torch.zeros(len(self.rows), len(self.rows[0].candidates))
        scores[torch.tensor(reading)] = self.scorer.score_ids(ids).reshape(sum(reading), -1)
        return scores

    def commit(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Append candidate ``choice[b]`` (B,) of row b, after ``score``."""
        chosen = choice.tolist()
        # everything that can raise comes before the first change
        texts = [self._appended(row, row.candidates[j]) for row, j in zip(self.rows, chosen, strict=True)]
        self._commit_branches(chosen)
        for i, (row, j) in enumerate(zip(self.rows, chosen, strict=True)):
            row.score = float(self._scored[i, j])
            self._set_text(row, row.candidates[j], texts[i])

    def _commit_branches(self, choice: list[int]) -> None:
        """Commit what was read of the chosen candidates, where there is a cache."""

    def append(self, tokens: Tensor) -> None:
        """Append tokens (B, 1) that were not scored; they are read with the next candidates."""
        self._set_candidates(tokens.tolist())
        texts = [self._appended(row, row.candidates[0]) for row in self.rows]
        for row, text in zip(self.rows, texts, strict=True):
            self._set_text(row, row.candidates[0], text)

    def _appended(self, row: TextRow, candidate: Candidate) -> TokenizedText:
        text = self.scorer.full_text(row.prompt, candidate.text, finished=candidate.finished)
        return self.scorer.retokenizer.append(row.tokenized, text, candidate.suffix)

    def _set_text(self, row: TextRow, candidate: Candidate, text: TokenizedText) -> None:
        row.tokenized = text
        row.completion.token_ids.append(candidate.token)
        row.completion.text = candidate.text

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        once = set(rows)
        selected = []
        for i in rows:
            selected.append(self.rows[i] if i in once else self.rows[i].copy())
            once.discard(i)
        self.rows = selected
        if len(self._scored):
            self._scored, self._counts = self._scored[list(rows)], [self._counts[i] for i in rows]

    def copy_rows(self, rows: Sequence[int]) -> Self:
        """A runner of its own with copies of some rows."""
        other = copy.copy(self)
        other.select_rows(rows)
        other.rows = [row.copy() for row in other.rows]
        return other


class CachedTextScorerRunner(TextScorerRunner):
    """A causal scorer with a cache: the suffixes of all candidates of all rows are branches, read in one pass."""

    def __init__(self, scorer: CrossTokenizerScorer, policy: Policy, eos_ids: set[int], *, runner: TreeRunner) -> None:
        """As ``TextScorerRunner``; ``runner`` reads the scorer's model."""
        super().__init__(scorer, policy, eos_ids)
        self.runner = runner
        self._branches: list[tuple[TokenTrie, list[int]]] | None = None  # of the last pass, and each candidate's end

    @property
    def calls(self) -> int:
        """Forward passes so far."""
        return self.runner.calls

    def begin(self, requests: Sequence[Request]) -> list[list[int]] | None:
        """Start rows for these requests; their prompts in the scorer's tokens, for the cache to be prefilled with."""
        super().begin(requests)
        for row in self.rows:
            row.cached = [*self.scorer.special_tokens(row.prompt, finished=False)[0], *row.tokenized.ids]
        return [list(row.cached) for row in self.rows]

    def fresh(self, longest: int, width: int) -> Self:
        """A runner of the same scorer without rows, with room for ``longest`` tokens and the widest tree."""
        other = super().fresh(longest, width)
        other.runner = self.runner.fresh(longest + MAX_WIDTH)
        return other

    def _forget_scores(self) -> None:
        """Forget what was scored last, and the branches of that pass."""
        super()._forget_scores()
        self._branches = None

    def prefill(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]]) -> None:
        """Start rows for these requests, and read their prompts in the scorer's tokens."""
        self.runner.prefill(self.begin(requests) or [])

    def add(self, other: Self) -> None:
        """Append another runner's rows."""
        self.runner.add(other.runner)
        super().add(other)

    def copy_rows(self, rows: Sequence[int]) -> Self:
        """A runner of its own with copies of some rows."""
        other = copy.copy(self)
        other.runner = self.runner.copy_rows(rows)
        TextScorerRunner.select_rows(other, rows)
        other._select_branches(rows)
        other.rows = [row.copy() for row in other.rows]
        return other

    def _scores(self) -> Tensor:
        """Scores (B, K) from one pass over all branches (several if they have more than ``MAX_WIDTH`` nodes)."""
        if any(not row.full and len(row.tokenized.ids) - len(row.cached) > _MAX_PENDING for row in self.rows):
            self._read_pending()
        places = [self._shared_length(row) for row in self.rows]
        parts: list[Tensor] = []
        first = 0
        while first < len(self.rows[0].candidates):
            last, read = self._add_branches(places, first)
            parts.append(self._pass(read))
            self._branches = read if first == 0 and last == len(self.rows[0].candidates) else None
            first = last
        return torch.cat(parts, 1)

    def _add_branches(self, places: list[int], first: int) -> tuple[int, list[tuple[TokenTrie, list[int]]]]:
        """Each row's trie of as many candidates from ``first`` on as one pass reads, and each candidate's last node."""
        read: list[tuple[TokenTrie, list[int]]] = [(TokenTrie(), []) for _ in self.rows]
        for j in range(first, len(self.rows[0].candidates)):
            for row, place, (branches, ends) in zip(self.rows, places, read, strict=True):
                ends.append(-1 if row.full else branches.add(*self._branch(row, row.candidates[j], place)))
            if max(len(branches.tokens) for branches, _ in read) >= MAX_WIDTH:
                return j + 1, read
        return len(self.rows[0].candidates), read

    def _shared_length(self, row: TextRow) -> int:
        """How many of the cached tokens are those of the text so far."""
        text = [*self.scorer.special_tokens(row.prompt, finished=False)[0], *row.tokenized.ids]
        if row.cached[: len(text)] == text:
            return len(text)
        return _shared_prefix(row.cached, text, 0)

    def _branch(self, row: TextRow, candidate: Candidate, place: int) -> tuple[int, list[int]]:
        """Number of cached tokens that a candidate shares, and its tokens from there: at least the last one."""
        before, after = self.scorer.special_tokens(row.prompt, finished=candidate.finished)
        kept = len(before) + candidate.suffix.kept
        if place >= kept:
            start, rest = kept, [*candidate.suffix.ids, *after]
        else:
            start, rest = 0, self._ids(row, candidate)
        shared = _shared_prefix(row.cached, rest, start)
        leaves = min(shared, start + len(rest) - 1)
        if leaves < start:  # nothing is new: the last token is read again
            return leaves, self._ids(row, candidate)[leaves:]
        return leaves, rest[leaves - start :]

    def _pass(self, read: list[tuple[TokenTrie, list[int]]]) -> Tensor:
        """Scores (B, K) at the ends of all branches, in one pass."""
        batch = RaggedTree([branches for branches, _ in read], self.runner.cache.lengths)
        masks = {kind: batch.visible(window) for kind, window in self.runner.windows.items()}
        states = self.runner.forward(batch.ids, batch.positions, masks)
        scores = self.runner.head(states.final).float().cpu()
        return scores.gather(1, torch.tensor([ends for _, ends in read]).clamp(min=0))

    def _commit_branches(self, choice: list[int]) -> None:
        """Commit the chosen branches; after several passes, they are read again with the next candidates instead."""
        if self._branches is None or all(row.full for row in self.rows):
            return
        nodes = [
            [] if row.full else branches.path(ends[j])
            for row, (branches, ends), j in zip(self.rows, self._branches, choice, strict=True)
        ]
        self._commit_nodes([branches for branches, _ in self._branches], nodes)

    def _commit_nodes(self, branches: list[TokenTrie], nodes: list[list[int]]) -> None:
        """Commit one path per row after the cached tokens that it shares (nothing if it is empty)."""
        after = []
        for row, mine, path in zip(self.rows, branches, nodes, strict=True):
            after.append(mine.places[path[0]] if path else len(row.cached))
            row.cached = [*row.cached[: after[-1]], *(mine.tokens[node] for node in path)]
        depth = max(map(len, nodes))
        padded = torch.tensor([[*path, *[0] * (depth - len(path))] for path in nodes])
        self.runner.cache.commit_path(padded, [len(path) for path in nodes], after)

    def _read_pending(self) -> None:
        """Read the text so far of all rows, and commit it."""
        read = []
        for row in self.rows:
            text = [*self.scorer.special_tokens(row.prompt, finished=False)[0], *row.tokenized.ids]
            place = _shared_prefix(row.cached, text, 0)
            branches = TokenTrie()
            if not row.full and (unread := text[place : self.scorer.max_length]):
                branches.add(place, unread)
            read.append(branches)
        self._pass([(branches, [len(branches.tokens) - 1]) for branches in read])
        self._commit_nodes(read, [list(range(len(branches.tokens))) for branches in read])

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        super().select_rows(rows)
        self._select_branches(rows)
        self.runner.select_rows(rows)

    def _select_branches(self, rows: Sequence[int]) -> None:
        if self._branches is not None:
            self._branches = [self._branches[i] for i in rows]


def _shared_prefix(held: list[int], tokens: list[int], start: int) -> int:
    """How many tokens of ``held`` a text shares; its tokens from ``start`` on are given, those before are shared."""
    n = 0
    while n < len(tokens) and start + n < len(held) and held[start + n] == tokens[n]:
        n += 1
    return start + n
