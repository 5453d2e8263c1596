"""``rgtg score``: rewards of finished completions."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rgtg.cli.common import (
    AsJson,
    Config,
    Overrides,
    Quiet,
    Seed,
    atomic_write,
    emit,
    hush_libraries,
    refuse_overwriting,
    save_settings,
    verb,
)
from rgtg.config import ScoreSettings
from rgtg.errors import NonFiniteError

if TYPE_CHECKING:
    from rgtg.models.scorers.base import Scorer


@verb
def command(
    scorer: Annotated[str | None, typer.Option(help="Reward model: folder or hub id.")] = None,
    input: Annotated[Path | None, typer.Option(help="JSONL of prompt with text or completion.")] = None,
    output: Annotated[Path | None, typer.Option(help="The same lines with a reward each.")] = None,
    policy: Annotated[str | None, typer.Option(help="Of a head on its states, where that policy has moved.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default 8.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Score completions: reads what rgtg generate writes, adds "reward" to every line."""
    flags = {k: v for k, v in locals().items() if k in ScoreSettings.model_fields}
    settings = ScoreSettings.resolve(config, overrides, flags)
    from rgtg.data.completions import read_completions

    refuse_overwriting([("--input", settings.input), ("--config", config)], [settings.output])
    refuse_overwriting(
        [("--input", settings.input)], [settings.output.with_name(f"{settings.output.name}.settings.json")]
    )
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
    emit(
        summary,
        as_json=as_json,
        quiet=quiet,
        show=lambda: typer.echo(f"{len(rows)} rewards in {settings.output}, mean {mean:.4f}"),
    )


def _rewards(model: "Scorer", rows: list[dict[str, Any]], batch_size: int) -> list[float]:
    """Reward of each row; a row says by ``finish_reason`` whether it ended or was cut."""
    from rgtg.data.completions import completion_text

    prompts, texts = [row["prompt"] for row in rows], [completion_text(row) for row in rows]
    finished = [row.get("finish_reason") != "length" for row in rows]
    rewards = model.score(prompts, texts, finished=finished, batch_size=batch_size)
    if bad := [i for i, reward in enumerate(rewards) if not math.isfinite(reward)]:
        raise NonFiniteError(f"the reward of row {bad[0] + 1} is {rewards[bad[0]]}; try --dtype float32")
    return rewards
