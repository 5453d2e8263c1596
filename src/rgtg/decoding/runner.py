"""Run a causal model over its cached prefix: read a prompt, read a tree, keep one node."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rgtg.decoding.kv_cache import TreeCache
from rgtg.decoding.token_tree import TokenTree
from rgtg.models.prefix_scorer import pad_right, scalar_head, trunk

# forward(model, logits_to_keep=, **inputs) → one vector (or scalar) per position read
Readout = Callable[..., Tensor]

_MASKED_LAYERS = {"full_attention", "sliding_attention"}


class Runner(Protocol):
    """What decoding needs of a model: all rows advance together, one token at a time."""

    calls: int

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; return the readout at each one's last token, (B, …)."""
        ...

    def read(self, tree: TokenTree) -> Tensor:
        """Readout at every node, (B, N, …); nothing is kept."""
        ...

    def keep(self, nodes: Tensor) -> None:
        """Keep node ``nodes[b]``, a child of the prefix, of the tree that was read last."""
        ...

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        ...


def policy_logits(model: Any, *, last_only: bool, **inputs: Any) -> Tensor:
    """Next-token logits (B, N, V): at every position read, or at the last only (B, 1, V)."""
    logits: Tensor = model(logits_to_keep=1 if last_only else 0, **inputs).logits
    return logits[:, -1:] if last_only else logits


def scorer_scores(model: Any, *, last_only: bool, **inputs: Any) -> Tensor:
    """Scalar head at every position read (B, N), or at the last only (B, 1)."""
    states = trunk(model)(**inputs).last_hidden_state
    scores: Tensor = scalar_head(model)(states[:, -1:] if last_only else states)[..., 0]
    return scores


class TreeRunner:
    """Reads trees over one preallocated cache; the prefix is stored once whatever the number of nodes.

    Rows of different lengths are padded on the left, so that every row's prefix ends in the same column; positions and
    masks leave the padding out.
    """

    def __init__(self, model: Any, readout: Readout, capacity: int) -> None:
        text = model.config.get_text_config()
        self.model, self.readout = model, readout
        self.device = model.device
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.cache = TreeCache(text.num_hidden_layers, capacity)
        self.windows = mask_windows(model.config)
        self.padding = torch.zeros(0)
        self.calls = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; return the readout at each one's last token, (B, …)."""
        width = max(map(len, prompts))
        self.padding = torch.tensor([width - len(p) for p in prompts], device=self.device)
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        out = self._forward(TokenTree.chain(ids.to(self.device)), last_only=True)
        self.cache.keep_chain(width)
        return out[:, 0]

    def read(self, tree: TokenTree) -> Tensor:
        """Readout at every node, (B, N, …); nothing is kept."""
        return self._forward(tree, last_only=False)

    def keep(self, nodes: Tensor) -> None:
        """Keep node ``nodes[b]``, a child of the prefix, of the tree that was read last."""
        self.cache.keep_node(nodes.to(self.device))

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        rows = rows.to(self.device)
        self.padding = self.padding[rows]
        self.cache.select_rows(rows)

    def _forward(self, tree: TokenTree, *, last_only: bool) -> Tensor:
        self.calls += 1
        start = self.cache.length
        positions = start + tree.depths.to(self.device) - self.padding[:, None]
        return self.readout(
            self.model,
            last_only=last_only,
            input_ids=tree.tokens.to(self.device),
            position_ids=positions.clamp(min=0),
            attention_mask=self._masks(tree, start),
            past_key_values=self.cache,
            use_cache=True,
        )

    def _masks(self, tree: TokenTree, start: int) -> Any:
        """Additive masks (B, 1, N, L + N): one, or one per kind of layer where a model mixes them."""
        built = {kind: self._mask(tree, start, window) for kind, window in self.windows.items()}
        return built if len(built) > 1 else next(iter(built.values()))

    def _mask(self, tree: TokenTree, start: int, window: int | None) -> Tensor:
        columns = torch.arange(start, device=self.device)
        depths = tree.depths.to(self.device)
        sees_prefix = (columns >= self.padding[:, None])[:, None, :].expand(-1, tree.width, -1)  # (B, N, L)
        sees_nodes = tree.ancestry.to(self.device)
        if window is not None:
            sees_prefix = sees_prefix & (columns > start + depths[:, None] - window)
            sees_nodes = sees_nodes & (depths[None, :] > depths[:, None] - window)
        if start == 0:  # a left-padded prompt: padding is seen by nobody but itself (a row of -inf would be NaN)
            padded = torch.arange(tree.width, device=self.device) < self.padding[:, None]
            sees = sees_nodes & (~padded[:, None, :] | torch.eye(tree.width, dtype=torch.bool, device=self.device))
        else:
            sees = torch.cat([sees_prefix, sees_nodes.expand(len(self.padding), -1, -1)], -1)
        bias = torch.zeros(sees.shape, dtype=self.dtype, device=self.device)
        return bias.masked_fill_(~sees, torch.finfo(self.dtype).min)[:, None]


