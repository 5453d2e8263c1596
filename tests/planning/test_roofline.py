"""The arithmetic of a plan, by hand on small numbers, and compared with what the engine allocates."""

import math

import pytest
import torch

from helpers.scorer_kinds import kinds, lora
from helpers.tiny_models import tiny_policy
from rgtg import GuidedPolicy
from rgtg.config import PlanSettings
from rgtg.decoding.methods import METHODS
from rgtg.decoding.runners import scorer_runner
from rgtg.decoding.runners.kv_cache import TreeCache
from rgtg.planning.hardware import Device, from_sheet
from rgtg.planning.method_costs import (
    MAX_WIDTH,
    MethodVariant,
    PlannedBatch,
    adapter_weights,
    batch_time,
    cache_bytes,
    candidate_count,
    head_weights,
    method_variants,
    prefill_time,
    token_time,
    weight_bytes,
)
from rgtg.planning.model_shapes import ModelShape, count_shape
from rgtg.planning.roofline import (
    ForwardPass,
    all_reduce_seconds,
    attention_seconds,
    overlapped_seconds,
    pass_time,
    sampling_seconds,
)

# 2 layers of 4 × 4 heads: q, k, v, o 16 weights each, three sides of 4 × 8; vocabulary 10
SHAPE = ModelShape.llama("small", 2, 4, 2, 8, 10, head_dim=2, heads=2)
DEVICE = Device(
    name="slow", dtype="bfloat16", memory=1e6, bandwidth=100.0, compute=1000.0, attention_bandwidth=[50.0, 25.0],
    attention_compute=500.0, row_seconds=0.001, layer_seconds=0.1, pass_seconds=0.5, step_seconds=2.0,
    logit_seconds=0.01, link=10.0, link_seconds=0.3, measured=True, source="invented",
)  # fmt: skip
NAMES = {
    "separate": "separate", "state head": "state", "vocabulary head": "vocab", "adapter": "adapter",
    "vocabulary": "vocabulary scorer",
}  # fmt: skip
ALL = {"none", *NAMES}


def planned_batch(settings, policy=SHAPE, scorer=SHAPE, device=DEVICE, parallel=1, batch=1):
    return PlannedBatch(PlanSettings(policy="", **settings), policy, scorer, device, parallel, batch)


def test_weights_of_a_small_shape_by_hand():
    assert SHAPE.trunk == 2 * (4 * 16 + 3 * 32) == 320
    assert (SHAPE.head, SHAPE.total) == (40, 320 + 2 * 8 + 4 + 80)
    assert SHAPE.cache_bytes(2) == 2 * 2 * 4 * 2  # keys and values, layers, numbers, bytes


def test_time_of_a_pass_by_hand():
    # one row, one new token behind nine, no logits: 640 bytes at 100 a second, 640 operations at 1000
    products = overlapped_seconds(6.4, 0.64)
    # per layer: 1 · 10 columns · 8 bytes of keys and values per head (2 · 2 · 2), two heads, at 50 a second;
    # 4 · 2 heads · 10 columns · 2 = 160 operations at 500
    attention = 2 * overlapped_seconds(160 / 50, 160 / 500)
    rest = 2 * 1 * 4 * 0.001 + 2 * 0.1 + 0.5
    cost = pass_time(SHAPE, DEVICE, ForwardPass(1, 1, 9))
    assert cost.seconds == pytest.approx(products + attention + rest)
    assert cost.limit == pytest.approx((640 + 9 * 32) / 100)
    # the output layer: 80 bytes, and 80 operations of the one state
    with_logits = pass_time(SHAPE, DEVICE, ForwardPass(1, 1, 9, 1))
    assert with_logits.seconds - cost.seconds == pytest.approx(overlapped_seconds(0.8, 0.08))
    assert sampling_seconds(DEVICE, 3, 10) == pytest.approx(2.3)


def test_two_devices_split_a_pass_and_all_reduce():
    one, two = (pass_time(SHAPE, DEVICE, ForwardPass(4, 3, 7), parallel) for parallel in (1, 2))
    exchange = all_reduce_seconds(DEVICE, 12 * 4 * 2, 2)
    assert exchange == pytest.approx(0.3 + 96 / 10)  # 2 · ½ of what is added up, both ways
    fixed = 2 * 12 * 4 * 0.001 + 2 * 0.1 + 0.5
    assert two.seconds == pytest.approx(fixed + (one.seconds - fixed) / 2 + 2 * 2 * exchange)
    assert all_reduce_seconds(DEVICE.model_copy(update={"link": 0.0}), 1, 2) == math.inf


