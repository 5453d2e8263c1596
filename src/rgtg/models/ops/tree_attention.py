"""Tree attention: which models take a 4-D mask, and several completions of one prompt packed in one row.

The columns of a packed row are the prompt, the tokens with which all its completions begin, and then the rest of each
completion in turn, so that one forward pass reads the prompt once. A completion attends to the shared columns and to
itself, at the positions it has in a row of its own, so its states are those of a row of its own.

Tokens with which all rows begin, such as a system message, are read once for all passes: a `SharedPrefix` holds their
keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from rgtg.models.loading.engine_model import ReadableModel
from rgtg.models.ops.attention import SINGLE_QUERY_ATTENTION
from rgtg.models.ops.hidden_states import capture_hidden_states
from rgtg.models.ops.lm_head import trunk

_MASKED_LAYERS = {"full_attention", "sliding_attention"}
SHARED, PADDING = 0, -1  # parts of a row; the rest of completion c is part c + 1
_reads_packed: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
_reads_prefix: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


@dataclass(frozen=True)
class PackedRow:
    """A prompt and its completions in one row of L columns.

    Attributes:
        ids: (L,) tokens.
        positions: (L,) position of each token in a row of its own completion.
        parts: (L,) ``SHARED``, or c + 1 for a token of completion c alone.
        columns: for each completion, the columns (P + T,) of its prompt and of its tokens.
    """

    ids: Int[Tensor, " length"]
    positions: Int[Tensor, " length"]
    parts: Int[Tensor, " length"]
    columns: list[Int[Tensor, " tokens"]]


def pack_row(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> PackedRow:
    """Pack completions of one prompt.

    Example:
        >>> row = pack_row([5, 6], [[7, 8], [7, 9, 2]])
        >>> row.ids.tolist(), row.positions.tolist(), row.parts.tolist()
        ([5, 6, 7, 8, 9, 2], [0, 1, 2, 3, 3, 4], [0, 0, 0, 1, 2, 2])
        >>> [columns.tolist() for columns in row.columns]
        [[0, 1, 2, 3], [0, 1, 2, 4, 5]]
    """
    common = shared_length(completions)
    shared = [*prompt, *completions[0][:common]]
    ids, positions, parts, columns = list(shared), list(range(len(shared))), [SHARED] * len(shared), []
    for part, completion in enumerate(completions, start=1):
        own = completion[common:]
        columns.append(torch.tensor([*range(len(shared)), *range(len(ids), len(ids) + len(own))]))
        ids += own
        positions += range(len(shared), len(shared) + len(own))
        parts += [part] * len(own)
    return PackedRow(torch.tensor(ids), torch.tensor(positions), torch.tensor(parts), columns)


def shared_length(texts: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all texts begin.

    Example:
        >>> shared_length([[5, 6, 7], [5, 6], [5, 6, 8]])
        2
    """
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False)))


class SharedPrefix(DynamicCache):  # type: ignore[misc]
    """Keys and values of the N tokens with which every row begins. Passes read them and add nothing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer: the first pass fills it, later ones append theirs to a copy."""
        if layer_idx >= len(self.layers):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]
        layer, rows = self.layers[layer_idx], len(key_states)
        keys, values = (held.expand(rows, -1, -1, -1) for held in (layer.keys, layer.values))
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


@torch.no_grad()
def read_prefix(model: Any, tokens: Sequence[int]) -> SharedPrefix:
    """Read the tokens with which every row begins."""
    prefix = SharedPrefix()
    trunk(model)(torch.tensor([list(tokens)], device=model.device), past_key_values=prefix, use_cache=True)
    return prefix


def packed_inputs(model: Any, rows: Sequence[PackedRow], prefix: SharedPrefix | None = None) -> dict[str, Any]:
    """The keyword arguments with which a model reads packed rows, padded on the right, on its device.

    Args:
        model: that reads them.
        rows: without the tokens of ``prefix``.
        prefix: the tokens before every row, if they were read.
    """
    ids = pad_sequence([row.ids for row in rows], batch_first=True)  # (B, L)
    positions = pad_sequence([row.positions for row in rows], batch_first=True)
    parts = pad_sequence([row.parts for row in rows], batch_first=True, padding_value=PADDING)
    device, before = model.device, prefix.get_seq_length() if prefix is not None else 0
    return {
        "input_ids": ids.to(device),
        "position_ids": (positions + before).to(device),
        "attention_mask": attention_masks(model, positions.to(device), parts.to(device), before),
        "use_cache": prefix is not None,
    } | ({"past_key_values": prefix} if prefix is not None else {})


