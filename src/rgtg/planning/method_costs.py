"""Time and memory of every method with every kind of scorer: which model runs which passes over how many tokens."""

import math
from dataclasses import dataclass
from typing import Literal

from rgtg.config import DecodingSettings, PlanSettings
from rgtg.decoding.methods import METHODS, Method, branch_columns, segments_of
from rgtg.planning.hardware import BYTES, Device
from rgtg.planning.model_shapes import ModelShape
from rgtg.planning.roofline import ForwardPass, TimeEstimate, pass_time, product_seconds, sampling_seconds

Kind = Literal["none", "separate", "vocabulary", "adapter", "state head", "vocabulary head"]
HEAD_WIDTH, HEAD_RANK, LORA_RANK = 256, 64, 16
_SCORED_TOGETHER = 8  # completions in one batch of a reward model
MAX_WIDTH = 128  # candidates or segment tokens in one pass, as in decoding.runners.scorer_runner


@dataclass(frozen=True)
class MethodVariant:
    """A method with one kind of scorer."""

    method: Method
    kind: Kind

    @property
    def needs_scorer(self) -> bool:
        """Whether a second model is loaded."""
        return self.kind in ("separate", "vocabulary")


def method_variants(kinds: set[Kind]) -> list[MethodVariant]:
    """Every method with the kinds of scorers that suit it: its usual one, and for pargs adapters and heads too."""
    found = []
    for method in METHODS.values():
        if method.scorer is None:
            suited: tuple[Kind, ...] = ("none",)
        elif method.vocabulary:
            suited = ("vocabulary", "vocabulary head") if method.name == "farma" else ("vocabulary",)
        elif method.name == "pargs":
            suited = ("separate", "adapter", "state head", "vocabulary head")
        else:
            suited = ("separate",)
        found += [MethodVariant(method, kind) for kind in suited if kind in kinds]
    return found


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of a plan: what is asked for, the models' shapes, and the devices."""

    settings: PlanSettings
    policy: ModelShape
    scorer: ModelShape | None
    device: Device
    parallel: int
    batch: int

    @property
    def mean_length(self) -> float:
        """Tokens of a sequence, averaged over the completion."""
        return self.settings.prompt_tokens + self.settings.new_tokens / 2

    @property
    def second_model(self) -> ModelShape:
        """The scorer, where it is a model of its own."""
        assert self.scorer is not None, "variants with a separate scorer are planned only if one is named"
        return self.scorer

    @property
    def reward_model(self) -> ModelShape:
        """The scorer with a scalar head."""
        return self.second_model.without_head()

    def run(self, shape: ModelShape, one: ForwardPass) -> TimeEstimate:
        """A forward pass of one of the models."""
        return pass_time(shape, self.device, one, self.parallel)

    def policy_token(self, branches: int = 1) -> TimeEstimate:
        """The policy reads one token of every sequence; branches share their prompt's cache."""
        s = self.settings
        cached = self.mean_length if branches == 1 else s.prompt_tokens + branches * s.new_tokens / 2
        return self.run(self.policy, ForwardPass(self.batch, branches, cached, self.batch * branches))

    def sampling(self, branches: int = 1) -> TimeEstimate:
        """Choosing a token for every sequence."""
        return TimeEstimate(sampling_seconds(self.device, self.batch * branches, self.policy.vocabulary), 0.0)


def candidate_count(variant: MethodVariant, settings: PlanSettings, vocabulary: int) -> int:
    """Next tokens that are scored at each step."""
    if variant.method.candidates != "policy":
        return vocabulary
    given = settings.k if "k" in settings.model_fields_set else variant.method.top_k
    return min(given or vocabulary, vocabulary)


def prefill_time(variant: MethodVariant, planned: PlannedBatch) -> TimeEstimate:
    """Time to read the prompts of a batch."""
    length, batch = planned.settings.prompt_tokens, planned.batch
    total = planned.run(planned.policy, ForwardPass(batch * (2 if variant.kind == "adapter" else 1), length, 0, batch))
    if variant.needs_scorer and (variant.method.unit != "completion" or variant.method.scores_tokens):
        scorer = planned.reward_model if variant.kind == "separate" else planned.second_model
        total += planned.run(scorer, ForwardPass(batch, length, 0))
    return total


def batch_time(variant: MethodVariant, planned: PlannedBatch) -> TimeEstimate:
    """Time of a batch from its prompts to its last token. A policy with its own passes does not read the last token."""
    total = prefill_time(variant, planned) + token_time(variant, planned) * planned.settings.new_tokens
    if variant.method.unit == "token" and variant.kind not in ("state head", "adapter"):
        total += planned.policy_token() * -1
    elif variant.method.unit == "completion":
        total += planned.policy_token(planned.settings.n) * -1
    return total