def test_grouped_heads_are_expanded_for_several_queries():
    grouped = SHAPE.model_copy(update={"heads": 4, "kv_heads": 2})
    head = 2 * 1 * 12 * 2 * 2  # keys and values of one head, 12 columns
    many = attention_seconds(grouped, DEVICE, ForwardPass(1, 2, 10))
    assert many == pytest.approx(head * 6 / 100 + overlapped_seconds(head * 4 / 25, 4 * 2 * 4 * 12 * 2 / 500))
    assert attention_seconds(grouped, DEVICE, ForwardPass(1, 1, 11)) == pytest.approx(
        overlapped_seconds(head * 2 / 25, 4 * 1 * 4 * 12 * 2 / 500)
    )


def test_overlapped_time_lies_between_the_larger_limit_and_the_sum():
    assert overlapped_seconds(3.0, 0.0) == pytest.approx(3)
    assert 3 < overlapped_seconds(3.0, 2.0) < 5
    assert overlapped_seconds(2.0, 3.0) == overlapped_seconds(3.0, 2.0)


def test_only_experts_that_tokens_are_routed_to_are_read():
    mixture = SHAPE.model_copy(update={"experts": 160, "routed": 8, "active": 2})
    assert mixture.weights_per_token == 320 - 160 + 40
    assert mixture.weights_read(1) == mixture.weights_per_token
    assert mixture.weights_read(2) == pytest.approx(160 + 160 * (1 - 0.75**2))
    assert mixture.weights_read(1000) == pytest.approx(320)


def test_time_of_token_wise_methods_by_hand():
    asked = planned_batch({"prompt_tokens": 6, "new_tokens": 8})
    variant = MethodVariant(METHODS["policy"], "none")
    token = pass_time(SHAPE, DEVICE, ForwardPass(1, 1, 10, 1)).seconds + 2.1  # behind 6 and half of 8; ten logits
    prompt = pass_time(SHAPE, DEVICE, ForwardPass(1, 6, 0, 1)).seconds
    assert token_time(variant, asked).seconds == pytest.approx(token)
    # eight are chosen; the prompts' pass gave the first, so seven are read
    assert batch_time(variant, asked).seconds == pytest.approx(prompt + 8 * token - (token - 2.1))
    pargs = MethodVariant(METHODS["pargs"], "separate")
    scored = pass_time(SHAPE.without_head(), DEVICE, ForwardPass(1, 3, 10)).seconds
    asked = planned_batch({"prompt_tokens": 6, "new_tokens": 8, "k": 3})
    assert token_time(pargs, asked).seconds == pytest.approx(token + scored)
    best, asked = (
        MethodVariant(METHODS["best-of-n"], "separate"),
        planned_batch({"prompt_tokens": 6, "new_tokens": 8, "n": 4}),
    )
    drawn = pass_time(SHAPE, DEVICE, ForwardPass(1, 4, 6 + 4 * 4, 4)).seconds + 2 + 4 * 0.1
    rewards = pass_time(SHAPE.without_head(), DEVICE, ForwardPass(4, 14, 0)).seconds
    assert token_time(best, asked).seconds == pytest.approx(drawn + rewards / 8)


def test_time_of_segment_wise_methods_by_hand():
    asked = planned_batch(
        {"prompt_tokens": 6, "new_tokens": 8, "n": 2, "segment_tokens": 4, "cards_drawn": 2, "cards_scored": 0.5}
    )
    reward = SHAPE.without_head()
    drawn = pass_time(SHAPE, DEVICE, ForwardPass(1, 2, 10 + 2 * 4 / 2, 2)).seconds * 3 / 4 + 2 + 2 * 0.1
    scored, kept = (pass_time(reward, DEVICE, ForwardPass(1, nodes, 10)).seconds for nodes in (2 * 4, 4))
    again = pass_time(SHAPE, DEVICE, ForwardPass(1, 4, 10, 1)).seconds
    ended = pass_time(reward, DEVICE, ForwardPass(2, 14, 0)).seconds  # two completions, read whole
    blockwise = token_time(MethodVariant(METHODS["cd-blockwise"], "separate"), asked).seconds
    assert blockwise == pytest.approx(drawn + (scored + again + kept) / 8 + ended / 8)  # one of two segments
    # cards: two tokens drawn for one that stays, in segments of four, half of which are kept
    token = pass_time(SHAPE, DEVICE, ForwardPass(1, 1, 10, 1)).seconds + 2.1
    cards = token_time(MethodVariant(METHODS["cards"], "separate"), asked).seconds
    assert cards == pytest.approx(2 * token + kept * (0.5 + 0.5 / 2) / 2 + ended / 8)


