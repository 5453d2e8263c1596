"""``judge``: win rates by a language model as a judge.

Each pair is shown to the judge twice, once with each side first, because judges have a position bias (Zheng et al.
2023, arXiv 2306.05685). Answers are cached on disk as they arrive, so that a run that was stopped can continue.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
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
from rgtg.evaluation.judge.inputs import CompletionPair, read_inputs
from rgtg.evaluation.judge.prompt import JudgePrompt, Message, NoVerdictError, Verdict, read_verdict
from rgtg.evaluation.judge.win_rate import pair_score, summarise
from rgtg.evaluation.provenance import provenance
from rgtg.types.judge import JudgedPair, JudgeFailure, JudgeMatch, JudgeResult

Progress = Callable[[int, int], None]
Question = tuple[str, str, str]  # prompt, completion shown first, completion shown second

_FAILURES_IN_A_ROW = 3  # this many mean that the endpoint fails, not single calls
_WINNERS: tuple[dict[Verdict, Literal["a", "b", "tie"]], ...] = (
    {"first": "a", "second": "b", "tie": "tie"},
    {"first": "b", "second": "a", "tie": "tie"},
)


@dataclass
class Judgement:
    """The result of judging: the figures, and every judged pair."""

    result: JudgeResult
    pairs: list[JudgedPair]


@dataclass(frozen=True)
class CallEstimate:
    """What a run would do: calls to make, answers in the cache, and an estimate of the tokens and cost."""

    pairs: int
    identical: int
    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens_at_most: int | None
    cost_at_most: float | None


@dataclass
class _JudgeReply:
    """The verdict on one question, or the reason why there is none."""

    verdict: Verdict | None = None
    answers: list[str] = field(default_factory=list)
    problem: str = ""
    fault: Literal["", "refused", "failed"] = ""


def judge(settings: JudgeSettings, progress: Progress | None = None) -> Judgement:
    """Have every pair judged in both orders, and compute the figures.

    Raises:
        UsageError: unusable settings or inputs.
        DataError: bad rows, or labels with completions of different prompts.
        EndpointError: the endpoint cannot be reached, refuses, or keeps failing; its answers so far are cached.
    """
    inputs = read_inputs(settings, settings.output / "rejects.jsonl" if settings.on_bad == "skip" else None)
    prompt = JudgePrompt.load(settings.prompt_file)
    with closing(AnswerCache(settings.answers)) as cache:
        client = JudgeClient(settings, cache)
        # 1. Both orders of every pair; equal questions are asked once.
        questions = _questions(inputs.pairs, prompt)
        # 2. The answers, several calls at a time.
        replies = _ask_all(questions, client, prompt, progress)
        # 3. The verdicts of every pair, and the figures of every two labels.
        pairs, failures = _collect(inputs.pairs, replies)
        result = JudgeResult(
            kind=inputs.kind, model=settings.model, base_url=client.url, prompt_fingerprint=prompt.fingerprint,
            matches=_matches(pairs, settings), failures=failures, usage=client.usage(),
            provenance=provenance(
                command="rgtg judge", settings=settings.model_dump(mode="json"), seed=settings.seed, models={},
                data=inputs.data,
            ),
        )  # fmt: skip
    return Judgement(result, pairs)


def estimate_calls(settings: JudgeSettings) -> CallEstimate:
    """What ``judge`` would do; makes no call and needs no key.

    Raises:
        UsageError: unusable settings or inputs.
        DataError: bad rows, or labels with completions of different prompts.
    """
    endpoint_url(settings)
    pairs = read_inputs(settings).pairs
    questions = _questions(pairs, JudgePrompt.load(settings.prompt_file))
    with closing(AnswerCache(settings.answers)) as cache:
        new = [m for m in questions.values() if cache.get(request_key(settings, m)) is None]
    prompt_tokens = sum(map(estimated_tokens, new))
    at_most = len(new) * settings.max_tokens if settings.max_tokens is not None else None
    return CallEstimate(
        pairs=len(pairs), identical=sum(pair.text_a == pair.text_b for pair in pairs), calls=len(new),
        cached=len(questions) - len(new), prompt_tokens=prompt_tokens, completion_tokens_at_most=at_most,
        cost_at_most=cost(settings, prompt_tokens, at_most) if at_most is not None else None,
    )  # fmt: skip


def _orders(pair: CompletionPair) -> tuple[tuple[str, str], tuple[str, str]]:
    return (pair.text_a, pair.text_b), (pair.text_b, pair.text_a)


def _questions(pairs: Sequence[CompletionPair], prompt: JudgePrompt) -> dict[Question, list[Message]]:
    """The messages of every question. Identical texts are a tie and need no judge."""
    return {
        (pair.prompt, first, second): prompt.ask(pair.prompt, first, second)
        for pair in pairs
        if pair.text_a != pair.text_b
        for first, second in _orders(pair)
    }


def _ask_all(
    questions: dict[Question, list[Message]], client: JudgeClient, prompt: JudgePrompt, progress: Progress | None
) -> dict[Question, _JudgeReply]:
    """Replies to all questions. If the work is stopped, calls in flight are completed, because they are paid for.

    Raises:
        EndpointError: several calls failed in a row, or all of them.
    """
    replies: dict[Question, _JudgeReply] = {}
    answered, failed_in_a_row = False, 0
    pool = ThreadPoolExecutor(client.settings.concurrency, thread_name_prefix="judge")
    try:
        # 1. Start all calls.
        asked: dict[Future[_JudgeReply], Question] = {
            pool.submit(_ask, messages, client, prompt): question for question, messages in questions.items()
        }
        for future in as_completed(asked):
            # 2. Collect a reply.
            reply = replies[asked[future]] = future.result()
            # 3. Stop if the endpoint keeps failing. Refusals are about single texts, unless no call ever succeeded;
            # calls that are done come in any order, so that three refusals may come before an answer that is there.
            answered = answered or not reply.fault or client.has_answer(questions.values())
            if reply.fault == "failed" or (reply.fault and not answered):
                failed_in_a_row += 1
            elif not reply.fault:
                failed_in_a_row = 0
            if failed_in_a_row >= _FAILURES_IN_A_ROW:
                raise client.failure(f"{failed_in_a_row} calls failed in a row, the last one with: {reply.problem}")
            if progress:
                progress(len(replies), len(questions))
    except BaseException:  # Ctrl-C too
        client.stopping.set()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()
    if replies and all(reply.fault for reply in replies.values()):
        raise client.failure(f"every call failed, the last one with: {[*replies.values()][-1].problem}")
    return replies


def _ask(messages: list[Message], client: JudgeClient, prompt: JudgePrompt) -> _JudgeReply:
    """Ask; if the answer has no verdict, ask again with a reminder, up to ``answer_retries`` times."""
    reply = _JudgeReply()
    for _ in range(1 + client.settings.answer_retries):
        try:
            answer = client.ask(messages)
        except CallFailedError as error:
            reply.problem = str(error)
            reply.fault = "refused" if isinstance(error, CallRefusedError) else "failed"
            return reply
        reply.answers.append(answer.text)
        try:
            reply.verdict = read_verdict(answer.text)
            return reply
        except NoVerdictError as error:
            cut_off = answer.finish_reason == "length"
            reply.problem = f"{error}{f' (cut off at max_tokens = {client.settings.max_tokens})' if cut_off else ''}"
        messages = prompt.ask_again(messages, answer.text)
    return reply


def _collect(
    pairs: Sequence[CompletionPair], replies: dict[Question, _JudgeReply]
) -> tuple[list[JudgedPair], list[JudgeFailure]]:
    """Every pair with its verdicts, and every question without one."""
    judged, failures = [], []
    for pair in pairs:
        sides = {"a": pair.a, "b": pair.b, "prompt": pair.prompt}
        verdicts: list[Literal["a", "b", "tie"] | None] = ["tie", "tie"]
        answers: list[str] = []
        if pair.text_a != pair.text_b:
            both = [replies[pair.prompt, first, second] for first, second in _orders(pair)]
            verdicts = [r.verdict and names[r.verdict] for r, names in zip(both, _WINNERS, strict=True)]
            answers = [r.answers[-1] if r.answers else "" for r in both]
            failures += [
                JudgeFailure(**sides, shown_first=shown, reason=r.problem, answer=answer)
                for r, answer, shown in zip(both, answers, (pair.a, pair.b), strict=True)
                if r.verdict is None
            ]
        judged.append(
            JudgedPair(
                **sides, text_a=pair.text_a, text_b=pair.text_b, verdicts=verdicts, answers=answers,
                score=pair_score(verdicts),
            )
        )  # fmt: skip
    return judged, failures


def _matches(pairs: Sequence[JudgedPair], settings: JudgeSettings) -> list[JudgeMatch]:
    by_labels: dict[tuple[str, str], list[JudgedPair]] = defaultdict(list)
    for pair in pairs:
        by_labels[pair.a, pair.b].append(pair)
    return [summarise(some, seed=settings.seed, resamples=settings.bootstrap) for some in by_labels.values()]
