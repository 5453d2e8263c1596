"""Reads the pairs to judge: from files of completions, the output of a comparison, or human preference pairs."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rgtg.config import JudgeSettings
from rgtg.data.completions import completion_source, completion_text, read_completions
from rgtg.data.formats import readable_prompt
from rgtg.data.pairs import read_pairs
from rgtg.data.sources import named_path
from rgtg.errors import DataError, UsageError
from rgtg.utils.files import file_checksum

# Prompt, seed of the run (in the output of a comparison), and the number of earlier completions of both. Completions
# with the same key are compared.
CompletionKey = tuple[str, int | None, int]
Completions = Mapping[CompletionKey, str]


@dataclass(frozen=True, slots=True)
class CompletionPair:
    """Two completions of one prompt, with the labels of the methods or files that they come from."""

    a: str
    b: str
    prompt: str
    text_a: str
    text_b: str


@dataclass(frozen=True, slots=True)
class JudgeInputs:
    """All pairs to judge, and the fingerprints of the files they came from."""

    kind: Literal["win-rate", "agreement"]
    pairs: list[CompletionPair]
    data: dict[str, str]


def read_inputs(settings: JudgeSettings, rejects: Path | None = None) -> JudgeInputs:
    """Read the inputs that the settings name: chosen with rejected, or every two labels on every prompt.

    Args:
        settings: name the inputs.
        rejects: where ``on_bad="skip"`` writes the bad rows of a file of pairs; None only warns.

    Raises:
        UsageError: no input, inputs that exclude each other, only one label, or an unknown baseline.
        DataError: bad rows, or labels with completions of different prompts.
    """
    sides = [side for side in (settings.a, settings.b) if side is not None]
    if bool(settings.pairs) + bool(sides) + bool(settings.completions) != 1 or len(sides) == 1:
        raise UsageError(
            "give the judge one of: --a FILE with --b FILE, --completions (twice or a folder), or --pairs FILE"
        )
    if settings.pairs:
        human = read_pairs(settings.pairs, on_bad=settings.on_bad, rejects=rejects, readable=True)
        kept = human.pairs[: settings.limit]
        pairs = [CompletionPair("chosen", "rejected", pair.prompt, pair.chosen, pair.rejected) for pair in kept]
        return JudgeInputs("agreement", pairs, {"pairs": human.fingerprint})
    by_label, data = _read_all(sides or settings.completions)
    if sides and len(by_label) != 2:
        raise UsageError(f"--a and --b hold more than two labels ({', '.join(by_label)}): use --completions")
    return JudgeInputs("win-rate", _pair_up(by_label, settings), data)


def _pair_up(by_label: Mapping[str, Completions], settings: JudgeSettings) -> list[CompletionPair]:
    if len(by_label) < 2:
        raise UsageError(f"only {', '.join(by_label)} was given: a judge needs completions of at least two")
    if settings.baseline is not None and settings.baseline not in by_label:
        raise UsageError(f"baseline = {settings.baseline!r} is none of {', '.join(by_label)}")
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in next(iter(by_label.values()))))
    wanted = set(prompts[: settings.limit])
    return [
        CompletionPair(a, b, key[0], by_label[a][key], by_label[b][key])
        for a, b in itertools.combinations(by_label, 2)
        if settings.baseline in (None, a, b)
        for key in _shared_keys(a, b, by_label)
        if key[0] in wanted
    ]


def _shared_keys(a: str, b: str, by_label: Mapping[str, Completions]) -> list[CompletionKey]:
    """Keys that both labels have. A run without randomness has fewer seeds; everything else must be the same."""
    seeds = {seed for _, seed, _ in by_label[a]} & {seed for _, seed, _ in by_label[b]}
    of_a, of_b = ([key for key in by_label[label] if key[1] in seeds] for label in (a, b))
    unmatched = set(of_a) ^ set(of_b) or (set() if of_a else set(by_label[a]))
    if unmatched:
        raise DataError(
            f"{a} and {b} do not answer the same prompts the same number of times: {len(unmatched)} completions have "
            f"no counterpart, one of them of {min(prompt for prompt, _, _ in unmatched)[:60]!r}; judge files made from "
            "the same --prompts file"
        )
    return of_a


def _read_all(sources: list[str]) -> tuple[dict[str, dict[CompletionKey, str]], dict[str, str]]:
    """The completions of all files by label, and the files' checksums by name."""
    by_label: dict[str, dict[CompletionKey, str]] = {}
    data = {}
    for source, (name, path) in zip(sources, _named(sources), strict=True):
        for label, texts in _by_label(read_completions(path), name).items():
            if label in by_label:
                raise UsageError(f"{source}: {label} was given before; name the files apart with NAME=FILE")
            by_label[label] = texts
        data[name] = file_checksum(path).sha256[:16]
    return by_label, data


def _by_label(rows: list[dict[str, Any]], name: str) -> dict[str, dict[CompletionKey, str]]:
    """Texts by key, for each row of a comparison; other completions have the name of their file as label."""
    found: dict[str, dict[CompletionKey, str]] = {}
    seen: Counter[tuple[str, str, int | None]] = Counter()
    for row in rows:
        # a chat as people read it: policies with other chat templates write the same messages differently
        prompt = readable_prompt(completion_source(row))
        label, seed = str(row.get("row") or name), row.get("run_seed")
        found.setdefault(label, {})[prompt, seed, seen[label, prompt, seed]] = completion_text(row)
        seen[label, prompt, seed] += 1
    return found


def _named(sources: list[str]) -> list[tuple[str, Path]]:
    """Name and file of each source. The name is given (NAME=FILE), or the file's, or its folder's for equal names."""
    given = []
    for source in sources:
        name, path = named_path(source)
        given.append((name, path / "completions.jsonl" if path.is_dir() else path))
    stems = Counter(_stem(path) for _, path in given)
    return [(name or (_stem(path) if stems[_stem(path)] == 1 else path.parent.name), path) for name, path in given]


def _stem(path: Path) -> str:
    """The file name without its format's endings; the dot in ``beta0.5.jsonl.gz`` belongs to the name."""
    return re.sub(r"\.(jsonl|ndjson|parquet)(\.(gz|xz|zst))?$", "", path.name)
