"""Several completions of one prompt over one cache of it: read once and stored once, whatever their number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rgtg.decoding.runners.model_runner import EngineRunner, RecomputeRunner, Runner, TreeRunner
from rgtg.decoding.runners.token_tree import States, TokenTree


class SharedPrefixRunner:
    """Presents R rows, one per completion, over a ``TreeRunner`` of B prompts: completions are branches of a tree.

    Each pass reads the same small tree after every active branch. A node attends to its prompt, its own branch and its
    ancestors. The cache holds L + n·T columns per prompt instead of n·(L + T). A row that is copied shares the
    columns of the original: only its mask is copied.

    Attributes:
        prompts: prompt of each row.
        lengths: (R,) tokens of each row, its prompt's included.
        seen: (R, capacity) which columns of its prompt's cache a row attends to.
        positions: (B, capacity) of the token in each column.
    """

    def __init__(self, runner: TreeRunner, n: int) -> None:
        """Fork every prompt that ``runner`` has read into n rows, the n of one prompt side by side."""
        self.runner, self.model, self.head, self.layer = runner, runner.model, runner.head, runner.layer
        self.prompt_lengths = list(runner.cache.lengths)
        count, capacity = len(self.prompt_lengths), runner.cache.capacity
        self.prompts = [p for p in range(count) for _ in range(n)]
        self.lengths = torch.tensor(self.prompt_lengths)[self.prompts]
        self.seen = torch.arange(capacity) < self.lengths[:, None]
        self.positions = torch.arange(capacity).repeat(count, 1)
        # of the last pass: its width per row, nodes per prompt, and each row's place among those of its prompt
        self._width, self._nodes, self._places = 0, 0, torch.zeros(0, dtype=torch.long)

    @property
    def calls(self) -> int:
        """Forward passes so far, the prompts' included."""
        return self.runner.calls

    @property
    def rows(self) -> int:
        """Number of active completions."""
        return len(self.prompts)

    def read(self, tree: TokenTree) -> States:
        """States (R, W, H) at every node of a tree after each row; nothing is committed."""
        cache, width = self.runner.cache, tree.width
        self._width, self._places = width, self._places_in_prompt()
        self._nodes = nodes_per_prompt = (int(self._places.max()) + 1) * width
        self._reserve(cache.longest + nodes_per_prompt)
        # 1. where each row's nodes lie among those of its prompt (B, N)
        rows = torch.tensor(self.prompts)[:, None]
        nodes = self._places[:, None] * width + torch.arange(width)
        ids = torch.zeros(len(self.prompt_lengths), nodes_per_prompt, dtype=torch.long)
        ids[rows, nodes] = tree.tokens.cpu()
        depths = tree.depths
        positions = torch.tensor(self.prompt_lengths)[:, None].expand_as(ids).clone()  # of padding: any
        positions[rows, nodes] = self.lengths[:, None] + depths
        # 2. what they attend to
        ancestry = tree.ancestry
        masks = {}
        for kind, window in self.runner.windows.items():
            near = ancestry if window is None else ancestry & (depths[:, None] - depths < window)
            masks[kind] = self._visible(rows, nodes, positions, near, window)
        states = self.runner.forward(ids, positions, masks)
        return states.at((rows, nodes))

    def commit(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Commit the path ``nodes[r, :counts[r]]`` (R, D) of the tree that each row has read; None commits all D."""
        cache, depth = self.runner.cache, nodes.shape[1]
        kept = torch.full((len(nodes),), depth) if counts is None else torch.tensor(counts)
        chosen = self._places[:, None] * self._width + nodes.cpu()  # (R, D) among the nodes of the prompt
        # 1. the columns that these nodes get: all stay where they are, or the chosen ones close up
        if depth == self._width:
            columns = chosen
            before, added = list(cache.lengths), self._nodes
            cache.commit_first([added] * len(before))
        else:
            paths, columns = self._close_up(chosen)
            before = list(cache.lengths)
            cache.commit_path(paths)
        # 2. rows attend to them from now on
        rows = torch.tensor(self.prompts)[:, None]
        columns = columns + torch.tensor(before)[rows]
        mine = torch.arange(depth) < kept[:, None]
        self.seen[torch.arange(len(nodes))[:, None].expand_as(columns)[mine], columns[mine]] = True
        places = (self.lengths[:, None] + torch.arange(depth)).expand_as(columns)
        self.positions[rows.expand_as(columns)[mine], columns[mine]] = places[mine]
        self.lengths = self.lengths + kept

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied. A prompt without rows leaves the cache."""
        index = list(rows)
        self.prompts = [self.prompts[row] for row in index]
        self.lengths, self.seen = self.lengths[index], self.seen[index]
        if len(self._places):
            self._places = self._places[index]
        active = sorted(set(self.prompts))
        if len(active) == len(self.prompt_lengths):
            return
        self.prompts = [active.index(p) for p in self.prompts]
        self.positions = self.positions[active]
        self.prompt_lengths = [self.prompt_lengths[p] for p in active]
        self.runner.select_rows(active)

    def copy_rows(self, rows: Sequence[int]) -> "SharedPrefixRunner":
        """Not possible: branches share their prompt's columns."""
        raise NotImplementedError("completions of a shared prompt are not copied")

    def drop_branches(self) -> None:
        """Drop every branch; the prompts stay."""
        lengths = zip(self.runner.cache.lengths, self.prompt_lengths, strict=True)
        self.runner.rollback([now - before for now, before in lengths])

    def _places_in_prompt(self) -> Tensor:
        """(R,) each row's place among those of its prompt, in order."""
        counts = [0] * len(self.prompt_lengths)
        places = []
        for p in self.prompts:
            places.append(counts[p])
            counts[p] += 1
        return torch.tensor(places)

    def _reserve(self, columns: int) -> None:
        """Make room for so many columns, here and in the cache."""
        self.runner.reserve(columns)
        if (more := self.runner.cache.capacity - self.seen.shape[1]) > 0:
            self.seen = torch.nn.functional.pad(self.seen, (0, more))
            self.positions = torch.nn.functional.pad(self.positions, (0, more))

    def _visible(self, rows: Tensor, nodes: Tensor, positions: Tensor, near: Tensor, window: int | None) -> Tensor:
        """Which columns each node attends to, (B, N, columns): its prompt, its branch, its ancestors, itself.

        Args:
            rows: (R, 1) prompt of each row.
            nodes: (R, W) each row's nodes among those of its prompt.
            positions: (B, N) of the nodes.
            near: (W, W) which nodes of its own tree a node attends to.
            window: of sliding attention, in tokens; None sees everything.
        """
        lengths = torch.tensor(self.runner.cache.lengths)
        end = int(lengths.max()) + positions.shape[1]
        # 1. itself: all that padding sees
        visible = torch.arange(end) == (lengths[:, None] + torch.arange(positions.shape[1]))[..., None]
        # 2. the prompt and the branch
        seen = self.seen[:, None, :end].expand(-1, nodes.shape[1], -1)
        if window is not None:
            now = positions[rows, nodes][..., None]
            seen = seen & (now - self.positions[rows[:, 0], :end][:, None] < window)
        visible[rows, nodes] |= seen
        # 3. the ancestors
        columns = lengths[rows] + nodes
        visible[rows[..., None], nodes[:, :, None], columns[:, None]] |= near
        return visible

    def _close_up(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Paths (B, M) that keep each prompt's chosen nodes (R, D), once and in order; their new columns (R, D).

        In order, because a copy from left to right must not write over a node that is still to be copied.
        """
        columns, paths = torch.zeros_like(chosen), []
        rows = torch.tensor(self.prompts)
        for p in range(len(self.prompt_lengths)):
            found, columns[rows == p] = torch.unique(chosen[rows == p], return_inverse=True)
            paths.append(found)
        longest = max(map(len, paths))
        # padding repeats the last node, in a column that no row attends to
        return torch.stack([torch.cat([path, path[-1:].expand(longest - len(path))]) for path in paths]), columns


def fork(runner: Runner, n: int) -> "SharedPrefixRunner | RecomputeRunner | EngineRunner":
    """N rows for each one that a runner has read: branches of its cache, or copies of its rows.

    Another engine's rows share what they were copied from, and texts are copied where there is no cache.

    The runner itself stays as it is, once the branches are dropped (``SharedPrefixRunner.drop_branches``).
    """
    if isinstance(runner, TreeRunner):
        return SharedPrefixRunner(runner, n)
    return runner.copy_rows([row for row in range(runner.rows) for _ in range(n)])
