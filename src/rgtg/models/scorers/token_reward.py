"""A language model whose output layer scores every possible next token."""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgtg.errors import UsageError
from rgtg.models.loading.device_map import DeviceMap, Placement, finish_loading, is_on_one_device
from rgtg.models.loading.lora_merge import load_merged
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.pretrained import is_adapter, load_tokenizer, resolve_dtype
from rgtg.models.loading.scorer_info import ScorerInfo, read_info
from rgtg.models.loading.tensor_parallel import TpPlan, broadcast_from_rank0
from rgtg.models.ops.lm_head import final_states, head_is_linear, policy_logits
from rgtg.models.scorers.heads import gathers_rows
from rgtg.models.scorers.token_scorer import TokenScorer

_POSITIONS = 1024  # whose logits over the whole vocabulary are in memory at once


class VocabularyScorer(TokenScorer):
    """A causal language model whose output layer scores next tokens.

    ``objective`` says how. ``farma`` (arXiv 2502.04517) reads the logits as values: r(y_{1:i}) = Q(h_{i−1})[y_i].
    ``autoregressive`` (GenARM, arXiv 2410.08193) sums log-probabilities in nats: r(y_{1:i}) = Σ_{j≤i} log
    π_r(y_j | x, y_{<j}). Any language model can be used in the second way, for example one tuned with DPO.
    """

    reads_previous_state = True

    def __init__(
        self,
        scorer: Policy,
        *,
        info: ScorerInfo | None = None,
        name: str = "vocabulary scorer",
        objective: Literal["farma", "autoregressive"] | None = None,
    ) -> None:
        output = scorer.model.get_output_embeddings()
        if output is None or not hasattr(output, "weight"):
            raise UsageError(f"{name}: {type(scorer.model).__name__} has no output layer over a vocabulary")
        self.model, self.tokenizer = scorer.model, scorer.tokenizer
        self.weight, self.bias = output.weight, getattr(output, "bias", None)
        self.info, self.name = info, name
        self.objective: str = objective or (info.objective if info else "autoregressive")
        self._has_weight = is_on_one_device(scorer.model)  # whether rows of its output layer can be gathered
        self.layer = scorer.model.config.get_text_config().num_hidden_layers
        self.max_length = scorer.max_length
        self.append_eos = info.append_eos if info else True  # a language model ends what it has finished with EOS

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        device_map: DeviceMap | None = None,
        tp_plan: TpPlan | None = None,
    ) -> Self:
        """Load a scorer trained with ``farma`` or ``autoregressive`` (LoRA adapters merged), or any language model.

        A folder without rgtg.json is a language model, which becomes an autoregressive scorer. ``dtype``, ``device``,
        ``device_map`` and ``tp_plan`` are those of `rgtg.models.loading.policy.load_policy`.

        Raises:
            ModelNotFoundError: nothing loadable at ``source``.
            UsageError: a scorer of another kind.
        """
        info = read_info(source)
        if info is not None and (info.trunk, info.head) != ("separate", "vocab"):
            raise UsageError(
                f"{source} was trained with {info.objective} and has a {info.head} head (trunk {info.trunk}), not the "
                "output layer of a language model; load it with load_scorer and without a kind"
            )
        placement = Placement(dtype, device, device_map, tp_plan)
        if not is_adapter(source):
            return cls(load_policy(source, **vars(placement)), info=info, name=source)
        from transformers import AutoModelForCausalLM

        kwargs = {"dtype": resolve_dtype(dtype), **placement.load_kwargs()}
        model = finish_loading(load_merged(AutoModelForCausalLM, source, "scorer", **kwargs), placement)
        return cls(Policy(model, load_tokenizer(source, "scorer")), info=info, name=source)

    def head(
        self, states: Float[Tensor, "batch hidden"], candidate_ids: Int[Tensor, "batch candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        """Scores of candidates after prefixes with these final states, in fp32.

        For an autoregressive scorer they are logits. These differ from log π_r(y_i | y_{<i}) by a term of the prefix
        alone, which cancels among its candidates.
        """
        # A few rows of W are gathered if W is on one device and the logits are W·h alone.
        linear = self._has_weight and head_is_linear(self.model)
        if not linear or not gathers_rows(candidate_ids.shape[1], len(self.weight)):
            return policy_logits(self.model, states).gather(-1, candidate_ids).float()
        rows = torch.nn.functional.embedding(candidate_ids, self.weight)  # (B, K, H)
        scores = (rows @ states[..., None])[..., 0].float()
        return broadcast_from_rank0(self.model, scores if self.bias is None else scores + self.bias[candidate_ids])

    def _score_batch(
        self, ids: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"], windows: Sequence[slice]
    ) -> list[Tensor]:
        states = final_states(self.model, ids, mask)
        return [
            self._next_scores(states[row, window.start - 1 : window.stop - 1], ids[row, window])
            for row, window in enumerate(windows)
        ]

    def _next_scores(
        self, states: Float[Tensor, "length hidden"], ids: Int[Tensor, " length"]
    ) -> Float[Tensor, " length"]:
        """Scores of one completion's prefixes on the CPU, from the state before each token."""
        if self.objective != "autoregressive":
            return self.head(states, ids[:, None])[:, 0].cpu()
        parts = []
        for some, tokens in zip(torch.split(states, _POSITIONS), torch.split(ids, _POSITIONS), strict=True):
            log_probs = policy_logits(self.model, some).float().log_softmax(-1)  # (T, V)
            parts.append(log_probs.gather(-1, tokens[:, None])[:, 0])
        return torch.cat(parts).double().cumsum(0).float().cpu()
