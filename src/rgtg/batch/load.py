"""From the settings of ``rgtg generate`` to models that are joined, and to the decoding settings that were given."""

from typing import Any

from rgtg.config import GenerateSettings
from rgtg.decoding.guided_policy import GuidedPolicy

_DECODING = (
    "temperature", "top_p", "min_new_tokens", "max_new_tokens", "stop", "repetition_penalty", "no_repeat_ngram_size",
    "draft_length", "entropy_gate", "segment_length", "min_segment", "entropy_threshold", "reward_threshold",
    "threshold_start", "retries",
)  # fmt: skip


def load_guided(settings: GenerateSettings) -> GuidedPolicy:
    """The policy and scorer of the settings, joined; ``policy`` must be given.

    Raises:
        ModelNotFoundError: a folder or hub id that cannot be loaded.
        UsageError: models and settings that do not go together.
    """
    assert settings.policy is not None, "checked before anything is loaded"
    given = settings.model_fields_set
    return GuidedPolicy.from_pretrained(
        settings.policy,
        settings.scorer,
        method=settings.method,
        beta=settings.beta if "beta" in given else None,
        n=settings.n if "n" in given else None,
        top_k=settings.top_k if "top_k" in given else "default",
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        tp_plan=settings.tp_plan,
        scorer_device=settings.scorer_device,
        scorer_device_map=settings.scorer_device_map,
        scorer_tp_plan=settings.scorer_tp_plan,
        draft=settings.draft,
    )


def decoding_of(settings: GenerateSettings) -> dict[str, Any]:
    """The decoding settings that were given, as ``GuidedPolicy.generate`` takes them."""
    return {name: getattr(settings, name) for name in _DECODING if name in settings.model_fields_set}
