"""One completion to make: its prompt, parameters and random generator, when it ends, and how far it is."""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from rgtg.config import DecodingSettings
from rgtg.decoding.sampling import Draws, SamplingParams
from rgtg.decoding.stop_texts import MarkedText, StopTexts
from rgtg.errors import DataError, PromptTooLongError, UsageError
from rgtg.tokenization.conversation import turn_end
from rgtg.tokenization.encoding import decode_completion
from rgtg.types.generation import Completion, StepTrace

# Fields of a request that its caller gives; the others are its state.
_GIVEN = 12
# One text, or a conversation.
Prompt = str | list[dict[str, Any]]


def any_chat(prompts: Iterable[Prompt]) -> bool:
    """Whether one of the prompts is a conversation."""
    return not all(isinstance(prompt, str) for prompt in prompts)


def require_chats(prompts: Iterable[Prompt]) -> None:
    """Refuse variables of the chat template where no prompt is a chat.

    Raises:
        UsageError: all of them are plain text.
    """
    if not any_chat(prompts):
        raise UsageError(
            "chat_template_kwargs applies to chats, and every prompt is plain text: give messages",
            setting="chat_template_kwargs",
        )


@dataclass(eq=False)
class Request:
    """One completion from the caller to the loop; nothing in it depends on its neighbours.

    Attributes:
        prompt: its text, with the chat template applied.
        prompt_ids: its tokens.
        seed: of the request's own random generator.
        processors: transformers' logits processors; they see this request's tokens.
        params: how its tokens are chosen. With several scorers, their weighted sum is the score.
        stopping: when it ends.
        method: row of the methods table.
        scorers: names of the scorers that steer it.
        betas: one for each scorer.
        source: the prompt for scorers with a tokenizer of their own: chat messages, text, or None for what the tokens
            say.
        keep_trace: record every candidate's figures of every step.
        settings: complete decoding settings; methods that draw segments read them.

        token_ids: drawn so far.
        finish_reason: ``stop``, ``length`` or ``abstained``, once it has ended.
        text: of the ended completion.
        error: why it failed; its neighbours go on.
        scores_not_finite: tokens that were left to the policy because a scorer returned NaN.
        cached_tokens: prompt tokens that the prefix cache held.
        touched: with a value threshold: tokens that replace the policy's own draw.
        expected_kl_nats: with a KL budget: sum of the KL of its steps so far.
        log_normaliser: of sequential Monte Carlo: estimate of log Σ_y π(y)·exp(β·r(y)), in nats.
        weight: share of the weight that a particle has.
        particles: all of them.
    """

    prompt: str
    prompt_ids: list[int]
    seed: int
    processors: Any = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    stopping: "StoppingCriteria | None" = None
    method: str = "policy"
    scorers: tuple[str, ...] = ()
    betas: tuple[float, ...] = ()
    source: Prompt | None = None
    keep_trace: bool = False
    settings: DecodingSettings = field(default_factory=DecodingSettings)

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
    finish_reason: str | None = None
    text: str = ""
    trace: list[StepTrace] = field(default_factory=list)
    error: Exception | None = None
    scores_not_finite: int = 0
    cached_tokens: int = 0
    touched: int | None = None
    expected_kl_nats: float | None = None
    log_normaliser: float | None = None
    weight: float | None = None
    particles: "list[Request]" = field(default_factory=list)
    _generator: torch.Generator | None = field(default=None, init=False, repr=False)
    _numbers: list[float] = field(default_factory=list, init=False, repr=False)  # drawn and not used, the last one next

    def uniform(self) -> float:
        """The next number in [0, 1) of this request's own stream; each token takes one, whatever the parameters."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        if not self._numbers:  # 64 at a time are the same numbers as one by one
            self._numbers = torch.rand(64, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._numbers.pop()

    def allowed_nats(self) -> float:
        """KL that the next step may take: up to the budget's share of the tokens that there are then."""
        assert self.params.kl_budget is not None, "there is a budget"
        share = (len(self.token_ids) + 1) / self.settings.max_new_tokens
        return self.params.kl_budget * share - (self.expected_kl_nats or 0.0)

    def copy(self) -> "Request":
        """The same request, with tokens and a trace of its own."""
        copied = copy.copy(self)
        copied.token_ids, copied.trace = list(self.token_ids), list(self.trace)
        return copied

    def take_stream(self, other: "Request") -> None:
        """Go on with the seed and the random numbers of another request."""
        self.seed, self._generator, self._numbers = other.seed, other._generator, other._numbers

    @property
    def ended(self) -> bool:
        """Whether it takes no more tokens."""
        return self.finish_reason is not None or self.error is not None

    def process(self, logits: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """Policy logits (V,) through the processors, which see this request's tokens (and drafted ones after them)."""
        ids = torch.tensor([[*self.prompt_ids, *self.token_ids, *drafted]], device=logits.device)
        processed: Tensor = self.processors(ids, logits[None])
        return processed[0]

    def record(self, draws: Draws, row: int) -> None:
        """Take over the token that was drawn for it, with its figures.

        Args:
            draws: of the rows that were drawn together.
            row: this request's place among them.
        """
        figures = draws.figures[row]
        self.token_ids.append(int(figures[0]))
        self.policy_log_prob += figures[1]
        self.guided_log_prob += figures[2]
        self.candidates_log_prob += figures[3]
        self.policy_calls += 1
        if self.params.kl_budget is not None:
            self.expected_kl_nats = (self.expected_kl_nats or 0.0) + figures[-1]
        if self.params.value_threshold is not None:
            self.touched = (self.touched or 0) + (not figures[-1])
        scored = draws.scores is not None and bool(figures[7])
        if scored:
            self.score = figures[5]
            self.scorer_calls += 1
        if self.keep_trace:
            scores = draws.scores[row] if scored and draws.scores is not None else None
            self.trace.append(step_trace(self.token_ids[-1], draws.ids[row], draws.log_probs[row], scores,
                                         draws.guided[row]))  # fmt: skip
            if scored and draws.scores_each is not None:
                self.trace[-1].scores_of_each = draws.scores_each[:, row].tolist()

    def restart(self) -> None:
        """Forget everything that was drawn, as if the request had just been made."""
        given = [getattr(self, f.name) for f in fields(Request)[:_GIVEN]]
        vars(self).update(vars(Request(*given)))
        self._generator = None  # not in the above: a field without init is an attribute of the class at first

    def to_completion(self) -> Completion:
        """The public record, once it has ended."""
        assert self.finish_reason in ("stop", "length", "abstained"), "only ended requests are published"
        chat = None if self.source is None or isinstance(self.source, str) else list(self.source)
        return Completion(
            prompt=self.prompt,
            messages=chat,
            chat_template_kwargs=self.settings.chat_template_kwargs or None if chat else None,
            text=self.text,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            method=self.method,
            seed=self.seed,
            policy_log_prob=self.policy_log_prob,
            guided_log_prob=self.guided_log_prob,
            candidates_log_prob=self.candidates_log_prob,
            score=self.score,
            policy_calls=self.policy_calls,
            scorer_calls=self.scorer_calls,
            selection_nats=self.selection_nats,
            touched=self.touched,
            expected_kl_nats=self.expected_kl_nats,
            log_normaliser=self.log_normaliser,
            weight=self.weight,
            drafted=self.drafted,
            accepted=self.accepted,
            candidates=self.candidates,
            retokenised=self.retokenised,
            unscored=self.unscored,
            trace=self.trace if self.keep_trace else None,
        )


def step_trace(token: int, ids: Tensor, log_probs: Tensor, scores: Tensor | None, guided: Tensor) -> StepTrace:
    """The public record of one row's step; tensors (K,)."""
    return StepTrace(
        token_id=token,
        candidate_ids=ids.tolist(),
        policy_log_probs=log_probs.tolist(),
        scores=scores.tolist() if scores is not None else None,
        guided_log_probs=guided.tolist(),
    )


class StoppingCriteria:
    """When a request ends: an EOS token, a stop text (which may be a special token), its last token, a low score."""

    def __init__(self, tokenizer: Any, eos_ids: set[int], settings: DecodingSettings) -> None:
        self.tokenizer, self.eos_ids, self.stop = tokenizer, eos_ids, StopTexts(tokenizer, settings.stop)
        self.has_stop = bool(settings.stop)
        self.limit, self.minimum = settings.max_new_tokens, settings.min_new_tokens
        self.abstain_below = settings.abstain_below

    def update(self, request: Request) -> None:
        """Set ``finish_reason`` and ``text`` if the newest token ends the request."""
        at_eos = request.token_ids[-1] in self.eos_ids
        full = len(request.token_ids) >= self.limit
        low = self.abstain_below is not None and request.score is not None and request.score < self.abstain_below
        if not (at_eos or full or self.has_stop or low):
            return
        # the token that ends a completion is no part of its text, also where it is not a special one
        ids = request.token_ids[:-1] if at_eos else request.token_ids
        text = decode_completion(self.tokenizer, request.prompt_ids, ids)
        cut = self._first_stop(request, text) if self.has_stop else None
        if low:  # whatever else ends it, this is what the caller must know
            request.text, request.finish_reason = text if cut is None else text[:cut], "abstained"
        elif cut is not None:
            request.text, request.finish_reason = text[:cut], "stop"
        elif at_eos or full:
            request.text, request.finish_reason = text, "stop" if at_eos else "length"

    def _first_stop(self, request: Request, text: str) -> int | None:
        """Where the first stop text begins; those that end within the least number of tokens do not count."""
        if len(request.token_ids) < self.minimum:
            return None
        early = request.token_ids[: max(self.minimum - 1, 0)]
        held = 0
        if early:
            before = decode_completion(self.tokenizer, request.prompt_ids, early)
            held = len(self._marked(request.prompt_ids, early, before).text)
        return self.stop.find(self._marked(request.prompt_ids, request.token_ids, text), held)

    def _marked(self, prompt_ids: Sequence[int], token_ids: Sequence[int], text: str) -> MarkedText:
        """The text of these tokens with the special tokens that occur in stop texts."""
        places = []
        for i, token in enumerate(token_ids if self.stop.special else ()):
            if token in self.stop.special:
                before = decode_completion(self.tokenizer, prompt_ids, token_ids[:i])
                place = len(before.rstrip("�"))
                while place < len(before) and text[place : place + 1] == "�":  # it is never completed
                    place += 1
                places.append((place, token))
        return self.stop.mark(text, places)

    def ends_at(self, request: Request, token: int) -> bool:
        """Whether a token ends the request: EOS, or a special token that is a stop text."""
        if token in self.eos_ids:
            return True
        return token in self.stop.tokens and len(request.token_ids) + 1 >= self.minimum


def process(
    requests: Sequence[Request], logits: Tensor, log_probs: Tensor, drafted: list[list[int]] | None = None
) -> Tensor:
    """Policy log-probabilities (B, V) after each request's own processors, which also see its ``drafted`` tokens.

    Args:
        requests: B of them.
        logits: (B, V) the policy's.
        log_probs: (B, V) their log-softmax, returned as it is where no request has processors.
        drafted: tokens after those of each request.
    """
    for request in requests:
        if request.processors:
            break
    else:
        return log_probs
    more = drafted or [[]] * len(requests)
    processed = [
        request.process(logits[i].float(), more[i]) if request.processors else logits[i].float()
        for i, request in enumerate(requests)
    ]
    return torch.log_softmax(torch.stack(processed), -1)


def prompt_source(request: Request, tokenizer: Any) -> Prompt:
    """What a scorer with a tokenizer of its own takes for the prompt: chat messages, text, or what the tokens say."""
    if request.source is not None:
        return request.source
    return str(tokenizer.decode(request.prompt_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def end_tokens(policy: Any) -> set[int]:
    """Token ids that end a completion: the generation config's, the tokenizer's, and the chat template's turn end."""
    end = turn_end(policy.tokenizer)
    return configured_end_tokens(policy) | ({end.token_id} if end is not None and end.token_id is not None else set())


def configured_end_tokens(policy: Any) -> set[int]:
    """Token ids that end a completion in transformers' ``generate``, and the tokenizer's EOS."""
    configured = getattr(policy.model, "generation_config", None)
    eos = getattr(configured, "eos_token_id", None)
    ids = set(eos) if isinstance(eos, list) else {eos}
    return {int(i) for i in ids | {policy.tokenizer.eos_token_id} if i is not None}


@dataclass
class RowSeeds:
    """Seeds of requests in their order, for callers who do not hold all prompts: see ``row_seeds``."""

    seed: int
    _drawn: Counter[int] = field(default_factory=Counter)

    def next(self, prompt_ids: Iterable[int]) -> int:
        """The seed of the next request."""
        prompt = tuple(prompt_ids)
        first = derive_seed(self.seed, prompt, 0)
        count = self._drawn[first]
        self._drawn[first] += 1
        return derive_seed(self.seed, prompt, count) if count else first


def row_seeds(seed: "int | Sequence[int]", prompts: Sequence[Sequence[int]]) -> list[int]:
    """A seed for each request: the given ones, or one derived from the seed, the prompt, and how often it came before.

    A request's text then depends on neither its neighbours nor its place, and a prompt given twice is sampled twice.

    Raises:
        UsageError: the list of seeds is not as long as the list of prompts.
    """
    if isinstance(seed, int):
        return list(map(RowSeeds(seed).next, prompts))
    if len(seed) != len(prompts):
        raise UsageError(f"{len(seed)} seeds for {len(prompts)} prompts; give one number, or one seed per prompt")
    return list(seed)


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from anything with a stable representation."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def make_processors(settings: DecodingSettings, prompt_length: int, eos_ids: set[int], device: Any) -> Any:
    """Transformers' own logits processors for one request; empty where nothing is asked for."""
    penalised = settings.repetition_penalty != 1 or settings.no_repeat_ngram_size or settings.min_new_tokens
    if not (penalised or settings.logit_bias):
        return ()
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    processors = LogitsProcessorList()
    if settings.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in settings.logit_bias.items()}))
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
