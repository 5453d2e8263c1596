"""The logits processor that vLLM loads by name: ``--logits-processors rgtg.engines.vllm:Guidance``.

vLLM has two model runners with two interfaces. One class serves both, because the name is given before it is known
which one runs. V1 numbers rows by their place in the batch, V2 by a slot that a request keeps.
"""

import logging
from typing import Any, NamedTuple

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.sample.logits_processor import process_dict_updates

from rgtg.engines.vllm.arguments import Guide, read_guide, require_sampling
from rgtg.engines.vllm.guide import HeadOnStates, guide_rows
from rgtg.engines.vllm.loading import load_heads, padding_ids, require_engine
from rgtg.engines.vllm.scorer_file import scorers_of_server
from rgtg.engines.vllm.states import LATEST

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:  # a vLLM without the second model runner
    LogitsProcessorV2 = object

_logger = logging.getLogger("vllm.rgtg")  # shown by vLLM's own logging


class _Guided(NamedTuple):
    """A guided request in the running batch; V1's token lists grow as tokens are drawn."""

    guide: Guide
    prompt_ids: list[int] | None
    output_ids: list[int]


class Guidance(LogitsProcessorV1, LogitsProcessorV2):  # type: ignore[misc]
    """Guides the rows of requests that ask for it, and leaves all others as they are."""

    def __init__(self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool | None = None) -> None:
        """Load the server's scorers.

        Args:
            vllm_config: of the engine.
            device_or_states: V1's device, or V2's request states.
            is_pin_memory: given by V1 only.

        Raises:
            UsageError, DataError: scorers that this engine cannot carry, or an engine that cannot be guided. vLLM stops
                with the message before it serves anything.
        """
        require_engine(vllm_config)
        self._first_version = is_pin_memory is not None
        self._device = device_or_states if self._first_version else device_or_states.device
        self._known = {name: one.scores_vocabulary for name, one in scorers_of_server().items()}
        self._heads = load_heads(vllm_config, self._device)
        self._padding = padding_ids(vllm_config.model_config, self._device)
        self._speculates = vllm_config.speculative_config is not None
        self._running: dict[int, _Guided] = {}  # by row (V1) or slot (V2)
        self._warned = False

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse arguments that cannot be used; the client gets status 400 with the message.

        Raises:
            UsageError: a ValueError, as vLLM expects.
        """
        known = {name: one.scores_vocabulary for name, one in scorers_of_server().items()}
        guide = read_guide(sampling_params.extra_args, known)
        if guide is not None:
            require_sampling(guide, sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False: guidance changes which token is the most likely."""
        return False

    # -- V1 ----------------------------------------------------------------------------------------------------------

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests that enter, leave and move in the batch."""
        process_dict_updates(self._running, batch_update, self._enter)

    def _enter(self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> _Guided | None:
        guide = read_guide(params.extra_args, self._known)
        return None if guide is None else _Guided(guide, prompt_ids, output_ids)

    # -- V2 ----------------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request takes a slot; whether `apply` must be called for it.

        With drafts, it must be for every request: `apply` counts the rows of states that it is given.
        """
        guide = read_guide(sampling_params.extra_args, self._known)
        self._running.pop(req_idx, None)
        if guide is not None:
            self._running[req_idx] = _Guided(guide, None, [])
        return guide is not None or self._speculates

    # -- both --------------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Guide the rows (B, V) of guided requests, in place."""
        states = LATEST.take(len(logits)) if self._running or self._speculates else None
        if ctx is None:
            guided = {row: one.guide for row, one in self._running.items() if row < len(logits)}
        else:
            slots = ctx.expanded_idx_mapping.tolist() if self._running else []
            guided = {row: self._running[slot].guide for row, slot in enumerate(slots) if slot in self._running}
        if not guided:
            return logits
        assert states is not None, "there are guided requests"
        scorers = {name: HeadOnStates(head, states) for name, head in self._heads.items()}
        unscored = guide_rows(logits, guided, scorers, self._padding)
        if unscored and not self._warned:
            self._warned = True
            _logger.warning("a scorer gave scores that are not finite; those tokens were left to the policy")
        return logits
