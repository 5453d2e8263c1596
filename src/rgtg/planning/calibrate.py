"""Measures this machine's rates in a few seconds, with the operations that decoding consists of.

Every rate is the best of several tries, to reduce the effect of other programs.
"""

import functools
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rgtg.config import DecodingSettings
from rgtg.decoding.engine.batch import Batch, Prefilled
from rgtg.decoding.request import Request, StoppingCriteria
from rgtg.decoding.runners.base import PolicyState
from rgtg.decoding.runners.model_runner import TreeRunner
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.decoding.sampling import SamplingParams
from rgtg.models.loading.device_map import memory_bytes, synchronize
from rgtg.models.loading.pretrained import DTYPES
from rgtg.models.ops.attention import single_query_attention
from rgtg.models.ops.lm_head import policy_logits
from rgtg.models.ops.packed_linear import StackedWeights, can_pack_dtype, pack_linears
from rgtg.planning.hardware import Device
from rgtg.planning.roofline import OVERLAP, overlapped_seconds

_TRIES = 12
# Products (outputs, inputs) of layers of width 1024, more than fit into a processor's caches.
_SIDES, _LAYERS, _ROWS = ((3072, 1024), (1024, 1024), (5632, 1024), (1024, 2816)), 5, 64
_CACHES, _BATCH, _HEADS, _COLUMNS, _HEAD_DIM = 24, 4, 12, 128, 64
_TRUNK = 10  # weights of a small model's layer, in squares of its width: 4 for attention, 3 · 2 for the MLP


Clock = Callable[[], float]
Best = Callable[[Callable[[], Any]], float]


def measure_device(name: str, dtype: str, tries: int = _TRIES, clock: Clock = time.perf_counter) -> Device:
    """Rates of the CPU, or of the first GPU, in one dtype.

    Args:
        name: ``cpu`` or ``cuda``.
        dtype: float32, bfloat16 or float16.
        tries: of each operation; the best counts.
        clock: in seconds. On a busy CPU, ``time.process_time`` with one thread ignores other programs.
    """
    device = torch.device(name)
    best = functools.partial(_best, tries=tries, clock=clock)
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        bandwidth, compute = _products(device, dtype, best)
        one, several, operations = _attention(device, dtype, best)
        whole, layer, row = _passes(device, dtype, best, bandwidth, compute)
        step, logit = _steps(device, best)
    return Device(
        name=name, dtype=dtype, memory=_memory(device), bandwidth=bandwidth, compute=compute,
        attention_bandwidth=[one, several], attention_compute=operations, row_seconds=row, layer_seconds=layer,
        pass_seconds=whole, step_seconds=step, logit_seconds=logit, measured=True,
        source=f"measured here, {torch.get_num_threads()} threads" if device.type == "cpu" else "measured here",
    )  # fmt: skip


def _best(run: Callable[[], Any], tries: int, clock: Clock) -> float:
    times = []
    for _ in range(tries + 1):
        synchronize()
        start = clock()
        run()
        synchronize()
        times.append(clock() - start)
    return min(times[1:])


def _products(device: torch.device, dtype: str, best: Best) -> tuple[float, float]:
    """Bytes per second with one row, and operations per second with many rows."""
    kind = _kind(dtype)
    pack = device.type == "cpu" and can_pack_dtype(kind)
    sides = [side for _ in range(_LAYERS) for side in _SIDES]
    weights = [StackedWeights(torch.randn(side, device=device).mul(0.02).to(kind), None, pack=pack) for side in sides]
    size = sum(weight.nbytes for weight in weights)

    def run(rows: int) -> float:
        inputs = {side: torch.randn(1, rows, side, device=device).to(kind) for _, side in _SIDES}
        pairs = [(weight, inputs[inside]) for weight, (_, inside) in zip(weights, sides, strict=True)]
        return best(lambda: [weight(x) for weight, x in pairs])

    reading = run(1)
    return size / reading, 2 * size / kind.itemsize * _ROWS / _subtract_overlapped(run(_ROWS), reading)


def _subtract_overlapped(together: float, one: float) -> float:
    """The second of two times that overlap by ``overlapped_seconds``; at least half of the whole."""
    return float(max(together**OVERLAP - one**OVERLAP, (0.5 * together) ** OVERLAP) ** (1 / OVERLAP))


