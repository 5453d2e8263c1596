"""The Scorer protocol, and loading a scorer of any kind."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from rgtg.errors import UsageError
from rgtg.models.loading.device_map import DeviceMap
from rgtg.models.loading.hub import with_revision
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.scorer_info import ScorerInfo, read_info
from rgtg.models.loading.tensor_parallel import TpPlan
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.tokenization.conversation import PromptSource, TemplateKwargs

if TYPE_CHECKING:
    import torch

# Scorers of whole completions; what load_scorer returns; and what decoding uses, which wraps reward models that have
# another tokenizer.
CompletionScorer = PrefixScorer | OwnStateScorer | VocabularyScorer
LoadedScorer = CompletionScorer | SharedTrunkScorer
AnyScorer = LoadedScorer | CrossTokenizerScorer


class Scorer(Protocol):
    """Anything that scores the prefixes of completions; `rgtg.models.scorers.token_scorer` explains the attributes."""

    model: Any
    tokenizer: Any
    name: str
    causal: bool
    max_length: int | None
    append_eos: bool

    @property
    def info(self) -> ScorerInfo | None:
        """Contents of the scorer's rgtg.json, or None for a model that was not trained here."""
        ...

    def score_prefixes(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[Tensor]:
        """Scores of all prefixes y_{1:i}, i = 1 … T, of each completion: one fp32 CPU tensor (T,) per row."""
        ...

    def score(
        self,
        prompts: Sequence[PromptSource],
        completions: Sequence[str],
        *,
        finished: bool | Sequence[bool] = True,
        batch_size: int = 8,
        chat_template_kwargs: TemplateKwargs | None = None,
    ) -> list[float]:
        """Score of each completion; a finished one is closed as in training."""
        ...


def load_scorer(
    source: "str | CompletionScorer | tuple[Any, Any]",
    *,
    kind: Literal["autoregressive"] | None = None,
    revision: str | None = None,
    policy: Policy | None = None,
    dtype: "str | torch.dtype | None" = None,
    device: "str | torch.device | None" = None,
    device_map: DeviceMap | None = None,
    tp_plan: TpPlan | None = None,
    join: bool = False,
) -> LoadedScorer:
    """Load a scorer of the kind that its rgtg.json describes; a folder without one holds a stock reward model.

    Args:
        source: folder or hub id, a loaded scorer (returned as it is), or a loaded (reward model, tokenizer) pair.
        kind: ``autoregressive`` scores with the log-probabilities of a language model (folder, hub id or loaded pair),
            as GenARM does with any, for example one tuned with DPO. A folder that rgtg trained so needs no kind.
        revision: branch, tag or commit of a hub repository; ``owner/name@revision`` means the same.
        policy: the loaded policy. A head on its hidden states shares it; other scorers do not need it.
        dtype: of weights that are loaded.
        device: for weights that are loaded.
        device_map: instead of ``device``, as in `rgtg.models.loading.policy.load_policy`.
        tp_plan: instead of both, as there.
        join: load an adapter on the policy's trunk into the policy, so that one forward pass serves both; otherwise the
            adapter is merged into a reward model of its own.

    Raises:
        ModelNotFoundError: nothing loadable at ``source``.
        UsageError: a head for another policy, a model that is not a scorer, a scorer that is not of ``kind``, or a
            revision of something that is not a hub repository.
    """
    if revision is not None:
        if not isinstance(source, str):
            raise UsageError("revision applies to a scorer loaded by its hub id")
        source = with_revision(source, revision)
    placement: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map, "tp_plan": tp_plan}
    if kind is not None:
        return _load_autoregressive(source, kind, placement)
    if isinstance(source, VocabularyScorer):
        return source
    if isinstance(source, OwnStateScorer):
        if policy is not None and policy.model is not source.model:
            raise UsageError(f"the head {source.name} is on another loaded policy; load it with policy= this one")
        return source
    if isinstance(source, str) and (info := read_info(source)):
        if info.trunk == "own":
            return OwnStateScorer.from_pretrained(source, policy=policy, **placement)
        if info.trunk == "shared" and join and policy is not None:
            if device_map is not None or tp_plan is not None:
                raise UsageError(
                    "device_map and tp_plan apply to a model of its own; an adapter is where its policy is"
                )
            return SharedTrunkScorer.from_pretrained(source, policy)
        if info.head == "vocab":
            return VocabularyScorer.from_pretrained(source, **placement)
    return PrefixScorer.from_pretrained(source, **placement)


def load_named_scorer(
    source: str, policy: str | None = None, *, dtype: str | None = None, device: str | None = None
) -> CompletionScorer:
    """Load a scorer of whole completions by name; ``policy`` is the present place of the policy that a head needs.

    Raises:
        UsageError: a policy for a scorer that does not need one; and as `load_scorer`.
    """
    if policy is not None and trunk_of(source) != "own":
        raise UsageError(f"{source} is a model of its own and does not need a policy; leave --policy out")
    loaded = load_policy(policy, dtype=dtype, device=device) if policy is not None else None
    scorer = load_scorer(source, policy=loaded, dtype=dtype, device=device)
    assert not isinstance(scorer, SharedTrunkScorer), "only join=True gives one"
    return scorer


def weights_of(scorer: Any) -> Any:
    """The module that a scorer was trained as: a head on a policy's states, otherwise its model."""
    return scorer.head if isinstance(scorer, OwnStateScorer) else scorer.model


def trunk_of(source: str) -> str:
    """Whose hidden states a scorer's folder scores: ``separate`` (also without rgtg.json), ``own`` or ``shared``."""
    info = read_info(source)
    return info.trunk if info else "separate"


def _load_autoregressive(source: Any, kind: str, placement: dict[str, Any]) -> VocabularyScorer:
    if kind != "autoregressive":
        raise UsageError(f"kind={kind!r}: expected 'autoregressive', or None if rgtg.json describes the scorer")
    if isinstance(source, str):
        scorer = VocabularyScorer.from_pretrained(source, **placement)
    else:
        scorer = source if isinstance(source, VocabularyScorer) else VocabularyScorer(load_policy(source))
    if scorer.objective != "autoregressive":
        raise UsageError(
            f"{scorer.name} was trained with {scorer.objective}: its logits are values, not log-probabilities of text"
        )
    return scorer
