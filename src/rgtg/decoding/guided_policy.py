"""GuidedPolicy: a frozen policy, a scorer and a method, behind one ``generate``."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import torch

from rgtg.decoding.decoder import Decoder, Prompt, naming_prompt
from rgtg.decoding.loading import Source, load_models
from rgtg.decoding.methods import find_method
from rgtg.decoding.request import row_seeds, settled, to_completion
from rgtg.errors import UsageError
from rgtg.models.loading.device_map import DeviceMap, Placement
from rgtg.models.loading.policy import Policy
from rgtg.models.loading.tensor_parallel import TpPlan
from rgtg.tokenization.conversation import encode_source
from rgtg.tokenization.encoding import decode_completion
from rgtg.types.generation import Completion


class GuidedPolicy(Decoder):
    """Steers a frozen causal language model token by token with a scorer (or takes the best of n).

    Example:
        >>> guided = GuidedPolicy.from_pretrained("policy-folder", scorer="scorer-folder")  # doctest: +SKIP
        >>> guided.generate(["Once upon a time"], max_new_tokens=64, seed=0)[0].text  # doctest: +SKIP
    """

    @classmethod
    def from_pretrained(
        cls,
        policy: "str | Policy | tuple[Any, Any]",
        scorer: "Source | Sequence[Source] | None" = None,
        *,
        method: str = "pargs",
        beta: float | Sequence[float] | None = None,
        top_k: int | Literal["default"] | None = "default",
        n: int | None = None,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        device_map: DeviceMap | None = None,
        tp_plan: TpPlan | None = None,
        scorer_device: "str | torch.device | None" = None,
        scorer_device_map: DeviceMap | None = None,
        scorer_tp_plan: TpPlan | None = None,
        token_tree: bool | None = None,
        overlap: bool | None = None,
        draft: str | Policy | None = None,
        pack: bool = True,
    ) -> Self:
        """Load policy and scorer, and join them.

        Args:
            policy: folder, hub id, or a loaded (model, tokenizer) pair.
            scorer: a scorer that ``rgtg train`` made or a stock reward model (folder, hub id, or a loaded pair); None
                with method ``policy``. Several in a list steer together, Σ_j β_j·r_j.
            method: a row of ``rgtg.decoding.methods.METHODS``.
            beta: guidance strength (default 1); it multiplies the score. In TRL and DPO beta is the KL coefficient,
                the inverse of ours. Of several scorers, one each.
            top_k: candidates per step; None for the whole vocabulary; ``default`` is the method's own (10 for most).
            n: completions that best-of-n draws (default 10).
            dtype: of models loaded by name; default the checkpoint's own.
            device: of models loaded by name; default the first GPU, else the CPU.
            device_map: of a policy loaded by name, in place of ``device``: ``auto`` or a device for each module, over
                GPUs, memory and disk (accelerate). Scorers do not follow it.
            tp_plan: of a policy loaded by name, in place of both: ``auto`` (or styles by module) splits each layer
                among the processes of a torchrun. All of them must make the same calls; all get the same completions.
            scorer_device: of a separate scorer loaded by name; default the policy's.
            scorer_device_map: of a separate scorer loaded by name, as ``device_map``.
            scorer_tp_plan: of a separate scorer loaded by name, as ``tp_plan``.
            token_tree: force the one-pass tree (True) or the whole-text fallback (False); None finds out.
            overlap: let the policy read the candidates while a separate scorer scores them; None where the two are on
                different devices.
            draft: speculate, exactly: tokens are drafted by ``policy`` (worth it where the scorer is the dearer model),
                by ``prompt-lookup``, or by a smaller model with the same tokenizer (folder, hub id, loaded ``Policy``).
            pack: lay out the weights of models loaded by name for decoding on a CPU (in place of, not beside, the
                stock layout).

        Raises:
            ModelNotFoundError: a folder or hub id that cannot be loaded.
            TokenizerMismatchError: policy and scorer read text differently.
            UsageError: unusable settings, or a scorer the method cannot use.
        """
        find_method(method)
        loaded, scorers, drafter = load_models(
            policy, scorer, draft, method, pack=pack,
            of_policy=Placement(dtype, device, device_map, tp_plan),
            of_scorers=Placement(dtype, scorer_device, scorer_device_map, scorer_tp_plan),
        )  # fmt: skip
        return cls(
            loaded, scorers, method=method, beta=beta, top_k=top_k, n=n, token_tree=token_tree, overlap=overlap,
            draft=drafter,
        )  # fmt: skip

    def generate(
        self,
        prompts: "Prompt | Sequence[Prompt]",
        *,
        seed: int | Sequence[int] = 0,
        trace: bool = False,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[Completion]:
        """Complete prompts; a row's text depends on its prompt, seed and settings, never on its neighbours.

        Args:
            prompts: texts, or lists of chat messages (rendered by the tokenizer's chat template).
            seed: one for all (each row derives its own), or one per prompt, used as it is.
            trace: keep every candidate's figures of every step.
            batch_size: prompts decoded together.
            **settings: fields of ``rgtg.config.DecodingSettings``: max_new_tokens, min_new_tokens, temperature,
                top_p, stop, repetition_penalty, no_repeat_ngram_size, and beta, top_k, n for this call.

        Returns:
            One ``Completion`` per prompt, in order.

        Raises:
            DataError: an empty prompt, or one that does not fit the context.
            UsageError: unusable settings.
            NonFiniteError: NaN from the policy or the scorer.
        """
        many = _as_list(prompts)
        ids, texts = [], []
        for index, prompt in enumerate(many):
            with naming_prompt(index, len(many)):
                text, prompt_ids = encode_source(self.policy.tokenizer, prompt)
            ids.append(prompt_ids)
            texts.append(text)
        return self._generate(ids, texts, many, seed, trace, batch_size, settings)

    def row_seeds(self, prompts: Sequence[Prompt], seed: int) -> list[int]:
        """The seeds that ``generate(prompts, seed=seed)`` gives its rows, for callers who feed the prompts in parts."""
        return row_seeds(seed, [encode_source(self.policy.tokenizer, prompt)[1] for prompt in prompts])

    def generate_ids(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        seed: int | Sequence[int] = 0,
        trace: bool = False,
        batch_size: int = 8,
        **settings: Any,
    ) -> list[Completion]:
        """``generate`` for prompts that are token ids already."""
        texts = [self.policy.tokenizer.decode(list(ids)) for ids in prompt_ids]
        return self._generate(prompt_ids, texts, [None] * len(texts), seed, trace, batch_size, settings)

    def _generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        texts: Sequence[str],
        sources: Sequence[Prompt | None],
        seed: int | Sequence[int],
        trace: bool,
        batch_size: int,
        settings: dict[str, Any],
    ) -> list[Completion]:
        resolved = self.resolve(settings, complete=True)
        if batch_size < 1:
            raise UsageError(f"batch_size = {batch_size}: it must be at least 1")
        requests = self.requests(prompt_ids, texts, sources, seed, resolved)
        for start in range(0, len(requests), batch_size):
            for _ in self.steps(requests[start : start + batch_size], resolved, trace=trace):
                pass
        return [to_completion(request, self.method.name, trace=trace) for request in requests]

    def stream(self, prompt: Prompt, *, seed: int = 0, **settings: Any) -> Iterator[str]:
        """Complete one prompt, yielding text as it is drawn; the pieces joined equal ``generate``'s text.

        A segment-wise method yields whole segments, best-of-n its text at the end. Arguments and errors are those of
        ``generate``.
        """
        resolved = self.resolve(settings, complete=True)
        text, ids = encode_source(self.policy.tokenizer, prompt)
        (request,) = self.requests([ids], [text], [prompt], seed, resolved)
        shown = ""
        steps = self.steps([request], resolved, trace=False)
        for _ in steps:
            if self.method.unit != "completion" and request.finish_reason is None:
                text = decode_completion(self.policy.tokenizer, request.prompt_ids, request.token_ids)
                safe = settled(text, resolved.stop)
                if len(safe) > len(shown) and safe.startswith(shown):
                    yield safe[len(shown) :]
                    shown = safe
        yield request.text[len(shown) :]


def _as_list(prompts: "Prompt | Sequence[Prompt]") -> list[Prompt]:
    """A text or one conversation (a list of messages) is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    return [many] if many and isinstance(many[0], dict) else many
