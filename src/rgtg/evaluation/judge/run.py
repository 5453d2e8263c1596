"""Win rates by a language model as a judge: both orders of every pair, and nothing dropped in silence.

Each pair is shown to the judge twice, with either side first, since judges prefer a place (Zheng et al. 2023, arXiv
2306.05685). Answers are kept on disk as they come: a run that was stopped goes on where it stopped.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Literal

from rgtg.config import JudgeSettings
from rgtg.evaluation.judge.client import (
    AnswerCache,
    CallFailedError,
    CallRefusedError,
    JudgeClient,
    cost,
    endpoint_url,
    estimated_tokens,
    request_key,
)
from rgtg.evaluation.judge.inputs import CompletionPair, JudgeInputs, read_inputs
from rgtg.evaluation.judge.prompt import JudgePrompt, Message, NoVerdictError, Verdict, read_verdict
from rgtg.evaluation.judge.win_rate import pair_score, summarise
from rgtg.evaluation.provenance import provenance
from rgtg.types.base import Provenance
from rgtg.types.judge import JudgedPair, JudgeFailure, JudgeMatch, JudgeResult

Progress = Callable[[int, int], None]

_FAILURES_IN_A_ROW = 3  # then it is the endpoint that fails, not a call
_WINNERS: tuple[dict[Verdict, Literal["a", "b", "tie"]], ...] = (
    {"first": "a", "second": "b", "tie": "tie"},
    {"first": "b", "second": "a", "tie": "tie"},
)


@dataclass
class Judgement:
    """What a judge found: the figures, and every verdict they are made of."""

    result: JudgeResult
    pairs: list[JudgedPair]


@dataclass(frozen=True)
class CallEstimate:
    """What a run would do: calls to make, answers already there, and about how many tokens that is."""

    pairs: int
    identical: int
    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens_at_most: int | None
    cost_at_most: float | None


@dataclass
class _JudgeReply:
    """What came of one question: the verdict, or why there is none."""

    verdict: Verdict | None = None
    answers: list[str] = field(default_factory=list)
    problem: str = ""
    fault: Literal["", "refused", "failed"] = ""


def judge(settings: JudgeSettings, progress: Progress | None = None) -> Judgement:
    """Have every pair judged in both orders, and count.

    Raises:
        UsageError: unusable settings or inputs.
        DataError: bad rows, or sides that do not answer the same prompts.
        EndpointError: the endpoint cannot be reached, refuses, or keeps failing; what it answered is kept.
    """
    found = read_inputs(settings, settings.output / "rejects.jsonl" if settings.on_bad == "skip" else None)
    prompt = JudgePrompt.load(settings.prompt_file)
    with AnswerCache(settings.answers) as cache:
        endpoint = JudgeClient(settings, cache)
        # 1. Both orders of every pair; what is the same question is asked once.
        questions = _questions(found.contests, prompt)
        # 2. Answers, several at once.
        replies = _ask_all(questions, endpoint, prompt, progress)
        # 3. Back to pairs, and figures for every two labels.
        pairs, failures = _collect(found.contests, replies)
        result = JudgeResult(
            kind=found.kind,
            model=settings.model,
            base_url=endpoint.url,
            prompt_fingerprint=prompt.fingerprint,
            matches=_matches(pairs, settings),
            failures=failures,
            usage=endpoint.usage(),
            provenance=_provenance(settings, found),
        )
    return Judgement(result, pairs)


def plan(settings: JudgeSettings) -> CallEstimate:
    """What ``judge`` would do, without a call and without a key.

    Raises:
        UsageError: unusable settings or inputs.
        DataError: bad rows, or sides that do not answer the same prompts.
    """
    endpoint_url(settings)
    found = read_inputs(settings)
    prompt = JudgePrompt.load(settings.prompt_file)
    questions = _questions(found.contests, prompt)
    with AnswerCache(settings.answers) as cache:
        new = [m for m in questions.values() if cache.get(request_key(settings, m)) is None]
    read = sum(map(estimated_tokens, new))
    written = len(new) * settings.max_tokens if settings.max_tokens is not None else None
    return CallEstimate(
        pairs=len(found.contests),
        identical=sum(contest.text_a == contest.text_b for contest in found.contests),
        calls=len(new),
        cached=len(questions) - len(new),
        prompt_tokens=read,
        completion_tokens_at_most=written,
        cost_at_most=cost(settings, read, written) if written is not None else None,
    )


def _orders(contest: CompletionPair) -> tuple[tuple[str, str], tuple[str, str]]:
    return (contest.text_a, contest.text_b), (contest.text_b, contest.text_a)


def _questions(contests: Sequence[CompletionPair], prompt: JudgePrompt) -> dict[tuple[str, str, str], list[Message]]:
    """(prompt, first, second) → messages; identical texts are a tie that needs no judge."""
    return {
        (contest.prompt, first, second): prompt.ask(contest.prompt, first, second)
        for contest in contests
        if contest.text_a != contest.text_b
        for first, second in _orders(contest)
    }


def _ask_all(
    questions: dict[tuple[str, str, str], list[Message]],
    endpoint: JudgeClient,
    prompt: JudgePrompt,
    progress: Progress | None,
) -> dict[tuple[str, str, str], _JudgeReply]:
    """Replies to all questions.

    Raises:
        EndpointError: as ``judge`` says. Whatever stops the work, calls under way are waited for: they are paid.
    """
    replies: dict[tuple[str, str, str], _JudgeReply] = {}
    answered, failed_in_a_row = False, 0
    pool = ThreadPoolExecutor(endpoint.settings.concurrency, thread_name_prefix="judge")
    try:
        asked: dict[Future[_JudgeReply], tuple[str, str, str]] = {
            pool.submit(_ask, messages, endpoint, prompt): question for question, messages in questions.items()
        }
        for future in as_completed(asked):
            reply = replies[asked[future]] = future.result()
            answered = answered or not reply.fault
            # Refusals are the fault of their texts, unless nothing else ever came.
            if reply.fault == "failed" or (reply.fault and not answered):
                failed_in_a_row += 1
            elif not reply.fault:
                failed_in_a_row = 0
            if failed_in_a_row >= _FAILURES_IN_A_ROW:
                raise endpoint.failure(f"{failed_in_a_row} calls failed in a row, the last one with: {reply.problem}")
            if progress:
                progress(len(replies), len(questions))
    except BaseException:  # Ctrl-C too
        endpoint.stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
    _require_some_reply(replies, endpoint)
    return replies


def _require_some_reply(replies: dict[tuple[str, str, str], _JudgeReply], endpoint: JudgeClient) -> None:
    """Refuse to make figures where not one call got through."""
    if replies and all(reply.fault for reply in replies.values()):
        raise endpoint.failure(f"every call failed, the last one with: {[*replies.values()][-1].problem}")


def _ask(messages: list[Message], endpoint: JudgeClient, prompt: JudgePrompt) -> _JudgeReply:
    """Ask, and ask again where the answer holds no verdict; bounded."""
    reply = _JudgeReply()
    for _ in range(1 + endpoint.settings.answer_retries):
        try:
            answer = endpoint.ask(messages)
        except CallFailedError as error:
            reply.problem = str(error)
            reply.fault = "refused" if isinstance(error, CallRefusedError) else "failed"
            return reply
        reply.answers.append(answer.text)
        try:
            reply.verdict = read_verdict(answer.text)
            return reply
        except NoVerdictError as error:
            cut = (
                f" (cut off at max_tokens = {endpoint.settings.max_tokens})" if answer.finish_reason == "length" else ""
            )
            reply.problem = f"{error}{cut}"
        messages = prompt.ask_again(messages, answer.text)
    return reply


def _collect(
    contests: Sequence[CompletionPair], replies: dict[tuple[str, str, str], _JudgeReply]
) -> tuple[list[JudgedPair], list[JudgeFailure]]:
    pairs, failures = [], []
    for contest in contests:
        sides = {"a": contest.a, "b": contest.b, "prompt": contest.prompt}
        verdicts: list[Literal["a", "b", "tie"] | None] = ["tie", "tie"]
        answers: list[str] = []
        if contest.text_a != contest.text_b:
            both = [replies[contest.prompt, first, second] for first, second in _orders(contest)]
            verdicts = [r.verdict and names[r.verdict] for r, names in zip(both, _WINNERS, strict=True)]
            answers = [r.answers[-1] if r.answers else "" for r in both]
            failures += [
                JudgeFailure(**sides, shown_first=shown, reason=r.problem, answer=said)
                for r, said, shown in zip(both, answers, (contest.a, contest.b), strict=True)
                if r.verdict is None
            ]
        pairs.append(
            JudgedPair(
                **sides, text_a=contest.text_a, text_b=contest.text_b, verdicts=verdicts, answers=answers,
                score=pair_score(verdicts),
            )
        )  # fmt: skip
    return pairs, failures


def _matches(pairs: Sequence[JudgedPair], settings: JudgeSettings) -> list[JudgeMatch]:
    by_labels: dict[tuple[str, str], list[JudgedPair]] = defaultdict(list)
    for pair in pairs:
        by_labels[pair.a, pair.b].append(pair)
    return [summarise(some, seed=settings.seed, resamples=settings.bootstrap) for some in by_labels.values()]


def _provenance(settings: JudgeSettings, found: JudgeInputs) -> Provenance:
    return provenance(
        command="rgtg judge", settings=settings.model_dump(mode="json"), seed=settings.seed, models={}, data=found.data
    )
