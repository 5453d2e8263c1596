"""``make_rollouts``: values of a policy's candidate tokens from roll-outs, in a file for the audit of every scorer."""

import hashlib
import inspect
import itertools
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
from rgtg.decoding.request import Prompt, any_chat, derive_seed, require_chats
from rgtg.errors import DataError, NonFiniteError, OutputError, UsageError
from rgtg.evaluation.provenance import provenance
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.base import weights_of
from rgtg.tokenization.conversation import (
    PromptSource,
    TemplateKwargs,
    check_template_kwargs,
    encode_source,
    require_chat_template,
    template_fingerprint,
)
from rgtg.tokenization.encoding import decode_completion, tokenizer_hash
from rgtg.types.base import first_problem
from rgtg.types.generation import Completion
from rgtg.types.rollouts import PrefixRollouts, RolloutHeader
from rgtg.utils.files import write_synced, write_text

Progress = Callable[[int, int], None]
# Cut positions follow the R2 sequence (Roberts), which is even over the prompts and over the prefixes of one prompt.
_STRIDES = 0.7548776662466927, 0.5698402909980532


class RolloutReward(Protocol):
    """A reward model of finished completions; every scorer of rgtg is one."""

    name: str

    def score(
        self, prompts: Sequence[PromptSource], completions: Sequence[str], *, finished: Sequence[bool]
    ) -> list[float]:
        """Reward of each completion after its prompt."""
        ...


@dataclass
class CandidateRollouts:
    """The contents of a roll-outs file: prefixes of completions, their candidate tokens and the roll-outs of each."""

    header: RolloutHeader
    rows: list[PrefixRollouts]


@dataclass(frozen=True)
class _Cut:
    """Prefix ``index`` is prompt number ``prompt`` and the first ``position`` tokens of its completion."""

    index: int
    prompt: int
    position: int


