"""Which runners read a policy and its scorers: the cheapest exact way for each kind of scorer."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from rgtg.decoding.request import end_tokens
from rgtg.decoding.runners.model_runner import TreeRunner, make_runner
from rgtg.decoding.runners.policy_runner import MAX_WIDTH, EnginePolicyRunner, LoraPolicyRunner, TorchPolicyRunner
from rgtg.decoding.runners.scorer_runner import (
    SecondPassRunner,
    SeparateScorerRunner,
    StateHeadRunner,
    TokenRewardRunner,
    VocabHeadRunner,
)
from rgtg.decoding.runners.segment_scorer import (
    CachedSegmentScorer,
    CrossTokenizerSegmentScorer,
    SegmentScorer,
    WholeTextSegmentScorer,
)
from rgtg.decoding.runners.text_scorer_runner import CachedTextScorerRunner, TextScorerRunner
from rgtg.errors import UsageError
from rgtg.models.loading.policy import Policy
from rgtg.models.ops.lm_head import policy_logits, scorer_scores
from rgtg.models.scorers.base import AnyScorer, Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.heads import FoldedVocabularyHead, VocabularyHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.tokenization.conversation import same_chat_template
from rgtg.tokenization.encoding import embedding_rows, require_same_tokenizer, same_tokenizer

# Scorers that are models of their own; the others read the policy's states.
SeparateScorer = PrefixScorer | VocabularyScorer | CrossTokenizerScorer


class BatchKey(NamedTuple):
    """What requests must agree on to share the policy's forward pass.

    Attributes:
        fused: name of the scorer that reads states of the policy's pass at the candidates; None without one.
        layer: whose states the pass gives to heads; None reads no others than the final ones.
    """

    fused: str | None
    layer: int | None


@dataclass(frozen=True)
class TokenRunners:
    """Runners without rows for requests that are steered token by token; each batch and prompt gets fresh ones.

    Attributes:
        key: of the batch.
        policy: reads the policy.
        scorers: that make passes of their own, by name.
        options: the scorers on the policy's states, as arguments of ``Batch``.
    """

    key: BatchKey
    policy: TorchPolicyRunner
    scorers: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class RunnerFactory:
    """Makes runners for one policy and its scorers.

    Attributes:
        policy: the frozen policy.
        scorers: by name.
        tree: force token trees (True) or the whole-text fallback (False); None finds out what the model can do.
    """

    policy: Policy
    scorers: Mapping[str, AnyScorer]
    tree: bool | None = None

    def key(self, names: Sequence[str]) -> BatchKey:
        """The batch that a request with these scorers belongs to: the first one on the policy's states decides."""
        inside = [self.scorers[name] for name in names if not isinstance(self.scorers[name], SeparateScorer)]
        if not inside:  # the batch of vocabulary heads, so that one pass serves both
            heads = [scorer for scorer in self.scorers.values() if is_vocab_head(scorer)]
            return BatchKey(None, heads[0].layer if heads else None)
        first = inside[0]
        if is_vocab_head(first):
            return BatchKey(None, first.layer)
        return BatchKey(next(name for name in names if self.scorers[name] is first), None)

    def heads(self, key: BatchKey) -> dict[str, VocabHeadRunner]:
        """Vocabulary heads that read the states of this batch's pass, by name: they cost no pass of their own."""
        if key.fused is not None or key.layer is None:
            return {}
        return {
            name: VocabHeadRunner(self.policy.model, self._laid_out(scorer.head))
            for name, scorer in self.scorers.items()
            if is_vocab_head(scorer) and scorer.layer == key.layer
        }

    def _laid_out(self, head: Any) -> Any:
        """A vocabulary head as decoding wants it: folded where another engine's passes are short."""
        folds = self.policy.engine != "torch" and isinstance(head, VocabularyHead)
        return FoldedVocabularyHead(head) if folds else head

    def token_runners(self, names: Sequence[str]) -> TokenRunners:
        """Runners for requests with these scorers."""
        key = self.key(names)
        heads, fused = self.heads(key), self.fused(key)
        separate = {name: self.scorer_runner(name) for name in names if name != key.fused and name not in heads}
        options = {"fused": None if fused is None else (key.fused, fused), "heads": heads}
        return TokenRunners(key, self.policy_runner(key), separate, options)

    def fused(self, key: BatchKey) -> StateHeadRunner | None:
        """The scorer that reads states of the policy's pass at the candidates."""
        if key.fused is None:
            return None
        scorer = self.scorers[key.fused]
        assert isinstance(scorer, OwnStateScorer | SharedTrunkScorer), "a scorer on the policy's states"
        return StateHeadRunner(scorer.model, scorer.head)

    def policy_runner(self, key: BatchKey) -> TorchPolicyRunner:
        """Reads the policy; without rows or room for any (``fresh``)."""
        if key.fused is None:
            kind = TorchPolicyRunner if self.policy.engine == "torch" else EnginePolicyRunner
            return kind(self._runner(self.policy.model, key.layer))
        return self._fused_runner(self.scorers[key.fused])

    def scorer_runner(self, name: str) -> Any:
        """A scorer that makes passes of its own (`rgtg.decoding.runners.base.ScorerRunner`); without rows."""
        scorer: Any = self.scorers[name]
        match scorer:
            case CrossTokenizerScorer():
                return self._text_runner(scorer)
            case VocabularyScorer():
                return TokenRewardRunner(self._runner(scorer.model, scorer.layer), scorer.head)
            case PrefixScorer():
                return SeparateScorerRunner(make_runner(scorer.model, scorer_scores, 0, tree=self.tree))
        if is_vocab_head(scorer):
            head = VocabHeadRunner(scorer.model, scorer.head)
            return SecondPassRunner(TorchPolicyRunner(self._runner(scorer.model, scorer.layer)), head)
        return SecondPassRunner(self._fused_runner(scorer), StateHeadRunner(scorer.model, scorer.head))

    def segment_scorer(self, scorer: "Scorer | CrossTokenizerScorer", columns: int) -> SegmentScorer:
        """Scores segments and finished completions; ``columns``: tokens of prompt, completion and widest tree."""
        if isinstance(scorer, CrossTokenizerScorer):
            return CrossTokenizerSegmentScorer(scorer, self.policy.tokenizer)
        if isinstance(scorer, PrefixScorer) and scorer.causal:
            return CachedSegmentScorer(make_runner(scorer.model, scorer_scores, columns, tree=self.tree))
        return WholeTextSegmentScorer(scorer)

    def _text_runner(self, scorer: CrossTokenizerScorer) -> TextScorerRunner:
        """Over a cache where the scorer's model can have one, else of whole texts."""
        eos_ids = end_tokens(self.policy)
        if scorer.causal and self.tree is not False:
            runner = make_runner(scorer.model, scorer_scores, 0, tree=self.tree)
            if isinstance(runner, TreeRunner):
                return CachedTextScorerRunner(scorer, self.policy, eos_ids, runner=runner)
        return TextScorerRunner(scorer, self.policy, eos_ids)

    def _fused_runner(self, scorer: AnyScorer) -> TorchPolicyRunner:
        if isinstance(scorer, SharedTrunkScorer):
            return LoraPolicyRunner(self._runner(scorer.model))
        assert isinstance(scorer, OwnStateScorer), "a scorer on the policy's states"
        return TorchPolicyRunner(self._runner(scorer.model, scorer.layer))

    def _runner(self, model: Any, layer: int | None = None) -> Any:
        return make_runner(model, policy_logits, 0, tree=self.tree, layer=layer)


