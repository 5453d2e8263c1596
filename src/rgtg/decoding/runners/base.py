"""What the decoding loop, `rgtg.decoding.engine.batch.Batch`, needs of an engine. It need not run torch models.

To add an engine, implement `PolicyRunner` over its cache. Every tensor may be on the CPU: logits and states are
computed on wherever they are, in any floating dtype. A call that the engine cannot make raises
``NotImplementedError`` with the reason; the requests that need it fail with that error, and the others go on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self

from torch import Tensor

from rgtg.decoding.request import Request
from rgtg.decoding.runners.token_tree import States


class PolicyState(NamedTuple):
    """What the policy says after the newest token of each row.

    Attributes:
        logits: (B, V) of the next token.
        hidden: (B, H) states of the layer that heads read; None where they read none.
    """

    logits: Tensor
    hidden: Tensor | None


class PolicyRunner(Protocol):
    """The policy over a cache of rows: what the loop needs of an engine.

    Prompts may differ in length. ``tree``, ``commit`` and ``predict`` are called only for scorers that read the
    policy's states at the candidates. ``copy_rows`` serves two ends: requests join a batch, and after an error each
    row is tried alone, on a copy, to find whose error it is.
    """

    def fresh(self, longest: int, width: int) -> Self:
        """A runner of the same policy without rows, with room for ``longest`` tokens and a tree of ``width`` nodes."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> PolicyState:
        """Start with these prompts (B lists of token ids) as rows; what the policy says after them."""
        ...

    def step(self, tokens: Tensor) -> PolicyState:
        """Append one token (B, 1) of dtype long to each row: one forward pass. Changes nothing where it raises."""
        ...

    def tree(self, candidate_ids: Tensor) -> States:
        """States (B, K, H) at candidates (B, K) of the next token; no row grows."""
        ...

    def commit(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Append candidate ``choice[b]`` (B,) of row b, which ``tree`` has read."""
        ...

    def predict(self, states: States) -> PolicyState:
        """What the policy says at states (B, H) that ``tree`` has given: only the output head runs."""
        ...

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        ...

    def copy_rows(self, rows: Sequence[int]) -> Self:
        """A runner of its own with copies of some rows: stepping it leaves these rows as they are."""
        ...

    def branch(self, n: int) -> Self:
        """A runner of n rows for each row; they share what the rows have read, and take this runner's place.

        Only methods that draw several completions of a prompt together need it.
        """
        ...

    def add(self, other: Self) -> None:
        """Append copies of the rows of another runner of the same policy. Adds all of them, or none and raises."""
        ...


class ScorerRunner(Protocol):
    """A scorer that makes forward passes of its own, over a cache of rows.

    It reads chosen tokens late, together with the next candidates, so that steps on which nothing is scored (an
    entropy gate) cost no pass. ``score`` changes nothing where it raises, and can be called again for other rows.
    """

    # Whether ``score`` takes candidates of some rows only (``rows``): those that score from the prefix's state do.
    scores_any_rows: bool

    def fresh(self, longest: int, width: int) -> Self:
        """A runner of the same scorer without rows, with room for ``longest`` tokens and a tree of ``width`` nodes."""
        ...

    def prefill(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]]) -> None:
        """Start with these requests as rows, and read their prompts (the policy's tokens)."""
        ...

    def begin(self, requests: Sequence[Request]) -> Sequence[Sequence[int]] | None:
        """Start rows for these requests without reading; the tokens that its cache must be prefilled with, if any."""
        ...

    def prefilled(self, states: States) -> None:
        """The cache has been prefilled with what ``begin`` asked for; states (B, H) at the last tokens."""
        ...

    def score(self, candidate_ids: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Scores (B, K) of candidates (B, K), fp32, on their device; ``rows`` are those of the candidates."""
        ...

    # Writes into the requests of some rows what ``score`` has counted, once nothing of the step can fail any more; None
    # counts nothing.
    record: Callable[[Sequence[int]], None] | None

    def commit(self, candidate_ids: Tensor, choice: Tensor) -> None:
        """Append candidate ``choice[b]`` (B,) of row b, after ``score``."""
        ...

    def append(self, tokens: Tensor) -> None:
        """Append tokens (B, 1) that were not scored."""
        ...

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row named twice is copied."""
        ...

    def copy_rows(self, rows: Sequence[int]) -> Self:
        """A runner of its own with copies of some rows."""
        ...

    def cached_text(self, row: int, text: list[int]) -> list[int]:
        """The tokens that a row's cache was filled with; ``text`` is the policy's."""
        ...

    def fork(self, request: Request) -> Self:
        """The same single prefilled prompt, for another request with that prompt."""
        ...

    def branch(self, n: int, requests: Sequence[Request]) -> Self:
        """A runner of n rows for each row, one for each request; they take this runner's place."""
        ...

    def set_requests(self, requests: Sequence[Request]) -> None:
        """The rows belong to these requests from now on."""
        ...

    def read_pending(self) -> None:
        """Read the tokens that wait, where ``add`` would do so first. Changes nothing where it raises."""
        ...

    def add(self, other: Self) -> None:
        """Append copies of the rows of another runner of the same scorer."""
        ...