def make_rollouts(
    policy: Policy,
    prompts: "Sequence[Prompt] | str | Path",
    reward: "RolloutReward | Callable[[str], float]",
    *,
    path: "str | Path | None" = None,
    prefixes: int = 400,
    candidates: int = 10,
    per_candidate: int = 4,
    max_new_tokens: int = 64,
    chat_template_kwargs: TemplateKwargs | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> CandidateRollouts:
    """Estimate the value Q̂(prefix ⊕ v) of the policy's next tokens v at sampled prefixes, from roll-outs.

    The policy completes the prompts by ordinary sampling, and each completion is cut at positions that are spread
    evenly over it. There, the policy continues m times to the end from each of its k most likely next tokens, and a
    held-out reward scores the finished texts. Prefix i depends on the seed and the prompts only: more prefixes can be
    added later.

    Args:
        policy: the frozen policy.
        prompts: texts or lists of chat messages, or a file of them; duplicates are used once.
        reward: a model that scores finished completions, and reads chats by its own chat template; or a function of
            the whole text (prompt, of a chat as the policy's template writes it, and completion).
        path: file that keeps the roll-outs, one line per prefix; a run that was stopped continues from it.
        prefixes: number over all prompts (fewer if completions are too short for so many cuts).
        candidates: k, the number of most likely next tokens.
        per_candidate: m, the number of roll-outs of each.
        max_new_tokens: of a whole completion.
        chat_template_kwargs: variables of the policy's chat template.
        seed: of all sampling.
        batch_size: completions sampled together.
        progress: called with the number of finished prefixes and of all prefixes.

    Raises:
        UsageError: unusable settings, or a file made with other settings.
        DataError: bad prompts, a prompt longer than the context, or a damaged file.
        NonFiniteError: a reward that is NaN or infinite.
        OutputError: a file that cannot be written.
    """
    _check_counts(prefixes, candidates, per_candidate, max_new_tokens, batch_size)
    given = read_prompts(prompts) if isinstance(prompts, str | Path) else prompts
    sources = list({json.dumps(prompt): prompt for prompt in given}.values())
    if not sources:
        raise DataError("there are no prompts to roll out from")
    kwargs = dict(chat_template_kwargs) if chat_template_kwargs else None
    if kwargs:
        require_chats(sources)
    check_template_kwargs(policy.tokenizer, kwargs)
    if any_chat(sources):
        require_chat_template(policy.tokenizer, "the policy")
        if (own := getattr(reward, "tokenizer", None)) is not None:
            require_chat_template(own, "the reward")
    header = _header(policy, sources, reward, seed, candidates, per_candidate, max_new_tokens, kwargs)
    file = Path(path) if path is not None else None
    rollouts = _open(file, header) if file is not None else CandidateRollouts(header, [])
    if not rollouts.rows or rollouts.rows[-1].index < prefixes - 1:
        _add_missing(rollouts, policy, sources, reward, file, prefixes, batch_size, progress)
    return CandidateRollouts(rollouts.header, [row for row in rollouts.rows if row.index < prefixes])


def read_rollouts(path: "str | Path") -> CandidateRollouts:
    """Read a roll-outs file; an incomplete last line of a stopped run is left out.

    Raises:
        UsageError: no such file.
        DataError: not a roll-outs file, or a damaged one, with the line number.
    """
    file = Path(path)
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read the roll-outs {path}: {error.strerror}; make them (docs/audit.md)") from error
    try:
        header = RolloutHeader.model_validate_json(lines[0])
    except ValidationError as error:
        raise DataError(f"{path}:1: not the first line of a roll-outs file: {first_problem(error)}") from error
    rows: list[PrefixRollouts] = []
    for number, line in enumerate(lines[1:-1], 2):
        try:
            row = PrefixRollouts.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{path}:{number}: not a line of roll-outs: {first_problem(error)}") from error
        if rows and row.index <= rows[-1].index:
            raise DataError(f"{path}:{number}: prefix {row.index} comes after {rows[-1].index}; did two runs write it?")
        _check_shapes(row, header, len((rows or [row])[0].candidate_ids), f"{path}:{number}")
        rows.append(row)
    return CandidateRollouts(header, rows)


def rescore_rollouts(
    rollouts: CandidateRollouts, reward: "RolloutReward | Callable[[str], float]"
) -> CandidateRollouts:
    """Score the same roll-outs with another held-out reward; nothing is sampled again.

    Raises:
        NonFiniteError: a reward that is NaN or infinite.
    """
    name, fingerprint = _describe(reward)
    changed: dict[str, Any] = {"reward": name, "reward_fingerprint": fingerprint}
    if rollouts.header.chat_templates is not None:
        own = template_fingerprint(getattr(reward, "tokenizer", None))
        changed["chat_templates"] = [rollouts.header.chat_templates[0], own]
    header = rollouts.header.model_copy(update=changed)
    rows = []
    for row in rollouts.rows:
        found = _rewards(reward, row.source, row.prompt, row.texts, row.finished, header.chat_template_kwargs)
        rows.append(row.model_copy(update={"rewards": _repeat(found, row.ended, header.per_candidate)}))
    return CandidateRollouts(header, rows)


def write_rollouts(rollouts: CandidateRollouts, path: "str | Path") -> None:
    """Write a whole roll-outs file atomically."""
    records = (rollouts.header, *rollouts.rows)
    write_text(Path(path), "".join(record.model_dump_json() + "\n" for record in records))


def _add_missing(
    rollouts: CandidateRollouts,
    policy: Policy,
    prompts: Sequence[Prompt],
    reward: Any,
    file: Path | None,
    prefixes: int,
    batch_size: int,
    progress: Progress | None,
) -> None:
    """Add the missing prefixes, in order, to the rows and to the file."""
    header, first = rollouts.header, rollouts.rows[-1].index + 1 if rollouts.rows else 0
    # 1. Complete every prompt by ordinary sampling.
    sampler = GuidedPolicy(policy, method="policy", top_k=None)
    first_prompts, kwargs = list(prompts[:prefixes]), header.chat_template_kwargs
    more: dict[str, Any] = {} if kwargs is None or not any_chat(first_prompts) else {"chat_template_kwargs": kwargs}
    done = sampler.generate(
        first_prompts, seed=header.seed, batch_size=batch_size, max_new_tokens=header.max_new_tokens, **more
    )
    # 2. Choose where to cut the completions, and roll out from each cut that the file lacks.
    cuts = plan_cuts([len(completion.token_ids) for completion in done], prefixes)
    for count, cut in enumerate(cuts, 1):
        if cut.index >= first:
            completion = done[cut.prompt]
            row = _roll_prefix(policy, completion, cut, header, reward, batch_size)
            if file is not None:
                _append(file, row)
            rollouts.rows.append(row)
        if progress:
            progress(count, len(cuts))


def plan_cuts(lengths: Sequence[int], prefixes: int) -> list[_Cut]:
    """Cut prompt i mod P at a fraction of its completion that depends on i only, for prefix i.

    If that position of the prompt is taken, the next free one is used. If none is free, there is no prefix i.
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
    policy: Policy, completion: Completion, cut: _Cut, header: RolloutHeader, reward: Any, batch_size: int
) -> PrefixRollouts:
    kwargs, written = header.chat_template_kwargs, completion.token_ids[: cut.position]
    prompt, prompt_ids = encode_source(policy.tokenizer, completion.source, template_kwargs=kwargs)
    ids, log_probs = next_candidates(policy, [*prompt_ids, *written], header.candidates)
    drawn = roll_out(
        policy, prompt, prompt_ids, written, ids, n=header.per_candidate, max_new_tokens=header.max_new_tokens,
        seed=derive_seed(header.seed, prompt_ids, written), batch_size=batch_size,
    )  # fmt: skip
    ended = [len(group[0].token_ids) == len(written) + 1 for group in drawn]
    kept = [group[:1] if end else group for group, end in zip(drawn, ended, strict=True)]
    texts = [[request.text for request in group] for group in kept]
    finished = [[request.finish_reason == "stop" for request in group] for group in kept]
    rewards = _rewards(reward, completion.source, prompt, texts, finished, kwargs)
    return PrefixRollouts(
        index=cut.index, prompt=prompt, messages=completion.messages, prompt_ids=prompt_ids, written_ids=written,
        fraction=cut.position / len(completion.token_ids), candidate_ids=ids, policy_log_probs=log_probs,
        candidate_texts=[decode_completion(policy.tokenizer, prompt_ids, [*written, token]) for token in ids],
        ended=ended, texts=texts, finished=finished, rewards=_repeat(rewards, ended, header.per_candidate),
    )  # fmt: skip


def _repeat(rewards: Sequence[Sequence[float]], ended: Sequence[bool], m: int) -> list[list[float]]:
    """Repeat the reward of a completion that its candidate ended: all m roll-outs are the same text."""
    return [[group[0]] * m if end else list(group) for group, end in zip(rewards, ended, strict=True)]


def _rewards(
    reward: Any,
    source: Prompt,
    prompt: str,
    texts: Sequence[Sequence[str]],
    finished: Sequence[Sequence[bool]],
    kwargs: dict[str, Any] | None,
) -> list[list[float]]:
    """The reward of every text, of a model after ``source``, of a function after ``prompt``; equal ones once."""
    keys = [list(zip(group, ends, strict=True)) for group, ends in zip(texts, finished, strict=True)]
    unique = list(dict.fromkeys(itertools.chain.from_iterable(keys)))
    if hasattr(reward, "score"):
        whole, ends = [text for text, _ in unique], [end for _, end in unique]
        more = {"chat_template_kwargs": kwargs} if kwargs else {}
        values = reward.score([source] * len(unique), whole, finished=ends, **more)
    else:
        values = [float(reward(prompt + text)) for text, _ in unique]
    if not all(math.isfinite(value) for value in values):
        raise NonFiniteError("the reward is NaN or infinite for a finished completion; try dtype=float32, or check it")
    reward_of = dict(zip(unique, values, strict=True))
    return [[reward_of[key] for key in group] for group in keys]


def _header(
    policy: Policy,
    prompts: list[Prompt],
    reward: Any,
    seed: int,
    candidates: int,
    per_candidate: int,
    max_new_tokens: int,
    kwargs: dict[str, Any] | None,
) -> RolloutHeader:
    name, fingerprint = _describe(reward)
    templates = _templates(policy.tokenizer, reward) if any_chat(prompts) else None
    listed = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    counts = {"candidates": candidates, "per_candidate": per_candidate, "max_new_tokens": max_new_tokens}
    return RolloutHeader(
        policy=fingerprint_weights(policy.model), tokenizer=tokenizer_hash(policy.tokenizer), reward=name,
        reward_fingerprint=fingerprint, prompts=listed, seed=seed, **counts, chat_template_kwargs=kwargs,
        chat_templates=templates,
        provenance=provenance(command="rgtg audit --rollouts", settings=counts, seed=seed,
                              models={"policy": policy.model}, data={"prompts": listed}),
    )  # fmt: skip


def _templates(tokenizer: Any, reward: Any) -> list[str | None]:
    """Hashes of the chat templates of the policy and of the reward."""
    return [template_fingerprint(tokenizer), template_fingerprint(getattr(reward, "tokenizer", None))]


def _describe(reward: Any) -> tuple[str, str]:
    """Name and fingerprint of a reward: the fingerprint of a model's weights, or of a function's source code."""
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
    """Read the file, or create it. An incomplete last line of a stopped run is removed."""
    if not path.exists():
        write_rollouts(CandidateRollouts(header, []), path)
        return CandidateRollouts(header, [])
    rollouts = read_rollouts(path)
    mine, theirs = (h.model_dump(exclude={"provenance"}) for h in (header, rollouts.header))
    other = [f"{key} {theirs[key]!r} where this run has {mine[key]!r}" for key in mine if mine[key] != theirs[key]]
    if other:
        raise UsageError(f"{path} holds other roll-outs: {'; '.join(other)}. Choose another --rollouts-file")
    _remove_incomplete_line(path)
    return rollouts


def _remove_incomplete_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        warnings.warn(f"{path}: the last line is incomplete; that prefix is rolled out again", stacklevel=4)
        os.truncate(path, whole)


def _append(path: Path, row: PrefixRollouts) -> None:
    try:
        with path.open("ab") as file:
            write_synced(file, f"{row.model_dump_json()}\n".encode())
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; its lines are kept: run the same command again"
        ) from error


def _check_counts(prefixes: int, candidates: int, per_candidate: int, max_new_tokens: int, batch_size: int) -> None:
    least = {"prefixes": (prefixes, 1), "candidates": (candidates, 2), "per_candidate": (per_candidate, 1),
             "max_new_tokens": (max_new_tokens, 1), "batch_size": (batch_size, 1)}  # fmt: skip
    for name, (value, low) in least.items():
        if value < low:
            raise UsageError(f"{name} = {value}: it must be at least {low}")


def _check_shapes(row: PrefixRollouts, header: RolloutHeader, k: int, where: str) -> None:
    lists = (
        row.candidate_ids, row.policy_log_probs, row.candidate_texts, row.ended, row.texts, row.finished, row.rewards,
    )  # fmt: skip
    if not k or any(len(part) != k for part in lists) or any(len(r) != header.per_candidate for r in row.rewards):
        raise DataError(f"{where}: expected lists of {max(k, 1)} candidates, with {header.per_candidate} rewards each")
