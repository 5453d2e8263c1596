"""Reward-guided text generation: steer a frozen language model with a scorer trained on partial sequences."""

import importlib
from typing import TYPE_CHECKING, Any

from rgtg.version import __version__

_PUBLIC = {
    "AuditResult": "rgtg.types.audit",
    "Completion": "rgtg.types.generation",
    "DataError": "rgtg.errors",
    "FullRewardTrainer": "rgtg.training.trainers.reward",
    "GuidedPolicy": "rgtg.decoding.guided_policy",
    "OwnStateScorer": "rgtg.models.scorers.hidden_state_head",
    "PreferencePair": "rgtg.types.generation",
    "PrefixRewardTrainer": "rgtg.training.trainers.reward",
    "PrefixScorer": "rgtg.models.scorers.reward_model",
    "RgtgError": "rgtg.errors",
    "SharedTrunkScorer": "rgtg.models.scorers.lora_adapter",
    "StepTrace": "rgtg.types.generation",
    "UsageError": "rgtg.errors",
    "VocabularyScorer": "rgtg.models.scorers.token_reward",
    "audit_prefixes": "rgtg.evaluation.audit.prefix_accuracy",
    "audit_rollouts": "rgtg.evaluation.audit.candidate_ranking",
    "bradley_terry_loss": "rgtg.losses",
    "custom_generate": "rgtg.integrations.transformers",
    "load_scorer": "rgtg.models.scorers.base",
    "make_rollouts": "rgtg.evaluation.audit.candidate_rollouts",
    "prefix_bradley_terry_loss": "rgtg.losses",
    "read_pairs": "rgtg.data.pairs",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import rgtg`` is fast."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rgtg' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from rgtg.data.pairs import read_pairs as read_pairs
    from rgtg.decoding.guided_policy import GuidedPolicy as GuidedPolicy
    from rgtg.errors import DataError as DataError
    from rgtg.errors import RgtgError as RgtgError
    from rgtg.errors import UsageError as UsageError
    from rgtg.evaluation.audit.candidate_ranking import audit_rollouts as audit_rollouts
    from rgtg.evaluation.audit.candidate_rollouts import make_rollouts as make_rollouts
    from rgtg.evaluation.audit.prefix_accuracy import audit_prefixes as audit_prefixes
    from rgtg.integrations.transformers import custom_generate as custom_generate
    from rgtg.losses import bradley_terry_loss as bradley_terry_loss
    from rgtg.losses import prefix_bradley_terry_loss as prefix_bradley_terry_loss
    from rgtg.models.scorers.base import load_scorer as load_scorer
    from rgtg.models.scorers.hidden_state_head import OwnStateScorer as OwnStateScorer
    from rgtg.models.scorers.lora_adapter import SharedTrunkScorer as SharedTrunkScorer
    from rgtg.models.scorers.reward_model import PrefixScorer as PrefixScorer
    from rgtg.models.scorers.token_reward import VocabularyScorer as VocabularyScorer
    from rgtg.training.trainers.reward import FullRewardTrainer as FullRewardTrainer
    from rgtg.training.trainers.reward import PrefixRewardTrainer as PrefixRewardTrainer
    from rgtg.types.audit import AuditResult as AuditResult
    from rgtg.types.generation import Completion as Completion
    from rgtg.types.generation import PreferencePair as PreferencePair
    from rgtg.types.generation import StepTrace as StepTrace
