"""What one pass of a model takes on a device: products, attention, exchanges between devices, and what is fixed."""

import math
from dataclasses import dataclass

from rgtg.planning.hardware import BYTES, Device
from rgtg.planning.model_shapes import ModelShape


@dataclass(frozen=True)
class ForwardPass:
    """A pass of ``batch`` rows of the cache with ``queries`` new tokens each, over ``columns`` cached ones.

    ``logits`` counts the states that go through the output layer.
    """

    batch: float
    queries: float
    columns: float
    logits: float = 0

    @property
    def rows(self) -> float:
        """New tokens in all."""
        return self.batch * self.queries


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a pass, and the seconds that reading its weights and caches alone would take."""

    seconds: float
    limit: float

    def __add__(self, other: "TimeEstimate") -> "TimeEstimate":
        """One after the other."""
        return TimeEstimate(self.seconds + other.seconds, self.limit + other.limit)

    def __mul__(self, times: float) -> "TimeEstimate":
        """So many of them."""
        return TimeEstimate(self.seconds * times, self.limit * times)


OVERLAP = 1.8


def pass_cost(shape: ModelShape, device: Device, one: ForwardPass, parallel: int = 1) -> TimeEstimate:
    """Time of a pass whose weights and caches are spread over ``parallel`` devices."""
    width = BYTES[device.dtype]
    trunk = shape.read_per_pass(math.ceil(one.rows)) * width / parallel
    seconds = product_seconds(device, trunk, 2 * shape.used_per_row * one.rows / parallel)
    read = trunk
    if one.logits:
        head = shape.head * width / parallel
        seconds += product_seconds(device, head, 2 * shape.head * one.logits / parallel)
        read += head
    cache = one.batch * one.columns * shape.cache_bytes(width) / min(parallel, shape.kv_heads)
    seconds += shape.layers * attention_seconds(shape, device, one) / min(parallel, shape.kv_heads)
    seconds += shape.layers * one.rows * shape.hidden * device.row_seconds
    seconds += shape.layers * device.layer_seconds + device.pass_seconds
    if parallel > 1:
        seconds += shape.layers * 2 * exchange_seconds(device, one.rows * shape.hidden * width, parallel)
    return TimeEstimate(seconds, (read + cache) / device.bandwidth)


def product_seconds(device: Device, weights: float, operations: float) -> float:
    """Of products that read so many bytes: between the larger of the two limits and their sum."""
    return overlapped_seconds(weights / device.bandwidth, operations / device.compute)


def overlapped_seconds(reading: float, computing: float) -> float:
    """Seconds of reading and computing that overlap in part: (t_r^p + t_c^p)^{1/p}, p = 1.8.

    p was read off docs/results/decode-profile.json, whose products of 1 to 80 rows it gives within 15 %.
    """
    return float((reading**OVERLAP + computing**OVERLAP) ** (1 / OVERLAP))


def attention_seconds(shape: ModelShape, device: Device, one: ForwardPass) -> float:
    """Of one layer. A cache of fewer heads than the queries is expanded first where several queries read it."""
    columns = one.columns + one.queries
    of_head = 2 * one.batch * columns * shape.head_dim * BYTES[device.dtype]  # keys and values of one head
    grouped, single = shape.heads != shape.kv_heads, one.queries <= 1
    if grouped and not single:
        copied = of_head * (shape.kv_heads + shape.heads) / device.bandwidth
        read = of_head * shape.heads / device.attention_bandwidth[1]
    else:
        copied, read = 0.0, of_head * shape.kv_heads / device.attention_bandwidth[0 if single and not grouped else 1]
    operations = 4 * one.rows * shape.heads * columns * shape.head_dim
    return copied + overlapped_seconds(read, operations / device.attention_compute)


def exchange_seconds(device: Device, size: float, parallel: int) -> float:
    """Of adding up ``size`` bytes over all devices."""
    moved = 2 * (parallel - 1) / parallel * size
    return device.link_seconds + (moved / device.link if device.link else math.inf)


def step_seconds(device: Device, batch: float, vocabulary: int) -> float:
    """Of choosing a token for every row, models aside."""
    return device.step_seconds + batch * vocabulary * device.logit_seconds
