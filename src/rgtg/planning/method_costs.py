"""What a token takes, for every method and every kind of scorer: which passes of which model, over how many rows."""

import math
from dataclasses import dataclass
from typing import Literal

from rgtg.config import DecodingSettings
from rgtg.config.commands import PlanSettings
from rgtg.decoding.methods import METHODS, Method, branch_columns, segments_of
from rgtg.planning.hardware import BYTES, Device
from rgtg.planning.model_shapes import ModelShape
from rgtg.planning.roofline import ForwardPass, TimeEstimate, pass_cost, product_seconds, step_seconds

Kind = Literal["none", "separate", "vocabulary", "adapter", "state head", "vocabulary head"]
HEAD_WIDTH, HEAD_RANK, LORA_RANK = 256, 64, 16
_SCORED_TOGETHER = 8  # completions that a reward model reads at once
MAX_WIDTH = 128  # nodes of one pass over candidates or segments, as decoding.readers has it


@dataclass(frozen=True)
class MethodVariant:
    """A method read with one kind of scorer."""

    method: Method
    kind: Kind

    @property
    def needs_scorer(self) -> bool:
        """Whether a second model is loaded."""
        return self.kind in ("separate", "vocabulary")


def method_variants(kinds: set[Kind]) -> list[MethodVariant]:
    """Every row of the methods table with the scorers that suit it: its own kind, and for pargs the small ones too."""
    found = []
    for method in METHODS.values():
        if method.scorer is None:
            mine: tuple[Kind, ...] = ("none",)
        elif method.vocabulary:
            mine = ("vocabulary", "vocabulary head") if method.name == "farma" else ("vocabulary",)
        elif method.name == "pargs":
            mine = ("separate", "adapter", "state head", "vocabulary head")
        else:
            mine = ("separate",)
        found += [MethodVariant(method, kind) for kind in mine if kind in kinds]
    return found


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of a plan: shapes, devices, and what is asked for."""

    settings: PlanSettings
    policy: ModelShape
    scorer: ModelShape | None
    device: Device
    parallel: int
    batch: int

    @property
    def columns(self) -> float:
        """Tokens of a row's prefix, on average over the completion."""
        return self.settings.prompt_tokens + self.settings.new_tokens / 2

    def read(self, shape: ModelShape, one: ForwardPass) -> TimeEstimate:
        """A pass of one of the models."""
        return pass_cost(shape, self.device, one, self.parallel)

    def policy_token(self, branches: int = 1) -> TimeEstimate:
        """The policy reads one token of every row; branches share their prompt's cache."""
        s = self.settings
        columns = self.columns if branches == 1 else s.prompt_tokens + branches * s.new_tokens / 2
        return self.read(self.policy, ForwardPass(self.batch, branches, columns, self.batch * branches))

    def step(self, branches: int = 1) -> TimeEstimate:
        """Choosing a token for every row."""
        seconds = step_seconds(self.device, self.batch * branches, self.policy.vocabulary)
        return TimeEstimate(seconds, 0.0)

    @property
    def reward(self) -> ModelShape:
        """The scorer as a reward model."""
        return _scorer(self).without_head()


def candidates(way: MethodVariant, settings: PlanSettings, vocabulary: int) -> int:
    """Next tokens that are scored at each step."""
    if way.method.candidates != "policy":
        return vocabulary
    given = settings.k if "k" in settings.model_fields_set else way.method.top_k
    return min(given or vocabulary, vocabulary)


def prompt_cost(way: MethodVariant, job: PlannedBatch) -> TimeEstimate:
    """Reading the prompts of a batch, before the first token."""
    length, batch = job.settings.prompt_tokens, job.batch
    cost = job.read(job.policy, ForwardPass(batch * (2 if way.kind == "adapter" else 1), length, 0, batch))
    if way.needs_scorer and way.method.unit != "completion":
        cost += job.read(job.reward if way.kind == "separate" else _scorer(job), ForwardPass(batch, length, 0))
    return cost


