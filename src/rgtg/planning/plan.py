"""``make_plan``: whether each method fits into memory, how fast it is, and how long the whole job takes."""

from pathlib import Path
from typing import Any

from pydantic import Field

from rgtg.config.commands import PlanSettings
from rgtg.errors import UsageError
from rgtg.planning.hardware import (
    BYTES,
    HERE,
    REACHED_BANDWIDTH,
    REACHED_COMPUTE,
    REACHED_LINK,
    Device,
    from_sheet,
    parse_hardware,
)
from rgtg.planning.method_costs import (
    HEAD_RANK,
    HEAD_WIDTH,
    LORA_RANK,
    Kind,
    MethodVariant,
    PlannedBatch,
    activation_bytes,
    batch_time,
    cache_bytes,
    method_variants,
    token_time,
    weight_bytes,
)
from rgtg.planning.model_shapes import ModelShape, model_shape
from rgtg.types.base import FORMAT_VERSION, Record

USABLE = 0.9  # of a device's memory; the allocator and the driver need the rest
LARGEST_BATCH = 64


class PlanRow(Record):
    """One method with one kind of scorer."""

    method: str
    scorer: Kind
    fits: bool
    batch: int = Field(description="prompts decoded together by one copy of the models")
    tensor_parallel: int = Field(description="devices that share one copy")
    copies: int
    weights_gb: float = Field(description="on each device")
    caches_gb: float = Field(description="on each device, at full length")
    work_gb: float = Field(description="on each device: states, masks, log-probabilities")
    ms_per_token: float = Field(description="one token of every sequence of a batch, without prefill")
    limit_ms: float = Field(description="time to read the weights and caches alone")
    tokens_per_second: float = Field(description="of completions, on all devices together, prefill included")
    hours: float
    device_hours: float


class PlanResult(Record):
    """What ``rgtg plan`` prints."""

    version: int = FORMAT_VERSION
    policy: ModelShape
    scorer: ModelShape | None
    device: Device
    devices: int
    settings: dict[str, Any]
    rows: list[PlanRow]
    assumptions: list[str]


def make_plan(settings: PlanSettings) -> PlanResult:
    """Plan a job.

    Raises:
        UsageError: unknown hardware, or a tensor_parallel that does not divide the devices.
        ModelNotFoundError: a folder or hub id without the config.json of a decoder.
        DataError: a damaged hardware file.
    """
    policy = model_shape(settings.policy)
    scorer, kinds = _scorer_shape(settings.scorer)
    device, devices = _load_device(settings)
    if settings.tensor_parallel is not None and devices % settings.tensor_parallel:
        raise UsageError(f"tensor_parallel {settings.tensor_parallel} does not divide {devices} devices")
    rows = [_best_row(variant, settings, policy, scorer, device, devices) for variant in method_variants(kinds)]
    return PlanResult(
        policy=policy, scorer=scorer, device=device, devices=devices, rows=rows,
        settings=settings.model_dump(mode="json"), assumptions=_assumptions(settings, policy, scorer, device),
    )  # fmt: skip


def _scorer_shape(source: str | None) -> tuple[ModelShape | None, set[Kind]]:
    """The shape of the scorer, and the kinds of scorers that the plan covers."""
    small: set[Kind] = {"none", "adapter", "state head", "vocabulary head"}
    if source is None:
        return None, small
    if Path(source).exists() or "/" in source:
        from rgtg.models.loading.scorer_info import read_info

        info = read_info(source) if Path(source).exists() else None
        if info is not None and info.trunk == "shared":
            return None, {"none", "adapter"}
        if info is not None and info.trunk == "own":
            return None, {"none", "vocabulary head" if info.head == "vocab" else "state head"}
        if info is not None:
            return model_shape(source), {"none", "vocabulary" if info.head == "vocab" else "separate"}
    return model_shape(source), {*small, "separate", "vocabulary"}


def _load_device(settings: PlanSettings) -> tuple[Device, int]:
    """The device, from a data sheet, a file or a measurement, and the number of devices."""
    path = Path(settings.hardware)
    if path.suffix == ".json":
        device = Device.from_file(path, "hardware", "--save-hardware")
        if device.dtype != settings.dtype:
            raise UsageError(f"{path} was measured in {device.dtype}, and --dtype is {settings.dtype}")
        return device, 1
    name, count = parse_hardware(settings.hardware)
    if name not in HERE:
        return from_sheet(name, settings.dtype), count
    from rgtg.models.loading.device_map import resolve_device
    from rgtg.planning.calibrate import measure_device

    resolve_device(name)
    device = measure_device(name, settings.dtype)
    if settings.save_hardware is not None:
        from rgtg.utils.files import write_text

        write_text(settings.save_hardware, device.model_dump_json(indent=2) + "\n")
    return device, count


