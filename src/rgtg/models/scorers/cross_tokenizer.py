"""A reward model with another tokenizer than the policy: it scores the text of the policy's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.errors import DataError, PromptTooLongError, UnknownTokenError, UsageError, of_row
from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.models.loading.tensor_parallel import broadcast_from_rank0
from rgtg.models.scorers.reward_model import PrefixScorer, position_scores
from rgtg.models.scorers.token_scorer import Flags, finished_flags
from rgtg.tokenization.conversation import (
    PromptSource,
    TemplateKwargs,
    completed_chat,
    render_chat,
    turn_end,
)
from rgtg.tokenization.encoding import embedding_rows, require_embeddings
from rgtg.tokenization.padding import pad_right
from rgtg.tokenization.retokenizer import Retokenizer


@dataclass(frozen=True)
class RenderedPrompt:
    """The text before a completion, and the text that closes a finished completion.

    ``templated``: a chat template has written both, special tokens included.
    """

    text: str
    closing: str = ""
    templated: bool = False


class CrossTokenizerScorer:
    """Scores text with a reward model that has its own tokenizer: r(x, y) = R(tokenize(x ⊕ y)).

    After a prompt of plain text, the completion follows it directly, and the tokenizer adds its special tokens around
    both. After chat messages, the completion is the assistant's reply in the scorer's own chat template. A finished
    completion is closed as in the scorer's training: by EOS if its rgtg.json says so, or by the chat template. At the
    end of an *unfinished* completion, U+FFFD stands for an incomplete character and is removed; elsewhere it is kept.

    Attributes:
        causal: whether the model can keep a cache; an encoder scores whole texts.
        before: special tokens that the tokenizer adds before a text.
        after: special tokens that it adds after a text.
    """

    def __init__(self, scorer: PrefixScorer) -> None:
        self.model, self.tokenizer = scorer.model, scorer.tokenizer
        self.info: ScorerInfo | None = scorer.info
        self.name, self.causal, self.max_length = scorer.name, scorer.causal, scorer.max_length
        self.append_eos = scorer.append_eos
        # also what a chat template writes after the token that ends a reply, as stock models did in their training
        self._reads_whole_replies = self.info is None or not self.append_eos
        self.before, self.after = added_tokens(self.tokenizer)
        if self.causal and self.after[-1:] == [self.tokenizer.eos_token_id]:
            self.after = self.after[:-1]  # only finished texts end with EOS
        self.retokenizer = Retokenizer(self.tokenizer)
        self._bos = self._added_bos()
        self._embeddings = embedding_rows(self.model)
        self._require_special_tokens()

    def _require_special_tokens(self) -> None:
        """Check that the model can read what stands around every text.

        Raises:
            UsageError: it has no embedding for one of them, so that it can read nothing.
        """
        before, after = self.special_tokens(RenderedPrompt(""), finished=True)
        try:
            self.check_ids([*before, *after])
        except UnknownTokenError as error:
            raise UsageError(
                f"the scorer {self.name} and its tokenizer do not belong together: every text gets special token "
                f"{max([*before, *after])}, and there are {self._embeddings} embeddings; load the tokenizer that the "
                "scorer was trained with"
            ) from error

    def render(self, prompt: PromptSource, template_kwargs: TemplateKwargs | None = None) -> RenderedPrompt:
        """Text around the completion of a prompt.

        Raises:
            UsageError: chat messages, and a tokenizer without a chat template, or whose template omits the reply.
            DataError: the template refuses the messages.
        """
        if isinstance(prompt, str):
            return RenderedPrompt(prompt)
        try:
            text = render_chat(self.tokenizer, prompt, add_generation_prompt=True, template_kwargs=template_kwargs)
        except UsageError as error:
            raise UsageError(f"the scorer {self.name} cannot read a chat: {error}") from error
        except DataError as error:
            raise DataError(f"the scorer {self.name} cannot read this chat: {error}") from error
        end = turn_end(self.tokenizer, template_kwargs=template_kwargs)
        if end is None:
            raise UsageError(f"the chat template of the scorer {self.name} leaves the assistant's reply out")
        closing = end.text if self._reads_whole_replies else end.closing
        return RenderedPrompt(text, closing, templated=True)

    def full_text(self, prompt: RenderedPrompt, completion: str, *, finished: bool) -> str:
        """The text that is scored: prompt, completion, and the closing of a finished completion."""
        return prompt.text + (completion + prompt.closing if finished else completion.rstrip("�"))

    def special_tokens(self, prompt: RenderedPrompt, *, finished: bool) -> tuple[list[int], list[int]]:
        """Special tokens before and after those of the text."""
        if prompt.templated:
            return [], []
        # as for the policy, a text that itself begins with BOS gets no second one
        before = self.before[1:] if self._bos is not None and prompt.text.startswith(self._bos) else self.before
        eos = self.tokenizer.eos_token_id
        if finished and self.append_eos and self.causal and eos is not None and self.after[-1:] != [eos]:
            return before, [*self.after, eos]
        return before, self.after

    def _added_bos(self) -> str | None:
        """BOS as text, if the tokenizer adds it before every text, and reads it in a text."""
        bos = self.tokenizer.bos_token
        if not bos or self.before[:1] != [self.tokenizer.bos_token_id]:
            return None
        return str(bos) if self.retokenizer.encode([bos])[0] == self.before[:1] else None

    def require_room(self, prompt: PromptSource, template_kwargs: TemplateKwargs | None = None) -> None:
        """Check that the scorer's context has room for a completion after the prompt.

        Raises:
            DataError: the scorer's tokenizer gives no token for the prompt.
            PromptTooLongError: the prompt alone fills the context.
        """
        rendered = self.render(prompt, template_kwargs)
        (ids,) = self.retokenizer.encode([rendered.text])
        before, after = self.special_tokens(rendered, finished=False)
        self.check_ids(ids)
        if not before and not ids:
            raise DataError(f"the tokenizer of the scorer {self.name} turns the prompt into no token at all")
        length = len(before) + len(ids) + len(after)
        if self.max_length is not None and length >= self.max_length:
            raise PromptTooLongError(
                f"the prompt is {length} tokens to the scorer {self.name}, whose context of {self.max_length} has no "
                "room left for a completion; shorten it, or use a scorer with a longer context"
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """Check that the model has an embedding for each token.

        Raises:
            UnknownTokenError: it has none for one of them.
        """
        require_embeddings(ids, self._embeddings, f"the scorer {self.name}")

    def fits(self, length: int) -> bool:
        """Whether ``length`` tokens fit the scorer's context."""
        return self.max_length is None or length <= self.max_length

    def encode(
        self, prompts: Sequence[RenderedPrompt], completions: Sequence[str], finished: Sequence[bool]
    ) -> list[list[int]]:
        """Token ids of whole texts, special tokens included."""
        rows = list(zip(prompts, completions, finished, strict=True))
        texts = [self.full_text(prompt, completion, finished=end) for prompt, completion, end in rows]
        encoded: list[list[int]] = []
        for (prompt, _, end), ids in zip(rows, self.retokenizer.encode(texts), strict=True):
            before, after = self.special_tokens(prompt, finished=end)
            try:
                self.check_ids(ids)
            except DataError as error:
                raise of_row(error, len(encoded), len(rows)) from error
            encoded.append([*before, *ids, *after])
        return encoded

    def score(
        self,
        prompts: Sequence[PromptSource],
        completions: Sequence[str],
        *,
        finished: Flags = True,
        batch_size: int = 8,
        chat_template_kwargs: TemplateKwargs | None = None,
    ) -> list[float]:
        """Score each completion after its prompt.

        Args:
            prompts: texts, or lists of chat messages.
            completions: as many texts.
            finished: whether a completion has ended, for all or one value each; a finished completion is closed.
            batch_size: texts per forward pass.
            chat_template_kwargs: extra variables of the chat template.

        Raises:
            DataError: a chat that the template refuses, or a text that exceeds the scorer's context.
            UsageError: the number of ``finished`` differs from the number of completions.
        """
        rewards = self.rewards(prompts, completions, finished, batch_size, chat_template_kwargs)
        if None in rewards:
            index = rewards.index(None)
            raise DataError(
                f"completion {index + 1} of {len(rewards)} exceeds, with its prompt, the context of {self.max_length} "
                f"tokens of the scorer {self.name}; drop it, or use a scorer with a longer context",
                row=index,
            )
        return [reward for reward in rewards if reward is not None]

    def rewards(
        self,
        prompts: Sequence[PromptSource],
        completions: Sequence[str],
        finished: Flags,
        batch_size: int = 8,
        chat_template_kwargs: TemplateKwargs | None = None,
    ) -> list[float | None]:
        """Like ``score``, but None for a text that exceeds the scorer's context."""
        ended = finished_flags(finished, len(completions))
        rendered, texts = [], []
        for prompt, completion, end in zip(prompts, completions, ended, strict=True):
            around = self.render(prompt, chat_template_kwargs)
            if end and not isinstance(prompt, str):  # the template may rewrite or trim a finished reply
                text = completed_chat(
                    self.tokenizer, prompt, completion, finished=True, whole=self._reads_whole_replies,
                    template_kwargs=chat_template_kwargs,
                )  # fmt: skip
                around, completion = RenderedPrompt(text, templated=True), ""
            rendered.append(around)
            texts.append(completion)
        ids = self.encode(rendered, texts, ended)
        scores = iter(self.score_ids([row for row in ids if self.fits(len(row))], batch_size).tolist())
        return [next(scores) if self.fits(len(row)) else None for row in ids]

    @torch.inference_mode()
    def score_ids(self, rows: Sequence[Sequence[int]], batch_size: int = 64) -> Float[Tensor, " rows"]:
        """Scores of tokenized whole texts, fp32 on the CPU. Texts of similar length share a batch.

        Equal texts are scored once, so that their scores are equal in any batch.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            places.setdefault(tuple(row), []).append(i)
        scores = torch.zeros(len(rows))
        order = sorted(places, key=len)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for row, score in zip(batch, self._score_batch(batch), strict=True):
                scores[places[row]] = score
        return scores

    def _score_batch(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, " rows"]:
        """Scores of one padded batch. The mask hides the padding, so any token can pad."""
        pad = self.tokenizer.pad_token_id
        if pad is None or (self._embeddings is not None and pad >= self._embeddings):
            pad = 0
        ids, mask = pad_right(rows, pad, self.model.device)
        if not self.causal:
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
            return broadcast_from_rank0(self.model, logits[:, 0].float()).cpu()
        last = mask.sum(-1) - 1
        return position_scores(self.model, ids, mask).gather(1, last[:, None])[:, 0].float().cpu()


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that a tokenizer adds before and after a text.

    Raises:
        UsageError: it adds them inside the text, or different ones to different texts.
    """
    frames = {_frame(tokenizer, text) for text in ("a", "One, two and three.")}
    if len(frames) != 1 or (frame := frames.pop()) is None:
        raise UsageError("the scorer's tokenizer puts special tokens inside a text, or changes a text that has none")
    return list(frame[0]), list(frame[1])


def _frame(tokenizer: Any, text: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Special tokens before and after one text; None if they are not around the text's own tokens."""
    whole, ids = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
    for start in range(len(whole) - len(ids) + 1):
        if whole[start : start + len(ids)] == ids:
            return tuple(whole[:start]), tuple(whole[start + len(ids) :])
    return None
