"""A scorer that is a small head on the frozen policy's own hidden states: scoring costs almost nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgtg.errors import ModelNotFoundError, RgtgError, TokenizerMismatchError, UsageError
from rgtg.models.loading.device_map import DeviceMap, Placement, resolve_device
from rgtg.models.loading.hub import local_folder
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.policy_files import describe_policy_files
from rgtg.models.loading.pretrained import resolve_dtype
from rgtg.models.loading.scorer_info import HEAD_FILE, ScorerInfo, fingerprint_weights, read_info
from rgtg.models.loading.tensor_parallel import TpPlan, broadcast_from_rank0
from rgtg.models.ops.hidden_states import hidden_states_of, require_hidden_states
from rgtg.models.scorers.heads import Head, load_head, score_positions
from rgtg.models.scorers.token_scorer import TokenScorer
from rgtg.tokenization.encoding import tokenizer_hash


class OwnStateScorer(TokenScorer):
    """A head on a frozen policy's hidden states.

    Attributes:
        model: the policy's model itself, never a copy.
        layer: whose states the head scores, counted as in `rgtg.models.ops.hidden_states`.
        kind: ``state`` for a head on the candidate's state, ``vocab`` for one that scores every next token.
    """

    info: ScorerInfo

    def __init__(self, policy: Policy, head: Head, info: ScorerInfo, *, name: str = "head") -> None:
        if info.layer is None or info.head == "scalar":
            raise UsageError(f"{name}: its description names no head or no layer; train it: rgtg train --trunk own")
        self.model = policy.model
        self.tokenizer = policy.tokenizer
        self.info = info
        self.name = name
        self.max_length = policy.max_length
        self.append_eos = info.append_eos
        self.layer = info.layer
        self.kind: Literal["state", "vocab"] = info.head
        self.reads_previous_state = self.kind == "vocab"
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
        """Load a head from its folder, for ``policy`` or for the policy that its description names.

        The other arguments are those of `rgtg.models.loading.policy.load_policy`, for a policy that is loaded here.

        Raises:
            ModelNotFoundError: no such folder, or its policy cannot be loaded.
            UsageError: no head in the folder, another policy than the one it was trained on, or a dtype or device other
                than that of ``policy``.
            DataError: damaged files.
        """
        info = _read_head_info(folder)
        head = load_head(Path(local_folder(folder)), info)
        placement = Placement(dtype, device, device_map, tp_plan)
        if policy is None:
            policy = _load_named_policy(folder, info, placement)
        else:
            _require_placement(policy, placement)
        require_same_policy(policy, info, folder)
        return cls(policy, head, info, name=folder)

    def _score_batch(
        self, ids: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"], windows: Sequence[slice]
    ) -> list[Tensor]:
        states = hidden_states_of(self.model, ids, mask, [self.layer])[self.layer]  # (B, T, H)
        scores = []
        for row, window in enumerate(windows):
            read = prefix_states(self.kind, states[row : row + 1], window)
            found = score_positions(self.head, read, ids[row : row + 1, window])[0]
            scores.append(broadcast_from_rank0(self.model, found).cpu())
        return scores


def prefix_states(
    kind: str, states: Float[Tensor, "batch length hidden"], completion: slice
) -> Float[Tensor, "batch completion hidden"]:
    """The states that a head scores for a completion's prefixes: at its tokens, or one earlier for a ``vocab`` head."""
    back = 1 if kind == "vocab" else 0
    return states[:, completion.start - back : completion.stop - back]


def require_same_policy(policy: Policy, info: ScorerInfo, folder: str) -> None:
    """Check that a policy is the one on whose hidden states the scorer was trained.

    Raises:
        UsageError: other weights; the same weights in another dtype are accepted.
        TokenizerMismatchError: another tokenizer.
    """
    found = fingerprint_weights(policy.model)
    known = info.base_fingerprints | info.policy_file_fingerprints  # an engine's is that of its files
    if found not in known and not (info.policy_file_fingerprints and file_fingerprints(policy) & known):
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


def file_fingerprints(policy: Policy) -> set[str]:
    """Fingerprints of the files that a policy was loaded from; none if they are not there any more.

    A head that another engine's states trained knows its policy by them.
    """
    try:
        files = describe_policy_files(policy.model.name_or_path)
    except (AttributeError, RgtgError):
        return set()
    return {files.fingerprint, *files.casts.values()}


def _read_head_info(folder: str) -> ScorerInfo:
    info = read_info(folder)
    if info is None and (Path(local_folder(folder)) / HEAD_FILE).exists():
        raise UsageError(f"{folder} has no rgtg.json: saving it was interrupted; train the head again")
    if info is None or info.trunk != "own":
        raise UsageError(f"{folder} holds no head on a policy's own states; make one with rgtg train --trunk own")
    return info


def _load_named_policy(folder: str, info: ScorerInfo, placement: Placement) -> Policy:
    try:
        return load_policy(info.base_model, **vars(placement))
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the head {folder} needs the policy {info.base_model}, which cannot be loaded ({error}); say where the "
            "policy is now (--policy, or policy= in Python)"
        ) from error


def _require_placement(policy: Policy, placement: Placement) -> None:
    """Raise an error if a head is asked to have another dtype or device than its loaded policy."""
    dtype, device = placement.dtype, placement.device
    if placement.device_map is not None or placement.tp_plan is not None:
        raise UsageError("device_map and tp_plan apply to a model of its own; a head is where its policy is")
    if resolve_dtype(dtype) not in ("auto", policy.model.dtype):
        raise UsageError(f"a head cannot have dtype {dtype}: its policy is loaded in {policy.model.dtype}")
    if device is not None and resolve_device(device).type != policy.model.device.type:
        raise UsageError(f"a head cannot be on device {device}: its policy is on {policy.model.device}")
