"""Which rows can share a lane, and what a lane and a prompt on its way there are made of."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from rgtg.decoding.engine.batch import Lane
from rgtg.decoding.engine.chunked_prefill import Feed, Prefill
from rgtg.decoding.engine.prefix_cache import PrefixStore, policy_key
from rgtg.decoding.request import Request
from rgtg.decoding.runners.factory import Separate, make_reader, make_stepper
from rgtg.decoding.runners.model_runner import TreeRunner, make_runner
from rgtg.decoding.runners.policy_runner import Alone, JoiningStepper
from rgtg.decoding.runners.scorer_runner import JoiningReader
from rgtg.models.loading.policy import Policy
from rgtg.models.ops.lm_head import policy_logits
from rgtg.models.scorers.base import AnyScorer
from rgtg.models.scorers.hidden_state_head import OwnStateScorer


class LaneKey(NamedTuple):
    """How a lane's policy pass goes: with a scorer that is part of it, or observing a layer for heads at the prefix."""

    lead: str | None
    layer: int | None


def lane_key(scorers: Mapping[str, AnyScorer], names: Sequence[str]) -> LaneKey | None:
    """The lane for a row with these scorers; None where they ask different things of one pass."""
    inside = [name for name in names if not isinstance(scorers[name], Separate)]
    heads = [name for name in inside if _is_head(scorers[name])]
    if not inside:  # the lane that heads use too, so that one pass serves them all
        layers = [
            scorer.layer for scorer in scorers.values() if isinstance(scorer, OwnStateScorer) and _is_head(scorer)
        ]
        return LaneKey(None, layers[0] if layers else None)
    if len(heads) == len(inside):
        layers = sorted({cast(OwnStateScorer, scorers[name]).layer for name in heads})
        return LaneKey(None, layers[0]) if len(layers) == 1 else None
    return LaneKey(inside[0], None) if len(inside) == 1 else None


def make_lane(
    policy: Policy,
    scorers: Mapping[str, AnyScorer],
    key: LaneKey,
    *,
    on_nan: Literal["fail", "unguided"],
    store: PrefixStore | None,
) -> Lane:
    """A lane without members."""
    return Lane(
        _stepper(policy, scorers, key, 1),
        lambda name: _reader(policy, scorers[name], 1, ()),
        lead=key.lead,
        heads={
            name: cast(OwnStateScorer, scorer).head
            for name, scorer in scorers.items()
            if key.lead is None and _is_head(scorer) and cast(OwnStateScorer, scorer).layer == key.layer
        },
        on_nan=on_nan,
        store=store,
    )


def make_prefill(
    policy: Policy, scorers: Mapping[str, AnyScorer], key: LaneKey, names: Sequence[str], request: Request
) -> Prefill:
    """A prompt on its way into a lane, to be read by the policy and by the separate scorers among ``names``."""
    prompt = request.prompt_ids
    stepper = _stepper(policy, scorers, key, len(prompt))
    feeds = [Feed(policy_key(key.lead), stepper.policy, prompt, stepper.copies)]
    readers = {}
    for name in names:
        if isinstance(scorer := scorers[name], Separate):
            readers[name] = _reader(policy, scorer, len(prompt), [request])
            if (unread := readers[name].begin([prompt])) is not None:
                runner, (text,) = unread
                feeds.append(Feed(name, runner, text))
    return Prefill(feeds, stepper, readers)


def _is_head(scorer: AnyScorer) -> bool:
    """Whether a scorer is a head on the policy's state at the prefix."""
    return isinstance(scorer, OwnStateScorer) and scorer.kind == "vocab"


def _stepper(policy: Policy, scorers: Mapping[str, AnyScorer], key: LaneKey, columns: int) -> JoiningStepper:
    if key.lead is None:
        stepper = Alone(make_runner(policy.model, policy_logits, columns, layer=key.layer))
    else:
        stepper = cast(Any, make_stepper(policy, scorers[key.lead], columns, top_k=1))
    _let_grow(stepper.policy)
    return stepper


def _reader(policy: Policy, scorer: AnyScorer, columns: int, requests: Sequence[Request]) -> JoiningReader:
    reader = cast(JoiningReader, make_reader(policy, cast(Separate, scorer), columns, top_k=1, requests=requests))
    _let_grow(getattr(reader, "runner", None))
    return reader


def _let_grow(runner: Any) -> None:
    if isinstance(runner, TreeRunner):
        runner.grows = True
