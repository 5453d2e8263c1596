"""A `GuidedPolicy` whose requests vLLM completes with the plug-in: what a job's worker holds in vLLM's environment."""

import json
import os
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from rgtg.config import DecodingSettings
from rgtg.config.engines import require_carried, require_vllm
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.decoding.loading import ScorerSource, listed, load_for_method
from rgtg.decoding.methods import betas_of, scores_vocabulary
from rgtg.decoding.request import Request
from rgtg.engines.vllm.arguments import guided_params, read_guide, xargs
from rgtg.engines.vllm.scorer_file import VARIABLE
from rgtg.errors import RgtgError, UsageError, one_line
from rgtg.models.loading.device_map import Placement
from rgtg.models.loading.engine_model import EngineConfig, EngineModel
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.policy_files import describe_policy_files
from rgtg.models.loading.pretrained import load_tokenizer

# Settings that vLLM's sampler does not have, with the reason.
_REFUSED = {
    "top_p": "vLLM's top_p cuts the guided distribution, and this package's cuts the policy's",
    "entropy_gate": "vLLM guides every token",
    "kl_budget": "vLLM keeps beta",
    "abstain_below": "vLLM reports no scores",
    "no_repeat_ngram_size": "vLLM's sampler has none",
}


class VllmModel(EngineModel):
    """What a job asks of the policy that vLLM runs; vLLM reads the tokens in a loop of its own."""

    engine = "vllm"

    def __init__(self, source: str, llm: Any) -> None:
        sizes = llm.llm_engine.model_config
        self.name_or_path = source
        self.stored_dtype = str(sizes.dtype)
        self.config = EngineConfig(
            vocab_size=sizes.get_vocab_size(),
            hidden_size=sizes.get_hidden_size(),
            num_hidden_layers=sizes.hf_text_config.num_hidden_layers,
            max_position_embeddings=sizes.max_model_len - 1,  # the policy's log-probabilities take one more token
            model_type=sizes.hf_text_config.model_type,
        )
        configured = sizes.try_get_generation_config() or {}
        self.generation_config = SimpleNamespace(eos_token_id=configured.get("eos_token_id"))
        self._rgtg_fingerprint = describe_policy_files(source).fingerprint

    def require_layers(self, layers: Sequence[int]) -> None:
        """Check that only final states are asked for.

        Raises:
            UsageError: another layer.
        """
        final = self.config.num_hidden_layers
        if other := [layer for layer in layers if layer != final]:
            raise UsageError(
                f"the engine vllm gives the final states only (layer {final}), not those of layer {other[0]}: train "
                "the head with --layer final"
            )