def _attention(device: torch.device, dtype: str, best: Best) -> tuple[float, float, float]:
    """Bytes of a KV cache per second with one query and with eight, and operations per second with many queries."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kind = _kind(dtype)
    attend = single_query_attention if device.type == "cpu" and can_pack_dtype(kind) else sdpa_attention_forward
    layer = SimpleNamespace(is_causal=False, training=False)
    shape = (_BATCH, _HEADS, 2 * _COLUMNS, _HEAD_DIM)  # half of them in use: views, as in the middle of a completion
    pools = [torch.randn(shape, device=device).to(kind)[:, :, :_COLUMNS] for _ in range(2 * _CACHES)]
    caches = [pools[i : i + 2] for i in range(0, len(pools), 2)]

    def run(queries: int, over: Sequence[list[Tensor]]) -> float:
        query = torch.randn(_BATCH, _HEADS, queries, _HEAD_DIM, device=device).to(kind)
        mask = torch.zeros(_BATCH, 1, queries, _COLUMNS, device=device, dtype=kind)
        return best(lambda: [attend(layer, query, keys, values, mask) for keys, values in over])

    numbers = _BATCH * _HEADS * _COLUMNS * _HEAD_DIM
    size = 2 * _CACHES * numbers * kind.itemsize
    compute = 4 * 256 * numbers / run(256, caches[:1])
    several = _subtract_overlapped(run(8, caches), 4 * 8 * _CACHES * numbers / compute)
    return size / run(1, caches), size / several, compute


def _passes(
    device: torch.device, dtype: str, best: Best, bandwidth: float, compute: float
) -> tuple[float, float, float]:
    """Seconds of a pass, of a layer, and of a token in a layer per hidden dimension, without matrix products."""
    few, many = _runner(device, dtype, 2, 64), _runner(device, dtype, 10, 64)
    single = torch.full((1, 1), 7)
    short, long = (best(lambda r=r: _read(r, single)) for r in (few, many))  # type: ignore[misc]
    layer = max(long - short, 1e-6) / 8
    layers, width, rows = 4, 512, (16, 64)
    wide = _runner(device, dtype, layers, width)
    taken = [best(lambda n=n: _read(wide, torch.full((1, n), 7))) for n in rows]  # type: ignore[misc]
    trunk = layers * _TRUNK * width**2
    products = [overlapped_seconds(trunk * _kind(dtype).itemsize / bandwidth, 2 * trunk * n / compute) for n in rows]
    more = (taken[1] - taken[0]) - (products[1] - products[0])
    row = more / (layers * (rows[1] - rows[0]) * width)
    return max(short - 2 * layer, 0.0), layer, max(row, 0.0)


def _read(runner: TreeRunner, tokens: Tensor) -> Tensor:
    """A pass over leaves, of which the first is committed and rolled back; final states (1, N, H)."""
    final = runner.read(TokenTree.leaves(tokens)).final
    runner.commit(torch.zeros(1, 1, dtype=torch.long))
    runner.rollback([1])
    return final


def _runner(device: torch.device, dtype: str, layers: int, width: int) -> TreeRunner:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 64,
        intermediate_size=2 * width, vocab_size=64, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, _kind(dtype)).eval()
    runner = TreeRunner(pack_linears(model), policy_logits, 256)
    runner.prefill([[5] * 16])
    return runner


class _NoModel:
    """A policy, and a scorer, that say the same of every token without a model: what is left is the loop."""

    scores_any_rows = False
    record = None

    def __init__(self, state: PolicyState) -> None:
        self.state = state

    def step(self, tokens: Tensor) -> PolicyState:
        return self.state

    def score(self, candidate_ids: Tensor) -> Tensor:
        return torch.zeros(candidate_ids.shape, device=candidate_ids.device)

    def commit(self, candidate_ids: Tensor, choice: Tensor) -> None:
        pass


def _steps(device: torch.device, best: Best) -> tuple[float, float]:
    """Seconds of a step of the decoding loop, and per sequence and vocabulary entry."""
    small, large = (best(_next_token(device, batch, 32_000)) for batch in (1, 8))
    each = max(large - small, 0.0) / (7 * 32_000)
    return max(small - 32_000 * each, 0.0), each


def _next_token(device: torch.device, requests: int, vocabulary: int) -> Callable[[], Any]:
    """A step of the loop without models, for so many requests."""
    model: Any = _NoModel(PolicyState(torch.randn(requests, vocabulary, device=device), None))
    stopping = StoppingCriteria(None, set(), DecodingSettings(max_new_tokens=10**6))
    batch = Batch()
    rows = [
        Request("", [5], seed, params=SamplingParams(top_k=10), stopping=stopping, scorers=("none",), betas=(1.0,))
        for seed in range(requests)
    ]
    batch.add(rows, Prefilled(model, model.state, {"none": model}))
    return batch.step


def _kind(dtype: str) -> torch.dtype:
    kind = DTYPES[dtype]
    assert isinstance(kind, torch.dtype), "a plan's dtype is a name of one"
    return kind


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()
