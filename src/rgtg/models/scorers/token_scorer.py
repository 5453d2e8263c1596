"""What scorers of the policy's tokens share: one forward pass scores every prefix of a completion."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from rgtg.errors import DataError, UsageError, of_row
from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.tokenization.conversation import PromptSource, TemplateKwargs, encode_completed
from rgtg.tokenization.encoding import embedding_rows, require_embeddings
from rgtg.tokenization.padding import batches_by_length

# Of completions: one value for all, or one each.
Flags = bool | Sequence[bool]


class TokenScorer:
    """Base class of scorers that read the policy's tokens.

    Attributes:
        info: contents of the scorer's rgtg.json; None for a model that was not trained here.
        causal: whether one forward pass scores every prefix.
        append_eos: whether finished completions of plain prompts end with EOS, as in training.
        reads_previous_state: whether the score of token i is read at token i − 1, so that a prompt needs a token.
    """

    model: Any
    tokenizer: Any
    info: ScorerInfo | None
    name: str
    causal = True
    max_length: int | None
    append_eos: bool
    reads_previous_state = False

    @torch.inference_mode()
    def score_prefixes(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], *, batch_size: int = 8
    ) -> list[Tensor]:
        """Score every prefix y_{1:i}, i = 1 … T, of each completion.

        Returns:
            One fp32 CPU tensor of shape (T,) per completion.

        Raises:
            DataError: an empty completion, a text that exceeds the scorer's context or has a token without embedding,
                or an empty prompt if the scorer reads the state before a token.
        """
        rows = list(zip(prompt_ids, completion_ids, strict=True))
        self.require_readable(rows)
        if self.reads_previous_state and not all(prompt for prompt, _ in rows):
            raise DataError(f"{self.name} reads the state before a token: the prompt must have one")
        scores: dict[int, Tensor] = {}
        for indices, ids, mask in batches_by_length(rows, batch_size, self.model.device):
            windows = [slice(len(rows[i][0]), len(rows[i][0]) + len(rows[i][1])) for i in indices]
            scores |= zip(indices, self._score_batch(ids, mask, windows), strict=True)
        return [scores[i] for i in range(len(rows))]

    def require_readable(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Check that the model can read (prompt, completion) rows of token ids.

        Raises:
            DataError: an empty completion, too many tokens, or a token without embedding; names the row.
        """
        require_within_context(rows, self.max_length)
        embeddings = embedding_rows(self.model)
        for i, (prompt, completion) in enumerate(rows):
            try:
                require_embeddings([*prompt, *completion], embeddings, f"the scorer {self.name}")
            except DataError as error:
                raise of_row(error, i, len(rows)) from error

    def _score_batch(
        self, ids: Int[Tensor, "batch length"], mask: Int[Tensor, "batch length"], windows: Sequence[slice]
    ) -> list[Tensor]:
        """Scores (T,) on the CPU of each row's completion, whose tokens are ``ids[row, windows[row]]``."""
        raise NotImplementedError

    def score(
        self,
        prompts: Sequence[PromptSource],
        completions: Sequence[str],
        *,
        finished: Flags = True,
        templated: bool = False,
        batch_size: int = 8,
        chat_template_kwargs: TemplateKwargs | None = None,
    ) -> list[float]:
        """Score each completion after its prompt.

        Args:
            prompts: texts, or lists of chat messages, which the scorer's own chat template renders.
            completions: as many texts.
            finished: whether a completion has ended, for all or one value each. A finished reply ends as the chat
                template ends it, another finished completion with EOS if the scorer was trained so. A completion that
                was cut off at a limit has no end.
            templated: a chat template has written the prompts that are text, special tokens included.
            batch_size: texts per forward pass.
            chat_template_kwargs: extra variables of the chat template.

        Raises:
            DataError: an empty prompt, a chat that the template refuses, or a text that exceeds the scorer's context.
            UsageError: chat messages and no chat template, or the number of ``finished`` differs from the number of
                completions.
        """
        prompt_ids, completion_ids = encode_for_scoring(
            self, prompts, completions, finished, templated=templated, chat_template_kwargs=chat_template_kwargs
        )
        return [float(s[-1]) for s in self.score_prefixes(prompt_ids, completion_ids, batch_size=batch_size)]


def require_within_context(rows: Sequence[tuple[Sequence[int], Sequence[int]]], limit: int | None) -> None:
    """Check that (prompt, completion) rows of token ids can be scored.

    Raises:
        DataError: a completion is empty, or a row has more than ``limit`` tokens; names the row.
    """
    for i, (prompt, completion) in enumerate(rows):
        if not completion:
            raise of_row(DataError("a scored completion must have at least one token"), i, len(rows))
        if limit and len(prompt) + len(completion) > limit:
            long = DataError(
                f"a text of {len(prompt)} + {len(completion)} tokens exceeds the scorer's context of {limit}; drop it, "
                "or use a scorer with a longer context"
            )
            raise of_row(long, i, len(rows))


class ReadsTokens(Protocol):
    """What `encode_for_scoring` needs of a scorer; `TokenScorer` explains the attributes."""

    tokenizer: Any
    append_eos: bool

    @property
    def info(self) -> ScorerInfo | None:
        """Contents of rgtg.json, or None."""
        ...


def encode_for_scoring(
    scorer: ReadsTokens,
    prompts: Sequence[PromptSource],
    completions: Sequence[str],
    finished: Flags,
    *,
    templated: bool = False,
    chat_template_kwargs: TemplateKwargs | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and completions as the scorer reads them; arguments are those of `TokenScorer.score`.

    A scorer that was trained here reads a reply up to the token that ends it, a stock reward model all that its chat
    template writes. An empty completion without an end gets the score of its prompt: the prompt's last token becomes
    its only token.

    Raises:
        DataError: an empty prompt, or a chat that the template refuses.
        UsageError: chat messages and no chat template, or the number of ``finished`` differs from the number of
            completions.
    """
    ended = finished_flags(finished, len(completions))
    rows = [
        encode_completed(
            scorer.tokenizer,
            prompt,
            completion,
            finished=end,
            append_eos=scorer.append_eos,
            templated=templated,
            whole=scorer.info is None,
            template_kwargs=chat_template_kwargs,
        )
        for prompt, completion, end in zip(prompts, completions, ended, strict=True)
    ]
    for prompt_ids, completion_ids in rows:
        if not completion_ids:
            completion_ids.append(prompt_ids.pop())
    return [prompt_ids for prompt_ids, _ in rows], [completion_ids for _, completion_ids in rows]


def finished_flags(finished: Flags, count: int) -> list[bool]:
    """One flag per completion, from one flag for all or a sequence.

    Raises:
        UsageError: the sequence does not have ``count`` flags.
    """
    flags = [finished] * count if isinstance(finished, bool) else list(finished)
    if len(flags) != count:
        raise UsageError(f"finished has {len(flags)} values for {count} completions")
    return flags