class RecomputeRunner:
    """The fallback for models that cannot read a tree: every node's whole text is a row of its own.

    Exact for any causal model (linear attention, attention biases built from 2-D masks) and slow: the prefix is read
    again for each node of each step.
    """

    def __init__(self, model: Any, readout: Readout, capacity: int) -> None:
        self.model, self.readout = model, readout
        self.rows: list[list[int]] = []
        self.tree: TokenTree | None = None
        self.calls = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; return the readout at each one's last token, (B, …)."""
        self.rows = [list(prompt) for prompt in prompts]
        return self._read_last(self.rows)

    def read(self, tree: TokenTree) -> Tensor:
        """Readout at every node, (B, N, …); nothing is kept."""
        self.tree = tree
        tokens = tree.tokens.tolist()
        paths = [tree.path(node) for node in range(tree.width)]
        nodes = zip(self.rows, tokens, strict=True)
        texts = [[*row, *(mine[j] for j in path)] for row, mine in nodes for path in paths]
        read = self._read_last(texts)
        return read.reshape(len(self.rows), tree.width, *read.shape[1:])

    def keep(self, nodes: Tensor) -> None:
        """Keep node ``nodes[b]``, a child of the prefix, of the tree that was read last."""
        assert self.tree is not None, "keep() follows read()"
        for row, tokens, node in zip(self.rows, self.tree.tokens.tolist(), nodes.tolist(), strict=True):
            row.append(tokens[node])

    def select_rows(self, rows: Tensor) -> None:
        """Keep only (or repeat) these rows."""
        self.rows = [list(self.rows[i]) for i in rows.tolist()]

    def _read_last(self, texts: list[list[int]]) -> Tensor:
        self.calls += 1
        ids, mask = pad_right(texts, 0, self.model.device)
        out = self.readout(self.model, last_only=False, input_ids=ids, attention_mask=mask, use_cache=False)
        last = torch.tensor([len(text) - 1 for text in texts], device=out.device)
        read: Tensor = out[torch.arange(len(texts), device=out.device), last]
        return read


def make_runner(model: Any, readout: Readout, capacity: int, *, tree: bool | None = None) -> Runner:
    """The fast runner where the model can take it, else the fallback, with a warning.

    Args:
        model: a causal model.
        readout: ``policy_logits`` or ``scorer_scores``.
        capacity: longest prefix plus widest tree, in tokens.
        tree: force one or the other; None asks ``supports_token_tree``.
    """
    if tree is None:
        tree = supports_token_tree(model, readout)
        if not tree:
            warnings.warn(
                f"{type(model).__name__} cannot read a token tree (its attention takes no 4-D mask): every candidate's "
                "whole text is read again at each step, which is slow but exact",
                stacklevel=2,
            )
    return TreeRunner(model, readout, capacity) if tree else RecomputeRunner(model, readout, capacity)


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
    if model.config._attn_implementation not in ("sdpa", "eager"):
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
            runner.read(TokenTree.leaves(leaves.to(model.device)))
            runner.keep(torch.tensor([2, 1], device=model.device))
            outputs.append(runner.read(TokenTree.leaves(leaves.to(model.device))).float())
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False
    if not bool(outputs[1].isfinite().all()):
        return True  # a broken model is no reason to read it slowly; decoding refuses what is not finite
    tolerance = 1e-3 if fast.dtype == torch.float32 else 0.1
    scale = outputs[1].abs().max().clamp(min=1e-3)
    return bool((outputs[0] - outputs[1]).abs().max() <= tolerance * scale)
