"""``rgtg score``: rewards of finished completions."""

import json
import math
from typing import TYPE_CHECKING, Any

import typer

from rgtg.cli.common import Invocation, command, hush_libraries, save_settings
from rgtg.config import ScoreSettings
from rgtg.errors import NonFiniteError
from rgtg.utils.files import atomic_write, refuse_overwriting

if TYPE_CHECKING:
    from rgtg.models.scorers.base import Scorer


@command(ScoreSettings, "scorer input output policy batch_size dtype device")
def run(settings: ScoreSettings, invocation: Invocation) -> None:
    """Score completions: reads what rgtg generate writes, adds "reward" to every line."""
    from rgtg.data.completions import read_completions

    refuse_overwriting([("--input", settings.input), ("--config", invocation.config)], [settings.output])
    beside = settings.output.with_name(f"{settings.output.name}.settings.json")
    refuse_overwriting([("--input", settings.input)], [beside])
    rows = read_completions(settings.input)
    hush_libraries()
    from rgtg.models.scorers.base import load_named_scorer

    with atomic_write(settings.output) as partial:
        model = load_named_scorer(settings.scorer, settings.policy, dtype=settings.dtype, device=settings.device)
        rewards = _rewards(model, rows, settings.batch_size)
        scored = [row | {"reward": reward} for row, reward in zip(rows, rewards, strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) for row in scored]
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_settings(settings.output, settings)
    mean = sum(rewards) / len(rewards)
    summary = {"rows": len(rows), "mean_reward": mean, "output": str(settings.output)}
    invocation.emit(summary, lambda: typer.echo(f"{len(rows)} rewards in {settings.output}, mean {mean:.4f}"))


def _rewards(model: "Scorer", rows: list[dict[str, Any]], batch_size: int) -> list[float]:
    """Reward of each row; its ``finish_reason`` says whether it finished or was cut off."""
    from rgtg.data.completions import completion_text

    prompts, texts = [row["prompt"] for row in rows], [completion_text(row) for row in rows]
    finished = [row.get("finish_reason") != "length" for row in rows]
    rewards = model.score(prompts, texts, finished=finished, batch_size=batch_size)
    if bad := [i for i, reward in enumerate(rewards) if not math.isfinite(reward)]:
        raise NonFiniteError(f"the reward of row {bad[0] + 1} is {rewards[bad[0]]}; try --dtype float32")
    return rewards
