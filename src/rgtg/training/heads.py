"""Train a head on cached states: a thin transformers.Trainer, its batches, its figures."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus
from transformers import Trainer

from rgtg.errors import NonFiniteError
from rgtg.losses import mean_of_counted, prefix_bradley_terry_pair_losses, prefix_margins, prefixes_differ
from rgtg.models.heads import Head, StateHead, VocabularyHead
from rgtg.training.pairwise import PERCENTS, PairScores, pair_figures
from rgtg.training.state_cache import StateCache, moments

FIGURES = ("loss", *(f"accuracy_{percent}" for percent in PERCENTS), "margin", "prefix_accuracy")


class StatePairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Pairs of one layer's states; an item is (states, token ids) of the chosen and of the rejected completion."""

    def __init__(self, cache: StateCache, layer: int) -> None:
        self.cache = cache
        self.layer = layer

    def __len__(self) -> int:
        return self.cache.pairs

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        chosen, chosen_ids = self.cache.completion(self.layer, 2 * i)
        rejected, rejected_ids = self.cache.completion(self.layer, 2 * i + 1)
        return {"chosen": chosen, "chosen_ids": chosen_ids, "rejected": rejected, "rejected_ids": rejected_ids}


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """States (P, H) and token ids (P,) of completions [chosen …; rejected …] end to end, and their lengths (2B,)."""
    states = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    ids = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    lengths = torch.tensor([len(completion) for completion in ids])
    return {"states": torch.cat(states), "token_ids": torch.cat(ids), "lengths": lengths}


class HeadTrainer(Trainer):  # type: ignore[misc]
    """Minimises ``prefix-bt`` or ``full-bt`` over cached states.

    A step of a tiny head takes a few milliseconds, of which the Trainer's own work is one or two; it stays, for its
    settings, schedules, optimisers and callbacks are those of the other scorers.
    """

    control: Any

    def __init__(self, head: Head, args: Any, *, objective: str, about: dict[str, Any], **kwargs: Any) -> None:
        """As ``transformers.Trainer``, over `StatePairs`.

        Args:
            head: what is trained.
            args: TrainingArguments.
            objective: ``prefix-bt``, or ``full-bt`` (state heads).
            about: written with every logged line, to tell the heads of a search apart.
            kwargs: the Trainer's other arguments.
        """
        super().__init__(head, args, data_collator=collate, **kwargs)
        self.objective = objective
        self.about = about
        self._seen: list[Tensor] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the pairs of one batch.

        Raises:
            NonFiniteError: the loss is NaN or infinite; names the step.
        """
        losses, counted, scores = self.pair_losses(model, inputs)
        loss = mean_of_counted(losses, counted)
        if not bool(loss.isfinite()):
            raise NonFiniteError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower train.learning_rate or set "
                "train.max_grad_norm"
            )
        self._seen.append(figure_rows(losses.detach(), counted, scores))
        return (loss, scores) if return_outputs else loss

    def pair_losses(
        self, model: Any, inputs: dict[str, Tensor]
    ) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"], PairScores]:
        """Loss of each pair, which pairs count, and the scores they come from."""
        scores = pair_scores(model, inputs["states"], inputs["token_ids"], inputs["lengths"])
        held = scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask
        if self.objective == "prefix-bt":
            losses, counted = prefix_bradley_terry_pair_losses(*held, scores.differs)
            return losses, counted, scores
        losses = softplus(-prefix_margins(*held)[:, -1])
        return losses, torch.ones_like(losses, dtype=torch.bool), scores

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Exact means over the held-out pairs, whatever the batches."""
        model = self.model.eval()
        seen, self._seen = self._seen, []
        for inputs in self.get_eval_dataloader(eval_dataset):
            with self.compute_loss_context_manager():
                self.compute_loss(model, self._prepare_inputs(inputs))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means(self._seen).items()}
        self._seen = seen
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the pairs seen since the last line, and what head this is."""
        if "loss" in logs:
            logs = means(self._seen) | logs  # the Trainer's own mean of the training loss stays
            self._seen.clear()
        super().log(self.about | logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen", "chosen_ids", "rejected", "rejected_ids"]


def pair_scores(
    model: Any,
    states: Float[Tensor, "positions hidden"],
    token_ids: Tensor,
    lengths: Tensor,
) -> PairScores:
    """Scores of every prefix of a batch that `collate` made: the head sees no padding."""
    reads_tokens = isinstance(model, VocabularyHead)
    flat = model(states, token_ids[:, None])[:, 0] if reads_tokens else model(states)
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (2B, T)
    scores = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
    ids = token_ids.new_zeros(mask.shape).masked_scatter(mask, token_ids)
    (chosen, rejected), (chosen_mask, rejected_mask) = scores.chunk(2), mask.chunk(2)
    chosen_ids, rejected_ids = ids.chunk(2)
    differs = prefixes_differ(chosen_ids, rejected_ids, chosen_mask, rejected_mask)
    return PairScores(chosen, rejected, chosen_mask, rejected_mask, differs)


@torch.no_grad()
def figure_rows(losses: Tensor, counted: Tensor, scores: PairScores) -> Float[Tensor, "batch figures"]:
    """One row of ``FIGURES`` per pair, NaN where a figure has no meaning for it.

    ``prefix_accuracy`` is the share of a pair's differing prefixes at which the chosen one is ahead; a tie counts half.
    """
    margins = prefix_margins(scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask)
    where = scores.differs & (scores.chosen_mask | scores.rejected_mask)
    ahead = torch.where(where, (margins.sign() + 1) / 2, 0.0).sum(-1) / where.sum(-1)  # 0 / 0 where nothing differs
    shown = losses.masked_fill(~counted, torch.nan)
    return torch.cat([shown[:, None], pair_figures(scores), ahead[:, None]], dim=-1).cpu()


def means(rows: Sequence[Tensor]) -> dict[str, float]:
    """Mean of each figure over the pairs that have it; a figure that none has is left out."""
    if not rows:
        return {}
    values = torch.cat(list(rows)).nanmean(0).tolist()
    return {name: value for name, value in zip(FIGURES, values, strict=True) if value == value}


def new_head(states: Float[Tensor, "positions hidden"], width: int, table: Tensor | None, seed: int) -> Head:
    """A fresh head that standardises ``states``, drawn from ``seed`` alone.

    Args:
        states: of training, whose moments are stored in the head.
        width: of the hidden layer.
        table: where a vocabulary head's token table starts (V, rank); None makes a state head.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = StateHead(states.shape[-1], width) if table is None else _vocabulary_head(states, width, table)
    head.mlp.mean, head.mlp.std = moments(states)
    return head


