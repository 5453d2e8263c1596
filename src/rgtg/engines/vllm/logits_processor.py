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
from rgtg.engines.vllm.guide import HeadOnStates, RowScorer, guide_rows
from rgtg.engines.vllm.loading import load_heads, load_separate, padding_ids, require_engine
from rgtg.engines.vllm.scorer_file import scorers_of_server
from rgtg.engines.vllm.states import LATEST

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2
except ImportError:  # a vLLM without the second model runner
    LogitsProcessorV2 = object

_logger = logging.getLogger("vllm.rgtg")  # shown by vLLM's own logging


_REPORT_STEPS = 256
_Texts = dict[int, list[int] | None]


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
        self._device = torch.device(device_or_states if self._first_version else device_or_states.device)
        self._known = {name: one.scores_vocabulary for name, one in scorers_of_server().items()}
        self._heads = load_heads(vllm_config, self._device)
        self._separate = load_separate(vllm_config, self._device)
        self._requests: Any = device_or_states  # V2: their tokens
        self._padding = padding_ids(vllm_config.model_config, self._device)
        self._speculates = vllm_config.speculative_config is not None
        self._running: dict[int, _Guided] = {}  # by row (V1) or slot (V2)
        self._unscored: torch.Tensor | None = None  # whether any token was left to the policy, on the device
        self._steps = 0

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
        # 1. the states of these rows; without guided requests only counted
        states: Any = LATEST.take(len(logits)) if self._running or self._speculates else None
        guided, texts = self._rows(len(logits)) if ctx is None else self._rows_of_slots(ctx)
        if not guided:
            return logits
        # 2. what scores them
        scorers: dict[str, RowScorer] = {name: HeadOnStates(head, states) for name, head in self._heads.items()}
        if self._separate:
            from rgtg.engines.vllm.separate import SeparateOnRows

            scorers |= {name: SeparateOnRows(scorer, texts) for name, scorer in self._separate.items()}
        # 3. their logits
        self._report(guide_rows(logits, guided, scorers, self._padding).any())
        return logits

    def _report(self, unscored: torch.Tensor) -> None:
        """Warn of tokens that were left to the policy; the device is asked rarely, since asking waits for it."""
        self._steps += 1
        self._unscored = unscored if self._unscored is None else self._unscored | unscored
        if (self._device.type == "cpu" or self._steps % _REPORT_STEPS == 0) and bool(self._unscored):
            self._unscored = None
            _logger.warning("a scorer gave scores that are not finite: tokens were left to the policy")

    def _rows(self, rows: int) -> tuple[dict[int, Guide], _Texts]:
        """V1's guided rows, and the tokens of those that a model of its own scores.

        They are not known where a prompt was given as embeddings.
        """
        running = {row: one for row, one in self._running.items() if row < rows}
        texts: _Texts = {
            row: None if one.prompt_ids is None else [*one.prompt_ids, *one.output_ids]
            for row, one in running.items()
            if self._needs_text(one.guide)
        }
        return {row: one.guide for row, one in running.items()}, texts

    def _rows_of_slots(self, ctx: Any) -> tuple[dict[int, Guide], _Texts]:
        """V2's guided rows, and the tokens, up to the step's position, of those that a model of its own scores."""
        guided: dict[int, Guide] = {}
        texts: _Texts = {}
        if not self._running:
            return guided, texts
        slots = (ctx.expanded_idx_mapping if self._speculates else ctx.idx_mapping_np).tolist()  # the latter: no wait
        for row, slot in enumerate(slots):
            if slot not in self._running:
                continue
            guide = self._running[slot].guide
            if self._needs_text(guide):
                end = int(ctx.pos[row]) + 1
                if end < int(self._requests.prefill_len.np[slot]):
                    continue  # its prompt is being read: nothing is drawn
                texts[row] = self._requests.all_token_ids.gpu[slot, :end].tolist()
            guided[row] = guide
        return guided, texts

    def _needs_text(self, guide: Guide) -> bool:
        return any(name in self._separate for name in guide.scorers)
