"""The models that a server has loaded: one policy, and scorers by name."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.loading import lay_out_policy, pack_separate, set_threads
from rgtg.decoding.methods import find_method
from rgtg.decoding.runners.factory import RunnerFactory, fit_scorer
from rgtg.errors import RgtgError, UsageError
from rgtg.models.loading.policy import Policy, load_policy
from rgtg.models.loading.pretrained import find_gguf, load_pretrained
from rgtg.models.loading.scorer_info import read_info
from rgtg.models.scorers.base import AnyScorer, load_scorer, trunk_of
from rgtg.models.scorers.cross_tokenizer import CrossTokenizerScorer


class ServedModels:
    """What requests may choose from; nothing is ever loaded because of one."""

    def __init__(self, policy: Policy, scorers: Mapping[str, AnyScorer], policy_name: str = "policy") -> None:
        self.policy, self.policy_name = policy, policy_name
        self.scorers = {name: fit_scorer(policy, scorer) for name, scorer in scorers.items()}
        for name, scorer in self.scorers.items():
            scorer.name = name  # what refusals call it: clients never see a path
            if not isinstance(scorer, CrossTokenizerScorer):  # those keep a tokenizer of their own
                scorer.tokenizer = policy.tokenizer
        self.factory = RunnerFactory(policy, self.scorers)
        self._guided: dict[tuple[str, tuple[str, ...]], GuidedPolicy] = {}

    @classmethod
    def load(
        cls,
        policy: str,
        scorers: Mapping[str, str],
        *,
        policy_name: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        scorer_device: str | None = None,
        cache_gguf: bool = False,
        engine: str | None = None,
        threads: int | None = None,
    ) -> "ServedModels":
        """Load a policy and scorers by folder or hub id.

        A scorer's folder without rgtg.json holds a reward model, or a language model, read by its log-probabilities.

        Models are loaded in a thread that ends afterwards, together with its OpenMP workers. If this thread kept such
        workers beside those of the engine's thread, there would be more of them than cores; libgomp then puts workers
        to sleep between two operations instead of letting them spin, and every step takes a third longer.

        Raises:
            ModelNotFoundError: one of them cannot be loaded.
            TokenizerMismatchError: a scorer of the policy's tokens that has another tokenizer.
            UsageError: a head of another policy, or a folder that holds no scorer.
        """
        set_threads(threads)
        with ThreadPoolExecutor(1) as apart:
            arguments = policy, scorers, dtype, device, scorer_device, cache_gguf, engine
            loaded, read = apart.submit(_load, *arguments).result()
        return cls(loaded, read, policy_name or Path(policy).name or policy)

    @property
    def tokenizer(self) -> Any:
        """The policy's."""
        return self.policy.tokenizer

    @property
    def max_length(self) -> int | None:
        """Context of the policy in tokens; None where it has no limit."""
        return self.policy.max_length

    def guided(self, method: str, scorers: tuple[str, ...]) -> GuidedPolicy:
        """The policy and scorers under a method, made once; it prepares requests.

        Raises:
            UsageError: no such method or scorer, or a scorer that the method cannot use.
        """
        key = method, scorers
        if key not in self._guided:
            if unknown := [name for name in scorers if name not in self.scorers]:
                known = ", ".join(sorted(self.scorers)) or "none"
                raise UsageError(f"no scorer {unknown[0]!r} is loaded; loaded: {known}", setting="scorers")
            if find_method(method).scorer is None and scorers:
                raise UsageError(f"method {method} is not steered: leave the scorers out", setting="scorers")
            if len(set(scorers)) < len(scorers):
                raise UsageError("a scorer is named twice", setting="scorers")
            named = {name: self.scorers[name] for name in scorers}
            beta = [1.0] * len(named) if len(named) > 1 else None
            self._guided[key] = GuidedPolicy(self.policy, named, method=method, beta=beta, overlap=False)
        return self._guided[key]


def _load(
    policy: str,
    scorers: Mapping[str, str],
    dtype: str | None,
    device: str | None,
    scorer_device: str | None,
    cache_gguf: bool,
    engine: str | None,
) -> tuple[Policy, dict[str, Any]]:
    loaded = lay_out_policy(
        load_policy(policy, dtype=dtype, device=device, cache_gguf=cache_gguf, engine=engine),
        grouped=any(trunk_of(source) == "shared" for source in scorers.values()),
    )
    read: dict[str, Any] = {}
    for name, source in scorers.items():
        placed = {"dtype": dtype, "device": scorer_device or loaded.model.device}
        read[name] = pack_separate(load_scorer(source, policy=loaded, join=True, kind=_kind_of(source), **placed))
    return loaded, read


def _kind_of(source: str) -> Literal["autoregressive"] | None:
    """How a folder that says nothing of itself is read: a language model by its log-probabilities."""
    if read_info(source) is not None:
        return None
    if find_gguf(source) is not None:
        return "autoregressive"
    from transformers import AutoConfig

    try:
        config = load_pretrained(AutoConfig, source, "scorer")
    except RgtgError:
        return None  # loading says why
    names = config.architectures or []
    return "autoregressive" if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) else None
