"""The roll-outs that candidates are judged by: made once, kept in a file, read by the audit of every scorer."""

import hashlib
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from rgtg.data.prompts import read_prompts
from rgtg.decoding.engine.rollouts import next_candidates, roll_out
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.request import Request, derive_seed
from rgtg.errors import DataError, NonFiniteError, OutputError, UsageError
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.base import weights_of
from rgtg.tokenization.encoding import decode_completion, encode_prompt, tokenizer_hash
from rgtg.types.rollouts import PrefixRollouts, RolloutHeader
from rgtg.utils.files import write_synced, write_text

Progress = Callable[[int, int], None]
# A position is a point of this sequence (Roberts' R2), even over the prompts and over the prefixes of one prompt.
_STRIDES = 0.7548776662466927, 0.5698402909980532


class RolloutReward(Protocol):
    """A model that scores finished completions; every scorer of rgtg is one."""

    name: str

    def score(self, prompts: Sequence[str], completions: Sequence[str], *, finished: Sequence[bool]) -> list[float]:
        """Reward of each completion after its prompt."""
        ...


@dataclass
class CandidateRollouts:
    """Contents of a roll-outs file."""

    header: RolloutHeader
    rows: list[PrefixRollouts]


@dataclass(frozen=True)
class _Cut:
    """Where a completion of the policy is cut: prefix ``index`` is ``prompt`` and its first ``position`` tokens."""

    index: int
    prompt: int
    position: int


