"""Several completions of one prompt over one cache of it: read once and stored once, whatever their number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rgtg.decoding.runners.model_runner import RecomputeRunner, Runner, TreeRunner
from rgtg.decoding.runners.token_tree import TokenTree


class SharedPromptRunner:
    """Presents B·n rows, one per completion, over a ``TreeRunner`` of B prompts: completions are branches of a tree.

    Each pass reads one node per living branch and keeps them all; a node attends to its prompt and to its own branch.
    The cache holds L + n·T columns per prompt instead of n·(L + T).
    """

    def __init__(self, runner: TreeRunner, n: int) -> None:
        """Fork every prompt that ``runner`` has read into n rows, the n of one prompt side by side."""
        self.runner, self.model, self.readout = runner, runner.model, runner.readout
        prompts = len(runner.cache.lengths)
        self.places = [(p, branch) for p in range(prompts) for branch in range(n)]
        self.seen: Tensor | None = None
        self.prompt_lengths = torch.tensor(runner.cache.lengths)
        # branch that each column belongs to, and its position; -1 is the prompt's, seen by all
        self.owners = torch.full((prompts, runner.cache.capacity), -1)
        self.positions = torch.arange(runner.cache.capacity).repeat(prompts, 1)
        self.steps = 0
        self._branches = torch.zeros(prompts, 0, dtype=torch.long)

    @property
    def calls(self) -> int:
        """Passes so far, the prompt's included."""
        return self.runner.calls

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Not here: the prompts are read before they are shared."""
        raise NotImplementedError("read the prompts with the runner that is shared")

    def states(self, tree: TokenTree) -> Tensor:
        """Final states (R, 1, H) at one new token of each row; nothing is kept."""
        if tree.width != 1:
            raise ValueError("completions of a shared prompt advance by one token")
        rows, nodes = self._grid()
        alive = nodes.max().item() + 1
        ids = torch.zeros(len(self.owners), int(alive), dtype=torch.long)
        self._branches = torch.full(ids.shape, -2)  # padding: a branch that owns nothing
        ids[rows, nodes] = tree.tokens[:, 0].cpu()
        self._branches[rows, nodes] = torch.tensor([branch for _, branch in self.places])
        positions = (self.prompt_lengths + self.steps)[:, None].expand_as(ids)
        states = self.runner.forward(ids, positions, self._masks)
        return states[rows, nodes][:, None]

    def keep(self, nodes: Tensor, counts: Sequence[int] | None = None) -> None:
        """Keep the token that each row read."""
        width = self._branches.shape[1]
        for p, start in enumerate(self.runner.cache.lengths):
            self.owners[p, start : start + width] = self._branches[p]
            self.positions[p, start : start + width] = self.prompt_lengths[p] + self.steps
        self.runner.cache.keep_first([width] * len(self.owners))
        self.steps += 1

    def forget(self, counts: Sequence[int]) -> None:
        """Not here: nothing is drafted."""
        raise NotImplementedError("completions of a shared prompt are not drafted")

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows; a prompt none of whose rows is left leaves the cache."""
        self.places = [self.places[i] for i in rows.tolist()]
        living = sorted({p for p, _ in self.places})
        if len(living) == len(self.owners):
            return
        self.places = [(living.index(p), branch) for p, branch in self.places]
        chosen = torch.tensor(living)
        self.owners, self.positions = self.owners[chosen], self.positions[chosen]
        self.prompt_lengths = self.prompt_lengths[chosen]
        self.runner.select_rows(chosen)

    @property
    def batch(self) -> int:
        """Living completions."""
        return len(self.places)

    def start(self, rows: int) -> None:
        """Not here: the prompts are read before they are shared."""
        raise NotImplementedError("read the prompts with the runner that is shared")

    def join(self, other: Runner) -> None:
        """Not here: branches are grown from what has been read."""
        raise NotImplementedError("completions of a shared prompt are not joined by others")

    def drop_branches(self) -> None:
        """Forget every branch; the prompts stay."""
        now = torch.tensor(self.runner.cache.lengths)
        self.runner.forget((now - self.prompt_lengths).tolist())

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Prompt and node of each row: the living branches of a prompt, in order."""
        counts = [0] * len(self.owners)
        nodes = []
        for p, _ in self.places:
            nodes.append(counts[p])
            counts[p] += 1
        return torch.tensor([p for p, _ in self.places]), torch.tensor(nodes)

    def _masks(self, window: int | None) -> Tensor:
        """Which columns each node attends to, (B, N, columns): its prompt, its branch, itself."""
        lengths = torch.tensor(self.runner.cache.lengths)
        width = self._branches.shape[1]
        end = int(lengths.max()) + width
        columns = torch.arange(end)
        kept = columns < lengths[:, None]
        owners = self.owners[:, :end].where(kept, -3)
        mine = owners[:, None] == self._branches[:, :, None]
        seen = mine | (owners == -1)[:, None]
        if window is not None:
            now = (self.prompt_lengths + self.steps)[:, None]
            seen &= (now - self.positions[:, :end] < window)[:, None]
        own = columns == (lengths[:, None] + torch.arange(width))[..., None]
        return seen | own


def fork(runner: Runner, n: int) -> Runner:
    """N rows for each one that a runner has read: branches of its cache, or copies of its texts where it has no tree.

    The runner itself stays as it is, once the branches are dropped (``SharedPromptRunner.drop_branches``).
    """
    if isinstance(runner, TreeRunner):
        return SharedPromptRunner(runner, n)
    assert isinstance(runner, RecomputeRunner), "runners read trees or texts"
    copies = RecomputeRunner(runner.model, runner.readout, 0)
    copies.rows = [list(row) for row in runner.rows for _ in range(n)]
    return copies
