"""Time of one forward pass on a device, by a roofline model: reading weights and caches against arithmetic."""

import math
from dataclasses import dataclass

from rgtg.planning.hardware import BYTES, Device
from rgtg.planning.model_shapes import ModelShape

OVERLAP = 1.8  # p of `overlapped_seconds`


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass of ``batch`` sequences with ``queries`` new tokens each, after ``cached`` tokens in the KV cache.

    ``logits`` is the number of hidden states that go through the output layer.
    """

    batch: float
    queries: float
    cached: float
    logits: float = 0

    @property
    def tokens(self) -> float:
        """New tokens of all sequences."""
        return self.batch * self.queries


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of some work, and its lower limit: the seconds to read the weights and caches alone."""

    seconds: float
    limit: float

    def __add__(self, other: "TimeEstimate") -> "TimeEstimate":
        """One after the other."""
        return TimeEstimate(self.seconds + other.seconds, self.limit + other.limit)

    def __mul__(self, times: float) -> "TimeEstimate":
        """The same work several times."""
        return TimeEstimate(self.seconds * times, self.limit * times)


def pass_time(shape: ModelShape, device: Device, one: ForwardPass, parallel: int = 1) -> TimeEstimate:
    """Time of a forward pass with weights and caches split over ``parallel`` devices."""
    width = BYTES[device.dtype]
    # 1. The layers' matrix products, and the output layer's.
    weights = shape.weights_read(math.ceil(one.tokens)) * width / parallel
    seconds = product_seconds(device, weights, 2 * shape.weights_per_token * one.tokens / parallel)
    if one.logits:
        head = shape.head * width / parallel
        seconds += product_seconds(device, head, 2 * shape.head * one.logits / parallel)
        weights += head
    # 2. Attention.
    cache = one.batch * one.cached * shape.cache_bytes(width) / min(parallel, shape.kv_heads)
    seconds += shape.layers * attention_seconds(shape, device, one) / min(parallel, shape.kv_heads)
    # 3. Element-wise work, and the fixed time of layers and passes.
    seconds += shape.layers * one.tokens * shape.hidden * device.row_seconds
    seconds += shape.layers * device.layer_seconds + device.pass_seconds
    # 4. Two all-reduces per layer.
    if parallel > 1:
        seconds += shape.layers * 2 * all_reduce_seconds(device, one.tokens * shape.hidden * width, parallel)
    return TimeEstimate(seconds, (weights + cache) / device.bandwidth)


def product_seconds(device: Device, weight_bytes: float, operations: float) -> float:
    """Seconds of matrix products: between the larger of the two limits and their sum."""
    return overlapped_seconds(weight_bytes / device.bandwidth, operations / device.compute)


def overlapped_seconds(reading: float, computing: float) -> float:
    """Seconds of reading and computing that overlap in part: (t_r^p + t_c^p)^{1/p}, p = 1.8.

    p is fitted to docs/results/decode-profile.json, whose products of 1 to 80 rows it predicts within 15 %.
    """
    return float((reading**OVERLAP + computing**OVERLAP) ** (1 / OVERLAP))


def attention_seconds(shape: ModelShape, device: Device, one: ForwardPass) -> float:
    """Seconds of attention in one layer. With grouped heads and several queries, keys and values are expanded first."""
    length = one.cached + one.queries
    head_bytes = 2 * one.batch * length * shape.head_dim * BYTES[device.dtype]  # keys and values of one head
    grouped, single = shape.heads != shape.kv_heads, one.queries <= 1
    if grouped and not single:
        copying = head_bytes * (shape.kv_heads + shape.heads) / device.bandwidth
        reading = head_bytes * shape.heads / device.attention_bandwidth[1]
    else:
        copying = 0.0
        reading = head_bytes * shape.kv_heads / device.attention_bandwidth[0 if single and not grouped else 1]
    operations = 4 * one.tokens * shape.heads * length * shape.head_dim
    return copying + overlapped_seconds(reading, operations / device.attention_compute)


def all_reduce_seconds(device: Device, size: float, parallel: int) -> float:
    """Seconds to sum ``size`` bytes over all devices."""
    moved = 2 * (parallel - 1) / parallel * size
    return device.link_seconds + (moved / device.link if device.link else math.inf)


def sampling_seconds(device: Device, batch: float, vocabulary: int) -> float:
    """Seconds to choose a token for every sequence, without the models."""
    return device.step_seconds + batch * vocabulary * device.logit_seconds