def token_time(variant: MethodVariant, planned: PlannedBatch) -> TimeEstimate:
    """Time of one token of every sequence of a batch, averaged over a completion."""
    match variant.method.unit:
        case "token":
            return _token_wise(variant, planned)
        case "completion":
            n = planned.settings.n
            rewards = _score_completions(planned, n) * (1 / planned.settings.new_tokens)
            drawn = planned.policy_token(n) + planned.sampling(n)
            return drawn + (_score_candidates(variant, planned) if variant.method.scores_tokens else rewards)
    return _cards(planned) if variant.method.rule == "accept" else _blockwise(planned)


def _token_wise(variant: MethodVariant, planned: PlannedBatch) -> TimeEstimate:
    batch, cached, shape = planned.batch, planned.mean_length, planned.policy
    k = candidate_count(variant, planned.settings, shape.vocabulary)
    unguided = planned.policy_token() + planned.sampling()
    match variant.kind:
        case "none":
            return unguided
        case "separate":
            return unguided + planned.run(planned.reward_model, ForwardPass(batch, k, cached))
        case "vocabulary":
            logits = batch if k == shape.vocabulary else 0
            return unguided + planned.run(planned.second_model, ForwardPass(batch, 1, cached, logits))
        case "vocabulary head":
            return unguided + _head_time(planned, batch)
        case "state head":  # the policy reads all candidates, and the head scores their states
            candidates = planned.run(shape, ForwardPass(batch, k, cached, batch))
            return candidates + planned.sampling() + _head_time(planned, batch * k)
        case "adapter":  # one pass with and without the LoRA weights
            both = shape.model_copy(update={"trunk": shape.trunk + adapter_weights(shape)})
            candidates = planned.run(both, ForwardPass(2 * batch, k, cached, batch))
            return candidates + planned.sampling() + _adapter_time(planned)


def _score_completions(planned: PlannedBatch, n: float) -> TimeEstimate:
    """A reward model reads n finished completions of every prompt from the beginning, several in one batch."""
    s = planned.settings
    passes = planned.batch * n / _SCORED_TOGETHER
    together = min(_SCORED_TOGETHER, planned.batch * n)
    one = ForwardPass(together, s.prompt_tokens + s.new_tokens, 0)
    return planned.run(planned.reward_model, one) * max(passes, 1)


def _score_candidates(variant: MethodVariant, planned: PlannedBatch) -> TimeEstimate:
    """A reward model reads k candidates of each of n growing completions in one pass over the prompt's cache."""
    s = planned.settings
    k = candidate_count(variant, s, planned.policy.vocabulary)
    return planned.run(
        planned.reward_model, ForwardPass(planned.batch, s.n * k, s.prompt_tokens + s.n * s.new_tokens / 2)
    )


