"""results.json and audits → one self-contained HTML page with its figures inline; loads no model."""

import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rgtg.errors import DataError
from rgtg.evaluation.figures import COLOURS, draw_audits, new_figure
from rgtg.outputs import write_text
from rgtg.types import AuditResult, ComparisonResult, Interval, MethodResult, Provenance

# Matplotlib wants a real colour; in the page's SVG it becomes the text colour, which follows light and dark.
_INK = "#010203"
_COLOURS = (*COLOURS[:-1], _INK)  # for black, which a dark page would hide

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5b6270; --line: #d9dce1; --paper: #ffffff; --card: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3af; --line: #3a3f47; --paper: #16181c; --card: #20242a }
}
* { box-sizing: border-box }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums }
th { white-space: normal; vertical-align: bottom } th:first-child, td:first-child { text-align: left }
th, small, figcaption, footer { color: var(--soft); font-weight: 600 } small, figcaption, footer { font-weight: 400 }
figure { margin: 1rem 0 } svg { max-width: 100%; height: auto; color: var(--ink) }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem }
.card, blockquote { background: var(--card); border-radius: .4rem; padding: .6rem .9rem; margin: 0 }
blockquote { margin: 1.2rem 0 .8rem; border-left: 4px solid var(--line) } .text { white-space: pre-wrap;
  overflow-wrap: anywhere }
.card header { display: flex; justify-content: space-between; font-weight: 600 }
footer { margin-top: 3rem; border-top: 1px solid var(--line); font-size: .85rem; overflow-wrap: anywhere }
"""

_HEADINGS = {
    "reward": "reward", "kl_nats": "KL to the policy, nats", "perplexity": "perplexity",
    "distinct_2": "distinct\u20112", "length_tokens": "length, tokens",
}  # fmt: skip


def html_report(
    result: ComparisonResult, audits: Mapping[str, AuditResult] | None = None, *, title: str, intro: str = ""
) -> str:
    """One HTML page: rewards, reward against KL, audits, samples side by side, provenance.

    Nothing outside the page is loaded; every text in it is escaped.

    Args:
        result: of ``rgtg compare`` or ``rgtg demo``.
        audits: name of a scorer → its audit; none leaves that part out.
        title: heading of the page.
        intro: plain text; each line becomes a paragraph.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    parts = [
        f"<h1>{_text(title)}</h1>",
        *(f"<p>{_text(line)}</p>" for line in intro.splitlines() if line.strip()),
        _rewards(result),
        _audits(audits) if audits else "",
        _samples(result),
        _provenance(result.provenance, audits or {}),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def write_report(
    results: Path, output: Path, *, audits: Mapping[str, Path] | None = None, title: str = "Comparison", intro: str = ""
) -> None:
    """Read results.json and audit.json files and write the page, whole or not at all.

    Raises:
        DataError: a file that is not what it should be.
        OutputError: the page cannot be written.
    """
    loaded = {name: _load(AuditResult, path) for name, path in (audits or {}).items()}
    page = html_report(_load(ComparisonResult, results), loaded, title=title, intro=intro)
    write_text(output, page)


def _load(kind: Any, path: Path) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path} is not a valid {kind.__name__}: {where}: {first['msg']}") from error


def _rewards(result: ComparisonResult) -> str:
    ordered = sorted(result.methods, key=_reward_order)
    metrics = [name for name in ordered[0].metrics if name != "reward"] if ordered else []
    named = ["method", f"{result.reward} (95\u00a0% interval)", *(_HEADINGS.get(m, m) for m in metrics)]
    headings = [*named, "policy calls", "scorer calls", "tokens/s"]
    rows = [_method_cells(row, metrics) for row in ordered]
    drawn = [row for row in ordered if _drawable(row)]
    heading = f"<h2>Reward on {result.prompts} prompts</h2>{_table(headings, rows)}"
    if not drawn:
        return heading
    figure = _figure(lambda axes: _draw_rewards(axes, drawn, result.reward), "Reward against distance from the policy")
    return (
        f"{heading}{figure}<p><small>Right is farther from the policy, up is better. Bars: 95 % intervals of the "
        "reward. A greedy method's KL is minus the log-probability of its completion; best-of-n's is an upper bound."
        "</small></p>"
    )


def _drawable(row: MethodResult) -> bool:
    return "kl_nats" in row.metrics and math.isfinite(row.metrics["kl_nats"].mean + row.metrics["reward"].mean)


def _reward_order(row: MethodResult) -> float:
    mean = row.metrics["reward"].mean
    return math.inf if math.isnan(mean) else -mean


def _method_cells(row: MethodResult, metrics: Sequence[str]) -> list[str]:
    rest = [_text(_number(row.metrics[m].mean)) if m in row.metrics else "–" for m in metrics]
    costs = [f"{row.policy_calls:,}", f"{row.scorer_calls:,}", _number(row.tokens_per_second)]
    return [_text(row.label), _interval(row.metrics["reward"]), *rest, *costs]


