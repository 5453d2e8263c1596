"""The section of completions side by side; words that the baseline lacks are marked."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from rgtg.data.formats import readable_prompt
from rgtg.report.comparison import Kind, by_reward, kinds, representatives
from rgtg.report.document import Card, Paragraph, Sample, Section
from rgtg.report.number_format import number
from rgtg.types.comparison import ComparisonResult, MethodResult

_WORD = re.compile(r"\s+|\S+")


def samples(result: ComparisonResult) -> Section:
    """The first completions of every method. The baseline of each kind of runs comes first and has no marks."""
    shown = [run for run in representatives(result) if run.samples]
    count = min((len(run.samples) for run in shown), default=0)
    if not count:
        return Section("samples", "", [])
    groups = {kind.title: _with_control(kind) for kind in kinds(result, shown)}
    bases = [base.label for base, _ in groups.values() if base]
    note = f"Marked: words that the completion of {' or '.join(bases)} lacks in that position." if bases else ""
    left_out = len(result.methods) - len(shown)
    if left_out:
        note += f" {left_out} rows of other strengths are left out; a comparison's completions.jsonl holds them all."
    blocks = [_sample(groups, i) for i in range(count)]
    return Section("samples", "Completions side by side", [Paragraph(note.strip(), soft=True), *blocks])


def marked_words(text: str, baseline: str) -> list[tuple[str, bool]]:
    """Words and the white space between them, each with whether the baseline lacks it.

    difflib finds the common subsequences of words. White space is marked only between two marked words.

    >>> marked_words("The red dog", "The dog")
    [('The ', False), ('red', True), (' dog', False)]
    """
    mine, theirs = text.split(), baseline.split()
    matcher = difflib.SequenceMatcher(None, theirs, mine, autojunk=False)
    new = [True] * len(mine)
    for match in matcher.get_matching_blocks():
        new[match.b : match.b + match.size] = [False] * match.size
    runs: list[tuple[str, bool]] = []
    word, pieces = -1, _WORD.findall(text)
    for piece in pieces:
        space = piece.isspace()
        word += not space
        inside = space and 0 <= word < len(new) - 1 and new[word] and new[word + 1]
        flag = inside or (not space and new[word])
        if runs and runs[-1][1] == flag:
            runs[-1] = (runs[-1][0] + piece, flag)
        else:
            runs.append((piece, flag))
    return runs


def _with_control(kind: Kind) -> tuple[MethodResult | None, list[MethodResult]]:
    """The control of a kind, if it is shown, and all its runs: the control first, then by reward."""
    base = next((run for run in kind.runs if run.label == kind.control), None)
    first = [] if base is None else [base]
    return base, first + [run for run in by_reward(kind.runs) if run is not base]


def _sample(groups: Mapping[str, tuple[MethodResult | None, Sequence[MethodResult]]], index: int) -> Sample:
    cards: dict[str, list[Card]] = {}
    for title, (base, runs) in groups.items():
        baseline = _text(base.samples[index]) if base else None
        cards[title] = [_card(run.label, run.samples[index], baseline if run is not base else None) for run in runs]
    ordered = [run for _, runs in groups.values() for run in runs]
    prompt = _prompt(ordered[0].samples[index])
    return Sample(prompt, cards, _trace(prompt, [(run, run.samples[index]) for run in ordered]))


def _trace(prompt: str, ordered: Sequence[tuple[MethodResult, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """The steps of the runs that have a trace, as a document for the trace viewer."""
    branches = [
        _branch(i, run, sample) for i, (run, sample) in enumerate(ordered) if sample.get("steps") and "rule" in sample
    ]
    return {"format": "rgtg-trace", "version": 1, "prompt": prompt, "branches": branches} if branches else None


def _branch(number: int, run: MethodResult, sample: Mapping[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {name: sample.get(name) for name in ("score", "policy_calls", "scorer_calls")}
    guided, policy = sample.get("guided_log_prob"), sample.get("policy_log_prob")
    if _is_number(guided) and _is_number(policy):
        figures["kl_nats"] = guided - policy
    return {
        "id": number, "parent": None, "label": run.label, "side": "guided" if sample["rule"]["scorers"] else "unguided",
        "rule": sample["rule"], "steps": sample["steps"], "text": str(sample.get("text", "")),
        "finish_reason": str(sample.get("finish_reason", "stop")),
        "guidance": {name: value for name, value in figures.items() if _is_number(value)},
        "reward": sample["reward"] if _is_number(sample.get("reward")) else None,
    }  # fmt: skip


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _card(label: str, sample: dict[str, Any], baseline: str | None) -> Card:
    text, reward = _text(sample), sample.get("reward")
    ended = sample.get("finish_reason", "stop")
    notes = [] if ended == "stop" else ["abstained" if ended == "abstained" else "cut off"]
    if not text:
        notes.append("empty")
    words = [(text, False)] if baseline is None else marked_words(text, baseline)
    return Card(label, number(reward) if isinstance(reward, int | float) else "", words, notes)


def _prompt(sample: Mapping[str, Any]) -> str:
    """The prompt, a conversation with its roles instead of a model's special tokens."""
    return readable_prompt(sample.get("messages") or str(sample.get("prompt", "")))


def _text(sample: dict[str, Any]) -> str:
    return str(sample.get("text", "")).strip()
