"""``rgtg theory``: what token-wise guidance does, by exact enumeration."""

from typing import TYPE_CHECKING

from rgtg.cli.common import Invocation, command
from rgtg.config import TheorySettings

if TYPE_CHECKING:
    from rich.table import Table

    from rgtg.evaluation.theory import TheoryResult


@command(TheorySettings, "vocabulary length beta")
def run(settings: TheorySettings, invocation: Invocation) -> None:
    """Enumerate a tiny random world: why scorers must be trained on prefixes, and what guidance then samples from."""
    from rgtg.evaluation.theory import exhibits

    result = exhibits(**settings.model_dump())
    invocation.emit(result, lambda: _show(result))


def _show(result: "TheoryResult") -> None:
    from rich.console import Console

    console = Console()
    console.print(
        f"{result.vocabulary} tokens, completions of {result.length}, β = {result.beta:g}, seed {result.seed}: "
        "every figure is an exact sum over all completions\n"
    )
    console.print(_equal_loss(result))
    console.print(_identities(result))
    console.print(_guidance(result))


def _equal_loss(result: "TheoryResult") -> "Table":
    from rich.table import Table

    found = result.equal_loss
    table = Table(title="1  Two scorers with equal full-sequence loss", title_justify="left")
    table.add_column("")
    table.add_column("A", justify="right")
    table.add_column("B", justify="right")
    table.add_row("full-sequence loss", *(f"{loss:.4f}" for loss in found.full_loss))
    table.add_row("prefix loss", *(f"{loss:.4f}" for loss in found.prefix_loss))
    compared = f"{found.opposite} of {found.prefix_comparisons}"
    table.add_row("pairs of prefixes ordered oppositely", compared, compared)
    table.add_row(
        f"mean reward, sampled token by token (policy {found.policy_reward:.3f})",
        *(f"{reward:.3f}" for reward in found.sampled_reward),
    )
    table.add_row(
        f"reward of the greedy completion (best {found.best_reward:.3f})",
        *(f"{reward:.3f}" for reward in found.greedy_reward),
    )
    return table


def _identities(result: "TheoryResult") -> "Table":
    from rich.table import Table

    table = Table(title="2, 3  Identities of the guided policy", title_justify="left")
    table.add_column("")
    table.add_column("largest difference", justify="right")
    table.add_row("guided policy against the ratio of two RLHF policies", f"{result.ratio.largest:.1e}")
    table.add_row("score with and without a function of y_{<i} added", f"{result.prefix_function.largest:.1e}")
    return table


def _guidance(result: "TheoryResult") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title="4  Token-wise guidance against the RLHF policy π·exp(β·r)/Z", title_justify="left")
    table.add_column("scorer of prefixes")
    table.add_column("KL, nats", justify="right")
    table.add_column("mean reward", justify="right")
    for row in result.guidance:
        # fp32 leaves about 1e-7 either side of zero
        table.add_row(Text(row.scorer), f"{max(0.0, row.kl_nats):.4f}", f"{row.reward:.3f}")
    return table
