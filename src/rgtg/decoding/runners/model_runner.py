"""Run a causal model over its cached prefix: read a prompt, read a tree, keep one path."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rgtg.decoding.runners.kv_cache import TreeCache
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.models.loading.device_map import has_device_map
from rgtg.models.ops.attention import SINGLE_QUERY_ATTENTION
from rgtg.models.ops.hidden_states import capture_hidden_states
from rgtg.models.ops.lm_head import trunk
from rgtg.tokenization.padding import pad_right

# readout(model, states (…, H)) → one vector or scalar per state
Readout = Callable[[Any, Tensor], Tensor]

_MASKED_LAYERS = {"full_attention", "sliding_attention"}
# Wider trees (prompts) are read once: their mask is not kept for the next pass.
_KEPT_PATTERN = 1024


class Runner(Protocol):
    """What decoding needs of a model: each row's prefix is read once, then trees over it.

    ``seen`` holds the states of the observed layer at what was read last (None where no layer is observed).
    """

    model: Any
    readout: Readout
    seen: Tensor | None

    @property
    def calls(self) -> int:
        """Passes of the model so far, the prompts' included."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; return the final states at each one's last token, (B, H)."""
        ...

    def states(self, tree: TokenTree) -> Tensor:
        """Final states at every node, (B, N, H); nothing is kept."""
        ...

    def keep(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Keep the path ``nodes[b, :counts[b]]`` of the tree that was read last, from the prefix down; (B, D)."""
        ...

    def forget(self, counts: Sequence[int]) -> None:
        """Forget the last ``counts[b]`` kept tokens of row b."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        ...

    @property
    def batch(self) -> int:
        """Rows that it holds."""
        ...

    def start(self, rows: int) -> None:
        """Begin anew with so many empty rows."""
        ...

    def join(self, other: Any) -> None:
        """Append the rows of another runner of the same model and kind."""
        ...


def read(runner: Runner, tree: TokenTree) -> Tensor:
    """The runner's readout at every node, (B, N, …)."""
    return runner.readout(runner.model, runner.states(tree))


def read_next(runner: Runner, tokens: Tensor) -> Tensor:
    """Read one token per row, ``tokens`` (B, 1), and keep it; return the final states at it, (B, H)."""
    states = runner.states(TokenTree.chain(tokens))[:, 0]
    runner.keep(torch.zeros(len(states), 1, dtype=torch.long))
    return states