@torch.no_grad()
def packed_states_of(
    model: Any, rows: Sequence[PackedRow], layers: Sequence[int], prefix: SharedPrefix | None = None
) -> dict[int, Tensor]:
    """Hidden states (B, L, H) of several layers, in one pass of the trunk over packed rows; see `packed_inputs`."""
    if isinstance(model, ReadableModel):
        return model.packed_states([(row.ids, row.positions, row.parts) for row in rows], layers)
    with capture_hidden_states(model, layers) as states:
        trunk(model)(**packed_inputs(model, rows, prefix))
    return dict(states)


def attention_masks(
    model: Any, positions: Int[Tensor, "batch length"], parts: Int[Tensor, "batch length"], before: int = 0
) -> Tensor | dict[str, Tensor]:
    """The 4-D mask (B, 1, L, N + L) of packed rows, or one for each kind of attention layer if there are several.

    Masks are booleans for ``sdpa``, which converts them in any dtype (autocast included), and additive for ``eager``.

    Args:
        model: that reads the rows.
        positions: as in `PackedRow`.
        parts: as in `PackedRow`, ``PADDING`` at padding.
        before: tokens N of a shared prefix before every row.
    """
    masks = {}
    for kind, window in mask_windows(model.config).items():
        masks[kind] = visible_tokens(positions, parts, window, before)[:, None]
        if model.config._attn_implementation == "eager":
            hidden = ~masks[kind]
            masks[kind] = torch.zeros(hidden.shape, dtype=model.dtype, device=hidden.device)
            masks[kind].masked_fill_(hidden, torch.finfo(model.dtype).min)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def visible_tokens(
    positions: Int[Tensor, "batch length"], parts: Int[Tensor, "batch length"], window: int | None, before: int = 0
) -> Bool[Tensor, "batch length columns"]:
    """``[b, i, j]``: token i attends to token j, that is j is not later, and is shared or of the same completion.

    Padding attends to padding, so that no row of the mask is empty.

    Args:
        positions: of each token.
        parts: as in `PackedRow`, ``PADDING`` at padding.
        window: of sliding attention, in tokens; None attends to everything.
        before: tokens N of a shared prefix, which are the first columns; ``positions`` count from its end.
    """
    length = parts.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=parts.device).tril()
    visible = earlier & ((parts[:, None] == SHARED) | (parts[:, None] == parts[..., None]))
    if window is not None:
        near = positions[..., None] - positions[:, None] < window
        visible &= near | torch.eye(length, dtype=torch.bool, device=parts.device)
    if before:
        distance = positions[..., None] - torch.arange(-before, 0, device=parts.device)  # (B, L, N)
        near = distance < window if window is not None else torch.ones_like(distance, dtype=torch.bool)
        visible = torch.cat([near, visible], -1)
    return visible


def packing_pays(hidden: int, prompt: int, completions: Sequence[int]) -> bool:
    """Whether packing saves more multiplications than it adds.

    A token that is not read again saves about 12·H² per layer. A packed row attends with a mask, which computes all L²
    pairs of its tokens, where causal attention computes half of a plain row's; a pair costs about 2·H.

    Args:
        hidden: size H of the model.
        prompt: tokens of the shared prompt.
        completions: tokens of each completion.

    Example:
        >>> packing_pays(576, 145, [50, 50]), packing_pays(576, 20, [1000, 1000])
        (True, False)
    """
    packed = (prompt + sum(completions)) ** 2
    plain = sum((prompt + completion) ** 2 for completion in completions) / 2
    return 6 * hidden * prompt * (len(completions) - 1) > packed - plain


def prefix_pays(hidden: int, prefix: int, rows: Sequence[int]) -> bool:
    """Whether reading a shared prefix once saves more multiplications than the masks of rows of their own add.

    See `packing_pays`; rows of several completions have masks anyway and always save.

    Args:
        hidden: size H of the model.
        prefix: tokens of the prefix.
        rows: tokens of each row after it.

    Example:
        >>> prefix_pays(576, 24, [180] * 9), prefix_pays(576, 24, [1000] * 9)
        (True, False)
    """
    masked = sum(row * (row + prefix) for row in rows)
    plain = sum((row + prefix) ** 2 for row in rows) / 2
    return 6 * hidden * prefix * (len(rows) - 1) > masked - plain


