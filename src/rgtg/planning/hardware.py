"""Devices: their memory, bandwidth and arithmetic, from data sheets or measured."""

import re

from pydantic import Field

from rgtg.errors import UsageError
from rgtg.types.base import FORMAT_VERSION, Record

GB, TB, TERA = 1e9, 1e12, 1e12
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Device(Record):
    """Rates of one device in one dtype. Times are seconds, sizes bytes, rates bytes or operations per second.

    A pass takes  Σ_products overlapped_seconds(bytes / bandwidth, operations / compute)  +  attention  +  layers ·
    (rows · hidden · row_seconds + layer_seconds)  +  pass_seconds. Each step of the decoding loop adds the time of
    choosing a token (``roofline.sampling_seconds``).
    """

    version: int = FORMAT_VERSION
    name: str
    dtype: str
    memory: float
    bandwidth: float = Field(gt=0, description="bytes of weights per second, in products with one row")
    compute: float = Field(gt=0, description="operations per second of products with many rows (a multiply-add is two)")
    attention_bandwidth: list[float] = Field(
        description="bytes of a KV cache per second: with one query, and with several"
    )
    attention_compute: float = Field(gt=0)
    row_seconds: float = Field(description="element-wise work of one token in one layer, per hidden dimension")
    layer_seconds: float = Field(description="fixed time of a layer: Python, operators, kernel launches")
    pass_seconds: float = Field(description="fixed time of a pass: mask, positions, bookkeeping")
    step_seconds: float = Field(description="fixed time of a step of the decoding loop")
    logit_seconds: float = Field(description="log-softmax, candidates and choice, per sequence and vocabulary entry")
    link: float = Field(0.0, description="bytes per second to the other devices, in one direction; 0: no link")
    link_seconds: float = Field(0.0, description="fixed time of one all-reduce")
    measured: bool
    source: str


# Data sheets give peaks. The share that is reached is an assumption, and every plan states it.
REACHED_BANDWIDTH, REACHED_COMPUTE, REACHED_LINK = 0.75, 0.5, 0.7
LAYER_SECONDS, PASS_SECONDS, STEP_SECONDS, LINK_SECONDS = 2.5e-4, 1e-3, 1.5e-3, 1.5e-5

_SHEETS = {
    # name: bytes, bytes/s, dense 16-bit and fp32 operations/s, NVLink or PCIe bytes/s in one direction, data sheet
    "a100": (80 * GB, 2.039 * TB, 312 * TERA, 19.5 * TERA, 300 * GB, "NVIDIA A100 80GB SXM data sheet"),
    "h100": (80 * GB, 3.35 * TB, 989 * TERA, 67 * TERA, 450 * GB, "NVIDIA H100 SXM data sheet"),
    "h200": (141 * GB, 4.8 * TB, 989 * TERA, 67 * TERA, 450 * GB, "NVIDIA H200 SXM data sheet"),
    "l40s": (48 * GB, 0.864 * TB, 362 * TERA, 91.6 * TERA, 32 * GB, "NVIDIA L40S data sheet (PCIe 4)"),
}
HERE = ("cpu", "cuda")
MOST = 100_000  # devices in a plan


def from_sheet(name: str, dtype: str) -> Device:
    """A device from the table, with the assumed shares of its data sheet's peaks."""
    memory, bandwidth, half, single, link, source = _SHEETS[name]
    reached = REACHED_BANDWIDTH * bandwidth
    compute = REACHED_COMPUTE * (single if dtype == "float32" else half)
    return Device(
        name=name, dtype=dtype, memory=memory, bandwidth=reached, compute=compute,
        attention_bandwidth=[reached, reached], attention_compute=compute,
        row_seconds=40 * BYTES[dtype] / reached, layer_seconds=LAYER_SECONDS, pass_seconds=PASS_SECONDS,
        step_seconds=STEP_SECONDS, logit_seconds=40 / reached, link=REACHED_LINK * link, link_seconds=LINK_SECONDS,
        measured=False, source=source,
    )  # fmt: skip


def parse_hardware(text: str) -> tuple[str, int]:
    """Name and number of devices.

    Raises:
        UsageError: an unknown device, or too many devices.

    Example:
        >>> parse_hardware("h200x8")
        ('h200', 8)
    """
    found = re.fullmatch(r"(?P<name>[a-z]+\d*[a-z]?)(?:x(?P<count>[1-9]\d*))?", text.lower())
    name = found["name"] if found else text
    if found is None or name not in (*_SHEETS, *HERE):
        raise UsageError(
            f"unknown hardware {text!r}; expected one of {', '.join(_SHEETS)}, or {' or '.join(HERE)} to measure this "
            "machine, with a number of devices (h200x8), or a file that --save-hardware wrote"
        )
    count = found["count"] or "1"
    if len(count) > len(str(MOST)) or int(count) > MOST:
        raise UsageError(f"hardware {text!r:.40}: expected at most {MOST:,} devices")
    return name, int(count)
