"""A scorer that says of every next token at once how good it is: one row of one token through a model of its own."""

from collections.abc import Sequence
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgtg.errors import DataError, UsageError
from rgtg.models.loading.device_map import DeviceMap, Placement, finish_loading, is_on_one_device
from rgtg.models.loading.lora_merge import is_adapter, load_merged
from rgtg.models.loading.policy import Policy, context_length, load_policy, load_tokenizer, resolve_dtype
from rgtg.models.loading.scorer_info import ScorerInfo, read_info
from rgtg.models.loading.tensor_parallel import TpPlan, broadcast_from_rank0
from rgtg.models.ops.lm_head import head_is_linear, policy_logits
from rgtg.models.scorers.heads import MANY
from rgtg.models.scorers.reward_model import ReadsCompletions, require_within_context
from rgtg.tokenization.padding import batches_by_length

TOKENS = 1024  # positions whose logits over the whole vocabulary are held at once


class VocabularyScorer(ReadsCompletions):
    """A causal language model whose output layer scores next tokens.

    ``objective`` says how: ``farma`` (arXiv 2502.04517) reads its logits as values, r(y_{1:i}) = Q(h_{i−1})[y_i];
    ``autoregressive`` (GenARM, arXiv 2410.08193) reads its log-probabilities in nats, r(y_{1:i}) = Σ_{j≤i} log
    π_r(y_j | x, y_{<j}). Any language model can be read the second way, one that DPO has tuned for example.
    """

    causal = True

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
        self.gathers = is_on_one_device(scorer.model)  # whether rows of its output layer can be read
        self.layer = scorer.model.config.get_text_config().num_hidden_layers
        self.max_length = context_length(scorer.model.config)
        self.append_eos = info.append_eos if info else True  # a language model closes what it has finished

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

        A folder without rgtg.json is a language model, and is read as an autoregressive scorer. ``dtype``, ``device``,
        ``device_map`` and ``tp_plan`` as of `rgtg.models.loading.policy.load_policy`.

        Raises:
            ModelNotFoundError: nothing loadable at ``source``.
            UsageError: a scorer of another kind.
        """
        info = read_info(source)
        if info is not None and (info.trunk, info.head) != ("separate", "vocab"):
            raise UsageError(
                f"{source} was trained with {info.objective} and has a {info.head} head (trunk {info.trunk}): it is no "
                "language model that scores next tokens; load it with load_scorer and without a kind"
            )
        return cls(load_language_model(source, Placement(dtype, device, device_map, tp_plan)), info=info, name=source)

    def head(
        self, states: Float[Tensor, "batch hidden"], candidate_ids: Int[Tensor, "batch candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        """Scores, fp32, of candidates after prefixes with these final states; of a few, only their rows of W are read.

        For an autoregressive scorer they are logits, which differ from log π_r(y_i | y_{<i}) by a term of the prefix
        alone: it cancels among the candidates.
        """
        # weights elsewhere, a cap or a scale on the logits; or so many that gathering their rows would copy most of W
        gathers = self.gathers and head_is_linear(self.model)
        if not gathers or candidate_ids.shape[1] > len(self.weight) // MANY:
            return policy_logits(self.model, states).gather(-1, candidate_ids).float()
        rows = torch.nn.functional.embedding(candidate_ids, self.weight)  # (B, K, H)
        scores = (rows @ states[..., None])[..., 0].float()
        return broadcast_from_rank0(self.model, scores if self.bias is None else scores + self.bias[candidate_ids])

    @torch.inference_mode()
    def score_prefixes(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[Tensor]:
        """Scores of every prefix y_{1:i}, i = 1 … T, from one pass over each completion.

        Returns:
            One fp32 CPU tensor of shape (T,) per completion.

        Raises:
            DataError: an empty completion, an empty prompt, or a text over the context.
        """
        rows = list(zip(prompt_ids, completion_ids, strict=True))
        require_within_context(rows, self.max_length)
        if not all(prompt for prompt, _ in rows):
            raise DataError(f"{self.name} reads the state before a token: the prompt must have one")
        scores: dict[int, Tensor] = {}
        for part, ids, mask in batches_by_length(rows, batch_size, self.model.device):
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
            states = self.model.base_model(
                ids, attention_mask=mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state
            for row, i in enumerate(part):
                first, total = len(rows[i][0]), len(rows[i][0]) + len(rows[i][1])
                scores[i] = self._next_scores(states[row, first - 1 : total - 1], ids[row, first:total])
        return [scores[i] for i in range(len(rows))]

    def _next_scores(self, states: Float[Tensor, "length hidden"], ids: Int[Tensor, " length"]) -> Tensor:
        """Scores (T,) of one completion's prefixes, from the state before each token."""
        if self.objective != "autoregressive":
            return self.head(states, ids[:, None])[:, 0].cpu()
        parts = []
        for some, tokens in zip(torch.split(states, TOKENS), torch.split(ids, TOKENS), strict=True):
            log_probs = policy_logits(self.model, some).float().log_softmax(-1)  # (T, V)
            parts.append(log_probs.gather(-1, tokens[:, None])[:, 0])
        return torch.cat(parts).double().cumsum(0).float().cpu()


def load_language_model(source: str, placement: Placement) -> Policy:
    """A causal language model and its tokenizer; a LoRA adapter is merged into its base.

    Raises:
        ModelNotFoundError: nothing loadable at ``source``.
    """
    if not is_adapter(source):
        return load_policy(source, **vars(placement))
    from transformers import AutoModelForCausalLM

    where = placement.arguments()
    model = load_merged(AutoModelForCausalLM, source, "scorer", dtype=resolve_dtype(placement.dtype), **where)
    return Policy(finish_loading(model, placement), load_tokenizer(source, "scorer"))
