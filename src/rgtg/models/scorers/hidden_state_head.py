"""Scorers that cost next to nothing: a small head on the frozen policy's own hidden states, and how those are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rgtg.errors import DataError, ModelNotFoundError, TokenizerMismatchError, UsageError
from rgtg.models.loading.device_map import DeviceMap, Placement, resolve_device
from rgtg.models.loading.hub import local_folder
from rgtg.models.loading.policy import Policy, context_length, load_policy, resolve_dtype
from rgtg.models.loading.scorer_info import HEAD_FILE, ScorerInfo, fingerprint_weights, read_info
from rgtg.models.loading.tensor_parallel import TpPlan, broadcast_from_rank0
from rgtg.models.ops.hidden_states import hidden_states_of, require_hidden_states
from rgtg.models.scorers.heads import Head, load_head, score_positions
from rgtg.models.scorers.heads import StateHead as StateHead
from rgtg.models.scorers.heads import VocabularyHead as VocabularyHead
from rgtg.models.scorers.reward_model import ReadsCompletions, require_within_context
from rgtg.tokenization.encoding import tokenizer_hash
from rgtg.tokenization.padding import batches_by_length


class OwnStateScorer(ReadsCompletions):
    """A head and the frozen policy whose states it reads; ``model`` is the policy's own, never a copy.

    ``layer`` counts as transformers' ``hidden_states``: 0 the embeddings, …, ``num_hidden_layers`` the last hidden
    state, after the final norm.
    """

    causal = True

    def __init__(self, policy: Policy, head: Head, info: ScorerInfo, *, name: str = "head") -> None:
        if info.layer is None or info.head == "scalar":
            raise UsageError(f"{name}: its description names no head or no layer; train it: rgtg train --trunk own")
        self.model = policy.model
        self.tokenizer = policy.tokenizer
        self.info = info
        self.name = name
        self.max_length = context_length(policy.model.config)
        self.append_eos = info.append_eos
        self.layer = info.layer
        self.kind: Literal["state", "vocab"] = info.head
        self.head = head.to(policy.model.device).eval().requires_grad_(False)
        require_hidden_states(self.model, [self.layer])

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        *,
        policy: Policy | None = None,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        device_map: DeviceMap | None = None,
        tp_plan: TpPlan | None = None,
    ) -> "OwnStateScorer":
        """Load a head from its folder, onto ``policy`` or the policy that it names.

        The other arguments are of a policy that is loaded (`rgtg.models.loading.policy.load_policy`).

        Raises:
            ModelNotFoundError: no such folder, or its policy cannot be loaded.
            UsageError: no head in the folder, another policy than the one it was trained on, or a place at odds with
                the given policy.
            DataError: files that are damaged.
        """
        info = _require_head(folder)
        head = load_head(Path(local_folder(folder)), info)
        placement = Placement(dtype, device, device_map, tp_plan)
        if policy is None:
            policy = _load_own_policy(folder, info, placement)
        else:
            _require_placed(policy, placement)
        require_same_policy(policy, info, folder)
        return cls(policy, head, info, name=folder)

    @torch.inference_mode()
    def score_prefixes(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[Tensor]:
        """Scores of every prefix y_{1:i}, i = 1 … T, from one pass of the policy over each completion.

        Returns:
            One fp32 CPU tensor of shape (T,) per completion.

        Raises:
            DataError: an empty completion, a text over the context, or (vocabulary head) an empty prompt.
        """
        rows = list(zip(prompt_ids, completion_ids, strict=True))
        require_within_context(rows, self.max_length)
        if self.kind == "vocab" and not all(prompt for prompt, _ in rows):
            raise DataError("a vocabulary head reads the state before a token: the prompt must have one")
        scores: dict[int, Tensor] = {}
        for part, ids, mask in batches_by_length(rows, batch_size, self.model.device):
            states = hidden_states_of(self.model, ids, mask, [self.layer])[self.layer]
            for row, i in enumerate(part):
                window = slice(len(rows[i][0]), len(rows[i][0]) + len(rows[i][1]))
                read = prefix_states(self.kind, states[row : row + 1], window)
                scores[i] = broadcast_from_rank0(
                    self.model, score_positions(self.head, read, ids[row : row + 1, window])[0]
                ).cpu()
        return [scores[i] for i in range(len(rows))]


def prefix_states(kind: str, states: Tensor, completion: slice) -> Tensor:
    """States (B, T, H) at which a completion's prefixes are read: its own tokens, or one earlier (vocabulary head)."""
    back = 1 if kind == "vocab" else 0
    return states[:, completion.start - back : completion.stop - back]


def require_same_policy(policy: Policy, info: ScorerInfo, folder: str) -> None:
    """Refuse a policy other than the one whose states the scorer was trained on.

    Raises:
        UsageError: other weights (the same ones loaded in another dtype are recognised).
        TokenizerMismatchError: another tokenizer.
    """
    found = fingerprint_weights(policy.model)
    if found not in info.base_fingerprints:
        name = getattr(policy.model, "name_or_path", "") or type(policy.model).__name__
        kind = "" if info.head == "scalar" else f" --head {info.head}"
        raise UsageError(
            f"the scorer {folder} was trained on the states of {info.base_model} (weights {info.base_fingerprint}); "
            f"this policy is {name} (weights {found}), whose states mean nothing to it: steer {info.base_model}, or "
            f"train one for this policy (rgtg train --trunk {info.trunk}{kind} --base {name})"
        )
    if tokenizer_hash(policy.tokenizer) != info.tokenizer_hash:
        raise TokenizerMismatchError(
            f"the scorer {folder} was trained with another tokenizer than this policy's; load the policy with the "
            f"tokenizer of {info.base_model}"
        )


def _require_head(folder: str) -> ScorerInfo:
    info = read_info(folder)
    if info is None and (Path(local_folder(folder)) / HEAD_FILE).exists():
        raise UsageError(f"{folder} has no rgtg.json: saving it was interrupted; train the head again")
    if info is None or info.trunk != "own":
        raise UsageError(f"{folder} holds no head on a policy's own states; make one with rgtg train --trunk own")
    return info


def _load_own_policy(folder: str, info: ScorerInfo, placement: Placement) -> Policy:
    try:
        return load_policy(info.base_model, **vars(placement))
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the head {folder} reads the states of {info.base_model}, which cannot be loaded ({error}); name the "
            "policy's new place (--policy, or policy= in Python)"
        ) from error


def _require_placed(policy: Policy, placement: Placement) -> None:
    dtype, device = placement.dtype, placement.device
    wanted = resolve_dtype(dtype)
    if placement.device_map is not None or placement.tp_plan is not None:
        raise UsageError("device_map and tp_plan are of a model of its own; a head is where its policy is")
    if wanted not in ("auto", policy.model.dtype):
        raise UsageError(f"dtype {dtype} is asked of a head whose policy is loaded in {policy.model.dtype}")
    if device is not None and resolve_device(device).type != policy.model.device.type:
        raise UsageError(f"device {device} is asked of a head whose policy is on {policy.model.device}")