def job_cost(way: MethodVariant, job: PlannedBatch) -> TimeEstimate:
    """A batch from its prompts to its last token, which no policy that reads for itself has to read."""
    cost = prompt_cost(way, job) + token_cost(way, job) * job.settings.new_tokens
    if way.method.unit == "token" and way.kind not in ("state head", "adapter"):
        cost += job.policy_token() * -1
    elif way.method.unit == "completion":
        cost += job.policy_token(job.settings.n) * -1
    return cost


def token_cost(way: MethodVariant, job: PlannedBatch) -> TimeEstimate:
    """One token of every row of a batch, the average over a completion."""
    k = candidates(way, job.settings, job.policy.vocabulary)
    match way.method.unit:
        case "token":
            return _stepwise(way, job, k)
        case "completion":
            return (
                job.policy_token(job.settings.n)
                + job.step(job.settings.n)
                + _rewards(job, job.settings.n) * (1 / job.settings.new_tokens)
            )
    return _cards(job) if way.method.rule == "accept" else _blockwise(way, job)


def _stepwise(way: MethodVariant, job: PlannedBatch, k: int) -> TimeEstimate:
    batch, columns, shape = job.batch, job.columns, job.policy
    match way.kind:
        case "none":
            return job.policy_token() + job.step()
        case "separate":
            return job.policy_token() + job.step() + job.read(job.reward, ForwardPass(batch, k, columns))
        case "vocabulary":
            logits = batch if k == shape.vocabulary else 0
            return job.policy_token() + job.step() + job.read(_scorer(job), ForwardPass(batch, 1, columns, logits))
        case "vocabulary head":
            return job.policy_token() + job.step() + _head_cost(job, batch)
        case "state head":
            return job.read(shape, ForwardPass(batch, k, columns, batch)) + job.step() + _head_cost(job, batch * k)
        case "adapter":
            more = shape.model_copy(update={"trunk": shape.trunk + adapter_weights(shape)})
            return job.read(more, ForwardPass(2 * batch, k, columns, batch)) + job.step() + _adapter_cost(job)


def _rewards(job: PlannedBatch, n: float) -> TimeEstimate:
    """A reward model reads n finished completions of every prompt from their beginning, a few together."""
    s = job.settings
    passes = job.batch * n / _SCORED_TOGETHER
    together = min(_SCORED_TOGETHER, job.batch * n)
    return job.read(job.reward, ForwardPass(together, s.prompt_tokens + s.new_tokens, 0)) * max(passes, 1)


