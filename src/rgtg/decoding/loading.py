"""Models by name, or loaded: policy, scorers and drafter as decoding wants them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from rgtg.decoding.engine.drafters import DRAFTS
from rgtg.decoding.methods import find_method
from rgtg.errors import UsageError
from rgtg.models.loading.device_map import Placement
from rgtg.models.loading.engine_model import EngineModel
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import read_info
from rgtg.models.loading.tensor_parallel import set_local_device
from rgtg.models.ops.packed_linear import group_linears, grouped_linears, pack_linears
from rgtg.models.scorers.base import AnyScorer, load_scorer, trunk_of
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer

# A scorer: a folder or hub id, a loaded one, or a loaded (reward model, tokenizer) pair.
ScorerSource = str | AnyScorer | tuple[Any, Any]
_PLACES = "scorer_device, scorer_device_map and scorer_tp_plan"


def load_models(
    policy: "str | Policy | tuple[Any, Any]",
    scorer: "ScorerSource | Sequence[ScorerSource] | None",
    draft: "str | Policy | None",
    method: str,
    *,
    of_policy: Placement,
    of_scorers: Placement,
    pack: bool,
    cache_gguf: bool = False,
    engine: str | None = None,
    threads: int | None = None,
) -> "tuple[Policy, list[AnyScorer], str | Policy | None]":
    """Load what is given by name; arguments and errors are those of ``GuidedPolicy.from_pretrained``."""
    set_threads(threads)
    sources, apart = listed(scorer), of_scorers != Placement(of_scorers.dtype)
    for name in ("device_map", "tp_plan"):
        if getattr(of_policy, name) is not None and not isinstance(policy, str):
            raise UsageError(f"{name} applies to a policy loaded by name; load yours with a {name} of its own")
    if of_policy.tp_plan is not None or of_scorers.tp_plan is not None:
        set_local_device()
    if isinstance(policy, str):
        loaded = load_policy(policy, **vars(of_policy), cache_gguf=cache_gguf, engine=engine)
    else:
        loaded = load_policy(policy, cache_gguf=cache_gguf)
        require_engine(loaded, engine)
    if isinstance(policy, str):
        joined = any(isinstance(one, str) and trunk_of(one) == "shared" for one in sources)
        loaded = lay_out_policy(loaded, pack=pack, grouped=joined)
    if apart and not all(isinstance(one, str) for one in sources):
        raise UsageError(f"{_PLACES} apply to a scorer loaded by name; move a loaded model yourself")
    where = of_scorers if apart else replace(of_scorers, device=of_policy.device)
    scorers = [load_for_method(one, loaded, method, where, pack=pack) for one in sources]
    if apart and not (scorers and all(isinstance(one, PrefixScorer | VocabularyScorer) for one in scorers)):
        raise UsageError(f"{_PLACES} apply to a scorer that is a model of its own")
    if isinstance(draft, str) and draft not in DRAFTS:
        draft = load_policy(draft, dtype=of_policy.dtype, device=loaded.model.device)
        draft.model = pack_linears(draft.model) if pack else draft.model
    return loaded, scorers, draft


def lay_out_policy(policy: Policy, *, pack: bool = True, grouped: bool) -> Policy:
    """The policy as decoding wants it, in place of the stock layout: weights are held once.

    Args:
        policy: just loaded.
        pack: lay out its linear layers for a CPU.
        grouped: an adapter will be stacked under its layers.
    """
    if isinstance(policy.model, EngineModel):
        return policy
    if pack:
        policy.model = pack_linears(policy.model)
    if grouped and not grouped_linears(policy.model):
        policy.model = group_linears(policy.model, pack=False)
    return policy


def set_threads(threads: int | None) -> None:
    """Let all engines of this process compute with so many threads; None leaves it to the environment.

    Raises:
        UsageError: fewer than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise UsageError(f"threads = {threads}: it must be at least 1", setting="threads")
    torch.set_num_threads(threads)  # the other engines take their number from torch


def require_engine(policy: Policy, engine: str | None) -> None:
    """Check that a policy that was loaded before runs in the engine that is asked for.

    Raises:
        UsageError: it runs in another.
    """
    if engine not in (None, "auto", policy.engine):
        raise UsageError(f"engine applies to a policy loaded by name; this one runs in {policy.engine} already")


def listed(scorer: Any) -> list[Any]:
    """None, one scorer or several, as a list; a pair of model and tokenizer is one."""
    if scorer is None:
        return []
    return list(scorer) if isinstance(scorer, list) else [scorer]


def load_for_method(source: ScorerSource, policy: Policy, method: str, where: Placement, *, pack: bool) -> AnyScorer:
    """A scorer by name, as a method reads it; one that is not part of the policy is packed as the policy is.

    Where a method reads a language model's log-probabilities (GenARM), a folder without rgtg.json holds one.
    """
    if not isinstance(source, str | tuple):
        return source
    row = find_method(method)
    kind: Literal["autoregressive"] | None = None
    if row.scorer == "autoregressive" and _says_nothing(source):
        kind = "autoregressive"
    if where.device_map is None and where.tp_plan is None:
        where = replace(where, device=where.device or policy.model.device)
    placed = vars(where) if isinstance(source, str) else {}
    scorer = load_scorer(source, policy=policy, join=row.scores_tokens, kind=kind, **placed)
    return pack_separate(scorer) if pack and isinstance(source, str) else scorer


def pack_separate(scorer: AnyScorer) -> AnyScorer:
    """A scorer with its weights laid out for a CPU, where it is a model of its own and not part of the policy."""
    if isinstance(scorer, PrefixScorer | VocabularyScorer):
        scorer.model = pack_linears(scorer.model)
    return scorer


def _says_nothing(source: Any) -> bool:
    """Whether only the method can tell what a source holds: a loaded pair, or a folder or hub id without rgtg.json."""
    if isinstance(source, tuple):
        return True
    return isinstance(source, str) and read_info(source) is None
