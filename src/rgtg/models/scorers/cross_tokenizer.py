"""Any reward model with a tokenizer of its own: it reads what the policy's tokens say, as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.errors import DataError, PromptTooLongError, UsageError
from rgtg.models.loading.scorer_info import ScorerInfo
from rgtg.models.loading.tensor_parallel import broadcast_from_rank0
from rgtg.models.scorers.reward_model import PrefixScorer, finished_flags, position_scores
from rgtg.tokenization.conversation import render_chat
from rgtg.tokenization.padding import pad_right
from rgtg.tokenization.retokenizer import Retokenizer

Prompt = str | Sequence[dict[str, Any]]
# Stands for the assistant's text while a chat template is looked at.
_STAND_IN = "rgtgStandIn"


@dataclass(frozen=True)
class RenderedPrompt:
    """What a scorer reads around a completion: text before it, and text after it once it is finished.

    ``templated``: a chat template wrote both, special tokens included.
    """

    text: str
    closing: str = ""
    templated: bool = False


class CrossTokenizerScorer:
    """Scores text: r(x, y) = R(tokenise(x ⊕ y)), with the scorer's own tokenizer and its own chat template.

    A completion of plain text follows its prompt as it stands, between the special tokens that the tokenizer adds.
    After chat messages, it is the assistant's next turn. A finished completion is closed as the scorer was trained: by
    EOS if its rgtg.json says so, or by the chat template. Trailing U+FFFD of an *unfinished* completion are bytes of a
    character that is not there yet, and no text; elsewhere U+FFFD is read as it stands.

    Attributes:
        causal: whether the model keeps a cache; an encoder reads whole texts.
    """

    def __init__(self, scorer: PrefixScorer) -> None:
        self.model, self.tokenizer = scorer.model, scorer.tokenizer
        self.info: ScorerInfo | None = scorer.info
        self.name, self.causal, self.max_length = scorer.name, scorer.causal, scorer.max_length
        self.append_eos = scorer.append_eos
        self.before, self.after = added_tokens(self.tokenizer)
        if self.info is not None and self.causal and self.after[-1:] == [self.tokenizer.eos_token_id]:
            self.after = self.after[:-1]  # trained on open texts: EOS says that a text is finished
        self.retokenizer = Retokenizer(self.tokenizer)
        self._rows = self.model.get_input_embeddings().weight.shape[0]

    def render(self, prompt: Prompt) -> RenderedPrompt:
        """Where the completion of a prompt goes.

        Raises:
            UsageError: chat messages, and a tokenizer without a chat template, or one that leaves the reply out.
        """
        if isinstance(prompt, str):
            return RenderedPrompt(prompt)
        reply = {"role": "assistant", "content": _STAND_IN}
        try:
            whole = render_chat(self.tokenizer, [*prompt, reply], add_generation_prompt=False)
        except UsageError as error:
            raise UsageError(f"the scorer {self.name} cannot read a chat: {error}") from error
        text, found, closing = whole.rpartition(_STAND_IN)
        if not found:
            raise UsageError(f"the chat template of the scorer {self.name} leaves the assistant's reply out")
        return RenderedPrompt(text, self._as_trained(closing), templated=True)

    def _as_trained(self, closing: str) -> str:
        """A template's end of a turn, as a scorer that was trained here has seen it: up to EOS."""
        eos = str(self.tokenizer.eos_token or "")
        if self.info is None or not eos:
            return closing
        if not closing.strip():
            return closing + eos
        inside, found, rest = closing.rpartition(eos)
        return inside + eos if found and self.append_eos and not rest.strip() else closing

    def full_text(self, turn: RenderedPrompt, completion: str, *, finished: bool) -> str:
        """All that the scorer reads of a turn."""
        said = completion + turn.closing if finished else completion.rstrip("�")
        return turn.text + said

    def special_tokens(self, turn: RenderedPrompt, *, finished: bool) -> tuple[list[int], list[int]]:
        """Tokens before and after those of the text."""
        if turn.templated:
            return [], []
        eos = self.tokenizer.eos_token_id
        if finished and self.append_eos and self.causal and eos is not None and self.after[-1:] != [eos]:
            return self.before, [*self.after, eos]
        return self.before, self.after

    def require_room(self, prompt: Prompt) -> None:
        """Refuse a prompt that leaves no room for a completion, as far as that is known before there is one.

        Raises:
            DataError: a prompt that is nothing to the scorer.
            PromptTooLongError: with the scorer's own figures.
        """
        turn = self.render(prompt)
        (body,) = self.retokenizer.encode([turn.text])
        before, after = self.special_tokens(turn, finished=False)
        self.check_ids(body)
        if not before and not body:
            raise DataError(f"the tokenizer of the scorer {self.name} turns the prompt into no token at all")
        length = len(before) + len(body) + len(after)
        if self.max_length is not None and length >= self.max_length:
            raise PromptTooLongError(
                f"the prompt is {length} tokens to the scorer {self.name}, whose context of {self.max_length} then has "
                "no room for a completion; shorten it, or use a scorer with a longer context"
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the model has no embedding for.

        Raises:
            UsageError: the tokenizer belongs to another model.
        """
        if ids and max(ids) >= self._rows:
            raise UsageError(
                f"the tokenizer of the scorer {self.name} gives token {max(ids)}, and its model has embeddings for "
                f"{self._rows}: they do not belong together; load the tokenizer that the scorer was trained with"
            )

    def fits(self, length: int) -> bool:
        """Whether so many tokens fit the scorer's context."""
        return self.max_length is None or length <= self.max_length

    def encode(
        self, turns: Sequence[RenderedPrompt], completions: Sequence[str], finished: Sequence[bool]
    ) -> list[list[int]]:
        """Tokens of whole texts, special ones included."""
        rows = list(zip(turns, completions, finished, strict=True))
        bodies = self.retokenizer.encode([self.full_text(turn, said, finished=end) for turn, said, end in rows])
        ids = []
        for (turn, _, end), body in zip(rows, bodies, strict=True):
            before, after = self.special_tokens(turn, finished=end)
            self.check_ids(body)
            ids.append([*before, *body, *after])
        return ids

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: bool | Sequence[bool] = True,
        batch_size: int = 8,
    ) -> list[float]:
        """Reward of each completion after its prompt.

        Args:
            prompts: texts, or lists of chat messages.
            completions: texts, as many.
            finished: whether a completion ended, for all or one each; those that did are closed.
            batch_size: texts read together.

        Raises:
            DataError: a text over the scorer's context.
            UsageError: another number of ``finished`` than of completions.
        """
        rewards = self.rewards(prompts, completions, finished=finished, batch_size=batch_size)
        if None in rewards:
            at = rewards.index(None)
            raise DataError(
                f"completion {at + 1} of {len(rewards)} exceeds, with its prompt, the context of {self.max_length} "
                f"tokens of the scorer {self.name}; drop it, or use a scorer with a longer context"
            )
        return [reward for reward in rewards if reward is not None]

    def rewards(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        finished: bool | Sequence[bool] = True,
        batch_size: int = 8,
    ) -> list[float | None]:
        """As ``score``, with None for texts over the scorer's context."""
        ended = finished_flags(finished, len(completions))
        ids = self.encode([self.render(prompt) for prompt in prompts], completions, ended)
        fitting = [i for i, mine in enumerate(ids) if self.fits(len(mine))]
        scores: list[float | None] = [None] * len(ids)
        for i, score in zip(fitting, self.score_ids([ids[i] for i in fitting], batch_size).tolist(), strict=True):
            scores[i] = score
        return scores

    @torch.inference_mode()
    def score_ids(self, rows: Sequence[Sequence[int]], batch_size: int = 64) -> Float[Tensor, " rows"]:
        """Scores (N,), fp32 on the CPU, of whole texts as tokens; texts of like length are read together.

        Equal texts are read once, so that they tie whatever stands beside them.
        """
        places: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            places.setdefault(tuple(row), []).append(i)
        scores = torch.zeros(len(rows))
        order = sorted(places, key=len)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            for row, score in zip(part, self._score_batch(part), strict=True):
                scores[places[row]] = score
        return scores

    def _score_batch(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores of one padded batch. What pads is hidden by the mask, so a model without a padding token will do."""
        pad = self.tokenizer.pad_token_id
        ids, mask = pad_right(rows, pad if pad is not None and pad < self._rows else 0, self.model.device)
        if not self.causal:
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
            return broadcast_from_rank0(self.model, logits[:, 0].float()).cpu()
        last = mask.sum(-1) - 1
        return position_scores(self.model, ids, mask).gather(1, last[:, None])[:, 0].float().cpu()


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that a tokenizer puts before and after a text.

    Raises:
        UsageError: it puts them elsewhere, or not always.
    """
    frames = {_frame(tokenizer, text) for text in ("a", "One, two and three.")}
    if len(frames) != 1 or (frame := frames.pop()) is None:
        raise UsageError("the scorer's tokenizer puts special tokens inside a text, or changes a text that has none")
    return list(frame[0]), list(frame[1])


def _frame(tokenizer: Any, text: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    whole, body = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return tuple(whole[:start]), tuple(whole[start + len(body) :])
    return None
