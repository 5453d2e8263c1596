"""Reward-guided text generation: steer a frozen language model with a scorer trained on partial sequences."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AuditResult": "rgtg.types",
    "Completion": "rgtg.types",
    "DataError": "rgtg.errors",
    "FullRewardTrainer": "rgtg.training.full_reward",
    "GuidedPolicy": "rgtg.decoding.guided",
    "OwnStateScorer": "rgtg.models.own_state",
    "PreferencePair": "rgtg.types",
    "PrefixRewardTrainer": "rgtg.training.prefix_reward",
    "PrefixScorer": "rgtg.models.prefix_scorer",
    "RgtgError": "rgtg.errors",
    "SharedTrunkScorer": "rgtg.models.shared_trunk",
    "StepTrace": "rgtg.types",
    "UsageError": "rgtg.errors",
    "VocabularyScorer": "rgtg.models.vocab_scorer",
    "audit_prefixes": "rgtg.evaluation.prefix_audit",
    "audit_rollouts": "rgtg.evaluation.rollout_audit",
    "bradley_terry_loss": "rgtg.losses",
    "custom_generate": "rgtg.integrations.transformers",
    "load_scorer": "rgtg.models.scorer",
    "make_rollouts": "rgtg.evaluation.rollouts",
    "prefix_bradley_terry_loss": "rgtg.losses",
    "read_pairs": "rgtg.data",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    """Load a public name on first use: importing rgtg must stay cheap."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rgtg' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from rgtg.data import read_pairs as read_pairs
    from rgtg.decoding.guided import GuidedPolicy as GuidedPolicy
    from rgtg.errors import DataError as DataError
    from rgtg.errors import RgtgError as RgtgError
    from rgtg.errors import UsageError as UsageError
    from rgtg.evaluation.prefix_audit import audit_prefixes as audit_prefixes
    from rgtg.evaluation.rollout_audit import audit_rollouts as audit_rollouts
    from rgtg.evaluation.rollouts import make_rollouts as make_rollouts
    from rgtg.integrations.transformers import custom_generate as custom_generate
    from rgtg.losses import bradley_terry_loss as bradley_terry_loss
    from rgtg.losses import prefix_bradley_terry_loss as prefix_bradley_terry_loss
    from rgtg.models.own_state import OwnStateScorer as OwnStateScorer
    from rgtg.models.prefix_scorer import PrefixScorer as PrefixScorer
    from rgtg.models.scorer import load_scorer as load_scorer
    from rgtg.models.shared_trunk import SharedTrunkScorer as SharedTrunkScorer
    from rgtg.models.vocab_scorer import VocabularyScorer as VocabularyScorer
    from rgtg.training.full_reward import FullRewardTrainer as FullRewardTrainer
    from rgtg.training.prefix_reward import PrefixRewardTrainer as PrefixRewardTrainer
    from rgtg.types import AuditResult as AuditResult
    from rgtg.types import Completion as Completion
    from rgtg.types import PreferencePair as PreferencePair
    from rgtg.types import StepTrace as StepTrace
