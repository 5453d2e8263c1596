"""A prompt read in parts by every model that needs it, between the steps of those who are decoding already."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgtg.decoding.engine.prefix_cache import PrefixStore
from rgtg.decoding.runners.mixture import Mixture, OwnPass
from rgtg.decoding.runners.model_runner import Runner, TreeRunner
from rgtg.decoding.runners.policy_runner import Alone, Apart, JoiningStepper
from rgtg.decoding.runners.scorer_runner import CachedReader, JoiningReader, read_chain
from rgtg.decoding.runners.segment_scorer import CachedSegments
from rgtg.decoding.runners.text_scorer_runner import TextReader


@dataclass
class Feed:
    """What one model has to read of one text, in ``copies`` equal rows.

    Attributes:
        key: of the model in the store.
        runner: without rows yet.
        tokens: the text.
        copies: rows.
        place: tokens read so far; negative before anything was looked up or read.
        states: final states (copies, H) at the last token that was read.
    """

    key: str
    runner: Runner
    tokens: Sequence[int]
    copies: int = 1
    place: int = -1
    states: Tensor | None = None

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return len(self.tokens) - max(self.place, 0)

    def start(self, store: PrefixStore | None) -> int:
        """Look up what others have read; how many tokens that saves."""
        self.place = 0
        self.runner.start(self.copies)
        if store is not None and isinstance(self.runner, TreeRunner) and (hit := store.find(self.key, self.tokens)):
            cache, self.place = hit
            self.runner.cache.take_first(cache, self.place)
        return self.place

    def read(self, chunk: int) -> None:
        """Read so many tokens more; a model without a cache reads them all."""
        if not isinstance(self.runner, TreeRunner):
            self.states = self.runner.prefill([self.tokens] * self.copies)
            self.place = len(self.tokens)
            return
        part = torch.tensor([list(self.tokens[self.place : self.place + chunk])] * self.copies)
        self.states = read_chain(self.runner, part)[:, -1]
        self.place += part.shape[1]


@dataclass
class Reading:
    """One prompt, and what reads it in parts.

    Attributes:
        feeds: of the policy first, then of the scorers that have a cache.
        cached: tokens of the prompt that the policy need not read.
    """

    feeds: list[Feed]
    cached: int = field(default=0, init=False)

    @property
    def left(self) -> int:
        """Tokens that are still to be read, by all models together."""
        return sum(feed.left for feed in self.feeds)

    @torch.inference_mode()
    def advance(self, chunk: int, store: PrefixStore | None) -> None:
        """One model reads one chunk."""
        feed = next(feed for feed in self.feeds if feed.left)
        if feed.place < 0:
            saved = feed.start(store)
            self.cached = saved if feed is self.feeds[0] else self.cached
        feed.read(chunk)
        if not feed.left:
            self._end(feed, store)

    def _end(self, feed: Feed, store: PrefixStore | None) -> None:
        """Leave it to ``prefill``, which then has nothing to read; the store gets a copy, since decoding writes on."""
        assert isinstance(feed.runner, TreeRunner), "others read whole prompts themselves"
        assert feed.states is not None, "it has just been read"
        feed.runner.read_ahead = [list(feed.tokens)] * feed.copies, feed.states
        if store is not None:
            store.keep_rows(feed.key, feed.runner, feed.tokens, range(feed.copies))


@dataclass
class Prefill(Reading):
    """One prompt on its way into a lane: a stepper and readers of one row, and what they still have to read.

    Attributes:
        stepper: the policy, and what scores in its pass.
        readers: scorers beside it, by name.
        logits: (1, V) the policy's, once it has read the prompt.
    """

    stepper: JoiningStepper
    readers: dict[str, JoiningReader]
    logits: Tensor = field(default_factory=lambda: torch.zeros(0), init=False)

    def _end(self, feed: Feed, store: PrefixStore | None) -> None:
        """The policy's logits; the store gets the cache itself, which a lane copies from."""
        if feed is self.feeds[0]:
            policy = self.stepper.policy
            assert feed.states is not None, "it has just been read"
            self.logits = policy.readout(policy.model, feed.states[:1])
        if store is not None and isinstance(feed.runner, TreeRunner):
            store.add(feed.key, feed.tokens, feed.runner.cache)


def unread(part: object, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[TreeRunner, list[list[int]]]]:
    """What in a runner, stepper or reader has a cache, and the texts that its ``prefill`` will ask for."""
    match part:
        case TreeRunner():
            yield part, [list(prompt) for prompt in prompts]
        case Alone():
            yield from unread(part.policy, [*prompts] * part.copies)
            if isinstance(part, Apart):
                yield from unread(part.reader, prompts)
        case Mixture():
            yield from unread(part.lead, prompts)
            for reader in part.readers:
                yield from unread(reader, prompts)
        case OwnPass():
            yield from unread(part.stepper, prompts)
        case CachedSegments():
            yield from unread(part.runner, prompts)
        case CachedReader() | TextReader() if (begun := part.begin(prompts)) is not None:
            yield from unread(*begun)
