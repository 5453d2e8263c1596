"""What the server says of itself: models, guidance, tokens, health, metrics, version."""

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from rgtg.decoding.methods import METHODS, scores_vocabulary
from rgtg.decoding.request import end_tokens
from rgtg.models.scorers.base import AnyScorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.serving.http.bodies import JsonRoute
from rgtg.serving.http.errors import ApiError
from rgtg.serving.http.input_processor import Planner
from rgtg.serving.http.requests import DetokenizeRequest, TokenizeRequest
from rgtg.serving.http.responses import (
    Answer,
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
from rgtg.serving.http.state import Service
from rgtg.version import __version__


def _json(answer: Answer) -> Response:
    return Response(answer.json_bytes(), media_type="application/json")


def health(service: Service) -> APIRouter:
    """Whether the process lives, and whether it takes requests."""
    router = APIRouter(tags=["health"])

    @router.get("/livez", response_model=None, responses=documented(Status))
    async def livez() -> Response:
        """Whether the process lives, and its engine with it: where this fails, start it again."""
        if service.status == "ready":
            service.require()
        return _json(Status(status="alive"))

    @router.get("/readyz", response_model=None, responses=documented(Status))
    @router.get("/health", response_model=None, responses=documented(Status))
    async def readyz() -> Response:
        """Whether requests are taken: models are loaded, and the server is not about to stop."""
        service.require()
        return _json(Status(status="ready"))

    @router.get("/version", response_model=None, responses=documented(Version))
    async def version() -> Response:
        """Of rgtg."""
        return _json(Version(version=__version__))

    @router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """In Prometheus' text format."""
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def models(service: Service) -> APIRouter:
    """What requests may name."""
    router = APIRouter(tags=["OpenAI"])

    def cards() -> list[ModelCard]:
        planner = service.planner
        return [
            ModelCard(
                id=name,
                created=service.created,
                scorer=scorers[0] if scorers else None,
                max_model_len=planner.models.max_length,
            )
            for name, scorers in planner.aliases.items()
        ]

    @router.get("/v1/models", response_model=None, responses=documented(ModelList))
    async def listed() -> Response:
        """The policy, and one name more for each scorer that may steer it."""
        return _json(ModelList(data=cards()))

    @router.get("/v1/models/{model:path}", response_model=None, responses=documented(ModelCard))
    async def one(model: str) -> Response:
        """One of them."""
        for card in cards():
            if card.id == model:
                return _json(card)
        raise ApiError(404, f"there is no model {model!r}", param="model", code="model_not_found")

    @router.get("/v1/guidance", response_model=None, responses=documented(GuidanceInfo), tags=["guidance"])
    async def guidance() -> Response:
        """Scorers, methods and limits."""
        return _json(describe(service))

    return router


def describe(service: Service) -> GuidanceInfo:
    """What requests may ask for."""
    loaded, settings = service.planner.models, service.settings
    methods = [
        MethodCard(
            name=row.name,
            unit=row.unit,
            scorer=row.scorer,
            rule=row.rule,
            clip=row.clip,
            takes=list(row.takes),
            top_k=row.top_k,
            paper=row.paper,
        )
        for row in METHODS.values()
    ]
    names = ("max_tokens", "default_max_tokens", "max_batch", "max_queue", "max_candidates", "max_prompts")
    return GuidanceInfo(
        policy=loaded.policy_name,
        max_model_len=loaded.max_length,
        scorers=[_card(name, scorer) for name, scorer in loaded.scorers.items()],
        methods=methods,
        limits={name: getattr(settings, name) for name in names},
        chat_template=bool(getattr(loaded.tokenizer, "chat_template", None)),
        end_token_ids=sorted(end_tokens(loaded.policy)),
    )


def _card(name: str, scorer: AnyScorer) -> ScorerCard:
    info = scorer.info
    return ScorerCard(
        name=name, objective=info.objective if info else None, kind=_kind(scorer), max_length=scorer.max_length
    )


def _kind(scorer: AnyScorer) -> Literal["prefix", "vocabulary", "head", "adapter", "text"]:
    match scorer:
        case CrossTokenizerScorer():
            return "text"
        case SharedTrunkScorer():
            return "adapter"
        case OwnStateScorer():
            return "head"
    return "vocabulary" if scores_vocabulary(scorer) else "prefix"


def tokens(service: Service) -> APIRouter:
    """Text to tokens and back."""
    router = APIRouter(route_class=JsonRoute, tags=["tokens"])

    @router.post("/tokenize", response_model=None, responses=documented(Tokens))
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """Tokens of a text or a chat, as the policy reads them."""
        planner = service.planner
        ids = await run_in_threadpool(_encode, planner, body)
        shown = [service.known.text(i) for i in ids]
        return _json(Tokens(tokens=ids, count=len(ids), max_model_len=planner.models.max_length, token_strs=shown))

    @router.post("/detokenize", response_model=None, responses=documented(Detokenized))
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        """Text of tokens, special ones written out."""
        planner = service.planner
        _require_model(planner, body.model)
        planner.require_tokens(body.tokens, "tokens")
        text = await run_in_threadpool(planner.models.tokenizer.decode, body.tokens, clean_up_tokenization_spaces=False)
        return _json(Detokenized(prompt=str(text)))

    return router


def _encode(planner: Planner, body: TokenizeRequest) -> list[int]:
    _require_model(planner, body.model)
    if body.messages is not None:
        (prompt,) = planner.prompts([body.messages], "messages")
        return list(prompt.ids)
    if body.prompt and body.add_special_tokens:
        (prompt,) = planner.prompts([body.prompt], "prompt")
        return list(prompt.ids)
    tokenizer: Any = planner.models.tokenizer
    return list(tokenizer(body.prompt, add_special_tokens=body.add_special_tokens).input_ids)


def _require_model(planner: Planner, model: str | None) -> None:
    if model is not None and model not in planner.aliases:
        raise ApiError(404, f"there is no model {model!r}", param="model", code="model_not_found")
