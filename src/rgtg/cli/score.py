"""``rgtg score``: rewards of finished completions."""

import json
import math
from typing import TYPE_CHECKING, Any

import typer

from rgtg.cli.common import Invocation, command, hush_libraries, save_settings
from rgtg.config import ScoreSettings
from rgtg.errors import DataError, NonFiniteError, UsageError
from rgtg.utils.files import atomic_write, refuse_overwriting

if TYPE_CHECKING:
    from rgtg.models.scorers.base import Scorer


@command(ScoreSettings, "scorer input output policy chat_template_kwargs batch_size dtype device")
def run(settings: ScoreSettings, invocation: Invocation) -> None:
    """Score completions: reads what rgtg generate writes, adds "reward" to every line."""
    from rgtg.data.completions import is_chat, read_completions

    refuse_overwriting([("--input", settings.input), ("--config", invocation.config)], [settings.output])
    beside = settings.output.with_name(f"{settings.output.name}.settings.json")
    refuse_overwriting([("--input", settings.input)], [beside])
    rows = read_completions(settings.input)
    hush_libraries()
    from rgtg.models.scorers.base import load_named_scorer
    from rgtg.tokenization.conversation import check_template_kwargs

    with atomic_write(settings.output) as partial:
        model = load_named_scorer(settings.scorer, settings.policy, dtype=settings.dtype, device=settings.device)
        if settings.chat_template_kwargs:
            if not any(is_chat(row) for row in rows):
                raise UsageError("--chat-template-kwargs applies to chats, and every prompt is plain text")
            check_template_kwargs(model.tokenizer, settings.chat_template_kwargs)
        rewards = _rewards(model, rows, settings)
        scored = [row | {"reward": reward} for row, reward in zip(rows, rewards, strict=True)]
        lines = [json.dumps(row, ensure_ascii=False) for row in scored]
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_settings(settings.output, settings)
    mean = sum(rewards) / len(rewards)
    summary = {"rows": len(rows), "mean_reward": mean, "output": str(settings.output)}
    invocation.emit(summary, lambda: typer.echo(f"{len(rows)} rewards in {settings.output}, mean {mean:.4f}"))


def _of_line(error: DataError, places: list[int], settings: ScoreSettings, rows: list[dict[str, Any]]) -> DataError:
    """The same error, saying in which line of the file its row is, and the row's id if it has one.

    Args:
        error: about one of the rows at ``places``.
        places: of the rows that were scored together.
        settings: of the run.
        rows: of the file.
    """
    from rgtg.data.sources import iter_rows

    if error.row is None and len(places) > 1:
        return error
    row = places[error.row or 0]
    line = [number for number, _ in iter_rows(settings.input, None)][row]
    own = f" (id {rows[row]['id']})" if "id" in rows[row] else ""
    return type(error)(f"{settings.input}:{line}{own}: {error}", row=row)


def _rewards(model: "Scorer", rows: list[dict[str, Any]], settings: ScoreSettings) -> list[float]:
    """Reward of each row; its ``finish_reason`` says whether it finished or was cut off.

    A chat is read by the scorer's own chat template, with the row's variables.
    """
    from rgtg.data.completions import UNFINISHED, completion_source, completion_text
    from rgtg.data.formats import to_template_kwargs

    own = [to_template_kwargs(row) or settings.chat_template_kwargs for row in rows]
    rewards = [0.0] * len(rows)
    for kwargs in {json.dumps(one, sort_keys=True): one for one in own}.values():
        places = [i for i, one in enumerate(own) if one == kwargs]
        try:
            scores = model.score(
                [completion_source(rows[i]) for i in places], [completion_text(rows[i]) for i in places],
                finished=[rows[i].get("finish_reason") not in UNFINISHED for i in places],
                batch_size=settings.batch_size, chat_template_kwargs=kwargs,
            )  # fmt: skip
        except DataError as error:
            raise _of_line(error, places, settings, rows) from error
        for i, score in zip(places, scores, strict=True):
            rewards[i] = score
    if bad := [i for i, reward in enumerate(rewards) if not math.isfinite(reward)]:
        raise NonFiniteError(f"the reward of row {bad[0] + 1} is {rewards[bad[0]]}; try --dtype float32")
    return rewards