def _blockwise(way: MethodVariant, job: PlannedBatch) -> TimeEstimate:
    """N segments of each row drawn side by side, read as branches by the scorer; both read the chosen one again."""
    s = job.settings
    length = min(s.segment_tokens, s.new_tokens)
    draw = job.read(job.policy, ForwardPass(job.batch, s.n, job.columns + s.n * length / 2, job.batch * s.n))
    drawn = draw * ((length - 1) / length) + job.step(s.n)  # of the last token nothing follows
    passes = math.ceil(s.n / max(1, MAX_WIDTH // length))
    scored = job.read(job.reward, ForwardPass(job.batch, s.n * length / passes, job.columns)) * passes
    again = job.read(job.policy, ForwardPass(job.batch, length, job.columns, job.batch))
    kept = job.read(job.reward, ForwardPass(job.batch, length, job.columns))
    ended = _rewards(job, s.n) * (1 / s.new_tokens)  # what ends a completion is scored as a whole text, and not kept
    return drawn + (scored + again + kept) * (1 / length - 1 / s.new_tokens) + ended


def _cards(job: PlannedBatch) -> TimeEstimate:
    """Segments drawn until one is accepted, as often as was measured."""
    s = job.settings
    drawn = (job.policy_token() + job.step()) * s.cards_drawn
    length = s.cards_drawn / s.cards_scored
    scored = job.read(job.reward, ForwardPass(job.batch, length, job.columns))
    ended = _rewards(job, s.cards_drawn) * (1 / s.new_tokens)
    inside = max(0.0, 1 - length / s.new_tokens)  # the share of segments that end no completion
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
    """Weights of a head on the policy's states, with the sizes that training tries first."""
    inner = shape.hidden * HEAD_WIDTH
    return inner + HEAD_WIDTH * HEAD_RANK + shape.vocabulary * HEAD_RANK if kind == "vocabulary head" else inner


def _head_cost(job: PlannedBatch, rows: int) -> TimeEstimate:
    """A small network in fp32, about as many operators as half a layer."""
    weights = job.policy.hidden * HEAD_WIDTH
    seconds = product_seconds(job.device, 4 * weights, 2 * weights * rows) + job.device.layer_seconds / 2
    return TimeEstimate(seconds, 4 * weights / job.device.bandwidth)


def _adapter_cost(job: PlannedBatch) -> TimeEstimate:
    """The second product of each LoRA is an operator of its own, four to a layer: as many again as a layer has."""
    return TimeEstimate(job.policy.layers * job.device.layer_seconds, 0.0)


def _scorer(job: PlannedBatch) -> ModelShape:
    assert job.scorer is not None, "variants with a scorer of its own are planned where one is named"
    return job.scorer


def weight_bytes(way: MethodVariant, job: PlannedBatch) -> float:
    """Weights held on all devices together."""
    width = BYTES[job.device.dtype]
    held = job.policy.total * width
    if way.kind == "separate":
        held += job.reward.total * width
    elif way.kind == "vocabulary":
        held += _scorer(job).total * width
    elif way.kind == "adapter":
        held += adapter_weights(job.policy) * width
    elif way.kind != "none":
        held += 4 * head_weights(job.policy, way.kind)
    return held


def caches(way: MethodVariant, job: PlannedBatch) -> list[tuple[ModelShape, int, int]]:
    """Model, rows and columns of every cache that the engine makes for a batch (its columns are reserved at once)."""
    s, method = job.settings, way.method
    asked = DecodingSettings(
        max_new_tokens=s.new_tokens, n=s.n, segment_length=None if method.rule == "accept" else s.segment_tokens
    )
    longest = s.prompt_tokens + s.new_tokens
    wide = longest + min(candidates(way, s, job.policy.vocabulary), MAX_WIDTH)
    if way.kind in ("state head", "adapter"):
        return [(job.policy, job.batch * (2 if way.kind == "adapter" else 1), wide)]
    found = [(job.policy, job.batch, longest + branch_columns(method, asked) + 1)]
    if way.needs_scorer and method.unit == "token":
        found.append((_scorer(job), job.batch, wide if way.kind == "separate" else longest + 1))
    elif way.needs_scorer and method.unit == "segment":
        length = min(segments_of(method, asked)[1], s.new_tokens)
        found.append((_scorer(job), job.batch, longest + max(length, MAX_WIDTH)))
    return found


def cache_bytes(way: MethodVariant, job: PlannedBatch) -> float:
    """Caches of a batch, of policy and scorer, on all devices together."""
    width = BYTES[job.device.dtype]
    return float(sum(rows * columns * shape.cache_bytes(width) for shape, rows, columns in caches(way, job)))


def work_bytes(way: MethodVariant, job: PlannedBatch) -> float:
    """What a pass takes besides: states and masks of the prompts' pass, and the loop's log-probabilities."""
    s, width = job.settings, BYTES[job.device.dtype]
    rows = job.batch * s.prompt_tokens * (2 if way.kind == "adapter" else 1)
    inner = job.policy.trunk / job.policy.layers / job.policy.hidden  # sum of the outputs of one layer's products
    states = rows * (4 * job.policy.hidden + inner) * width
    mask = job.batch * s.prompt_tokens**2 * width
    branches = s.n if way.method.unit != "token" and way.method.rule == "best" else 1
    logits = 4 * job.batch * branches * job.policy.vocabulary * 4
    return float(states + mask + logits)