def groups_by_length(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Rows of similar length together, so that a batch of each group has at most ``limit`` tokens with its padding.

    A row that is longer than ``limit`` is a group of its own; without a limit all rows are one, in their order.

    Example:
        >>> groups_by_length([9, 2, 8, 3], 18), groups_by_length([9, 2, 8, 3], None)
        ([[1, 3], [2, 0]], [[0, 1, 2, 3]])
    """
    if limit is None:
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[i] <= limit:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def reads_packed_rows(model: Any) -> bool:
    """Whether a model reads packed rows exactly: known kinds of layers, and a probe that agrees with plain rows.

    The rule is that of token trees in decoding. Other models (linear attention, attention biases that are built from
    2-D masks) read every completion in a row of its own, and so do models that were loaded with flash attention.
    """
    if isinstance(model, ReadableModel):
        return True
    if model not in _reads_packed:
        _reads_packed[model] = takes_any_mask(model) and has_maskable_layers(model) and _probe_agrees(model)
    return _reads_packed[model]


def reads_shared_prefix(model: Any) -> bool:
    """Whether a model reads packed rows after a `SharedPrefix` exactly.

    Models whose rotary embeddings depend on the length of a text (dynamic, longrope) do not.
    """
    if isinstance(model, ReadableModel) or not reads_packed_rows(model):
        return False
    if model not in _reads_prefix:
        _reads_prefix[model] = not _rotates_by_length(model.config) and _probe_agrees(model, before=3)
    return _reads_prefix[model]


def _rotates_by_length(config: Any) -> bool:
    """Whether keys of the same token and position differ between short and long texts."""
    return "longrope" in (said := repr(getattr(config.get_text_config(), "rope_parameters", None))) or "dynamic" in said


@torch.inference_mode()
def _probe_agrees(model: Any, before: int = 0) -> bool:
    """Compare final states of two packed rows with those of plain rows: a model that misreads the mask differs.

    Args:
        model: to be checked.
        before: tokens of a shared prefix before the rows.
    """
    training = model.training
    model.eval()  # no dropout
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [(7 * i + 3) % vocabulary for i in range(12)]
    texts = [(ids[:4], [ids[4:7], ids[6:11]]), (ids[2:4], [ids[7:9], ids[7:8] + ids[1:3]])]
    rows, first = [pack_row(*text) for text in texts], ids[9 : 9 + before]
    try:
        prefix = read_prefix(model, first) if before else None
        packed = trunk(model)(**packed_inputs(model, rows, prefix)).last_hidden_state
        whole = [torch.tensor([*first, *prompt, *ends], device=model.device) for prompt, both in texts for ends in both]
        plain = [trunk(model)(text[None], use_cache=False).last_hidden_state[0, before:] for text in whole]
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError, LookupError):
        return False
    finally:
        model.train(training)
    found = torch.cat([packed[b, columns] for b, row in enumerate(rows) for columns in row.columns]).float()
    return probe_agrees(found, torch.cat(plain).float(), packed.dtype)


def mask_windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention layers, each with its sliding window in tokens (None attends to everything)."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def takes_any_mask(model: Any) -> bool:
    """Whether a model's attention is computed by a function that takes any mask."""
    return model.config._attn_implementation in ("sdpa", "eager", SINGLE_QUERY_ATTENTION)


def has_maskable_layers(model: Any) -> bool:
    """Whether all layers are attention of a known kind, computed by a function that takes any mask.

    Flash and flex attention take none; such a model is set to ``sdpa``.
    """
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or _MASKED_LAYERS)
    if getattr(model.config, "is_encoder_decoder", False) or not kinds <= _MASKED_LAYERS:
        return False
    if getattr(model, "_is_stateful", False) or not hasattr(text, "num_hidden_layers"):
        return False
    if not takes_any_mask(model):
        try:
            model.set_attn_implementation("sdpa")
        except (ValueError, ImportError, AttributeError):
            return False
    return True


def probe_agrees(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether outputs of a masked pass are those of plain passes: a model that ignores or misreads the mask differs.

    Args:
        found: of the masked pass, in fp32.
        expected: the same of plain passes.
        dtype: that the model computes in.
    """
    if not bool(expected.isfinite().all()):
        return True  # a broken model is no reason to read it slowly; what is not finite is refused later
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    scale = expected.abs().max().clamp(min=1e-3)
    return bool((found - expected).abs().max() <= tolerance * scale)
