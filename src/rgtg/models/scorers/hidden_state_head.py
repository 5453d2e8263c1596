"""Scorers that cost next to nothing: a small head on the frozen policy's own hidden states, and how those are read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rgtg.errors import DataError, ModelNotFoundError, TokenizerMismatchError, UsageError
from rgtg.models.loading.device_map import DeviceMap, Placement, resolve_device
from rgtg.models.loading.hub import local_folder
from rgtg.models.loading.policy import Policy, context_length, load_policy, resolve_dtype
from rgtg.models.loading.scorer_info import HEAD_FILE, ScorerInfo, fingerprint_weights, read_info
from rgtg.models.loading.tensor_parallel import TpPlan, agreed
from rgtg.models.scorers.heads import Head, load_head, score_positions
from rgtg.models.scorers.heads import StateHead as StateHead
from rgtg.models.scorers.heads import VocabularyHead as VocabularyHead
from rgtg.models.scorers.reward_model import ReadsCompletions, batches_by_length, require_fit
from rgtg.tokenization.encoding import tokenizer_hash

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")
_EMBEDDINGS = ("drop", "emb_dropout", "embed_dropout")  # what adds positions to the token embeddings


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
        require_observable(self.model, [self.layer])

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
        require_fit(rows, self.max_length)
        if self.kind == "vocab" and not all(prompt for prompt, _ in rows):
            raise DataError("a vocabulary head reads the state before a token: the prompt must have one")
        scores: dict[int, Tensor] = {}
        for part, ids, mask in batches_by_length(rows, batch_size, self.model.device):
            states = read_states(self.model, ids, mask, [self.layer])[self.layer]
            for row, i in enumerate(part):
                window = slice(len(rows[i][0]), len(rows[i][0]) + len(rows[i][1]))
                read = positions_of(self.kind, states[row : row + 1], window)
                scores[i] = agreed(self.model, score_positions(self.head, read, ids[row : row + 1, window])[0]).cpu()
        return [scores[i] for i in range(len(rows))]


def positions_of(kind: str, states: Tensor, completion: slice) -> Tensor:
    """States (B, T, H) at which a completion's prefixes are read: its own tokens, or one earlier (vocabulary head)."""
    back = 1 if kind == "vocab" else 0
    return states[:, completion.start - back : completion.stop - back]


def observed(model: Any, layer: int) -> nn.Module:
    """The module of a causal LM whose forward output (or its first element) is ``hidden_states[layer]``.

    Raises:
        UsageError: a layer that the model has not, or a model built in a way that is not known here.
    """
    owner, layers = _stack(model)
    if not 0 <= layer <= len(layers):
        raise UsageError(f"layer {layer} is not one of this model's: 0 (embeddings) to {len(layers)} (final state)")
    if layer == len(layers):  # where no norm is known, the trunk itself: its first output is the final state
        return _child(owner, _FINAL_NORMS) or _module(model.base_model)
    if layer == 0:
        return _child(owner, _EMBEDDINGS) or _module(model.get_input_embeddings())
    return layers[layer - 1]


@contextmanager
def watching(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While the block runs, each forward leaves its states (B, T, H) of these layers in the dictionary; no others."""
    seen: dict[int, Tensor] = {}
    home = model.device  # a layer may be elsewhere

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            seen[layer] = states.to(home)

        return hook

    handles = [observed(model, layer).register_forward_hook(keep(layer)) for layer in dict.fromkeys(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def read_states(
    model: Any, input_ids: Int[Tensor, "batch length"], attention_mask: Int[Tensor, "batch length"], layers: list[int]
) -> dict[int, Tensor]:
    """Hidden states (B, T, H) of the layers asked for, in one pass of the trunk: the language-model head is not run.

    Positions are counted from the mask, so padding may be on either side; states at padding are meaningless.
    """
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with watching(model, layers) as seen:
        model.base_model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    return dict(seen)


@torch.no_grad()
def require_observable(model: Any, layers: Sequence[int]) -> None:
    """Try on three tokens that `observed` finds what transformers calls these hidden states.

    That is what the next decoder layer is given, or the trunk returns. (Asking for ``output_hidden_states`` would leave
    transformers' hooks on every layer for good.)

    Raises:
        UsageError: it finds something else (a layer 0 that no module gives, or an unknown kind of model).
    """
    ids = torch.arange(3, device=model.device)[None] % model.config.get_text_config().vocab_size
    stack = _stack(model)[1]
    given: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            given[layer] = inputs[0] if inputs else named["hidden_states"]

        return hook

    handles = [module.register_forward_pre_hook(keep(i), with_kwargs=True) for i, module in enumerate(stack)]
    try:
        with watching(model, layers) as seen:
            given[len(stack)] = model.base_model(ids, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        if not _same(seen.get(layer), given.get(layer)):
            raise UsageError(
                f"layer {layer} of {type(model).__name__} cannot be observed: no module gives that state; use another "
                f"layer (the final state is layer {len(stack)})"
            )


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


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


def _stack(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder layers, and the module that owns them."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise UsageError(f"{type(model).__name__} has no list of {count} layers; its states cannot be observed")


def _module(found: nn.Module) -> nn.Module:
    return found


def _child(owner: nn.Module, names: Sequence[str]) -> nn.Module | None:
    found = (getattr(owner, name, None) for name in names)
    return next((module for module in found if isinstance(module, nn.Module)), None)
