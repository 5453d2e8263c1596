"""Join a policy with a scorer of any kind, and with a drafter: which runners and which stepper read them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rgtg.config import DecodingSettings
from rgtg.decoding.engine.drafters import MAX_DRAFT, Costs, Drafter, FromModel, FromPolicy, FromText
from rgtg.decoding.request import Request, end_tokens
from rgtg.decoding.runners.mixture import Mixture, OwnPass
from rgtg.decoding.runners.model_runner import Runner, TreeRunner, make_runner
from rgtg.decoding.runners.policy_runner import Alone, Apart, AtOnce, InOnePass, OnCandidates, OnPrefix, Stepper
from rgtg.decoding.runners.scorer_runner import MAX_WIDTH, CandidateReader, PrefixReader, Reader
from rgtg.decoding.runners.segment_scorer import CachedSegments, OwnTexts, SegmentReader, WholeTexts
from rgtg.decoding.runners.text_scorer_runner import BranchReader, TextReader
from rgtg.errors import UsageError
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.tensor_parallel import is_tensor_parallel
from rgtg.models.ops.lm_head import policy_logits, scorer_scores
from rgtg.models.ops.packed_linear import decode_bytes
from rgtg.models.scorers.base import AnyScorer, Scorer
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer
from rgtg.tokenization.encoding import require_same_tokenizer, same_tokenizer

# Drafts that need no model of their own.
DRAFTS = ("policy", "prompt-lookup")

# Scorers that are models of their own; the others are part of the policy.
Separate = PrefixScorer | VocabularyScorer | CrossTokenizerScorer


def as_read_beside(policy: Policy, scorer: AnyScorer) -> AnyScorer:
    """A scorer as this policy can have it: a reward model with another tokenizer, or an encoder, reads text.

    Raises:
        TokenizerMismatchError: another tokenizer, and a scorer that scores the policy's tokens or reads its states.
        UsageError: a scorer without an embedding for some token of the tokenizer.
    """
    if isinstance(scorer, CrossTokenizerScorer):
        return scorer
    if isinstance(scorer, PrefixScorer) and not (scorer.causal and same_tokenizer(policy.tokenizer, scorer.tokenizer)):
        return CrossTokenizerScorer(scorer)
    require_same_tokenizer(policy.tokenizer, scorer.tokenizer)
    require_embeddings(policy, scorer, whole=False)
    return scorer


def require_embeddings(policy: Policy, scorer: AnyScorer, *, whole: bool) -> None:
    """Refuse a scorer of the policy's tokens that cannot read one of them.

    Args:
        policy: whose next tokens are candidates.
        scorer: of any kind; those that read text or the policy's states are passed over.
        whole: every row of the policy's embedding may be a candidate, padding behind the tokenizer's last id too.

    Raises:
        UsageError: the scorer's embedding has fewer rows than there are tokens.
    """
    if not isinstance(scorer, PrefixScorer | VocabularyScorer):
        return
    rows, of_policy = (len(one.model.get_input_embeddings().weight) for one in (scorer, policy))
    wanted = of_policy if whole else min(of_policy, len(policy.tokenizer))
    if rows < wanted:
        whose = "the policy's embedding has" if whole else "the tokenizer has"
        raise UsageError(
            f"{scorer.name} has embeddings for {rows} tokens, and {whose} {wanted}: train it from the policy's own "
            f"base model, or give it more (model.resize_token_embeddings({wanted})) and train and save it so",
            setting="top_k" if whole else None,
        )


def make_stepper(
    policy: Policy,
    scorer: AnyScorer | None,
    longest: int,
    *,
    top_k: int | None = None,
    tree: bool | None = None,
    overlap: bool | None = None,
    requests: Sequence[Request] = (),
) -> Stepper:
    """The cheapest exact way to take a step with this policy and this scorer.

    Args:
        policy: the frozen policy.
        scorer: None for the policy alone.
        longest: tokens of the longest prompt and its completion together.
        top_k: candidates per step; None for the whole vocabulary.
        tree: force the token tree (True) or the whole-text fallback (False); None finds out.
        overlap: let the policy read the candidates while a separate scorer scores them; None where the two are on
            different devices of one process.
        requests: whose prompts are read, in order: a scorer with a tokenizer of its own takes their texts from here.
    """
    width = min(top_k or MAX_WIDTH, MAX_WIDTH)

    def runner(of: Policy | AnyScorer, nodes: int, layer: int | None = None) -> Runner:
        return make_runner(of.model, policy_logits, longest + nodes, tree=tree, layer=layer)

    match scorer:
        case None:
            return Alone(runner(policy, 1))
        case OwnStateScorer(kind="state"):
            return OnCandidates(runner(policy, width, scorer.layer), scorer.head)
        case OwnStateScorer():
            return OnPrefix(runner(policy, 1, scorer.layer), scorer.head)
        case SharedTrunkScorer():
            return InOnePass(runner(scorer, width), scorer.head)
    reader = make_reader(policy, scorer, longest, top_k=top_k, tree=tree, requests=requests)
    if overlap is None:
        apart = not is_tensor_parallel(policy.model) and policy.model.device != scorer.model.device
        overlap = apart and not isinstance(scorer, VocabularyScorer)
    if overlap and (top_k or MAX_WIDTH + 1) <= MAX_WIDTH:
        return AtOnce(runner(policy, width), reader)
    return Apart(runner(policy, 1), reader)


def make_reader(
    policy: Policy,
    scorer: Separate,
    longest: int,
    *,
    top_k: int | None = None,
    tree: bool | None = None,
    requests: Sequence[Request] = (),
) -> Reader:
    """A scorer that is a model of its own, with a cache for ``longest`` tokens and the candidates behind them."""
    if isinstance(scorer, CrossTokenizerScorer):
        return make_text_reader(scorer, policy, requests, longest, tree=tree)
    if isinstance(scorer, VocabularyScorer):
        runner = make_runner(scorer.model, policy_logits, longest + 1, tree=tree, layer=scorer.layer)
        return PrefixReader(runner, scorer.head)
    width = min(top_k or MAX_WIDTH, MAX_WIDTH)
    return CandidateReader(make_runner(scorer.model, scorer_scores, longest + width, tree=tree))


def make_text_reader(
    scorer: CrossTokenizerScorer, policy: Policy, requests: Sequence[Request], longest: int, *, tree: bool | None = None
) -> TextReader:
    """A scorer with a tokenizer of its own: over a cache where its model can have one, else of whole texts."""
    eos_ids = end_tokens(policy)
    if scorer.causal and tree is not False:
        runner = make_runner(scorer.model, scorer_scores, longest + MAX_WIDTH, tree=tree)
        if isinstance(runner, TreeRunner):
            return BranchReader(scorer, policy, eos_ids, requests, runner=runner)
    return TextReader(scorer, policy, eos_ids, requests)


def make_mixture(
    policy: Policy,
    scorers: Sequence[AnyScorer],
    betas: Sequence[float],
    longest: int,
    *,
    top_k: int | None = None,
    tree: bool | None = None,
    requests: Sequence[Request] = (),
) -> Stepper:
    """Several scorers at once, with one beta each: the guided score is Σ_j β_j·r_j.

    The first scorer that is part of the policy shares the policy's pass; every other one makes a pass of its own.

    Args:
        policy: the frozen policy.
        scorers: at least one.
        betas: one each.
        longest: tokens of the longest prompt and its completion together.
        top_k: candidates per step; None for the whole vocabulary.
        tree: as ``make_stepper``.
        requests: as ``make_stepper``.
    """

    def stepper(scorer: AnyScorer) -> Stepper:
        return make_stepper(policy, scorer, longest, top_k=top_k, tree=tree, overlap=False, requests=requests)

    def reader(scorer: AnyScorer) -> Reader:
        if isinstance(scorer, Separate):
            return make_reader(policy, scorer, longest, top_k=top_k, tree=tree, requests=requests)
        return OwnPass(stepper(scorer))

    first = next((i for i, scorer in enumerate(scorers) if not isinstance(scorer, Separate)), 0)
    order = [first, *(i for i in range(len(scorers)) if i != first)]
    readers = [reader(scorers[i]) for i in order[1:]]
    return Mixture(stepper(scorers[first]), readers, [betas[i] for i in order], order)


def make_segment_reader(
    policy: Policy,
    scorer: Scorer | CrossTokenizerScorer,
    longest: int,
    length: int,
    *,
    tree: bool | None = None,
    requests: Sequence[Request] = (),
) -> SegmentReader:
    """The cheapest exact way to score segments of at most ``length`` tokens behind completions.

    Args:
        policy: the frozen policy.
        scorer: of finished completions or prefixes.
        longest: tokens of the longest prompt and its completion together.
        length: tokens of a segment.
        tree: as ``make_stepper``.
        requests: as ``make_stepper``.
    """
    if isinstance(scorer, CrossTokenizerScorer):
        return OwnTexts(scorer, policy.tokenizer, requests)
    if isinstance(scorer, PrefixScorer) and scorer.causal:
        room = longest + max(length, MAX_WIDTH)
        return CachedSegments(make_runner(scorer.model, scorer_scores, room, tree=tree))
    return WholeTexts(scorer)


@dataclass
class Speculation:
    """What ``rgtg.decoding.engine.speculative.speculate`` runs on."""

    policy: Runner
    scorer: Runner | None
    drafter: Drafter
    costs: Costs


def check_overlap(scorer: AnyScorer | None, settings: DecodingSettings, *, drafted: bool) -> None:
    """Refuse two passes at once where there are no two, or where their trees would be read in parts.

    Raises:
        UsageError: saying why.
    """
    if not isinstance(scorer, PrefixScorer | CrossTokenizerScorer) or drafted:
        raise UsageError("overlap runs the policy beside a scorer that is a model of its own, without a draft")
    if settings.top_k is None or settings.top_k > MAX_WIDTH:
        raise UsageError(f"overlap reads at most {MAX_WIDTH} candidates with the policy: set top_k (10 is usual)")


def check_draft(draft: "str | Policy", scorer: AnyScorer | None, settings: DecodingSettings) -> None:
    """Refuse drafts that cannot be verified, or cannot save anything.

    Raises:
        UsageError: saying why, and what to do.
    """
    if isinstance(scorer, CrossTokenizerScorer):
        raise UsageError(
            f"drafts are verified with a scorer that reads the policy's tokens; {scorer.name} reads text, with a "
            "tokenizer of its own: leave the draft out"
        )
    if scorer is not None and not isinstance(scorer, PrefixScorer):
        raise UsageError(
            f"drafts are verified with a scorer that is a model of its own; {scorer.name} reads the policy's states or "
            "scores from the prefix, which costs too little to speculate on: leave the draft out"
        )
    if scorer is None and draft == "policy":
        raise UsageError("the policy cannot draft for itself: draft from prompt-lookup or a smaller model")
    if scorer is not None and (settings.top_k is None or settings.top_k > MAX_WIDTH):
        raise UsageError(f"drafts are verified over at most {MAX_WIDTH} candidates: set top_k (10 is usual)")


def make_speculation(
    policy: Policy,
    scorer: PrefixScorer | None,
    draft: "str | Policy",
    longest: int,
    *,
    top_k: int | None,
    tree: bool | None = None,
) -> Speculation:
    """Runners for speculative decoding.

    Args:
        policy: the frozen policy.
        scorer: a scorer of its own, or None for the policy alone.
        draft: ``policy``, ``prompt-lookup``, or a small model with the policy's tokenizer.
        longest: tokens of the longest prompt and its completion together.
        top_k: candidates per step.
        tree: as ``make_stepper``.
    """
    k = top_k or 0
    reader = make_runner(policy.model, policy_logits, longest + MAX_DRAFT + 1, tree=tree)
    width = MAX_DRAFT + (MAX_DRAFT + 1) * k
    judge = make_runner(scorer.model, scorer_scores, longest + width, tree=tree) if scorer else None
    ridge = 32.0 if policy.model.device.type == "cpu" else 256.0
    costs = Costs(decode_bytes(policy.model), decode_bytes(scorer.model) if scorer else 0.0, ridge, k)
    drafter: Drafter
    if isinstance(draft, Policy):
        small = make_runner(draft.model, policy_logits, longest + MAX_DRAFT + 1, tree=tree)
        drafter = FromModel(small, decode_bytes(draft.model), costs)
    else:
        drafter = FromPolicy(reader, costs) if draft == "policy" else FromText(costs)
    return Speculation(reader, judge, drafter, costs)