def _blockwise(planned: PlannedBatch) -> TimeEstimate:
    """The policy draws n segments of each sequence in parallel, and the scorer reads them as branches.

    Both models then read the chosen segment once more, to extend their caches.
    """
    s, batch, cached = planned.settings, planned.batch, planned.mean_length
    length = min(s.segment_tokens, s.new_tokens)
    draw = planned.run(planned.policy, ForwardPass(batch, s.n, cached + s.n * length / 2, batch * s.n))
    drawn = draw * ((length - 1) / length) + planned.sampling(s.n)  # nothing follows the last token
    passes = math.ceil(s.n / max(1, MAX_WIDTH // length))
    scored = planned.run(planned.reward_model, ForwardPass(batch, s.n * length / passes, cached)) * passes
    policy_again = planned.run(planned.policy, ForwardPass(batch, length, cached, batch))
    scorer_again = planned.run(planned.reward_model, ForwardPass(batch, length, cached))
    # segments that end a completion are scored as whole texts, and not read again
    ended = _score_completions(planned, s.n) * (1 / s.new_tokens)
    return drawn + (scored + policy_again + scorer_again) * (1 / length - 1 / s.new_tokens) + ended


def _cards(planned: PlannedBatch) -> TimeEstimate:
    """Segments are drawn until one is accepted, as often as the settings say."""
    s = planned.settings
    drawn = (planned.policy_token() + planned.sampling()) * s.cards_drawn
    length = s.cards_drawn / s.cards_scored
    scored = planned.run(planned.reward_model, ForwardPass(planned.batch, length, planned.mean_length))
    ended = _score_completions(planned, s.cards_drawn) * (1 / s.new_tokens)
    inside = max(0.0, 1 - length / s.new_tokens)  # the share of segments that do not end a completion
    return drawn + scored * (inside * (s.cards_scored + s.cards_scored / s.cards_drawn)) + ended


def adapter_weights(shape: ModelShape, rank: int = LORA_RANK) -> int:
    """Weights of a LoRA on every linear layer of the trunk."""
    attention = shape.heads * shape.head_dim
    cache = shape.kv_heads * shape.head_dim
    layer = (shape.trunk - shape.experts) / shape.layers - 2 * shape.hidden * (attention + cache)
    inner = layer / (3 * shape.hidden)
    sides = 2 * (shape.hidden + attention) + 2 * (shape.hidden + cache) + 3 * (shape.hidden + inner)
    return round(rank * shape.layers * sides)


def head_weights(shape: ModelShape, kind: Kind) -> int:
    """Weights of a head on the policy's hidden states, with the default sizes of training."""
    inner = shape.hidden * HEAD_WIDTH
    return inner + HEAD_WIDTH * HEAD_RANK + shape.vocabulary * HEAD_RANK if kind == "vocabulary head" else inner


def _head_time(planned: PlannedBatch, states: int) -> TimeEstimate:
    """A small network in fp32, with about half as many operators as a layer."""
    weights = planned.policy.hidden * HEAD_WIDTH
    seconds = product_seconds(planned.device, 4 * weights, 2 * weights * states) + planned.device.layer_seconds / 2
    return TimeEstimate(seconds, 4 * weights / planned.device.bandwidth)


def _adapter_time(planned: PlannedBatch) -> TimeEstimate:
    """The second product of each LoRA is a separate operator; a layer has about as many of them as other operators."""
    return TimeEstimate(planned.policy.layers * planned.device.layer_seconds, 0.0)


def weight_bytes(variant: MethodVariant, planned: PlannedBatch) -> float:
    """Bytes of all weights, on all devices together."""
    width = BYTES[planned.device.dtype]
    total = planned.policy.total * width
    if variant.kind == "separate":
        total += planned.reward_model.total * width
    elif variant.kind == "vocabulary":
        total += planned.second_model.total * width
    elif variant.kind == "adapter":
        total += adapter_weights(planned.policy) * width
    elif variant.kind != "none":
        total += 4 * head_weights(planned.policy, variant.kind)
    return total


def caches(variant: MethodVariant, planned: PlannedBatch) -> list[tuple[ModelShape, int, int]]:
    """Model, sequences and length of every KV cache of a batch (the engine reserves the whole length at once)."""
    s, method = planned.settings, variant.method
    asked = DecodingSettings(
        max_new_tokens=s.new_tokens, n=s.n, segment_length=None if method.rule == "accept" else s.segment_tokens
    )
    longest = s.prompt_tokens + s.new_tokens
    wide = longest + min(candidate_count(variant, s, planned.policy.vocabulary), MAX_WIDTH)
    if variant.kind in ("state head", "adapter"):
        return [(planned.policy, planned.batch * (2 if variant.kind == "adapter" else 1), wide)]
    if method.unit == "completion" and method.scores_tokens:  # branches of one prompt in both caches
        together, candidates = s.prompt_tokens + s.n * s.new_tokens, wide - longest
        return [
            (planned.policy, planned.batch, together + s.n),
            (planned.second_model, planned.batch, together + s.n * candidates),
        ]
    found = [(planned.policy, planned.batch, longest + branch_columns(method, asked) + 1)]
    if variant.needs_scorer and method.unit == "token":
        found.append((planned.second_model, planned.batch, wide if variant.kind == "separate" else longest + 1))
    elif variant.needs_scorer and method.unit == "segment":
        length = min(segments_of(method, asked)[1], s.new_tokens)
        found.append((planned.second_model, planned.batch, longest + max(length, MAX_WIDTH)))
    return found


def cache_bytes(variant: MethodVariant, planned: PlannedBatch) -> float:
    """Bytes of the KV caches of policy and scorer, on all devices together."""
    width = BYTES[planned.device.dtype]
    return float(sum(rows * length * shape.cache_bytes(width) for shape, rows, length in caches(variant, planned)))


def activation_bytes(variant: MethodVariant, planned: PlannedBatch) -> float:
    """Bytes of the prompts' hidden states and masks in prefill, and of the log-probabilities of a step."""
    s, width = planned.settings, BYTES[planned.device.dtype]
    tokens = planned.batch * s.prompt_tokens * (2 if variant.kind == "adapter" else 1)
    inner = planned.policy.trunk / planned.policy.layers / planned.policy.hidden  # outputs of one layer's products
    states = tokens * (4 * planned.policy.hidden + inner) * width
    mask = planned.batch * s.prompt_tokens**2 * width
    branches = s.n if variant.method.unit != "token" and variant.method.rule in ("best", "resample", "beam") else 1
    logits = 4 * planned.batch * branches * planned.policy.vocabulary * 4
    return float(states + mask + logits)
