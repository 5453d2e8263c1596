"""Run a causal model over its cached prefix: read a prompt, read a token tree, commit one path of it."""

import copy
import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from itertools import groupby, zip_longest
from typing import Any, Protocol, Self, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rgtg.decoding.runners.kv_cache import TreeCache
from rgtg.decoding.runners.token_tree import States, TokenTree, tree_ancestry, tree_depths
from rgtg.models.loading.device_map import has_device_map
from rgtg.models.loading.engine_model import ReadableModel
from rgtg.models.ops.hidden_states import capture_hidden_states
from rgtg.models.ops.lm_head import output_head, trunk
from rgtg.models.ops.tree_attention import has_maskable_layers, mask_windows, probe_agrees

# head(model, states (…, H)) → logits (…, V) or scores (…)
OutputHead = Callable[[Any, Tensor], Tensor]

# Masks of wider trees (prompts) are used once and not cached.
_MAX_CACHED_WIDTH = 1024


class TreeRunner:
    """Reads token trees over one preallocated cache; the prefix is stored once, whatever the number of nodes.

    Row b's prefix lies in the first ``cache.lengths[b]`` columns, and the nodes of the last pass after it. The cache
    grows when a pass needs more columns.

    Attributes:
        model: a causal model.
        head: final states (…, H) → logits (…, V) or scores (…).
        layer: whose states are read beside the final ones; None reads no others.
        cache: keys and values of all rows.
        calls: forward passes so far, those of the prompts included.
    """

    def __init__(self, model: Any, head: OutputHead, capacity: int = 0, *, layer: int | None = None) -> None:
        """Set up, without rows.

        Args:
            model: a causal model.
            head: ``policy_logits`` or ``scorer_scores``.
            capacity: columns that the cache has room for at first.
            layer: whose states are read too, if any.
        """
        self.model, self.head, self.layer = model, output_head(model, head), layer
        self.trunk, self.windows = trunk(model), mask_windows(model.config)
        self.device, self.dtype = model.device, model.dtype
        self.cache = TreeCache(model.config.get_text_config().num_hidden_layers, capacity, spread=has_device_map(model))
        self.calls = 0
        self._masks: dict[tuple[int, ...], Tensor] = {}
        # transformers 5.24 renamed it
        self._cache_argument = "cache" if "cache" in signature(self.trunk.forward).parameters else "past_key_values"

    def fresh(self, capacity: int) -> "TreeRunner":
        """A runner of the same model without rows, with room for ``capacity`` columns."""
        other = copy.copy(self)
        other.cache = TreeCache(len(self.cache.layers), capacity, spread=self.cache.spread)
        other.calls, other._masks = 0, {}
        return other

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.cache.lengths)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> States:
        """Start with these prompts as rows; states (B, H) at the last token of each."""
        # columns after a shorter prompt are overwritten by its first nodes
        ids = torch.tensor(list(zip_longest(*prompts, fillvalue=0)), device=self.device).T
        self.cache.reset(len(prompts))
        final, hooked = self.read(TokenTree.chain(ids))
        lengths = list(map(len, prompts))
        self.cache.commit_first(lengths)
        rows, last = torch.arange(len(prompts)), torch.tensor(lengths) - 1
        return States(final[rows, last], None if hooked is None else hooked[rows, last])

    def read(self, tree: TokenTree) -> States:
        """States (B, N, H) at every node of a tree after the prefixes; nothing is committed."""
        depths = tree_depths(tree.parents, tree.tokens.shape[1])
        positions = torch.tensor(self.cache.lengths)[:, None] + depths  # (B, N): after the prefix, by depth
        masks = {}
        for kind, window in self.windows.items():
            masks[kind] = self._tree_mask(tree, window)
        return self.forward(tree.tokens, positions, masks)

    def forward(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor]) -> States:
        """States (B, N, H) of nodes that are written after the prefixes.

        Args:
            ids: (B, N) tokens.
            positions: (B, N).
            masks: for each kind of attention layer (`windows`), which columns a node attends to: booleans
                (B, N, longest prefix + N), or an additive mask (B, 1, N, longest prefix + N).
        """
        self.calls += 1
        if self.cache.longest + ids.shape[1] > self.cache.capacity:
            self.reserve(self.cache.longest + ids.shape[1])
        for kind, mask in masks.items():
            if mask.dtype == torch.bool:
                additive = torch.zeros(mask.shape, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)
                masks[kind] = additive[:, None].to(self.device)
        inputs = {
            "input_ids": ids.to(self.device),
            "position_ids": positions.to(self.device, non_blocking=True),
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            self._cache_argument: self.cache,
            "use_cache": True,
        }
        if self.layer is None:
            return States(self.trunk(**inputs).last_hidden_state, None)
        with capture_hidden_states(self.model, [self.layer]) as captured:
            final: Tensor = self.trunk(**inputs).last_hidden_state
        return States(final, captured[self.layer])

    def reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        if columns > self.cache.capacity:
            self.cache.grow(columns)
            self._masks.clear()  # they are as wide as the cache

    def commit(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Commit the path ``nodes[b, :counts[b]]`` (B, D) of the tree that was read last, from the prefix down."""
        self.cache.commit_path(nodes, counts)

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last ``counts[b]`` committed tokens of row b."""
        self.cache.rollback(counts)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        self.cache.select_rows(rows)

    def copy_rows(self, rows: Sequence[int]) -> "TreeRunner":
        """A runner of its own with copies of some rows."""
        copied = self.fresh(0)
        copied.cache = self.cache.copy_rows(rows)
        return copied

    def reset(self, rows: int) -> None:
        """Start again with so many empty rows."""
        self.cache.reset(rows)

    def add(self, other: "TreeRunner") -> None:
        """Append copies of the rows of another runner of the same model."""
        self.reserve(other.cache.longest)
        self.cache.add(other.cache)

    def _tree_mask(self, tree: TokenTree, window: int | None) -> Tensor:
        """Which columns each node attends to: additive (B, 1, N, columns), or booleans (B, N, columns)."""
        start, nodes = self.cache.uniform, len(tree.parents)
        if start is None or window is not None or nodes > _MAX_CACHED_WIDTH:
            return visible_columns(tree, self.cache.lengths, window)
        if start + nodes > self.cache.capacity:
            self.reserve(start + nodes)
        if tree.parents not in self._masks:
            # the whole prefix, then the tree's ancestors; the last start + N columns are the mask of a pass
            mask = torch.zeros(nodes, self.cache.capacity + nodes, dtype=self.dtype)
            mask[:, self.cache.capacity :].masked_fill_(~tree_ancestry(tree.parents), torch.finfo(self.dtype).min)
            self._masks[tree.parents] = mask.to(self.device)
        mask = self._masks[tree.parents]
        return mask[:, self.cache.capacity - start :].expand(len(self.cache.lengths), 1, -1, -1)


def visible_columns(tree: TokenTree, lengths: Sequence[int], window: int | None) -> Tensor:
    """Which columns each node attends to, (B, N, longest prefix + N): its own prefix, its ancestors, itself.

    Args:
        tree: read after the prefixes.
        lengths: number of prefix tokens of each row.
        window: of sliding attention, in tokens; None attends to everything.
    """
    nodes, width = tree.width, max(lengths) + tree.width
    behind = (
        torch.arange(width) - torch.tensor(lengths)[:, None]
    )  # (B, columns): negative in the prefix, then the nodes
    node = behind.clamp(0, nodes)  # columns after the last node are hidden
    ancestry = torch.nn.functional.pad(tree.ancestry, (0, 1))
    visible = (behind < 0)[:, None] | ancestry[:, node].transpose(0, 1)
    if window is not None:
        depth = torch.nn.functional.pad(tree.depths, (0, 1))[node].where(behind >= 0, behind)  # (B, columns)
        visible &= tree.depths[:, None] - depth[:, None] < window
    return visible


class RecomputeRunner:
    """The fallback for models that cannot read a token tree: every node's whole text is a row of its own.

    Exact for any causal model (linear attention, attention biases built from 2-D masks) and slow: the prefix is read
    again for each node of each step.
    """

    def __init__(self, model: Any, head: OutputHead, capacity: int = 0, *, layer: int | None = None) -> None:
        """As ``TreeRunner``; there is no cache to have a ``capacity``."""
        self.model, self.head, self.layer = model, output_head(model, head), layer
        self.texts: list[list[int]] = []
        self.tree: TokenTree | None = None
        self.calls = 0

    def fresh(self, capacity: int) -> "RecomputeRunner":
        """A runner of the same model without rows."""
        other = copy.copy(self)
        other.texts, other.tree, other.calls = [], None, 0
        return other

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.texts)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> States:
        """Start with these prompts as rows; states (B, H) at the last token of each."""
        self.texts, self.tree = [list(prompt) for prompt in prompts], None
        return self._read_last(self.texts)

    def read(self, tree: TokenTree) -> States:
        """States (B, N, H) at every node of a tree after the prefixes; nothing is committed."""
        self.tree = tree
        tokens = tree.tokens.tolist()
        paths = [tree.path(node) for node in range(tree.width)]
        nodes = zip(self.texts, tokens, strict=True)
        whole = [[*text, *(mine[j] for j in path)] for text, mine in nodes for path in paths]
        final, hooked = self._read_last(whole)
        shape = (len(self.texts), tree.width, -1)
        return States(final.reshape(shape), None if hooked is None else hooked.reshape(shape))

    def commit(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Commit the path ``nodes[b, :counts[b]]`` (B, D) of the tree that was read last, from the prefix down."""
        assert self.tree is not None, "commit() follows read()"
        kept = counts if counts is not None else [nodes.shape[1]] * len(self.texts)
        for text, tokens, path, n in zip(self.texts, self.tree.tokens.tolist(), nodes.tolist(), kept, strict=True):
            text.extend(tokens[node] for node in path[:n])

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last ``counts[b]`` committed tokens of row b."""
        for text, n in zip(self.texts, counts, strict=True):
            del text[len(text) - n :]

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        self.texts = [list(self.texts[i]) for i in rows]
        if self.tree is not None:  # what was read and not committed yet
            self.tree = TokenTree(self.tree.tokens[list(rows)], self.tree.parents)

    def copy_rows(self, rows: Sequence[int]) -> "RecomputeRunner":
        """A runner of its own with copies of some rows."""
        copied = self.fresh(0)
        copied.texts = [list(self.texts[i]) for i in rows]
        return copied

    def reset(self, rows: int) -> None:
        """Start again with so many empty rows."""
        self.texts, self.tree = [[] for _ in range(rows)], None

    def add(self, other: "RecomputeRunner") -> None:
        """Append copies of the rows of another runner of the same model."""
        self.texts += [list(text) for text in other.texts]
        self.tree = None  # of fewer rows

    def _read_last(self, texts: list[list[int]]) -> States:
        """States (R, H) at the last token of each of R texts.

        Texts of one length are read together, because models that are read in this way may misread padding: recurrent
        layers pass through it, and sparse attention selects among it. If every text occurs in both halves of the batch,
        as a policy with an adapter needs it, that holds for each of these groups too.
        """
        self.calls += 1
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        final, hooked = [], []
        for _, group in groupby(order, key=lambda i: len(texts[i])):
            ids = torch.tensor([texts[i] for i in group], device=self.model.device)
            layers = [] if self.layer is None else [self.layer]
            with capture_hidden_states(self.model, layers) as captured:
                final.append(trunk(self.model)(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
            hooked += [states[:, -1] for states in captured.values()]
        back = torch.tensor(order).argsort()
        return States(torch.cat(final)[back], torch.cat(hooked)[back] if hooked else None)


class EngineRunner(Protocol):
    """What reads a policy that another engine runs; an engine implements it. `TreeRunner` explains the methods.

    ``States.final`` may be anything that ``head`` turns into logits, the logits themselves included.

    Attributes:
        model: the policy's `ReadableModel`.
        layer: whose states are given as ``States.hooked``.
        calls: forward passes so far.
        cache: has ``lengths`` and ``nbytes``, ``copy_rows([row])``, which gives a prefix cache an object with
            ``nbytes``, and ``copy_prefix(object, length)``, which lets the only row begin with it.
    """

    model: Any
    layer: int | None
    calls: int

    @property
    def cache(self) -> Any:
        """Keys and values of the rows."""
        ...

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    def head(self, final: Tensor) -> Tensor:
        """Logits (…, V) of final states."""
        ...

    def fresh(self, capacity: int) -> Self:
        """A runner of the same policy without rows."""
        ...

    def reset(self, rows: int) -> None:
        """Start again with so many empty rows."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> States:
        """Start with these prompts as rows; states (B, …) at the last token of each."""
        ...

    def append(self, tokens: Tensor) -> States:
        """Read tokens (B, n) after the rows and commit them; states (B, …) at the last ones."""
        ...

    def read(self, tree: TokenTree) -> States:
        """States (B, N, …) at every node of a tree after the rows; nothing is committed."""
        ...

    def commit(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Commit the path ``nodes[b, :counts[b]]`` (B, D) of the tree that was read last."""
        ...

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last ``counts[b]`` committed tokens of row b."""
        ...

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        ...

    def copy_rows(self, rows: Sequence[int]) -> Self:
        """A runner of its own with copies of some rows."""
        ...

    def add(self, other: Any) -> None:
        """Append copies of the rows of another runner of the same policy."""
        ...


CachedRunner = TreeRunner | EngineRunner
Runner = CachedRunner | RecomputeRunner


def has_cache(runner: Any) -> "TypeGuard[CachedRunner]":
    """Whether a model runner reads over a cache, so that it can read a prompt in chunks and keep what it has read."""
    return hasattr(runner, "cache")


def outputs(runner: Runner, tree: TokenTree) -> Tensor:
    """The runner's logits (B, N, V) or scores (B, N) at every node; nothing is committed."""
    return runner.head(runner.read(tree).final)


def append_tokens(runner: Runner, tokens: Tensor) -> States:
    """Read tokens (B, n), one after the other, and commit them; states (B, H) at the last ones."""
    if not isinstance(runner, TreeRunner | RecomputeRunner) and hasattr(runner, "append"):  # another engine's
        return runner.append(tokens)
    states = runner.read(TokenTree.chain(tokens))
    n = tokens.shape[1]
    runner.commit(torch.zeros(len(tokens), 1, dtype=torch.long) if n == 1 else torch.arange(n).expand(len(tokens), -1))
    return states.at((slice(None), -1))


def make_runner(
    model: Any, head: OutputHead, capacity: int, *, tree: bool | None = None, layer: int | None = None
) -> Runner:
    """The fast runner where the model can take it, else the fallback, with a warning; or that of the model's engine.

    Args:
        model: a causal model, in torch or of another engine.
        head: ``policy_logits`` or ``scorer_scores``.
        capacity: columns to make room for: the longest prefix plus the widest tree, in tokens.
        tree: force one or the other; None asks ``supports_token_tree``.
        layer: whose states are read too (0 embeddings … the number of layers), if any.
    """
    if isinstance(model, ReadableModel):
        return model.runner(capacity, layer)  # type: ignore[no-any-return]
    if tree is None:
        tree = supports_token_tree(model, head)
        if not tree:
            warnings.warn(
                f"{type(model).__name__} cannot read a token tree (its attention takes no 4-D mask): every candidate's "
                "whole text is read again at each step, which is slow but exact",
                stacklevel=2,
            )
    return (TreeRunner if tree else RecomputeRunner)(model, head, capacity, layer=layer)


_supported: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def supports_token_tree(model: Any, head: OutputHead) -> bool:
    """Whether a model reads a tree exactly: known kinds of layers, and a probe that agrees with plain passes."""
    if model not in _supported:
        _supported[model] = has_maskable_layers(model) and _probe_agrees(model, head)
    return _supported[model]


@torch.inference_mode()
def _probe_agrees(model: Any, head: OutputHead) -> bool:
    """Compare a small ragged tree with whole texts: a model that ignores or misreads the mask differs."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [(7 * i + 3) % vocabulary for i in range(9)]
    # every text twice, because an adapter changes the second half of a batch
    prompts, leaves = [ids[:5], ids[3:6]] * 2, torch.tensor([ids[6:9], ids[5:8]] * 2)
    try:
        fast = TreeRunner(model, head, capacity=16)
        slow = RecomputeRunner(model, head, capacity=16)
        for runner in (fast, slow):
            runner.prefill(prompts)
        found = []
        for runner in (fast, slow):
            runner.read(TokenTree.leaves(leaves.to(model.device)))
            runner.commit(torch.tensor([[2], [1]] * 2, device=model.device))
            found.append(outputs(runner, TokenTree.leaves(leaves.to(model.device))).float())
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False
    return probe_agrees(found[0], found[1], fast.dtype)