def make_rollouts(
    policy: Policy,
    prompts: "Sequence[str] | str | Path",
    reward: "RolloutReward | Callable[[str], float]",
    *,
    path: "str | Path | None" = None,
    prefixes: int = 400,
    candidates: int = 10,
    per_candidate: int = 4,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> CandidateRollouts:
    """Estimate the value of each of the policy's next tokens at sampled prefixes: Q̂(prefix ⊕ v), by roll-outs.

    The policy completes the prompts (ordinary sampling), and each completion is cut at positions spread evenly over
    it. From each of its k likeliest next tokens there the policy goes on m times to the end, and a held-out reward
    scores the finished texts. Prefix i depends on the seed and the prompts alone: more can be added later.

    Args:
        policy: the frozen policy.
        prompts: texts, or a file of them; each is used once, however often it is there.
        reward: a model that scores finished completions, or a function of the whole text (prompt and completion).
        path: file that keeps the roll-outs, a line per prefix as soon as it is done; a run that was stopped goes on.
        prefixes: how many, over all prompts (fewer where completions are too short for so many cuts).
        candidates: k, the policy's likeliest next tokens.
        per_candidate: m, roll-outs of each.
        max_new_tokens: of a whole completion.
        seed: of everything drawn.
        batch_size: completions sampled together.
        progress: called with the prefixes done and in all.

    Raises:
        UsageError: unusable settings, or a file made with others.
        DataError: bad prompts, a prompt over the context, or a file that is damaged.
        NonFiniteError: a reward that is NaN or infinite.
        OutputError: a file that cannot be written.
    """
    _check_counts(prefixes, candidates, per_candidate, max_new_tokens, batch_size)
    texts = list(dict.fromkeys(read_prompts(prompts) if isinstance(prompts, str | Path) else prompts))
    if not texts:
        raise DataError("there are no prompts to roll out from")
    header = _header(policy, texts, reward, seed, candidates, per_candidate, max_new_tokens)
    file = Path(path) if path is not None else None
    found = _open(file, header) if file is not None else CandidateRollouts(header, [])
    if not found.rows or found.rows[-1].index < prefixes - 1:
        _complete(found, policy, texts, reward, file, prefixes, batch_size, progress)
    return CandidateRollouts(found.header, [row for row in found.rows if row.index < prefixes])


def read_rollouts(path: "str | Path") -> CandidateRollouts:
    """Read a roll-outs file; a last line that was cut off by a stopped run is left out.

    Raises:
        UsageError: no such file.
        DataError: not such a file, or a damaged one; with the line.
    """
    file = Path(path)
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read the roll-outs {path}: {error.strerror}; make them (docs/audit.md)") from error
    try:
        header = RolloutHeader.model_validate_json(lines[0])
    except ValidationError as error:
        raise DataError(f"{path}:1: not the first line of a roll-outs file: {_first(error)}") from error
    rows: list[PrefixRollouts] = []
    for number, line in enumerate(lines[1:-1], 2):
        try:
            row = PrefixRollouts.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{path}:{number}: not a line of roll-outs: {_first(error)}") from error
        if rows and row.index <= rows[-1].index:
            raise DataError(f"{path}:{number}: prefix {row.index} comes after {rows[-1].index}; did two runs write it?")
        _check_shapes(row, header, len((rows or [row])[0].candidate_ids), f"{path}:{number}")
        rows.append(row)
    return CandidateRollouts(header, rows)


def rescore_rollouts(
    rollouts: CandidateRollouts, reward: "RolloutReward | Callable[[str], float]"
) -> CandidateRollouts:
    """The same roll-outs under another held-out reward: nothing is sampled again.

    Raises:
        NonFiniteError: a reward that is NaN or infinite.
    """
    name, fingerprint = _describe(reward)
    header = rollouts.header.model_copy(update={"reward": name, "reward_fingerprint": fingerprint})
    rows = []
    for row in rollouts.rows:
        found = _rewards(reward, row.prompt, row.texts, row.finished)
        rows.append(row.model_copy(update={"rewards": _repeat(found, row.ended, header.per_candidate)}))
    return CandidateRollouts(header, rows)


def write_rollouts(rollouts: CandidateRollouts, path: "str | Path") -> None:
    """Write a whole roll-outs file, whole or not at all."""
    records = (rollouts.header, *rollouts.rows)
    write_text(Path(path), "".join(record.model_dump_json() + "\n" for record in records))


def _complete(
    found: CandidateRollouts,
    policy: Policy,
    prompts: Sequence[str],
    reward: Any,
    file: Path | None,
    prefixes: int,
    batch_size: int,
    progress: Progress | None,
) -> None:
    """Add the prefixes that are missing, in order, to the rows and to the file."""
    header, first = found.header, found.rows[-1].index + 1 if found.rows else 0
    used = list(prompts[:prefixes])
    sampler = GuidedPolicy(policy, method="policy", top_k=None)
    done = sampler.generate(used, seed=header.seed, batch_size=batch_size, max_new_tokens=header.max_new_tokens)
    cuts = plan_cuts([len(completion.token_ids) for completion in done], prefixes)
    for count, cut in enumerate(cuts):
        if cut.index >= first:
            row = _roll_prefix(
                policy, done[cut.prompt].prompt, done[cut.prompt].token_ids, cut, header, reward, batch_size
            )
            if file is not None:
                _append(file, row)
            found.rows.append(row)
        if progress:
            progress(count + 1, len(cuts))


def plan_cuts(lengths: Sequence[int], prefixes: int) -> list[_Cut]:
    """Prefix i is of prompt i mod P, cut at a fraction of its completion that i alone decides.

    A position that the prompt has had moves on to the next free one; there is no cut where none is left.
    """
    taken: list[set[int]] = [set() for _ in lengths]
    cuts = []
    for index in range(prefixes):
        round_, prompt = divmod(index, len(lengths))
        length, had = lengths[prompt], taken[prompt]
        if len(had) == length:
            continue
        position = int(math.modf((prompt + 0.5) * _STRIDES[0] + round_ * _STRIDES[1])[0] * length)
        while position in had:
            position = (position + 1) % length
        had.add(position)
        cuts.append(_Cut(index, prompt, position))
    return cuts


def _roll_prefix(
    policy: Policy, prompt: str, token_ids: list[int], cut: _Cut, header: RolloutHeader, reward: Any, batch_size: int
) -> PrefixRollouts:
    prompt_ids, written = encode_prompt(policy.tokenizer, prompt), token_ids[: cut.position]
    ids, log_probs = next_candidates(policy, [*prompt_ids, *written], header.candidates)
    drawn = roll_out(
        policy, prompt, prompt_ids, written, ids, n=header.per_candidate, max_new_tokens=header.max_new_tokens,
        seed=derive_seed(header.seed, prompt_ids, written), batch_size=batch_size,
    )  # fmt: skip
    ended = [len(group[0].token_ids) == len(written) + 1 for group in drawn]
    kept = [group[:1] if end else group for group, end in zip(drawn, ended, strict=True)]
    texts, finished = _fields(kept)
    rewards = _rewards(reward, prompt, texts, finished)
    return PrefixRollouts(
        index=cut.index, prompt=prompt, prompt_ids=prompt_ids, written_ids=written,
        fraction=cut.position / len(token_ids), candidate_ids=ids, policy_log_probs=log_probs,
        candidate_texts=[decode_completion(policy.tokenizer, prompt_ids, [*written, token]) for token in ids],
        ended=ended, texts=texts, finished=finished, rewards=_repeat(rewards, ended, header.per_candidate),
    )  # fmt: skip


def _fields(drawn: Sequence[Sequence[Request]]) -> tuple[list[list[str]], list[list[bool]]]:
    texts = [[request.text for request in group] for group in drawn]
    return texts, [[request.finish_reason == "stop" for request in group] for group in drawn]


def _repeat(rewards: Sequence[Sequence[float]], ended: Sequence[bool], m: int) -> list[list[float]]:
    """A completion that the candidate ended is what all m roll-outs are: its value has no noise."""
    return [[group[0]] * m if end else list(group) for group, end in zip(rewards, ended, strict=True)]


def _rewards(
    reward: Any, prompt: str, texts: Sequence[Sequence[str]], finished: Sequence[Sequence[bool]]
) -> list[list[float]]:
    """Reward of every text, each one once."""
    flat = [
        (text, end) for group, ends in zip(texts, finished, strict=True) for text, end in zip(group, ends, strict=True)
    ]
    unique = list(dict.fromkeys(flat))
    if hasattr(reward, "score"):
        whole, ends = [text for text, _ in unique], [end for _, end in unique]
        values = reward.score([prompt] * len(unique), whole, finished=ends)
    else:
        values = [float(reward(prompt + text)) for text, _ in unique]
    if not all(math.isfinite(value) for value in values):
        raise NonFiniteError("the reward is NaN or infinite for a finished completion; try dtype=float32, or check it")
    of = dict(zip(unique, values, strict=True))
    pairs = zip(texts, finished, strict=True)
    return [[of[key] for key in zip(group, ends, strict=True)] for group, ends in pairs]


def _header(
    policy: Policy, prompts: list[str], reward: Any, seed: int, candidates: int, per_candidate: int, max_new_tokens: int
) -> RolloutHeader:
    name, fingerprint = _describe(reward)
    listed = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    counts = {"candidates": candidates, "per_candidate": per_candidate, "max_new_tokens": max_new_tokens}
    return RolloutHeader(
        policy=fingerprint_weights(policy.model), tokenizer=tokenizer_hash(policy.tokenizer), reward=name,
        reward_fingerprint=fingerprint, prompts=listed, seed=seed, **counts,
        provenance=provenance(command="rgtg audit --rollouts", settings=counts, seed=seed,
                              models={"policy": policy.model}, data={"prompts": listed}),
    )  # fmt: skip


def _describe(reward: Any) -> tuple[str, str]:
    """Name and fingerprint of a reward: of a model's weights, or of a function's source."""
    if hasattr(reward, "score"):
        return Path(reward.name).name, fingerprint_weights(weights_of(reward))
    if not callable(reward):
        raise UsageError(
            f"a reward is a model that scores texts or a function of one text, not {type(reward).__name__}"
        )
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    try:
        source = inspect.getsource(reward)
    except (OSError, TypeError):
        source = name
    return name, hashlib.sha256(source.encode()).hexdigest()[:16]


def _open(path: Path, header: RolloutHeader) -> CandidateRollouts:
    """What the file has already; a new one where there is none. A line that a stopped run left half is cut off."""
    if not path.exists():
        write_rollouts(CandidateRollouts(header, []), path)
        return CandidateRollouts(header, [])
    found = read_rollouts(path)
    mine, theirs = (h.model_dump(exclude={"provenance"}) for h in (header, found.header))
    other = [f"{key} {theirs[key]!r} where this run has {mine[key]!r}" for key in mine if mine[key] != theirs[key]]
    if other:
        raise UsageError(f"{path} holds other roll-outs: {'; '.join(other)}. Choose another --rollouts-file")
    _cut_tail(path)
    return found


def _cut_tail(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        warnings.warn(f"{path}: the last line was not finished; that prefix is rolled out again", stacklevel=4)
        os.truncate(path, whole)


def _append(path: Path, row: PrefixRollouts) -> None:
    try:
        with path.open("ab") as file:
            write_synced(file, f"{row.model_dump_json()}\n".encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; what it holds is kept: run it again") from error


def _check_counts(prefixes: int, candidates: int, per_candidate: int, max_new_tokens: int, batch_size: int) -> None:
    least = {"prefixes": (prefixes, 1), "candidates": (candidates, 2), "per_candidate": (per_candidate, 1),
             "max_new_tokens": (max_new_tokens, 1), "batch_size": (batch_size, 1)}  # fmt: skip
    for name, (value, low) in least.items():
        if value < low:
            raise UsageError(f"{name} = {value}: it must be at least {low}")


def _check_shapes(row: PrefixRollouts, header: RolloutHeader, k: int, where: str) -> None:
    lists = (
        row.candidate_ids,
        row.policy_log_probs,
        row.candidate_texts,
        row.ended,
        row.texts,
        row.finished,
        row.rewards,
    )
    if not k or any(len(part) != k for part in lists) or any(len(r) != header.per_candidate for r in row.rewards):
        raise DataError(
            f"{where}: expected {header.per_candidate} rewards of each of {max(k, 1)} candidates, every list as long"
        )


def _first(error: ValidationError) -> str:
    detail: Any = error.errors()[0]
    return f"{'.'.join(map(str, detail['loc']))} {detail['msg']}".strip()
