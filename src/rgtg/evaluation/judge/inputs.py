"""Which completions meet: files of completions, the output of a comparison, or pairs that humans have judged."""

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rgtg.config import JudgeSettings
from rgtg.data.completions import completion_text, read_completions
from rgtg.data.pairs import read_pairs
from rgtg.data.sources import named_path
from rgtg.errors import DataError, UsageError
from rgtg.utils.files import file_checksum

# Prompt, seed of the run (of a comparison's rows), and how many completions of both came before: the n-th meets the
# other side's n-th.
CompletionKey = tuple[str, int | None, int]
Completions = Mapping[CompletionKey, str]


@dataclass(frozen=True, slots=True)
class CompletionPair:
    """Two completions of one prompt, by the labels of those who wrote them."""

    a: str
    b: str
    prompt: str
    text_a: str
    text_b: str


@dataclass(frozen=True, slots=True)
class JudgeInputs:
    """Everything to be judged, and fingerprints of the files it came from."""

    kind: Literal["win-rate", "agreement"]
    contests: list[CompletionPair]
    data: dict[str, str]


def read_inputs(settings: JudgeSettings, rejects: Path | None = None) -> JudgeInputs:
    """Pair up what the settings name: chosen with rejected, or every two labels on every prompt.

    Args:
        settings: name the inputs.
        rejects: where ``on_bad="skip"`` writes the bad rows of a file of pairs; none warns of them.

    Raises:
        UsageError: no input, inputs that exclude each other, one label only, or an unknown baseline.
        DataError: bad rows, or labels that do not answer the same prompts.
    """
    sides = [side for side in (settings.a, settings.b) if side is not None]
    if bool(settings.pairs) + bool(sides) + bool(settings.completions) != 1 or len(sides) == 1:
        raise UsageError(
            "give the judge one of: --a FILE with --b FILE, --completions (twice or a folder), or --pairs FILE"
        )
    if settings.pairs:
        return _human_pairs(settings, settings.pairs, rejects)
    written, data = _read_all(sides or settings.completions)
    if sides and len(written) != 2:
        raise UsageError(f"--a and --b hold more than two labels ({', '.join(written)}): use --completions")
    return JudgeInputs("win-rate", _meetings(written, settings), data)


def _human_pairs(settings: JudgeSettings, source: str, rejects: Path | None) -> JudgeInputs:
    found = read_pairs(source, on_bad=settings.on_bad, rejects=rejects)
    contests = [
        CompletionPair("chosen", "rejected", p.prompt, p.chosen, p.rejected) for p in found.pairs[: settings.limit]
    ]
    return JudgeInputs("agreement", contests, {"pairs": found.fingerprint})


def _meetings(written: Mapping[str, Completions], settings: JudgeSettings) -> list[CompletionPair]:
    if len(written) < 2:
        raise UsageError(f"only {', '.join(written)} was given: a judge needs completions of at least two")
    if settings.baseline is not None and settings.baseline not in written:
        raise UsageError(f"baseline = {settings.baseline!r} is none of {', '.join(written)}")
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in next(iter(written.values()))))
    wanted = set(prompts[: settings.limit])
    return [
        CompletionPair(a, b, place[0], written[a][place], written[b][place])
        for a, b in itertools.combinations(written, 2)
        if settings.baseline in (None, a, b)
        for place in _shared_places(a, b, written)
        if place[0] in wanted
    ]


def _shared_places(a: str, b: str, written: Mapping[str, Completions]) -> list[CompletionKey]:
    """Where both have a completion. A row without randomness ran with fewer seeds; all else must match."""
    seeds = {seed for _, seed, _ in written[a]} & {seed for _, seed, _ in written[b]}
    of_a, of_b = ([place for place in written[side] if place[1] in seeds] for side in (a, b))
    apart = set(of_a) ^ set(of_b) or (set() if of_a else set(written[a]))
    if apart:
        raise DataError(
            f"{a} and {b} do not answer the same prompts the same number of times: {len(apart)} completions stand "
            f"alone, one of them of {min(prompt for prompt, _, _ in apart)[:60]!r}; judge files made from one and the "
            "same --prompts file"
        )
    return of_a


def _read_all(sources: list[str]) -> tuple[dict[str, dict[CompletionKey, str]], dict[str, str]]:
    written: dict[str, dict[CompletionKey, str]] = {}
    data = {}
    for source, (name, path) in zip(sources, _named(sources), strict=True):
        for label, texts in _by_label(read_completions(path), name).items():
            if label in written:
                raise UsageError(f"{source}: {label} was given before; name the files apart with NAME=FILE")
            written[label] = texts
        data[name] = file_checksum(path).sha256[:16]
    return written, data


def _by_label(rows: list[dict[str, Any]], name: str) -> dict[str, dict[CompletionKey, str]]:
    """Texts by place for each row of a comparison; other completions go by the name of their file."""
    written: dict[str, dict[CompletionKey, str]] = {}
    seen: Counter[tuple[str, str, int | None]] = Counter()
    for row in rows:
        label, prompt, seed = str(row.get("row") or name), row["prompt"], row.get("run_seed")
        written.setdefault(label, {})[prompt, seed, seen[label, prompt, seed]] = completion_text(row)
        seen[label, prompt, seed] += 1
    return written


def _named(sources: list[str]) -> list[tuple[str, Path]]:
    """Name and file of each source: as NAME=FILE says, else the file's own, else its folder's where that is no help."""
    given = []
    for source in sources:
        name, path = named_path(source)
        given.append((name, path / "completions.jsonl" if path.is_dir() else path))
    stems = Counter(_stem(path) for _, path in given)
    return [(name or (_stem(path) if stems[_stem(path)] == 1 else path.parent.name), path) for name, path in given]


def _stem(path: Path) -> str:
    """The name without what says its kind; a dot in ``beta0.5.jsonl.gz`` is part of the name."""
    return re.sub(r"\.(jsonl|ndjson|parquet)(\.(gz|xz|zst))?$", "", path.name)
