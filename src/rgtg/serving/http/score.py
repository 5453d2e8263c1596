"""``/v1/score``: what a scorer says of completions, whole or after each token."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from rgtg.errors import DeadlineError, NonFiniteError, RgtgError
from rgtg.models.ops.lm_head import trunk
from rgtg.models.scorers.base import AnyScorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import encode_for_scoring, require_within_context
from rgtg.serving.http.bodies import JsonRoute
from rgtg.serving.http.errors import ApiError, Written, from_rgtg
from rgtg.serving.http.input_processor import Planner, Prompt
from rgtg.serving.http.requests import ScoreRequest
from rgtg.serving.http.responses import PrefixScore, Score, Scores, documented
from rgtg.serving.http.serialize import usage
from rgtg.serving.http.state import Service
from rgtg.serving.http.streaming import while_connected
from rgtg.tokenization.encoding import decode_completion, encode_completion
from rgtg.tokenization.padding import batches_by_length

# Texts that a scorer reads between two steps of the engine.
_AT_ONCE = 4


@dataclass(frozen=True)
class Reading:
    """A completion to be read.

    Attributes:
        token_ids: of the policy's tokens, one for each score.
        work: reads it with the models, a little at a time; the scores of all parts joined are its prefixes'.
    """

    token_ids: list[int]
    work: list[Callable[[], list[float]]]


def readings(planner: Planner, body: ScoreRequest, name: str) -> tuple[list[Reading], int]:
    """What to read, and how many tokens that is; call it in a thread.

    Raises:
        ApiError: an unusable prompt, or too many completions.
        DataError: a text that does not fit the scorer.
    """
    scorer = planner.models.scorers[name]
    param = "messages" if body.messages is not None else "prompt"
    source = body.messages if body.messages is not None else body.prompt
    assert source is not None, "checked with the body"
    (prompt,) = planner.prompts([source], param)
    completions = [body.completion] if isinstance(body.completion, str) else body.completion
    if len(completions) > planner.settings.max_prompts:
        raise ApiError(400, f"at most {planner.settings.max_prompts} completions in a request", param="completion")
    if isinstance(scorer, CrossTokenizerScorer):
        found = [_of_text(planner, scorer, prompt, text, body) for text in completions]
    else:
        found = [_of_tokens(planner, scorer, prompt, text, body) for text in completions]
    return found, sum(len(prompt.ids) + len(one.token_ids) for one in found)


def _of_tokens(planner: Planner, scorer: AnyScorer, prompt: Prompt, text: str, body: ScoreRequest) -> Reading:
    """By a scorer that reads the policy's tokens: one pass gives all prefixes."""
    (ids,), (said,) = encode_for_scoring(
        planner.models.tokenizer,
        [prompt.text],
        [text],
        body.finished,
        append_eos=scorer.append_eos,
        templated=body.messages is not None,
    )
    require_within_context([(ids, said)], scorer.max_length)
    planner.require_tokens(said, "completion")
    return Reading(said, [partial(_read_tokens, scorer, ids, said)])


def _of_text(planner: Planner, scorer: CrossTokenizerScorer, prompt: Prompt, text: str, body: ScoreRequest) -> Reading:
    """By a scorer with a tokenizer of its own, which reads each prefix's text anew."""
    tokenizer = planner.models.tokenizer
    said = encode_completion(tokenizer, prompt.text, text, templated=body.messages is not None, append_eos=False)
    ends = range(1, len(said)) if body.prefixes else ()
    texts = [decode_completion(tokenizer, prompt.ids, said[:i]) for i in ends]
    whole = partial(_read_texts, scorer, prompt, [text], body.finished)
    parts = [
        partial(_read_texts, scorer, prompt, texts[i : i + _AT_ONCE], False) for i in range(0, len(texts), _AT_ONCE)
    ]
    return Reading(said, [*parts, whole])


def _read_tokens(scorer: AnyScorer, prompt: list[int], said: list[int]) -> list[float]:
    if isinstance(scorer, SharedTrunkScorer):
        return [float(score) for score in adapted_scores(scorer, prompt, said)]
    assert not isinstance(scorer, CrossTokenizerScorer), "it reads texts"
    return [float(score) for score in scorer.score_prefixes([prompt], [said])[0]]


def _read_texts(scorer: CrossTokenizerScorer, prompt: Prompt, texts: Sequence[str], finished: bool) -> list[float]:
    return scorer.score([prompt.source or prompt.text] * len(texts), texts, finished=finished)


@torch.inference_mode()
def adapted_scores(scorer: SharedTrunkScorer, prompt: list[int], said: list[int]) -> Tensor:
    """Scores (T,) of a completion's prefixes by an adapter on the policy's trunk: the second row of its twin's two."""
    ((_, ids, mask),) = batches_by_length([(prompt, said)], 1, scorer.model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    twice = [torch.cat([each, each]) for each in (ids, mask, positions)]
    states = trunk(scorer.model)(
        twice[0], attention_mask=twice[1], position_ids=twice[2], use_cache=False
    ).last_hidden_state
    return scorer.head(states[1])[len(prompt) :].cpu()


async def read_all(service: Service, found: Sequence[Reading]) -> list[list[float]]:
    """Scores of every reading's prefixes, read between the steps of whatever else runs.

    Raises:
        ApiError: the queue is full, the time is over, or a score is no number.
    """
    engine, seconds = service.require(), service.settings.request_seconds
    works = [work for reading in found for work in reading.work]
    futures = []
    try:
        futures = engine.run_all(works)
        async with asyncio.timeout(seconds):
            parts = iter(await asyncio.gather(*map(asyncio.wrap_future, futures)))
    except TimeoutError:
        raise from_rgtg(DeadlineError("the request was not finished in its time")) from None
    except RgtgError as error:
        raise from_rgtg(error, Written("completion")) from error
    finally:
        for future in futures:
            future.cancel()  # what is still to be read, where one part failed
    scores = [[score for _ in reading.work for score in next(parts)] for reading in found]
    if not all(math.isfinite(score) for each in scores for score in each):
        service.metrics.scored_nan += 1
        raise from_rgtg(NonFiniteError("the scorer returned NaN or infinite scores"))
    return scores


def _score(service: Service, index: int, reading: Reading, scores: list[float], *, prefixes: bool) -> Score:
    told = Score(index=index, score=scores[-1])
    if prefixes:
        known = service.known
        told.prefixes = [
            PrefixScore(token_id=i, text=known.text(i), score=score)
            for i, score in zip(reading.token_ids, scores, strict=True)
        ]
    return told


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute, tags=["guidance"])

    @router.post("/v1/score", response_model=None, responses=documented(Scores))
    async def score(request: Request, body: ScoreRequest) -> Response:
        """Score completions of one prompt."""
        planner = service.planner
        name = planner.scorer(body.model)
        try:
            found, tokens = await run_in_threadpool(readings, planner, body, name)
        except RgtgError as error:
            raise from_rgtg(error, Written("completion")) from error
        scores = await while_connected(request, read_all(service, found))
        data = [
            _score(service, i, reading, each, prefixes=body.prefixes)
            for i, (reading, each) in enumerate(zip(found, scores, strict=True))
        ]
        answer = Scores(model=name, data=data, usage=usage(tokens, 0))
        return Response(answer.json_bytes(), media_type="application/json")

    return router