class TreeRunner:
    """Reads trees over one preallocated cache; the prefix is stored once whatever the number of nodes.

    Row b's prefix lies in the first ``cache.lengths[b]`` columns, and the nodes behind it.
    """

    def __init__(self, model: Any, readout: Readout, capacity: int, *, layer: int | None = None) -> None:
        text = model.config.get_text_config()
        self.model, self.readout = model, readout
        self.trunk = trunk(model)
        self.device = model.device
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.cache = TreeCache(text.num_hidden_layers, capacity, spread=has_device_map(model))
        self.windows = mask_windows(model.config)
        self.layer = layer
        self.grows = False  # whether a pass that needs more columns makes room for them
        self.read_ahead: tuple[list[list[int]], Tensor] | None = None  # prompts that `prefill` finds read, and states
        self.seen: Tensor | None = None
        self.calls = 0
        self._patterns: dict[tuple[int, ...], Tensor] = {}

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; return the final states at each one's last token, (B, H)."""
        ahead, self.read_ahead = self.read_ahead, None
        if ahead is not None and ahead[0] == [list(p) for p in prompts]:
            return ahead[1]
        lengths = [len(p) for p in prompts]
        ids, _ = pad_right(prompts, 0, self.device)  # what lies beyond a prompt is overwritten by its first nodes
        self.cache.start(len(prompts))
        states = self.states(TokenTree.chain(ids))
        self.cache.keep_first(lengths)
        rows, last = torch.arange(len(prompts)), torch.tensor(lengths) - 1
        if self.seen is not None:
            self.seen = self.seen[rows, last][:, None]
        return states[rows, last]

    def states(self, tree: TokenTree) -> Tensor:
        """Final states at every node, (B, N, H); nothing is kept."""
        positions = torch.tensor(self.cache.lengths)[:, None] + tree.depths  # (B, N): behind the prefix, by depth
        return self.forward(tree.tokens, positions, lambda window: self._mask(tree, window))

    def forward(self, ids: Tensor, positions: Tensor, mask: Callable[[int | None], Tensor]) -> Tensor:
        """Final states (B, N, H) of nodes written behind the prefixes.

        Args:
            ids: (B, N).
            positions: (B, N).
            mask: for a sliding window (or None), the columns that each node sees: booleans (B, N, columns), or an
                additive mask (B, 1, N, columns) that is ready.
        """
        self.calls += 1
        if self.grows:
            self.reserve(self.cache.longest + ids.shape[1])
        masks = {kind: self._ready(mask(window)) for kind, window in self.windows.items()}
        inputs = {
            "input_ids": ids.to(self.device),
            "position_ids": positions.to(self.device, non_blocking=True),
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if self.layer is None:
            return self.trunk(**inputs).last_hidden_state  # type: ignore[no-any-return]
        with capture_hidden_states(self.model, [self.layer]) as seen:
            final: Tensor = self.trunk(**inputs).last_hidden_state
        self.seen = seen[self.layer]
        return final

    def reserve(self, columns: int) -> None:
        """Make room for prefixes and nodes of so many tokens together."""
        if columns > self.cache.capacity:
            self.cache.grow(columns)
            self._patterns.clear()  # they are as wide as the cache

    def keep(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Keep the path ``nodes[b, :counts[b]]`` of the tree that was read last, from the prefix down; (B, D)."""
        self.cache.keep_path(nodes, counts)

    def forget(self, counts: Sequence[int]) -> None:
        """Forget the last ``counts[b]`` kept tokens of row b."""
        self.cache.forget(counts)

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        self.cache.select_rows(rows)
        if self.seen is not None:
            self.seen = self.seen[rows.to(self.seen.device)]

    @property
    def batch(self) -> int:
        """Rows that it holds."""
        return len(self.cache.lengths)

    def start(self, rows: int) -> None:
        """Begin anew with so many empty rows."""
        self.cache.start(rows)

    def join(self, other: "TreeRunner") -> None:
        """Append the rows of another runner of the same model."""
        self.seen = join_seen(self.seen if self.cache.lengths else None, other.seen)
        self.reserve(other.cache.longest)
        self.cache.join(other.cache)

    def _mask(self, tree: TokenTree, window: int | None) -> Tensor:
        start, rows = self.cache.uniform, len(self.cache.lengths)
        if start is not None and window is None and tree.width <= _KEPT_PATTERN:
            pattern = self._pattern(tree)  # (N, capacity + N): the last start + N columns are this pass's mask
            return pattern[:, self.cache.capacity - start :].expand(rows, 1, -1, -1)
        return sees(tree, self.cache.lengths, window)

    def _ready(self, mask: Tensor) -> Tensor:
        return mask if mask.is_floating_point() else self._additive(mask)[:, None].to(self.device)

    def _pattern(self, tree: TokenTree) -> Tensor:
        """Nothing hidden of the prefix, then the tree's ancestry: built once for every tree of that shape."""
        if tree.parents not in self._patterns:
            prefix = torch.ones(tree.width, self.cache.capacity, dtype=torch.bool)
            self._patterns[tree.parents] = self._additive(torch.cat([prefix, tree.ancestry], 1)).to(self.device)
        return self._patterns[tree.parents]

    def _additive(self, visible: Tensor) -> Tensor:
        return torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, torch.finfo(self.dtype).min)


def sees(tree: TokenTree, lengths: Sequence[int], window: int | None) -> Tensor:
    """Which columns each node attends to, (B, N, longest prefix + N): its own prefix, its ancestors, itself.

    Args:
        tree: read behind the prefixes.
        lengths: tokens of each row's prefix.
        window: of sliding attention, in tokens; None sees everything.
    """
    nodes, width = tree.width, max(lengths) + tree.width
    behind = torch.arange(width) - torch.tensor(lengths)[:, None]  # (B, columns): < 0 prefix, then the nodes
    node = behind.clamp(0, nodes)  # those after the last node see nobody
    ancestry = torch.nn.functional.pad(tree.ancestry, (0, 1))
    visible = (behind < 0)[:, None] | ancestry[:, node].transpose(0, 1)
    if window is not None:
        depth = torch.nn.functional.pad(tree.depths, (0, 1))[node].where(behind >= 0, behind)  # (B, columns)
        visible &= tree.depths[:, None] - depth[:, None] < window
    return visible


class RecomputeRunner:
    """The fallback for models that cannot read a tree: every node's whole text is a row of its own.

    Exact for any causal model (linear attention, attention biases built from 2-D masks) and slow: the prefix is read
    again for each node of each step.
    """

    def __init__(self, model: Any, readout: Readout, capacity: int, *, layer: int | None = None) -> None:
        self.model, self.readout, self.layer = model, readout, layer
        self.rows: list[list[int]] = []
        self.tree: TokenTree | None = None
        self.seen: Tensor | None = None
        self.calls = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; return the final states at each one's last token, (B, H)."""
        self.rows = [list(prompt) for prompt in prompts]
        states = self._read_last(self.rows)
        if self.seen is not None:
            self.seen = self.seen[:, None]
        return states

    def states(self, tree: TokenTree) -> Tensor:
        """Final states at every node, (B, N, H); nothing is kept."""
        self.tree = tree
        tokens = tree.tokens.tolist()
        paths = [tree.path(node) for node in range(tree.width)]
        nodes = zip(self.rows, tokens, strict=True)
        texts = [[*row, *(mine[j] for j in path)] for row, mine in nodes for path in paths]
        states = self._read_last(texts)
        if self.seen is not None:
            self.seen = self.seen.reshape(len(self.rows), tree.width, -1)
        return states.reshape(len(self.rows), tree.width, -1)

    def keep(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Keep the path ``nodes[b, :counts[b]]`` of the tree that was read last, from the prefix down; (B, D)."""
        assert self.tree is not None, "keep() follows states()"
        kept = counts if counts is not None else [nodes.shape[1]] * len(self.rows)
        for row, tokens, path, n in zip(self.rows, self.tree.tokens.tolist(), nodes.tolist(), kept, strict=True):
            row.extend(tokens[node] for node in path[:n])

    def forget(self, counts: Sequence[int]) -> None:
        """Forget the last ``counts[b]`` kept tokens of row b."""
        for row, n in zip(self.rows, counts, strict=True):
            del row[len(row) - n :]

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        self.rows = [list(self.rows[i]) for i in rows.tolist()]
        if self.seen is not None:
            self.seen = self.seen[rows.to(self.seen.device)]

    @property
    def batch(self) -> int:
        """Rows that it holds."""
        return len(self.rows)

    def start(self, rows: int) -> None:
        """Begin anew with so many empty rows."""
        self.rows = [[] for _ in range(rows)]

    def join(self, other: "RecomputeRunner") -> None:
        """Append the rows of another runner of the same model."""
        self.seen = join_seen(self.seen if self.rows else None, other.seen)
        self.rows += [list(row) for row in other.rows]

    def _read_last(self, texts: list[list[int]]) -> Tensor:
        self.calls += 1
        ids, mask = pad_right(texts, 0, self.model.device)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        rows = torch.arange(len(texts))
        last = torch.tensor([len(text) - 1 for text in texts])
        if self.layer is None:
            return trunk(self.model)(**inputs).last_hidden_state[rows, last]  # type: ignore[no-any-return]
        with capture_hidden_states(self.model, [self.layer]) as seen:
            states: Tensor = trunk(self.model)(**inputs).last_hidden_state[rows, last]
        self.seen = seen[self.layer][rows, last]
        return states


def join_seen(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    """States of the observed layer at what two runners' rows read last, (B, 1, H)."""
    if mine is None or theirs is None:
        return theirs if mine is None else mine
    return torch.cat([mine[:, -1:], theirs[:, -1:]])


def make_runner(
    model: Any, readout: Readout, capacity: int, *, tree: bool | None = None, layer: int | None = None
) -> Runner:
    """The fast runner where the model can take it, else the fallback, with a warning.

    Args:
        model: a causal model.
        readout: ``policy_logits`` or ``scorer_scores``.
        capacity: longest prefix plus widest tree, in tokens.
        tree: force one or the other; None asks ``supports_token_tree``.
        layer: whose states are observed (0 embeddings … the number of layers), if any.
    """
    if tree is None:
        tree = supports_token_tree(model, readout)
        if not tree:
            warnings.warn(
                f"{type(model).__name__} cannot read a token tree (its attention takes no 4-D mask): every candidate's "
                "whole text is read again at each step, which is slow but exact",
                stacklevel=2,
            )
    return (TreeRunner if tree else RecomputeRunner)(model, readout, capacity, layer=layer)


def mask_windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention layers, each with its sliding window in tokens (None sees everything)."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


_verdicts: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def supports_token_tree(model: Any, readout: Readout) -> bool:
    """Whether a model reads a tree exactly: known layer kinds, and a small trial that agrees with plain passes."""
    if model not in _verdicts:
        _verdicts[model] = _has_known_layers(model) and _trial_agrees(model, readout)
    return _verdicts[model]


def _has_known_layers(model: Any) -> bool:
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or _MASKED_LAYERS)
    if getattr(model.config, "is_encoder_decoder", False) or not kinds <= _MASKED_LAYERS:
        return False
    if getattr(model, "_is_stateful", False) or not hasattr(text, "num_hidden_layers"):
        return False
    if model.config._attn_implementation not in ("sdpa", "eager", SINGLE_QUERY_ATTENTION):
        try:  # flash and flex back-ends take no arbitrary 4-D mask
            model.set_attn_implementation("sdpa")
        except (ValueError, ImportError, AttributeError):
            return False
    return True


@torch.inference_mode()
def _trial_agrees(model: Any, readout: Readout) -> bool:
    """Compare a small ragged tree with whole texts; a model that ignores or misreads the mask shows it here."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [(7 * i + 3) % vocabulary for i in range(9)]
    prompts, leaves = [ids[:5], ids[3:6]], torch.tensor([ids[6:9], ids[5:8]])
    try:
        fast = TreeRunner(model, readout, capacity=16)
        slow = RecomputeRunner(model, readout, capacity=16)
        for runner in (fast, slow):
            runner.prefill(prompts)
        outputs = []
        for runner in (fast, slow):
            runner.states(TokenTree.leaves(leaves.to(model.device)))
            runner.keep(torch.tensor([[2], [1]], device=model.device))
            outputs.append(read(runner, TokenTree.leaves(leaves.to(model.device))).float())
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False
    if not bool(outputs[1].isfinite().all()):
        return True  # a broken model is no reason to read it slowly; decoding refuses what is not finite
    tolerance = 1e-3 if fast.dtype == torch.float32 else 0.1
    scale = outputs[1].abs().max().clamp(min=1e-3)
    return bool((outputs[0] - outputs[1]).abs().max() <= tolerance * scale)
