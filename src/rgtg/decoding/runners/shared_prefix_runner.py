"""Several completions of one prompt over one cache of it: read once and stored once, whatever their number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rgtg.decoding.runners.model_runner import EngineRunner, RecomputeRunner, Runner, TreeRunner
from rgtg.decoding.runners.token_tree import States, TokenTree


class SharedPrefixRunner:
    """Presents B·n rows, one per completion, over a ``TreeRunner`` of B prompts: completions are branches of a tree.

    Each pass reads one node per active branch and commits them all; a node attends to its prompt and to its own branch.
    The cache holds L + n·T columns per prompt instead of n·(L + T).
    """

    layer = None

    def __init__(self, runner: TreeRunner, n: int) -> None:
        """Fork every prompt that ``runner`` has read into n rows, the n of one prompt side by side."""
        self.runner, self.model, self.head = runner, runner.model, runner.head
        prompts = len(runner.cache.lengths)
        self.branches = [(p, branch) for p in range(prompts) for branch in range(n)]
        self.prompt_lengths = torch.tensor(runner.cache.lengths)
        # branch that each column belongs to, and its position; -1 is the prompt's, which all attend to
        self.owners = torch.full((prompts, runner.cache.capacity), -1)
        self.positions = torch.arange(runner.cache.capacity).repeat(prompts, 1)
        self.steps = 0
        self._nodes = torch.zeros(prompts, 0, dtype=torch.long)  # branch of each node of the last pass

    @property
    def calls(self) -> int:
        """Forward passes so far, the prompts' included."""
        return self.runner.calls

    @property
    def rows(self) -> int:
        """Number of active completions."""
        return len(self.branches)

    def read(self, tree: TokenTree) -> States:
        """Final states (R, 1, H) at one new token of each row; nothing is committed."""
        if tree.width != 1:
            raise ValueError("completions of a shared prompt advance by one token")
        rows, nodes = self._grid()
        width = int(nodes.max()) + 1
        ids = torch.zeros(len(self.owners), width, dtype=torch.long)
        self._nodes = torch.full(ids.shape, -2)  # padding: a branch that owns no column
        ids[rows, nodes] = tree.tokens[:, 0].cpu()
        self._nodes[rows, nodes] = torch.tensor([branch for _, branch in self.branches])
        positions = (self.prompt_lengths + self.steps)[:, None].expand_as(ids)
        masks = {kind: self._visible(window) for kind, window in self.runner.windows.items()}
        final = self.runner.forward(ids, positions, masks).final
        return States(final[rows, nodes][:, None], None)

    def commit(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Commit the token that each row has read."""
        width = self._nodes.shape[1]
        for p, start in enumerate(self.runner.cache.lengths):
            self.owners[p, start : start + width] = self._nodes[p]
            self.positions[p, start : start + width] = self.prompt_lengths[p] + self.steps
        self.runner.cache.commit_first([width] * len(self.owners))
        self.steps += 1

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only; a prompt that has none left leaves the cache."""
        self.branches = [self.branches[i] for i in rows]
        active = sorted({p for p, _ in self.branches})
        if len(active) == len(self.owners):
            return
        self.branches = [(active.index(p), branch) for p, branch in self.branches]
        chosen = torch.tensor(active, dtype=torch.long)
        self.owners, self.positions = self.owners[chosen], self.positions[chosen]
        self.prompt_lengths = self.prompt_lengths[chosen]
        self.runner.select_rows(active)

    def copy_rows(self, rows: Sequence[int]) -> "SharedPrefixRunner":
        """Not possible: branches share their prompt's columns."""
        raise NotImplementedError("completions of a shared prompt are not copied")

    def drop_branches(self) -> None:
        """Drop every branch; the prompts stay."""
        now = torch.tensor(self.runner.cache.lengths)
        self.runner.rollback((now - self.prompt_lengths).tolist())

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Prompt (R,) and node (R,) of each row: the active branches of a prompt, in order."""
        counts = [0] * len(self.owners)
        nodes = []
        for p, _ in self.branches:
            nodes.append(counts[p])
            counts[p] += 1
        return torch.tensor([p for p, _ in self.branches]), torch.tensor(nodes)

    def _visible(self, window: int | None) -> Tensor:
        """Which columns each node attends to, (B, N, columns): its prompt, its branch, itself."""
        lengths = torch.tensor(self.runner.cache.lengths)
        width = self._nodes.shape[1]
        end = int(lengths.max()) + width
        columns = torch.arange(end)
        kept = columns < lengths[:, None]
        owners = self.owners[:, :end].where(kept, -3)
        mine = owners[:, None] == self._nodes[:, :, None]
        seen = mine | (owners == -1)[:, None]
        if window is not None:
            now = (self.prompt_lengths + self.steps)[:, None]
            seen &= (now - self.positions[:, :end] < window)[:, None]
        own = columns == (lengths[:, None] + torch.arange(width))[..., None]
        return seen | own


def fork(runner: Runner, n: int) -> "SharedPrefixRunner | RecomputeRunner | EngineRunner":
    """N rows for each one that a runner has read: branches of its cache, or copies of its rows.

    Another engine's rows share what they were copied from, and texts are copied where there is no cache.

    The runner itself stays as it is, once the branches are dropped (``SharedPrefixRunner.drop_branches``).
    """
    if isinstance(runner, TreeRunner):
        return SharedPrefixRunner(runner, n)
    return runner.copy_rows([row for row in range(runner.rows) for _ in range(n)])
