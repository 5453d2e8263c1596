"""``rgtg calibrate``: a score threshold that leaves all but a share of good completions alone."""

from typing import TYPE_CHECKING

import typer

from rgtg.cli.common import Invocation, command, hush_libraries, write_json
from rgtg.config import CalibrateSettings
from rgtg.utils.files import refuse_overwriting

if TYPE_CHECKING:
    from rgtg.types.calibration import CalibrationResult


@command(CalibrateSettings, "scorer input alpha good_above output policy chat_template_kwargs batch_size dtype device")
def run(settings: CalibrateSettings, invocation: Invocation) -> None:
    """Find the threshold of vfd and of --abstain-below from labelled completions of the policy.

    At most a share --alpha of good completions is touched, if those to come are like those in the file.

    [bold]Example[/bold]: rgtg calibrate --scorer SCORER --input labelled.jsonl --alpha 0.05
    """
    from rgtg.data.completions import read_completions

    if settings.output is not None:
        refuse_overwriting([("--input", settings.input), ("--config", invocation.config)], [settings.output])
    rows = read_completions(settings.input)
    hush_libraries()
    from rgtg.evaluation.calibration import calibrate, labels_of
    from rgtg.models.scorers.base import load_named_scorer

    labels_of(rows, settings.good_above)  # before any model is loaded
    scorer = load_named_scorer(settings.scorer, settings.policy, dtype=settings.dtype, device=settings.device)
    result = calibrate(
        scorer, rows, alpha=settings.alpha, good_above=settings.good_above, batch_size=settings.batch_size,
        template_kwargs=settings.chat_template_kwargs,
    )  # fmt: skip
    if settings.output is not None:
        write_json(settings.output, result)
    invocation.emit(result, lambda: _show(result))


def _show(result: "CalibrationResult") -> None:
    bad = "" if result.touched_bad is None else f", and touches {result.touched_bad:.1%} of {result.bad} bad ones"
    typer.echo(f"threshold {result.threshold:.6g}")
    typer.echo(
        f"It touches {result.touched_good:.1%} of {result.good} good completions{bad}. Of new good completions like "
        f"these, it touches at most {result.alpha:.3g} on average."
    )
    typer.echo(
        f"Use: --method vfd --value-threshold {result.threshold:.6g}, or --abstain-below {result.threshold:.6g} with a "
        "token-wise method"
    )
