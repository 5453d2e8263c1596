"""Health, version, metrics, models, guidance and tokenizer endpoints."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from rgtg.decoding.methods import METHODS, scores_vocabulary
from rgtg.decoding.request import end_tokens
from rgtg.models.scorers.base import AnyScorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.serving.http.errors import ApiError
from rgtg.serving.http.input_processor import InputProcessor
from rgtg.serving.http.middleware import JsonRoute
from rgtg.serving.http.requests import DetokenizeRequest, TokenizeRequest
from rgtg.serving.http.responses import (
    Detokenized,
    GuidanceInfo,
    MethodCard,
    ModelCard,
    ModelList,
    ScorerCard,
    Status,
    Tokens,
    Version,
    documented,
)
from rgtg.serving.http.serialize import json_response
from rgtg.serving.http.state import ServerState
from rgtg.version import __version__

_LIMITS = ("max_tokens", "default_max_tokens", "max_batch", "max_queue", "max_candidates", "max_prompts")


def health_routes(state: ServerState) -> APIRouter:
    """Health checks, version and metrics."""
    router = APIRouter(tags=["health"])

    @router.get("/livez", response_model=None, responses=documented(Status))
    async def livez() -> Response:
        """Whether the process and its engine are alive; if this fails, restart the server."""
        if state.status == "ready":
            state.require()
        return json_response(Status(status="alive"))

    @router.get("/readyz", response_model=None, responses=documented(Status))
    @router.get("/health", response_model=None, responses=documented(Status))
    async def readyz() -> Response:
        """Whether the server accepts requests: the models are loaded, and it is not stopping."""
        state.require()
        return json_response(Status(status="ready"))

    @router.get("/version", response_model=None, responses=documented(Version))
    async def version() -> Response:
        """The version of rgtg."""
        return json_response(Version(version=__version__))

    @router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(state.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def model_routes(state: ServerState) -> APIRouter:
    """Models, scorers, methods and limits that requests can use."""
    router = APIRouter(tags=["OpenAI"])

    def cards() -> list[ModelCard]:
        processor = state.require()
        return [
            ModelCard(
                id=name,
                object="model",
                created=state.created,
                owned_by="rgtg",
                scorer=scorers[0] if scorers else None,
                max_model_len=processor.models.max_length,
            )
            for name, scorers in processor.model_names.items()
        ]

    @router.get("/v1/models", response_model=None, responses=documented(ModelList))
    async def list_models() -> Response:
        """The policy, and one more name per scorer."""
        return json_response(ModelList(object="list", data=cards()))

    @router.get("/v1/models/{model:path}", response_model=None, responses=documented(ModelCard))
    async def get_model(model: str) -> Response:
        """One model."""
        for card in cards():
            if card.id == model:
                return json_response(card)
        raise ApiError(404, f"there is no model {model!r}", param="model", code="model_not_found")

    @router.get("/v1/guidance", response_model=None, responses=documented(GuidanceInfo), tags=["guidance"])
    async def guidance() -> Response:
        """Scorers, methods and limits."""
        models = state.require().models
        info = GuidanceInfo(
            policy=models.policy_name,
            max_model_len=models.max_length,
            scorers=[_scorer_card(name, scorer) for name, scorer in models.scorers.items()],
            methods=[
                MethodCard(
                    name=method.name,
                    unit=method.unit,
                    scorer=method.scorer,
                    rule=method.rule,
                    clip=method.clip,
                    takes=list(method.takes),
                    top_k=method.top_k,
                    paper=method.paper,
                )
                for method in METHODS.values()
            ],
            limits={name: getattr(state.settings, name) for name in _LIMITS},
            chat_template=bool(getattr(models.tokenizer, "chat_template", None)),
            end_token_ids=sorted(end_tokens(models.policy)),
        )
        return json_response(info)

    return router


def _scorer_card(name: str, scorer: AnyScorer) -> ScorerCard:
    kind: Literal["prefix", "vocabulary", "head", "adapter", "text"]
    match scorer:
        case CrossTokenizerScorer():
            kind = "text"
        case SharedTrunkScorer():
            kind = "adapter"
        case OwnStateScorer():
            kind = "head"
        case _:
            kind = "vocabulary" if scores_vocabulary(scorer) else "prefix"
    objective = scorer.info.objective if scorer.info else None
    return ScorerCard(name=name, objective=objective, kind=kind, max_length=scorer.max_length)


def token_routes(state: ServerState) -> APIRouter:
    """Text to tokens and back."""
    router = APIRouter(route_class=JsonRoute, tags=["tokens"])

    @router.post("/tokenize", response_model=None, responses=documented(Tokens))
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """Token ids of a text or a chat, as the server encodes prompts."""
        processor = state.require()
        processor.require_model(body.model)
        ids = await run_in_threadpool(_encode, processor, body)
        texts = [processor.token_bytes.text(i) for i in ids]
        max_length = processor.models.max_length
        return json_response(Tokens(tokens=ids, count=len(ids), max_model_len=max_length, token_strs=texts))

    @router.post("/detokenize", response_model=None, responses=documented(Detokenized))
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        """Text of token ids, with the names of special tokens."""
        processor = state.require()
        processor.require_model(body.model)
        processor.require_tokens(body.tokens, "tokens")
        text = await run_in_threadpool(processor.tokenizer.decode, body.tokens, clean_up_tokenization_spaces=False)
        return json_response(Detokenized(prompt=str(text)))

    return router


def _encode(processor: InputProcessor, body: TokenizeRequest) -> list[int]:
    if body.messages is not None or body.chat_template_kwargs or (body.prompt and body.add_special_tokens):
        source, param = body.source
        (prompt,) = processor.encode([source], param, body.chat_template_kwargs)
        return list(prompt.ids)
    return list(processor.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens).input_ids)
