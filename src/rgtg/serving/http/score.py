"""``/v1/score``: scores of completions, whole or after each token."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter, Request, Response
from jaxtyping import Float
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from rgtg.errors import NonFiniteError, RgtgError
from rgtg.models.ops.lm_head import trunk
from rgtg.models.scorers.base import AnyScorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.token_scorer import encode_for_scoring, require_within_context
from rgtg.serving.http.errors import ApiError, ParameterNames, from_rgtg
from rgtg.serving.http.input_processor import InputProcessor, Prompt
from rgtg.serving.http.middleware import JsonRoute
from rgtg.serving.http.requests import ScoreRequest
from rgtg.serving.http.responses import PrefixScore, Score, Scores, documented
from rgtg.serving.http.serialize import json_response, usage
from rgtg.serving.http.state import ServerState
from rgtg.serving.http.streaming import run_calls, while_connected
from rgtg.tokenization.encoding import decode_completion, encode_completion
from rgtg.tokenization.padding import batches_by_length

# Texts that a scorer reads between two steps of the engine.
_TEXTS_PER_CALL = 4


@dataclass(frozen=True)
class ScoringTask:
    """The work of scoring one completion.

    Attributes:
        token_ids: the completion in the policy's tokens.
        calls: run in order by the engine; their joined results are the scores of the prefixes that they cover.
    """

    token_ids: list[int]
    calls: list[Callable[[], list[float]]]


def _parse(processor: InputProcessor, body: ScoreRequest, name: str) -> tuple[list[ScoringTask], int]:
    """The tasks of a request, and its number of tokens; blocking, so call it in a worker thread.

    Raises:
        ApiError: a bad prompt, too many completions, or a completion that does not fit the scorer.
    """
    source, param = body.source
    (prompt,) = processor.encode([source], param, body.chat_template_kwargs)
    completions = [body.completion] if isinstance(body.completion, str) else body.completion
    if (limit := processor.settings.max_prompts) < len(completions):
        raise ApiError(400, f"at most {limit} completions in a request", param="completion")
    scorer = processor.models.scorers[name]
    try:
        if isinstance(scorer, CrossTokenizerScorer):
            tasks = [_text_task(processor, scorer, prompt, text, body) for text in completions]
        else:
            tasks = [_token_task(processor, scorer, prompt, text, body) for text in completions]
    except RgtgError as error:
        raise from_rgtg(error, ParameterNames("completion")) from error
    return tasks, sum(len(prompt.ids) + len(task.token_ids) for task in tasks)


def _token_task(
    processor: InputProcessor, scorer: AnyScorer, prompt: Prompt, text: str, body: ScoreRequest
) -> ScoringTask:
    """For a scorer of the policy's tokens: one call scores all prefixes."""
    source = prompt.text if prompt.source is None else prompt.source
    (prompt_ids,), (completion_ids,) = encode_for_scoring(
        scorer, [source], [text], body.finished, chat_template_kwargs=body.chat_template_kwargs
    )
    require_within_context([(prompt_ids, completion_ids)], scorer.max_length)
    processor.require_tokens([*prompt_ids, *completion_ids], "completion")
    return ScoringTask(completion_ids, [partial(_score_tokens, scorer, prompt_ids, completion_ids)])


def _text_task(
    processor: InputProcessor, scorer: CrossTokenizerScorer, prompt: Prompt, text: str, body: ScoreRequest
) -> ScoringTask:
    """For a scorer with its own tokenizer: every prefix is scored as a text of its own."""
    tokenizer = processor.tokenizer
    ids = encode_completion(tokenizer, prompt.text, text, templated=body.messages is not None, append_eos=False)
    lengths = range(1, len(ids)) if body.prefixes else ()
    prefixes = [decode_completion(tokenizer, prompt.ids, ids[:length]) for length in lengths]
    score = partial(_score_texts, scorer, prompt, kwargs=body.chat_template_kwargs)
    parts = range(0, len(prefixes), _TEXTS_PER_CALL)
    calls = [partial(score, prefixes[i : i + _TEXTS_PER_CALL], finished=False) for i in parts]
    return ScoringTask(ids, [*calls, partial(score, [text], finished=body.finished)])


def _score_tokens(scorer: AnyScorer, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    if isinstance(scorer, SharedTrunkScorer):
        return [float(score) for score in adapter_scores(scorer, prompt_ids, completion_ids)]
    assert not isinstance(scorer, CrossTokenizerScorer), "it scores texts"
    return [float(score) for score in scorer.score_prefixes([prompt_ids], [completion_ids])[0]]


def _score_texts(
    scorer: CrossTokenizerScorer, prompt: Prompt, texts: Sequence[str], *, finished: bool, kwargs: dict[str, Any] | None
) -> list[float]:
    sources = [prompt.source or prompt.text] * len(texts)
    return scorer.score(sources, texts, finished=finished, chat_template_kwargs=kwargs)


@torch.inference_mode()
def adapter_scores(scorer: SharedTrunkScorer, prompt_ids: list[int], completion_ids: list[int]) -> Float[Tensor, " T"]:
    """Scores of a completion's T prefixes by an adapter on the policy's trunk.

    The fused model computes two rows, the policy's and the adapter's; the scores are read from the second.
    """
    ((_, ids, mask),) = batches_by_length([(prompt_ids, completion_ids)], 1, scorer.model.device)  # (1, L)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids, mask, positions = (torch.cat([row, row]) for row in (ids, mask, positions))  # (2, L)
    hidden = trunk(scorer.model)(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    return scorer.head(hidden[1])[len(prompt_ids) :].cpu()


async def _run(state: ServerState, processor: InputProcessor, tasks: Sequence[ScoringTask]) -> list[list[float]]:
    """Prefix scores of every task; the engine runs the calls between its steps.

    Raises:
        ApiError: the queue is full, the deadline has passed, or a score is not finite.
    """
    calls = [call for task in tasks for call in task.calls]
    names, seconds = ParameterNames("completion"), state.settings.request_seconds
    results = iter(await run_calls(processor.engine, calls, names, seconds))
    scores = [[score for _ in task.calls for score in next(results)] for task in tasks]
    if not all(math.isfinite(score) for row in scores for score in row):
        state.metrics.scores_nan += 1
        raise from_rgtg(NonFiniteError("the scorer returned NaN or infinite scores"))
    return scores


def routes(state: ServerState) -> APIRouter:
    """The endpoint."""
    router = APIRouter(route_class=JsonRoute, tags=["guidance"])

    @router.post("/v1/score", response_model=None, responses=documented(Scores))
    async def score(request: Request, body: ScoreRequest) -> Response:
        """Score completions of one prompt."""
        processor = state.require()
        name = processor.scorer_name(body.model)
        tasks, num_tokens = await run_in_threadpool(_parse, processor, body, name)
        scores = await while_connected(request, _run(state, processor, tasks))
        text_of, data = processor.token_bytes.text, []
        for index, (task, row) in enumerate(zip(tasks, scores, strict=True)):
            data.append(Score(index=index, score=row[-1]))
            if body.prefixes:
                data[-1].prefixes = [
                    PrefixScore(token_id=token_id, text=text_of(token_id), score=score)
                    for token_id, score in zip(task.token_ids, row, strict=True)
                ]
        return json_response(Scores(object="list", model=name, data=data, usage=usage(num_tokens, 0)))

    return router