def _vocabulary_head(states: Tensor, width: int, table: Tensor) -> VocabularyHead:
    head = VocabularyHead(states.shape[-1], width, table.shape[1], len(table))
    with torch.no_grad():
        head.table.weight.copy_(table)
    return head


def vocabulary_size(model: Any) -> int:
    """Rows of the policy's output embedding: every token it can propose."""
    return len(_output_embedding(model))


@torch.no_grad()
def starting_table(model: Any, rank: int, seed: int) -> Float[Tensor, "vocabulary rank"]:
    """The policy's output embedding along its ``rank`` principal directions, scaled to a deviation of 0.1.

    Tokens that the policy treats alike start alike, so that one which the pairs hardly show is scored like its kin;
    from a random start the held-out loss was higher. Directions come from a few steps of subspace iteration.
    """
    weight = _output_embedding(model)
    parts = torch.split(weight, 16384)  # so that a large table is never held in fp32 as a whole
    mean = torch.stack([rows.float().sum(0) for rows in parts]).sum(0) / len(weight)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(weight.shape[1], rank, generator=generator).to(weight.device)
    for _ in range(8):
        product = torch.zeros_like(basis)
        for rows in parts:
            centred = rows.float() - mean
            product += centred.T @ (centred @ basis)
        basis = torch.linalg.qr(product).Q
    table = torch.cat([(rows.float() - mean) @ basis for rows in parts]).cpu()
    return 0.1 * table / table.std().clamp(min=1e-12)


def _output_embedding(model: Any) -> Tensor:
    weight: Tensor = (model.get_output_embeddings() or model.get_input_embeddings()).weight
    return weight