def test_every_method_has_a_variant_that_costs_at_least_the_policy():
    planned = method_variants(ALL)
    assert {variant.method.name for variant in planned} == set(METHODS)
    asked = planned_batch({}, device=from_sheet("h200", "bfloat16"), batch=4)
    least = token_time(MethodVariant(METHODS["policy"], "none"), asked)
    for variant in planned:
        cost = token_time(variant, asked)
        # cd-blockwise does not read a segment's last token, and shares what it draws among n
        assert cost.seconds > 0.9 * least.seconds
        assert cost.limit < cost.seconds
        assert prefill_time(variant, asked).seconds > 0
    assert {variant.kind for variant in method_variants({"none"})} == {"none"}


def test_candidates_are_the_methods_own_unless_given():
    assert candidate_count(MethodVariant(METHODS["rad"], "separate"), PlanSettings(policy=""), 1000) == 20
    assert candidate_count(MethodVariant(METHODS["rad"], "separate"), PlanSettings(policy="", k=5), 1000) == 5
    assert candidate_count(MethodVariant(METHODS["farma"], "vocabulary"), PlanSettings(policy="", k=5), 1000) == 1000


@pytest.fixture
def made(monkeypatch):
    """Every KV cache that is used."""
    caches, reset = {}, TreeCache.reset

    def noted(self, rows):
        caches[id(self)] = self
        reset(self, rows)

    monkeypatch.setattr(TreeCache, "reset", noted)
    return caches


@pytest.mark.filterwarnings("ignore:.*was trained on")
@pytest.mark.parametrize("variant", method_variants(ALL), ids=lambda variant: f"{variant.method.name}, {variant.kind}")
def test_planned_caches_have_the_size_of_the_engines(variant, made):
    policy, scorers = kinds()
    scorer = None if variant.kind == "none" else scorers[NAMES[variant.kind]][0]
    guided = GuidedPolicy.from_pretrained(policy, scorer=scorer, method=variant.method.name)
    asked = {"n": 3} if "n" in variant.method.takes else {}
    needed = {"accept": {"reward_threshold": -9.0}, "filter": {"value_threshold": 0.0}}
    given = asked | needed.get(variant.method.rule, {})
    for _ in range(2):  # the first time, a trial says whether the models read trees
        made.clear()
        guided.generate(["The cat sat", "The dog ran"], max_new_tokens=5, batch_size=2, **given)
    shapes = (count_shape(policy.model, "policy"), None if scorer is None else count_shape(tiny_policy(), "scorer"))
    planned = planned_batch(
        {"prompt_tokens": 11, "new_tokens": 5, **asked}, *shapes, from_sheet("h200", "float32"), batch=2
    )
    assert cache_bytes(variant, planned) == sum(cache.nbytes for cache in made.values()) > 0


def test_weights_are_those_of_the_models():
    model = tiny_policy()
    shape = count_shape(model, "tiny")
    assert shape.total == sum(p.numel() for p in model.parameters())
    trunk = [
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    ]
    assert shape.trunk == sum(trunk)
    assert shape.head == model.lm_head.weight.numel()
    adapter, _ = lora(model, rank=3)
    assert adapter_weights(shape, 3) == sum(a.numel() + b.numel() for a, b in adapter.values())
    device = from_sheet("h200", "bfloat16")
    for kind, held in {
        "none": 2 * shape.total, "adapter": 2 * (shape.total + adapter_weights(shape)),
        "state head": 2 * shape.total + 4 * head_weights(shape, "state head"),
        "vocabulary": 4 * shape.total, "separate": 2 * (2 * shape.total - shape.head),
    }.items():  # fmt: skip
        assert weight_bytes(MethodVariant(METHODS["pargs"], kind), planned_batch({}, shape, shape, device)) == held


def test_the_widest_pass_is_that_of_the_engine():
    assert MAX_WIDTH == scorer_runner.MAX_WIDTH