class VllmGuidedPolicy(GuidedPolicy):
    """Completes requests in vLLM. Everything around a request is as in the other engines: checks, seeds, records.

    A completion's ``guided_log_prob`` is what vLLM's sampler reports. Its ``policy_log_prob`` is read afterwards, by
    one pass of the unguided policy over the finished text. ``candidates_log_prob`` and ``score`` are None.
    """

    def __init__(
        self,
        policy: str,
        scorer: ScorerSource | Sequence[ScorerSource] | None = None,
        *,
        method: str = "pargs",
        beta: float | Sequence[float] | None = None,
        top_k: int | Literal["default"] | None = "default",
        **engine: Any,
    ) -> None:
        """Start vLLM in this process, with the policy and its scorers.

        Args:
            policy: folder or hub id.
            scorer: folders or hub ids; None with method ``policy``.
            method: that decides token by token, as in `GuidedPolicy`.
            beta: as in `GuidedPolicy`.
            top_k: as in `GuidedPolicy`.
            **engine: arguments of ``vllm.LLM``.

        Raises:
            MissingExtraError: this environment has no vLLM.
            UsageError: scorers or settings that vLLM cannot carry.
            RgtgError: vLLM does not start.
        """
        require_vllm()
        require_carried("vllm", method)
        sources = [str(one) for one in listed(scorer)]
        self._aliases = [f"scorer-{i + 1}" for i in range(len(sources))]
        self._folder = tempfile.TemporaryDirectory(prefix="rgtg-vllm-")
        self.llm = _start(policy, dict(zip(self._aliases, sources, strict=True)), Path(self._folder.name), engine)
        loaded = Policy(VllmModel(policy, self.llm), load_tokenizer(policy, "policy"))
        # vLLM has loaded the scorers itself; here they are for checks, contexts and fingerprints
        scorers = [load_for_method(one, loaded, method, Placement(device="cpu"), pack=False) for one in sources]
        super().__init__(loaded, scorers, method=method, beta=beta, top_k=top_k)

    def steps(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Complete requests in vLLM; yields them once, when all have ended."""
        self.complete(requests)
        yield requests

    def complete(self, requests: list[Request]) -> None:
        """Complete requests of ``prepare``. One that vLLM refuses has its ``error`` set, and the others go on.

        Raises:
            Exception: vLLM itself failed, and this process cannot go on.
        """
        if not requests:
            return
        try:
            self._complete(requests)
        except ValueError as error:  # vLLM checks a request before it reads any
            if len(requests) == 1:
                requests[0].error = error
                return
            for request in requests:
                request.restart()
                self.complete([request])

    def _complete(self, requests: list[Request]) -> None:
        from vllm import SamplingParams

        # 1. draw
        prompts: list[Any] = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        outputs = self.llm.generate(prompts, [self._params(request) for request in requests], use_tqdm=False)
        for request, output in zip(requests, outputs, strict=True):
            _take(request, output.outputs[0])
        # 2. log π of what was drawn: a pass over the texts, whose own next token is thrown away
        whole: list[Any] = [{"prompt_token_ids": [*one.prompt_ids, *one.token_ids]} for one in requests]
        read = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        for request, output in zip(requests, self.llm.generate(whole, read, use_tqdm=False), strict=True):
            steps = output.prompt_logprobs[len(request.prompt_ids) :]
            request.policy_log_prob = sum(
                step[token].logprob for step, token in zip(steps, request.token_ids, strict=True)
            )

    def _params(self, request: Request) -> Any:
        """The request's settings as vLLM's ``SamplingParams``."""
        from vllm import SamplingParams

        settings = request.settings
        sampling: dict[str, Any] = {
            "temperature": 0.0 if request.params.greedy else settings.temperature,
            "max_tokens": settings.max_new_tokens,
            "min_tokens": settings.min_new_tokens,
            "stop": settings.stop,
            "stop_token_ids": sorted(self.end_tokens),
            "skip_special_tokens": False,  # a stop text may be a special token
            "logit_bias": settings.logit_bias or None,
            "repetition_penalty": settings.repetition_penalty,
            "seed": request.seed,
            "logprobs": 0,  # of the drawn token alone
        }
        if self.used:
            return guided_params(**self._guide(settings), **sampling)
        return SamplingParams(top_k=settings.top_k or 0, **sampling)

    def _guide(self, settings: DecodingSettings) -> dict[str, Any]:
        """The plug-in's arguments."""
        top_k = "all" if settings.top_k is None else settings.top_k
        return {"scorers": self._aliases, "betas": betas_of(settings), "top_k": top_k, "method": self.method.name}

    def _check(self, settings: DecodingSettings) -> None:
        """Refuse also what vLLM does not take."""
        super()._check(settings)
        for name, reason in _REFUSED.items():
            if getattr(settings, name) != DecodingSettings.model_fields[name].default:
                raise UsageError(f"the engine vllm cannot carry {name}: {reason}; use --engine torch", setting=name)
        if self.used:
            if settings.repetition_penalty != 1:
                raise UsageError(
                    "repetition_penalty scales logits, and vLLM's guided ones are shifted: use --engine torch",
                    setting="repetition_penalty",
                )
            known = dict(zip(self._aliases, map(scores_vocabulary, self.scorers), strict=True))
            read_guide(xargs(**self._guide(settings)), known)


def _start(policy: str, scorers: dict[str, str], folder: Path, engine: dict[str, Any]) -> Any:
    """Start vLLM in this process, with the plug-in if there are scorers."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine that fails ends with its worker
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # compiling takes minutes; and a seeded request whose prompt is read in parts ends vLLM 0.32 on a CPU
        engine = {"enforce_eager": True, "enable_chunked_prefill": False, **engine}
    if scorers:
        named = {name: str(Path(one).absolute()) if Path(one).exists() else one for name, one in scorers.items()}
        file = folder / "scorers.json"
        file.write_text(json.dumps(named), encoding="utf-8")
        os.environ[VARIABLE] = str(file)
        engine["logits_processors"] = ["rgtg.engines.vllm:Guidance"]
    try:
        return LLM(policy, logprobs_mode="processed_logprobs", **engine)
    except RgtgError:  # of the plug-in
        raise
    except Exception as error:
        traceback.print_exc()
        raise RgtgError(f"vLLM could not start: {one_line(error)}") from error


def _take(request: Request, output: Any) -> None:
    """Take over what vLLM drew for a request. Its text is cut and decoded as in the other engines."""
    request.token_ids = list(output.token_ids)
    if not (request.params.greedy or request.settings.temperature == 0):  # a maximum is certain
        steps = zip(output.logprobs, request.token_ids, strict=True)
        request.guided_log_prob = sum(step[token].logprob for step, token in steps)
    request.candidates_log_prob = None  # type: ignore[assignment]  # vLLM does not report it
    request.policy_calls = len(request.token_ids)
    request.scorer_calls = len(request.token_ids) if request.scorers else 0
    assert request.stopping is not None, "prepared requests have stopping criteria"
    request.stopping.update(request)
    if request.finish_reason is None:
        request.error = RgtgError(f"vLLM ended the completion for a reason of its own: {output.finish_reason}")
