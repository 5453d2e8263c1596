"""The policy's own log-probabilities of a prompt's tokens, read in chunks between the steps of other requests."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.decoding.engine.prefix_cache import PrefixCache
from rgtg.decoding.runners.model_runner import CachedRunner, Runner, TreeRunner, has_cache
from rgtg.decoding.runners.token_tree import TokenTree
from rgtg.decoding.sampling import Vocabulary
from rgtg.errors import NonFiniteError
from rgtg.models.ops.lm_head import trunk
from rgtg.types.generation import StepTrace

# Positions whose logits are computed at once, where the whole prompt is read in one pass.
_POSITIONS = 128


class PromptLogProbs:
    """Reads a prompt, and says how likely each of its tokens is after those before it.

    Those are log-softmaxes of the policy's logits over the whole vocabulary, at temperature 1: what ``log_softmax`` of
    a stock forward pass gives. The first token follows nothing and has none.

    Args:
        ids: the prompt.
        count: most likely tokens to tell at each place, beside the prompt's own.
        vocabulary: the ids that are tokens; None is all.
    """

    def __init__(self, ids: Sequence[int], count: int, vocabulary: Vocabulary | None = None) -> None:
        self.ids, self.count, self.vocabulary = list(ids), count, vocabulary
        self._runner: CachedRunner | None = None
        self._position = 0

    @torch.inference_mode()
    def read(self, policy: Runner, chunk: int, cache: PrefixCache | None = None) -> list[StepTrace]:
        """Read so many more tokens; a model without a cache reads all of them at once.

        Args:
            policy: a runner of the policy, which is not changed.
            chunk: tokens.
            cache: takes over the keys and values of the prompt, once it has been read.

        Returns:
            A step for each token after one that was read. Both of its log-probabilities are the policy's.

        Raises:
            NonFiniteError: the policy's logits are NaN.
        """
        if self._position >= len(self.ids):
            return []
        if not has_cache(policy):
            self._position = len(self.ids)
            states = trunk(policy.model)(
                input_ids=torch.tensor([self.ids], device=policy.model.device), use_cache=False
            ).last_hidden_state[0]  # (L, H)
            return self._steps(policy, states, 0)
        # 1. a cache of its own
        if self._runner is None:
            self._runner = policy.fresh(len(self.ids))
            self._runner.reset(1)
        # 2. one chunk
        start, part = self._position, self.ids[self._position : self._position + chunk]
        states = self._runner.read(TokenTree.chain(torch.tensor([part]))).final[0]  # (n, H)
        self._runner.commit(torch.arange(len(part))[None])
        self._position += len(part)
        # 3. the prompt is read: a request that continues it need not do that again
        if cache is not None and self._position == len(self.ids):
            if isinstance(self._runner, TreeRunner):
                cache.add(("policy", None), self.ids, self._runner.cache)
            else:  # of another engine
                cache.add_rows(("policy", None), self._runner, self.ids, [0])
        return self._steps(self._runner, states, start)

    def _steps(self, runner: Runner, states: Float[Tensor, "length hidden"], start: int) -> list[StepTrace]:
        """Steps of the tokens that follow the states (n, H) at ``start``, ``start + 1`` …"""
        steps = []
        for first in range(0, len(states), _POSITIONS):
            after = self.ids[start + first + 1 : start + first + 1 + _POSITIONS]
            after = after[: len(states) - first]
            if not after:  # the prompt's last token
                break
            log_probs = torch.log_softmax(runner.head(states[first : first + len(after)]).float(), -1)  # (n, V)
            own = log_probs.gather(1, torch.tensor(after, device=log_probs.device)[:, None])[:, 0].tolist()
            if self.vocabulary is not None:
                log_probs = self.vocabulary.restrict(log_probs)
            values, ids = log_probs.topk(min(self.count, log_probs.shape[1]), -1)
            for token, log_prob, best, of_best in zip(after, own, ids.tolist(), values.tolist(), strict=True):
                if math.isnan(log_prob):
                    raise NonFiniteError("the policy's logits for this prompt are NaN; try dtype=float32")
                more = [] if token in best else [(token, log_prob)]
                told = [*zip(best, of_best, strict=True), *more]
                ranked, likely = [i for i, _ in told], [value for _, value in told]
                step = {"token_id": token, "candidate_ids": ranked, "policy_log_probs": likely, "scores": None}
                steps.append(StepTrace(**step, guided_log_probs=likely))
        return steps
