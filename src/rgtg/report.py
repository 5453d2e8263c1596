"""Results and audits as one self-contained HTML page; reads files' records, loads no model."""

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rgtg.evaluation.figures import COLOURS, new_figure, plot_audit
from rgtg.types import AuditResult, ComparisonResult, Interval, MethodResult

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d0d7de; --soft: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --soft: #161b22; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .6rem; text-align: left; vertical-align: top; }
th { background: var(--soft); }
small { opacity: .7; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { background: #ffffff; border-radius: 6px; max-width: 100%; height: auto; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .8rem; }
.sample { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; background: var(--soft);
  white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
"""
_COLUMNS = {
    "reward": "reward",
    "kl_nats": "KL to the policy (nats)",
    "perplexity": "perplexity under the policy",
    "distinct_2": "distinct bigrams",
    "length_tokens": "tokens",
}


def html_report(
    result: ComparisonResult, audits: Mapping[str, AuditResult], *, title: str = "Comparison", intro: str = ""
) -> str:
    """The whole page as text: figures inline, nothing fetched, readable in light and dark.

    Args:
        result: what ``rgtg compare`` or the demo measured.
        audits: audits to draw, by label; may be empty.
        title: of the page.
        intro: a paragraph before the figures, as plain text.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if intro:
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in intro.split("\n\n")]
    parts += ["<h2>Reward</h2>", _reward_table(result), _frontier(result.methods)]
    if audits:
        parts += ["<h2>Scorers on partial sequences</h2>", _audit_figure(audits), _verdicts(audits)]
    parts += ["<h2>Samples</h2>", _samples(result.methods), "<h2>How this was made</h2>", _provenance(result)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _reward_table(result: ComparisonResult) -> str:
    """All methods, best reward first; means over prompts with 95 % intervals, then cost."""
    shown = [name for name in _COLUMNS if all(name in row.metrics for row in result.methods)]
    head = "".join(f"<th>{label}</th>" for label in ["method", *(_COLUMNS[n] for n in shown), *_COST])
    rows = sorted(result.methods, key=lambda row: -row.metrics["reward"].mean)
    body = "".join(
        "<tr>"
        + "".join([f"<td>{html.escape(row.label)}</td>", *(_cell(row.metrics[n]) for n in shown), _cost(row)])
        + "</tr>"
        for row in rows
    )
    what = f"Reward: {html.escape(result.reward)}, on {result.prompts} prompts. Means with 95 % bootstrap intervals."
    return f'<p>{what}</p><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_COST = ("policy calls", "scorer calls", "tokens per second")


def _cell(interval: Interval) -> str:
    return f"<td>{interval.mean:.3g} <small>{interval.low:.3g} to {interval.high:.3g}</small></td>"


def _cost(row: MethodResult) -> str:
    return f"<td>{row.policy_calls}</td><td>{row.scorer_calls}</td><td>{row.tokens_per_second:.0f}</td>"


def _frontier(methods: Sequence[MethodResult]) -> str:
    """Reward against KL: one colour per method, its betas joined."""
    figure, axes = new_figure(7.2, 4.4)
    families: dict[str, list[MethodResult]] = {}
    for row in methods:
        families.setdefault(row.label.split(" β=")[0], []).append(row)
    for i, (label, rows) in enumerate(families.items()):
        rewards = [row.metrics["reward"] for row in rows]
        spread = [[r.mean - r.low for r in rewards], [r.high - r.mean for r in rewards]]
        axes.errorbar(
            [row.metrics["kl_nats"].mean for row in rows], [r.mean for r in rewards], yerr=spread,
            color=COLOURS[i % len(COLOURS)], marker="o", capsize=3, label=label,
        )  # fmt: skip
    axes.set(xlabel=_COLUMNS["kl_nats"], ylabel="reward")
    axes.legend()
    return _figure(figure, "Reward against KL to the policy, with 95 % intervals")


def _audit_figure(audits: Mapping[str, AuditResult]) -> str:
    buffer = io.StringIO()
    plot_audit(audits, buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), "Pairs ordered rightly, by share of the completion read")


def _figure(figure: Any, caption: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), caption)


def _inline(svg: str, caption: str) -> str:
    drawing = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
    return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _verdicts(audits: Mapping[str, AuditResult]) -> str:
    rows = "".join(f"<li><b>{html.escape(k)}</b>: {html.escape(a.verdict)}</li>" for k, a in audits.items())
    return f"<ul>{rows}</ul>"


def _samples(methods: Sequence[MethodResult]) -> str:
    """For each prompt, every method's completion side by side."""
    count = min((len(row.samples) for row in methods), default=0)
    blocks = []
    for i in range(count):
        prompt = html.escape(str(methods[0].samples[i]["prompt"]))
        cells = "".join(_sample(row.label, row.samples[i]) for row in methods)
        blocks.append(f'<h3>Prompt {i + 1}</h3><div class="sample">{prompt}</div><div class="samples">{cells}</div>')
    return "\n".join(blocks)


def _sample(label: str, sample: Mapping[str, Any]) -> str:
    head = f"<b>{html.escape(label)}</b> <small>reward {sample['reward']:.2f}</small>"
    return f'<div class="sample">{head}\n{html.escape(str(sample["text"]).strip())}</div>'


def _provenance(result: ComparisonResult) -> str:
    plain = result.provenance.model_dump(exclude_none=True)
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in plain.items())
    return f'<div class="wide"><table>{rows}</table></div>'
