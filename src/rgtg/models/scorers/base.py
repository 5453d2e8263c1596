"""The Scorer protocol, what a scorer declares about itself, and the one way to load any of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from rgtg.errors import UsageError
from rgtg.models.loading.device_map import DeviceMap
from rgtg.models.loading.hub import named
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import ScorerInfo, read_info
from rgtg.models.loading.tensor_parallel import TpPlan
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer

if TYPE_CHECKING:
    import torch


class Scorer(Protocol):
    """Anything that can say how good a prefix is.

    ``info`` is None for a model that was not trained here; ``causal`` says whether one forward reads every prefix.
    """

    model: Any
    tokenizer: Any
    name: str
    causal: bool
    max_length: int | None

    @property
    def info(self) -> ScorerInfo | None:
        """What the scorer's rgtg.json says of it."""
        ...

    def score_prefixes(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[Tensor]:
        """Scores of all prefixes y_{1:i}, i = 1 … T, of each completion: one fp32 CPU tensor (T,) per row."""
        ...

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        finished: bool | Sequence[bool] = True,
        batch_size: int = 8,
    ) -> list[float]:
        """Reward of each finished completion (or of an unfinished one, read without a closing EOS)."""
        ...


ReadableScorer = PrefixScorer | OwnStateScorer | VocabularyScorer  # those that read whole completions on their own
AnyScorer = ReadableScorer | SharedTrunkScorer | CrossTokenizerScorer


def load_scorer(
    source: "str | ReadableScorer | tuple[Any, Any]",
    *,
    kind: Literal["autoregressive"] | None = None,
    revision: str | None = None,
    policy: Policy | None = None,
    dtype: "str | torch.dtype | None" = None,
    device: "str | torch.device | None" = None,
    device_map: DeviceMap | None = None,
    tp_plan: TpPlan | None = None,
    join: bool = False,
) -> ReadableScorer | SharedTrunkScorer:
    """Load a scorer of any kind: its rgtg.json says which; a folder without one holds a stock reward model.

    Args:
        source: folder or hub id, a loaded scorer (returned as it is), or a loaded (reward model, tokenizer) pair.
        kind: ``autoregressive`` reads a language model (folder, hub id or loaded pair) by its log-probabilities, as
            GenARM reads any, for example one that DPO has tuned; a folder that rgtg trained so needs no kind.
        revision: branch, tag or commit of a hub repository; ``owner/name@revision`` says the same.
        policy: the loaded policy; a head on its states shares it, other scorers do not need it.
        dtype: of weights that are loaded.
        device: for weights that are loaded.
        device_map: in place of ``device``, as of `rgtg.models.loading.policy.load_policy`.
        tp_plan: in place of both, as there.
        join: read an adapter on the policy's trunk in one pass with the policy; else it is a reward model of its own.

    Raises:
        ModelNotFoundError: nothing loadable at ``source``.
        UsageError: a head made for another policy, a model that is no scorer, a scorer that is not of ``kind``, or a
            revision of what is no hub repository.
    """
    if revision is not None:
        if not isinstance(source, str):
            raise UsageError("revision applies to a scorer loaded by its hub id")
        source = named(source, revision)
    where: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map, "tp_plan": tp_plan}
    if kind is not None:
        return _as_autoregressive(source, kind, where)
    if isinstance(source, VocabularyScorer):
        return source
    if isinstance(source, OwnStateScorer):
        if policy is not None and policy.model is not source.model:
            raise UsageError(f"the head {source.name} is on another loaded policy; load it with policy= this one")
        return source
    if isinstance(source, str) and (info := read_info(source)):
        if info.trunk == "own":
            return OwnStateScorer.from_pretrained(source, policy=policy, **where)
        if info.trunk == "shared" and join and policy is not None:
            if device_map is not None or tp_plan is not None:
                raise UsageError("device_map and tp_plan are of a model of its own; an adapter is where its policy is")
            return SharedTrunkScorer.from_pretrained(source, policy)
        if info.head == "vocab":
            return VocabularyScorer.from_pretrained(source, **where)
    return PrefixScorer.from_pretrained(source, **where)


def load_named_scorer(
    source: str, policy: str | None = None, *, dtype: str | None = None, device: str | None = None
) -> ReadableScorer:
    """A scorer by name, to read whole completions with; ``policy`` says where the one that a head reads is now.

    Raises:
        UsageError: a policy for a scorer that reads none; and as ``load_scorer``.
    """
    if policy is not None and trunk_of(source) != "own":
        raise UsageError(f"{source} is a model of its own and reads no policy; leave --policy out")
    loaded = load_policy(policy, dtype=dtype, device=device) if policy is not None else None
    scorer = load_scorer(source, policy=loaded, dtype=dtype, device=device)
    assert not isinstance(scorer, SharedTrunkScorer), "only a policy can be joined with an adapter"
    return scorer


def weights_of(scorer: Any) -> Any:
    """The module whose weights a scorer was trained as: a head on a policy's states, else its model."""
    return scorer.head if isinstance(scorer, OwnStateScorer) else scorer.model


def trunk_of(source: str) -> str:
    """Whose states a scorer reads, by its folder: ``separate`` (also without rgtg.json), ``own`` or ``shared``."""
    info = read_info(source)
    return info.trunk if info else "separate"


def _as_autoregressive(source: Any, kind: str, where: dict[str, Any]) -> VocabularyScorer:
    if kind != "autoregressive":
        raise UsageError(f"kind={kind!r}: expected 'autoregressive', or None where rgtg.json says what a scorer is")
    if isinstance(source, str):
        scorer = VocabularyScorer.from_pretrained(source, **where)
    else:
        scorer = source if isinstance(source, VocabularyScorer) else VocabularyScorer(load_policy(source))
    if scorer.objective != "autoregressive":
        raise UsageError(
            f"{scorer.name} was trained with {scorer.objective}: its logits are values, not log-odds of text"
        )
    return scorer