def scorer_kind(policy: Policy, scorer: AnyScorer) -> str:
    """What kind of scorer this is, as the table of engines calls it (`rgtg.config.engines.SCORERS`)."""
    match scorer:
        case CrossTokenizerScorer():
            return "reward model with another tokenizer"
        case VocabularyScorer():
            return "vocabulary scorer of its own"
        case PrefixScorer():
            return "reward model of its own"
        case SharedTrunkScorer():
            return "LoRA adapter on the policy"
    if scorer.layer != policy.model.config.get_text_config().num_hidden_layers:
        return "head on another layer"
    return "vocabulary head on final states" if scorer.kind == "vocab" else "state head on final states"


def is_vocab_head(scorer: Any) -> TypeGuard[OwnStateScorer]:
    """Whether a scorer is a vocabulary head on the policy's state at the prefix."""
    return isinstance(scorer, OwnStateScorer) and scorer.kind == "vocab"


def tree_columns(top_k: int | None) -> int:
    """Columns that the widest tree of ``top_k`` candidates takes in a cache; None is the whole vocabulary."""
    return min(top_k or MAX_WIDTH, MAX_WIDTH)


def fit_scorer(policy: Policy, scorer: AnyScorer) -> AnyScorer:
    """A scorer as this policy can use it: a reward model with another tokenizer or template, or an encoder, reads text.

    Raises:
        TokenizerMismatchError: another tokenizer, and a scorer that scores the policy's tokens or reads its states.
        UsageError: a scorer without an embedding for some token of the tokenizer.
    """
    if isinstance(scorer, CrossTokenizerScorer):
        return scorer
    same_template = same_chat_template(policy.tokenizer, scorer.tokenizer)
    if isinstance(scorer, PrefixScorer) and not (
        scorer.causal and same_template and same_tokenizer(policy.tokenizer, scorer.tokenizer)
    ):
        return CrossTokenizerScorer(scorer)
    require_same_tokenizer(policy.tokenizer, scorer.tokenizer)
    if not same_template:
        warnings.warn(
            f"{scorer.name} scores the policy's tokens and reads chats in the policy's chat template, not in its own",
            stacklevel=2,
        )
    if isinstance(scorer, PrefixScorer | VocabularyScorer):
        require_all_tokens(policy, scorer.model, scorer.name)
    return scorer


def require_all_tokens(policy: Policy, model: Any, name: str) -> None:
    """Refuse a scorer or draft that reads the policy's tokens and has no embedding for one that the policy can write.

    Padding of either embedding beyond the tokenizer does not matter: it is never a candidate.

    Raises:
        UsageError: with both figures.
    """
    rows, wanted = embedding_rows(model), policy.vocabulary.size
    if rows is not None and rows < wanted:
        raise UsageError(
            f"{name} has embeddings for {rows} tokens, and the policy writes {wanted}: train it from the policy's own "
            f"base model, or give it more (model.resize_token_embeddings({wanted})) and train and save it so"
        )
