"""Join a policy with a scorer of any kind: which stepper reads the two, and how many models that takes."""

from rgtg.decoding.runner import make_runner
from rgtg.decoding.steps import (
    MAX_WIDTH,
    Alone,
    Apart,
    AtOnce,
    InOnePass,
    OnCandidates,
    OnPrefix,
    Stepper,
)
from rgtg.models.own_state import OwnStateScorer
from rgtg.models.policy import Policy
from rgtg.models.prefix_scorer import PrefixScorer
from rgtg.models.readout import policy_logits, scorer_scores
from rgtg.models.shared_trunk import SharedTrunkScorer
from rgtg.models.vocab_scorer import VocabularyScorer

AnyScorer = PrefixScorer | OwnStateScorer | SharedTrunkScorer | VocabularyScorer


def make_stepper(
    policy: Policy,
    scorer: AnyScorer | None,
    longest: int,
    *,
    top_k: int | None = None,
    tree: bool | None = None,
    overlap: bool | None = None,
) -> Stepper:
    """The cheapest exact way to take a step with this policy and this scorer.

    Args:
        policy: the frozen policy.
        scorer: None for the policy alone.
        longest: tokens of the longest prompt and its completion together.
        top_k: candidates per step; None for the whole vocabulary.
        tree: force the token tree (True) or the whole-text fallback (False); None finds out.
        overlap: let the policy read the candidates while a separate scorer scores them; None where the two are on
            different devices.
    """
    width = min(top_k or MAX_WIDTH, MAX_WIDTH)

    def runner(of: Policy | AnyScorer, nodes: int, layer: int | None = None):  # type: ignore[no-untyped-def]
        readout = scorer_scores if isinstance(of, PrefixScorer) else policy_logits
        return make_runner(of.model, readout, longest + nodes, tree=tree, layer=layer)

    match scorer:
        case None:
            return Alone(runner(policy, 1))
        case OwnStateScorer(kind="state"):
            return OnCandidates(runner(policy, width, scorer.layer), scorer.head)
        case OwnStateScorer():
            return OnPrefix(runner(policy, 1, scorer.layer), scorer.head)
        case SharedTrunkScorer():
            return InOnePass(runner(scorer, width), scorer.head)
        case VocabularyScorer():
            return OnPrefix(runner(policy, 1), scorer.head, runner(scorer, 1, scorer.layer))
    if overlap is None:
        overlap = policy.model.device != scorer.model.device
    if overlap and (top_k or MAX_WIDTH + 1) <= MAX_WIDTH:
        return AtOnce(runner(policy, width), runner(scorer, width))
    return Apart(runner(policy, 1), runner(scorer, width))
