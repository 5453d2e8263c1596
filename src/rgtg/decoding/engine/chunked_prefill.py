"""Prefill: every model reads its prompts, whole or in chunks between the steps of requests that are decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rgtg.decoding.engine.batch import Prefilled
from rgtg.decoding.engine.prefix_cache import CacheKey, PrefixCache
from rgtg.decoding.request import Request
from rgtg.decoding.runners.factory import TokenRunners
from rgtg.decoding.runners.model_runner import CachedRunner, Runner, TreeRunner, append_tokens, has_cache
from rgtg.decoding.runners.token_tree import States


@dataclass
class PrefillTask:
    """What one model has to read.

    Attributes:
        key: of the model in the prefix cache.
        runner: without rows yet.
        texts: one for each row; equal ones where the prompt is read in chunks.
        position: tokens read so far, the same in all rows; negative before anything was looked up or read.
        states: (rows, H) at the last tokens that were read.
    """

    key: CacheKey
    runner: Runner
    texts: Sequence[Sequence[int]]
    position: int = -1
    states: States | None = None

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return len(self.texts[0]) - max(self.position, 0)

    def read_all(self) -> States:
        """Read the texts whole, in one pass."""
        self.states = self.runner.prefill(self.texts)
        self.position = len(self.texts[0])
        return self.states

    def start(self, cache: PrefixCache | None) -> int:
        """Look up what has been read before; the number of tokens that this saves."""
        self.position = 0
        self.runner.reset(len(self.texts))
        if cache is not None and has_cache(self.runner) and (hit := cache.find(self.key, self.texts[0])):
            held, self.position = hit
            self.runner.cache.copy_prefix(held, self.position)
        return self.position

    def read(self, chunk: int) -> None:
        """Read so many more tokens; a model without a cache reads all of them."""
        if not has_cache(self.runner):
            self.read_all()
            return
        part = torch.tensor([list(text[self.position : self.position + chunk]) for text in self.texts])
        self.states = append_tokens(self.runner, part)
        self.position += part.shape[1]


class ChunkedPrefill:
    """One prompt that several models read in chunks.

    Attributes:
        tasks: of the policy first, then of the scorers that have a cache.
        cached_tokens: tokens of the prompt that the policy need not read.
    """

    def __init__(self, tasks: list[PrefillTask]) -> None:
        self.tasks = tasks
        self.cached_tokens = 0

    @property
    def left(self) -> int:
        """Tokens that are still to be read, by all models together."""
        return sum(task.left for task in self.tasks)

    @torch.inference_mode()
    def advance(self, chunk: int, cache: PrefixCache | None) -> None:
        """One model reads one chunk; a prompt that has been read goes into the prefix cache."""
        task = next(task for task in self.tasks if task.left)
        if task.position < 0:
            saved = task.start(cache)
            self.cached_tokens = saved if task is self.tasks[0] else self.cached_tokens
        task.read(chunk)
        if cache is not None and not task.left and has_cache(task.runner):
            self._store_prefix(task, task.runner, cache)

    def _store_prefix(self, task: PrefillTask, runner: CachedRunner, cache: PrefixCache) -> None:
        """Give the prefix cache a copy, since decoding goes on in the runner's own."""
        cache.add_rows(task.key, runner, task.texts[0], range(len(task.texts)))


class BatchPrefill(ChunkedPrefill):
    """A prompt on its way into a batch: the policy, and the scorers that make passes of their own."""

    def __init__(self, runners: TokenRunners, request: Request, *, columns: int | None = None) -> None:
        """Start fresh runners; nothing is read.

        Args:
            runners: of the policy and its scorers.
            request: whose prompt is read.
            columns: room for what decoding adds, where it goes on in these runners; None: a batch copies them.
        """
        length, room = len(request.prompt_ids), columns or 1
        self._joins = columns is None
        self.policy = runners.policy.fresh(length, room)
        prompts = [request.prompt_ids] * self.policy.copies
        doubled = runners.key.fused if len(prompts) > 1 else None
        super().__init__([PrefillTask(("policy", doubled), self.policy.runner, prompts)])
        self.scorers: dict[str, Any] = {}
        self._of_scorer: dict[str, PrefillTask] = {}
        for name, empty in runners.scorers.items():
            self.scorers[name] = runner = empty.fresh(length, room)
            if (texts := runner.begin([request])) is not None:
                self._of_scorer[name] = PrefillTask(("scorer", name), runner.runner, texts)
        self.tasks += self._of_scorer.values()
        self._shared = False

    @torch.inference_mode()
    def result(self) -> Prefilled:
        """What was read, once nothing is left."""
        for name, task in self._of_scorer.items():
            assert task.states is not None, "the prompt has been read"
            self.scorers[name].prefilled(task.states)
        assert self.tasks[0].states is not None, "the prompt has been read"
        state = self.policy.predict(self.policy.split(self.tasks[0].states))
        return Prefilled(self.policy, state, self.scorers, self._shared)

    def _store_prefix(self, task: PrefillTask, runner: CachedRunner, cache: PrefixCache) -> None:
        """Give the prefix cache the runner's own keys and values if a batch copies them, else a copy."""
        if not self._joins or not isinstance(runner, TreeRunner):
            super()._store_prefix(task, runner, cache)
            return
        cache.add(task.key, task.texts[0], runner.cache)
        self._shared = True
