"""One prompt being completed: its ids, its own random generator, its processors, and when it ends."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rgtg.config import DecodingSettings
from rgtg.errors import DataError, PromptTooLongError, UsageError
from rgtg.tokenization.encoding import decode_completion
from rgtg.types.generation import Completion, StepTrace


@dataclass
class Request:
    """State of one row while it is decoded; nothing of it depends on its neighbours.

    ``source`` is the prompt for scorers with a tokenizer of their own: chat messages, text, or None for what its tokens
    say.
    """

    prompt: str
    prompt_ids: list[int]
    seed: int
    processors: Any
    token_ids: list[int] = field(default_factory=list)
    policy_log_prob: float = 0.0
    guided_log_prob: float = 0.0
    candidates_log_prob: float = 0.0
    score: float | None = None
    policy_calls: int = 0
    scorer_calls: int = 0
    drafted: int = 0
    accepted: int = 0
    selection_nats: float = 0.0
    candidates: int = 0
    retokenised: int = 0
    unscored: int = 0
    source: str | list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    text: str = ""
    trace: list[StepTrace] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def uniform(self) -> float:
        """The next number in [0, 1) of this row's own stream; one is drawn per token whatever the rule."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def process(self, logits: Tensor, ahead: Sequence[int] = ()) -> Tensor:
        """Policy logits (V,) through transformers' processors, which see this row's tokens (and drafted ones ahead)."""
        ids = torch.tensor([[*self.prompt_ids, *self.token_ids, *ahead]], device=logits.device)
        processed: Tensor = self.processors(ids, logits[None])
        return processed[0]


def source_of(request: Request, tokenizer: Any) -> str | list[dict[str, Any]]:
    """What a scorer with a tokenizer of its own takes for the prompt: chat messages, text, or what the tokens say."""
    if request.source is not None:
        return request.source
    return str(tokenizer.decode(request.prompt_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def process(rows: Sequence[Request], logits: Tensor, whole: Tensor, ahead: list[list[int]] | None = None) -> Tensor:
    """Policy log-probabilities (B, V) after each row's own processors, which also see its tokens ``ahead``."""
    if not any(row.processors for row in rows):
        return whole
    more = ahead or [[]] * len(rows)
    processed = [row.process(logits[i].float(), more[i]) for i, row in enumerate(rows)]
    return torch.log_softmax(torch.stack(processed), -1)


class Stopping:
    """When a row ends: an EOS token, a stop text, or its last allowed token."""

    def __init__(self, tokenizer: Any, eos_ids: set[int], settings: DecodingSettings) -> None:
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.stop, self.limit, self.least = settings.stop, settings.max_new_tokens, settings.min_new_tokens

    def staying(self, rows: Sequence[Request], logits: Tensor, whole: Tensor) -> Sequence[int]:
        """Rows that take a next token, by what the policy expects there (B, V); others have got a ``finish_reason``."""
        return range(len(rows))

    def update(self, request: Request) -> None:
        """Set ``finish_reason`` and ``text`` where the row's newest token ends it."""
        ended = request.token_ids[-1] in self.eos_ids
        full = len(request.token_ids) >= self.limit
        if not (ended or full or self.stop):
            return
        text = decode_completion(self.tokenizer, request.prompt_ids, request.token_ids)
        cuts = self._cuts(request, text)
        if cuts:
            request.text, request.finish_reason = text[: min(cuts)], "stop"
        elif ended or full:
            request.text, request.finish_reason = text, "stop" if ended else "length"

    def _cuts(self, request: Request, text: str) -> list[int]:
        """Where stop texts begin that the least number of tokens does not already hold (those do not count)."""
        if not self.stop or len(request.token_ids) < self.least:
            return []
        early = request.token_ids[: max(self.least - 1, 0)]
        held = len(decode_completion(self.tokenizer, request.prompt_ids, early)) if early else 0
        return [at for at in (text.find(s, max(held - len(s) + 1, 0)) for s in self.stop) if at >= 0]


def end_tokens(policy: Any) -> set[int]:
    """Token ids that end a completion: the generation config's and the tokenizer's."""
    configured = getattr(policy.model, "generation_config", None)
    eos = getattr(configured, "eos_token_id", None)
    ids = set(eos) if isinstance(eos, list) else {eos}
    return {int(i) for i in ids | {policy.tokenizer.eos_token_id} if i is not None}


def row_seeds(seed: "int | Sequence[int]", prompts: Sequence[Sequence[int]]) -> list[int]:
    """A seed for each row: the given ones, or one derived from the seed, the prompt, and how often it came before.

    So a row's text depends on neither its neighbours nor its place, and a prompt given twice is sampled twice.

    Raises:
        UsageError: a list of seeds of another length than the prompts.
    """
    if not isinstance(seed, int):
        if len(seed) != len(prompts):
            raise UsageError(f"{len(seed)} seeds for {len(prompts)} prompts; give one number, or one seed per prompt")
        return list(seed)
    seeds = RowSeeds(seed)
    return [seeds.next(prompt) for prompt in prompts]


class RowSeeds:
    """The same, row by row, for callers who do not hold all prompts."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._seen: Counter[int] = Counter()

    def next(self, prompt_ids: Sequence[int]) -> int:
        """The seed of the next row."""
        prompt = tuple(prompt_ids)
        first = derive_seed(self._seed, prompt, 0)
        count = self._seen[first]
        self._seen[first] += 1
        return derive_seed(self._seed, prompt, count) if count else first


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from anything with a stable representation."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of an unfinished text that later tokens cannot change: no half character, no half stop text."""
    text = text.rstrip("�")
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - held]


def make_processors(settings: DecodingSettings, prompt_length: int, eos_ids: set[int], device: Any) -> Any:
    """Transformers' own processors for one row; an empty list where nothing is asked for."""
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if settings.min_new_tokens and eos_ids:
        processors.append(
            MinNewTokensLengthLogitsProcessor(prompt_length, settings.min_new_tokens, sorted(eos_ids), device=device)
        )
    return processors


def require_room(prompt_ids: Sequence[int], max_new_tokens: int, limit: int | None, role: str) -> None:
    """Refuse a prompt that is empty or, with the tokens asked for, does not fit a context.

    Raises:
        DataError: no tokens at all.
        PromptTooLongError: with both figures.
    """
    if not prompt_ids:
        raise DataError("the prompt has no tokens; give at least one")
    if limit is not None and len(prompt_ids) + max_new_tokens > limit:
        raise PromptTooLongError(
            f"a prompt of {len(prompt_ids)} tokens and {max_new_tokens} new ones exceed the {role}'s context of "
            f"{limit} tokens; shorten the prompt or lower max_new_tokens"
        )


def to_completion(request: Request, method: str, *, trace: bool) -> Completion:
    """The public record of a finished row."""
    assert request.finish_reason in ("stop", "length"), "only finished rows are published"
    return Completion(
        prompt=request.prompt,
        text=request.text,
        token_ids=request.token_ids,
        finish_reason=request.finish_reason,
        method=method,
        seed=request.seed,
        policy_log_prob=request.policy_log_prob,
        guided_log_prob=request.guided_log_prob,
        candidates_log_prob=request.candidates_log_prob,
        score=request.score,
        policy_calls=request.policy_calls,
        scorer_calls=request.scorer_calls,
        selection_nats=request.selection_nats,
        drafted=request.drafted,
        accepted=request.accepted,
        candidates=request.candidates,
        retokenised=request.retokenised,
        unscored=request.unscored,
        trace=request.trace if trace else None,
    )
