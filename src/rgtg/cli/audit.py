"""``rgtg audit``: is a scorer suitable for token-wise guidance?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgtg.cli.common import Invocation, command, hush_libraries, resumable, save_settings, write_json
from rgtg.config import AuditSettings
from rgtg.types.base import Interval
from rgtg.utils.files import atomic_write, make_folder, refuse_overwriting

if TYPE_CHECKING:
    from rgtg.evaluation.audit.candidate_rollouts import CandidateRollouts
    from rgtg.models.loading.policy import Policy
    from rgtg.types.audit import AuditPoint, AuditResult
    from rgtg.types.rollouts import CandidateFigures, RolloutAuditResult

_WRITTEN = ("audit.json", "audit.png", "rollout-audit.json", "rollout-audit.png", "settings.json")


@command(
    AuditSettings,
    "scorer pairs policy output chat_template_kwargs batch_size bootstrap on_bad dtype device",
    panels={
        "Audit of candidates": "rollouts prompts reward rollouts_file prefixes candidates per_candidate max_new_tokens "
        "beta kl_nats"
    },
)
def run(settings: AuditSettings, invocation: Invocation) -> None:
    """Measure a scorer on partial sequences: on pairs by prefix length, or on the candidates of one prefix."""
    hush_libraries()
    from rgtg.evaluation.plots import new_figure

    if settings.output:
        new_figure()  # a missing extra, and a folder that cannot be written, are errors before the work
        make_folder(settings.output)
        read = [
            (f"--{name.replace('_', '-')}", getattr(settings, name)) for name in ("pairs", "prompts", "rollouts_file")
        ]
        refuse_overwriting(read, [settings.output / name for name in _WRITTEN])
    model, loaded = _load(settings)
    by_pairs = _audit_pairs(model, settings) if settings.pairs else None
    by_rollouts = None
    if settings.rollouts:
        with resumable(f"the roll-outs are kept in {_rollouts_path(settings)}; the same command resumes from them"):
            by_rollouts = _audit_rollouts(model, loaded, settings, quiet=invocation.silent)
    if settings.output:
        save_settings(settings.output, settings)
    results = [result for result in (by_pairs, by_rollouts) if result is not None]
    printed: Any = results[0]
    if by_pairs and by_rollouts:
        both = {"pairs": by_pairs, "rollouts": by_rollouts}
        printed = {name: json.loads(result.model_dump_json()) for name, result in both.items()}  # NaN as text
    invocation.emit(printed, lambda: show(*results))


def _load(settings: AuditSettings) -> "tuple[Any, Policy | None]":
    """Load the scorer, and the policy if it is needed; a head on its hidden states shares it."""
    from rgtg.models.loading.policy import load_policy
    from rgtg.models.scorers.base import load_named_scorer, load_scorer, trunk_of

    if not settings.makes_rollouts:
        return load_named_scorer(settings.scorer, settings.policy, dtype=settings.dtype, device=settings.device), None
    assert settings.policy is not None, "checked with the settings"
    policy = load_policy(settings.policy, dtype=settings.dtype, device=settings.device)
    mine = policy if trunk_of(settings.scorer) == "own" else None
    return load_scorer(settings.scorer, policy=mine, dtype=settings.dtype, device=settings.device), policy


def _audit_pairs(model: Any, settings: AuditSettings) -> "AuditResult":
    from rgtg.evaluation.audit.prefix_accuracy import audit_prefixes
    from rgtg.evaluation.plots import plot_audit

    assert settings.pairs is not None, "called with pairs only"
    result = audit_prefixes(
        model,
        settings.pairs,
        batch_size=settings.batch_size,
        bootstrap=settings.bootstrap,
        seed=settings.seed,
        on_bad=settings.on_bad,
        rejects=settings.output / "rejects.jsonl" if settings.output and settings.on_bad == "skip" else None,
        chat_template_kwargs=settings.chat_template_kwargs,
    )
    if settings.output:
        with atomic_write(settings.output / "audit.png") as partial:
            plot_audit({result.scorer: result}, partial, format="png")
        write_json(settings.output / "audit.json", result)
    return result


def _audit_rollouts(
    model: Any, policy: "Policy | None", settings: AuditSettings, *, quiet: bool
) -> "RolloutAuditResult":
    from rgtg.evaluation.audit.candidate_ranking import audit_rollouts
    from rgtg.evaluation.plots import plot_rollout_audit

    result = audit_rollouts(
        model,
        _rollouts(policy, settings, quiet=quiet),
        beta=settings.beta,
        kl_nats=settings.kl_nats,
        batch_size=settings.batch_size,
        bootstrap=settings.bootstrap,
        seed=settings.seed,
    )
    if settings.output:
        with atomic_write(settings.output / "rollout-audit.png") as partial:
            plot_rollout_audit({result.scorer: result}, partial, format="png")
        write_json(settings.output / "rollout-audit.json", result)
    return result


def _rollouts(policy: "Policy | None", settings: AuditSettings, *, quiet: bool) -> "CandidateRollouts":
    """Make, continue or read the roll-outs."""
    from rich.console import Console
    from rich.progress import Progress

    from rgtg.evaluation.audit.candidate_rollouts import make_rollouts, read_rollouts
    from rgtg.models.scorers.reward_model import PrefixScorer

    if policy is None:
        assert settings.rollouts_file is not None, "checked with the settings"
        return read_rollouts(settings.rollouts_file)
    assert settings.prompts is not None, "checked with the settings"
    assert settings.reward is not None, "checked with the settings"
    reward = PrefixScorer.from_pretrained(settings.reward, dtype=settings.dtype, device=settings.device)
    with Progress(disable=quiet, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("rolling out", total=settings.prefixes)
        return make_rollouts(
            policy,
            settings.prompts,
            reward,
            path=_rollouts_path(settings),
            prefixes=settings.prefixes,
            candidates=settings.candidates,
            per_candidate=settings.per_candidate,
            max_new_tokens=settings.max_new_tokens,
            chat_template_kwargs=settings.chat_template_kwargs,
            seed=settings.seed,
            batch_size=settings.rollouts_batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _rollouts_path(settings: AuditSettings) -> Path:
    return settings.rollouts_file or (settings.output or Path()) / "rollouts.jsonl"


def show(*results: "AuditResult | RolloutAuditResult") -> None:
    """Print each audit as a table and its verdict."""
    from rich.console import Console

    from rgtg.types.audit import AuditResult

    console = Console()
    for result in results:
        if isinstance(result, AuditResult):
            console.print(_pairs_table(result))
            console.print(f"calibration error {result.calibration_error:.3f}; objective {result.objective}")
            if result.length_correlation and result.label_length_correlation:
                console.print(_length_line(result.length_correlation, result.label_length_correlation))
        else:
            console.print(_candidates_table(result))
            console.print(
                f"beta {result.beta:.3g}, {result.kl_nats:.3f} nats per token; reward {result.reward}; "
                f"{result.per_candidate} roll-outs of each of {result.candidates} candidates "
                f"(standard error {result.standard_error:.3g})"
            )
        console.print(result.verdict)


def _length_line(scores: "Interval", labels: "Interval") -> str:
    """How far scores follow length, beside how far the labels do."""
    more = scores.low > labels.high
    return (
        f"correlation with length: scores {scores.mean:+.2f} ({scores.low:+.2f} to {scores.high:+.2f}), labels "
        f"{labels.mean:+.2f} ({labels.low:+.2f} to {labels.high:+.2f})"
        + ("; the scorer favours length more than the labels do" if more else "")
    )


def _pairs_table(result: "AuditResult") -> Any:
    from rich.table import Table

    table = Table("prefix", "accuracy", "95 % interval", "margin", "ties", "pairs", title=f"audit of {result.scorer}")
    for point in result.by_tokens:
        table.add_row(f"{point.position:.0f} tokens", *_cells(point))
    table.add_section()
    for point in result.by_fraction:
        table.add_row(f"{point.position:.0%}", *_cells(point))
    return table


def _cells(point: "AuditPoint") -> list[str]:
    a, m = point.accuracy, point.margin
    return [f"{a.mean:.3f}", f"{a.low:.3f}–{a.high:.3f}", f"{m.mean:+.3f}", str(point.ties), str(point.pairs)]


def _candidates_table(result: "RolloutAuditResult") -> Any:
    from rich.table import Table

    title = f"candidates of one prefix, chosen by {result.scorer}"
    table = Table("written", "Spearman", "at most", "guided gain", "norm. regret", "n", title=title)
    for figures in result.by_position:
        table.add_row(f"< {figures.position:.0%}", *_candidate_cells(figures))
    table.add_section()
    table.add_row("all", *_candidate_cells(result.overall))
    return table


def _candidate_cells(figures: "CandidateFigures") -> list[str]:
    def cell(value: Interval, form: str = ".2f") -> str:
        return f"{value.mean:+{form}} ± {(value.high - value.low) / 2:{form}}"

    guided = figures.guided
    return [
        cell(figures.spearman), f"{figures.ceiling:.2f}", cell(guided.gain, ".2g"), cell(guided.normalised_regret),
        str(figures.prefixes),
    ]  # fmt: skip