def _best_row(
    variant: MethodVariant,
    settings: PlanSettings,
    policy: ModelShape,
    scorer: ModelShape | None,
    device: Device,
    devices: int,
) -> PlanRow:
    """The batch size and split with the fewest device-hours; if none fits, the smallest."""
    given = settings.tensor_parallel
    splits = [given] if given else [count for count in _powers(devices) if not devices % count]
    batches = [settings.batch_size] if settings.batch_size else _powers(min(LARGEST_BATCH, settings.prompts))[::-1]
    rows = [
        _plan_row(variant, PlannedBatch(settings, policy, scorer, device, parallel, batch), devices)
        for parallel in splits
        for batch in batches
    ]
    fitting = [row for row in rows if row.fits]
    return min(fitting, key=lambda row: row.device_hours) if fitting else rows[-1]


def _powers(limit: int) -> list[int]:
    """1, 2, 4 … and the limit itself.

    Example:
        >>> _powers(6)
        [1, 2, 4, 6]
    """
    return sorted({limit, *(2**i for i in range(limit.bit_length()) if 2**i <= limit)})


def _plan_row(variant: MethodVariant, planned: PlannedBatch, devices: int) -> PlanRow:
    s, parallel = planned.settings, planned.parallel
    weights = weight_bytes(variant, planned) / parallel
    caches = cache_bytes(variant, planned) / min(parallel, planned.policy.kv_heads)
    work = activation_bytes(variant, planned)
    whole, token = batch_time(variant, planned), token_time(variant, planned)
    copies = devices // parallel
    batches = -(-s.prompts // (planned.batch * copies))  # for each copy, rounded up
    hours = batches * whole.seconds / 3600
    return PlanRow(
        method=variant.method.name, scorer=variant.kind, fits=weights + caches + work <= USABLE * planned.device.memory,
        batch=planned.batch, tensor_parallel=parallel, copies=copies, weights_gb=weights / 1e9, caches_gb=caches / 1e9,
        work_gb=work / 1e9, ms_per_token=1e3 * token.seconds, limit_ms=1e3 * token.limit,
        tokens_per_second=s.prompts * s.new_tokens / (3600 * hours), hours=hours, device_hours=hours * devices,
    )  # fmt: skip


def _assumptions(settings: PlanSettings, policy: ModelShape, scorer: ModelShape | None, device: Device) -> list[str]:
    """The assumptions that a reader must know to judge the plan."""
    shapes = (("policy", policy), ("scorer", scorer))
    return [
        *(_of_size(role, shape) for role, shape in shapes if shape is not None and not shape.exact),
        *_of_device(device),
        f"every prompt has {settings.prompt_tokens} tokens and every completion {settings.new_tokens}; batches "
        "start and end together; loading the models is not counted",
        f"weights and caches in {settings.dtype}, {BYTES[settings.dtype]} bytes a number; {USABLE:.0%} of a device's "
        "memory is used",
        "policy and scorer are on the same devices and take turns; batch and split have the fewest device-hours",
        f"heads are {HEAD_WIDTH} wide, and of rank {HEAD_RANK} where they score the vocabulary; adapters have rank "
        f"{LORA_RANK}; no speculation, no entropy gate",
        f"cards draws {settings.cards_drawn:g} tokens and scores {settings.cards_scored:g} segments for each token "
        "it keeps, the averages of docs/results/study-stories.json; its threshold changes both (--set cards_drawn=…)",
    ]


def _of_size(role: str, shape: ModelShape) -> str:
    return (
        f"{role} {shape.name}: {shape.layers} layers × {shape.hidden}, {shape.kv_heads} of {shape.heads} heads cached, "
        f"vocabulary {shape.vocabulary:,}, as in a widely used model; a folder or hub id is counted exactly"
    )


def _of_device(device: Device) -> list[str]:
    if device.measured:
        return [f"{device.name}: rates {device.source}; they hold while the machine is as free as it was then"]
    return [
        f"{device.name}: {device.source}, of which {REACHED_BANDWIDTH:.0%} of the bandwidth, {REACHED_COMPUTE:.0%} of "
        f"the arithmetic and {REACHED_LINK:.0%} of the link are assumed to be reached: no GPU was measured (on one, "
        "--hardware cuda does)",
        f"eager PyTorch is assumed to take {1e3 * device.layer_seconds:.2g} ms for each layer of a pass, "
        f"{1e3 * device.pass_seconds:.2g} ms for a pass and {1e3 * device.step_seconds:.2g} ms for choosing a token, "
        "whatever the size: at small batches this, not the bandwidth, is the limit",
    ]