def _audits(audits: Mapping[str, AuditResult]) -> str:
    first = next(iter(audits.values()))
    headings = ["share read", *audits]
    rows = [
        [f"{point.position:.0%}", *(_at(audit, point.position) for audit in audits.values())]
        for point in first.by_fraction
    ]
    verdicts = "".join(f"<p><b>{_text(name)}</b>: {_text(audit.verdict)}</p>" for name, audit in audits.items())
    figure = _figure(lambda axes: _draw_audits(axes, audits), "Accuracy by share of the completion read")
    return (
        f"<h2>Scorers on partial completions</h2>{figure}{verdicts}"
        f"{_table(headings, rows)}<p><small>Share of pairs whose preferred side has the higher score when both are "
        "read that far; pairs still identical there are left out.</small></p>"
    )


def _at(audit: AuditResult, position: float) -> str:
    for point in audit.by_fraction:
        if math.isclose(point.position, position):
            return _interval(point.accuracy)
    return "–"


def _samples(result: ComparisonResult) -> str:
    count = min((len(row.samples) for row in result.methods), default=0)
    shown = "".join(_sample(result, i) for i in range(count))
    return f"<h2>Completions side by side</h2>{shown}" if shown else ""


def _sample(result: ComparisonResult, index: int) -> str:
    prompt = str(result.methods[0].samples[index].get("prompt", ""))
    ordered = sorted(result.methods, key=_reward_order)
    cards = "".join(_card(row.label, row.samples[index]) for row in ordered)
    return f'<blockquote class="text">{_text(prompt)}</blockquote><div class="cards">{cards}</div>'


def _card(label: str, sample: Mapping[str, Any]) -> str:
    reward = sample.get("reward")
    points = _number(reward) if isinstance(reward, int | float) else ""
    cut = "" if sample.get("finish_reason", "stop") == "stop" else " <small>(cut off)</small>"
    text = f'<div class="text">{_text(str(sample.get("text", "")).strip())}{cut}</div>'
    return f'<div class="card"><header><span>{_text(label)}</span><span>{points}</span></header>{text}</div>'


def _provenance(of: Provenance, audits: Mapping[str, AuditResult]) -> str:
    facts = {
        "command": of.command, "rgtg": of.version, "git commit": of.git_commit, "seed": of.seed, "dtype": of.dtype,
        "device": of.device, "settings": _pairs(of.settings), "models": _pairs(of.models),
        "data": _pairs(of.data),
    }  # fmt: skip
    facts |= {
        f"audit of {name}": f"{audit.pairs} pairs, {_pairs(audit.provenance.data)}" for name, audit in audits.items()
    }
    lines = "".join(f"<div><b>{_text(k)}</b> {_text(str(v))}</div>" for k, v in facts.items() if v not in (None, ""))
    return f"<footer>{lines}</footer>"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; headings are text."""
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _interval(value: Interval) -> str:
    if math.isnan(value.mean):
        return "–"
    return f"{_number(value.mean)} <small>{_number(value.low)} to {_number(value.high)}</small>"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _figure(draw: Any, caption: str) -> str:
    """An inline SVG whose ink is the page's text colour.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure, axes = new_figure(7.6)
    draw(axes)
    _use_ink(axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    drawn = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    labelled = drawn.replace("<svg", f'<svg role="img" aria-label="{_text(caption)}"', 1)
    return f"<figure>{labelled}<figcaption>{_text(caption)}</figcaption></figure>"


def _use_ink(axes: Any) -> None:
    axes.legend(frameon=False, fontsize="small", labelcolor=_INK)
    axes.tick_params(colors=_INK)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(_INK)
    for side, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side in ("left", "bottom"))


def _draw_rewards(axes: Any, rows: Sequence[MethodResult], reward: str) -> None:
    """One curve per method through its betas."""
    curves = {row.label: row.label.partition(" β=")[0] for row in rows}
    for i, curve in enumerate(dict.fromkeys(curves.values())):
        mine = sorted((row for row in rows if curves[row.label] == curve), key=lambda row: row.metrics["kl_nats"].mean)
        rewards = [row.metrics["reward"] for row in mine]
        spread = [[max(0.0, r.mean - r.low) for r in rewards], [max(0.0, r.high - r.mean) for r in rewards]]
        axes.errorbar(
            [row.metrics["kl_nats"].mean for row in mine], [r.mean for r in rewards], yerr=spread, label=curve,
            color=_COLOURS[i % len(_COLOURS)], marker="os^Dv*P"[i % 7], capsize=2, linewidth=1.4,
        )  # fmt: skip
    axes.set_xscale("symlog", linthresh=1)  # over-steered methods lie hundreds of nats away
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="KL to the policy, nats (logarithmic beyond 1)", ylabel=reward.replace("$", r"\$")
    )  # $ opens mathematics


def _draw_audits(axes: Any, audits: Mapping[str, AuditResult]) -> None:
    draw_audits(axes, audits, _COLOURS)
    axes.set_ylabel("pairs ordered rightly")
