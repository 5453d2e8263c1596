"""Heads before training, and their trainers on cached states, with datasets, batches and figures."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rgtg.config.training import options_of
from rgtg.errors import NonFiniteError
from rgtg.losses import mean_of_counted, mean_over, prefix_margins
from rgtg.models.scorers.heads import Head, StateHead, VocabularyHead
from rgtg.training.data.state_cache import StateCache
from rgtg.training.objectives import (
    PAIR_FIGURES,
    ROLLOUT_FIGURES,
    PairScores,
    RolloutScores,
    needs_best_next,
    pair_figures,
    pair_losses,
    pair_scores,
    rollout_figures,
    rollout_losses,
    with_explained_variance,
)
from rgtg.training.trainers.resumable import ResumableTrainer


def new_head(states: Float[Tensor, "positions hidden"], width: int, table: Tensor | None, seed: int) -> Head:
    """A new head that standardises ``states``; its weights depend on ``seed`` alone.

    Args:
        states: of training; the head stores their mean and deviation.
        width: of the hidden layer.
        table: initial token table (V, rank) of a vocabulary head; None makes a state head.
        seed: of the weights.
    """
    hidden = states.shape[-1]
    head: Head
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if table is None:
            head = StateHead(hidden, width)
        else:
            head = VocabularyHead(hidden, width, table.shape[1], len(table))
            head.table.weight.copy_(table)
    head.mlp.mean, head.mlp.std = moments(states)
    return head


def moments(states: Float[Tensor, "positions hidden"]) -> tuple[Float[Tensor, " hidden"], Float[Tensor, " hidden"]]:
    """Mean and standard deviation of each dimension, in fp32; the deviation of a near-constant dimension is floored."""
    total = torch.zeros(states.shape[1], dtype=torch.float64)
    squares = total.clone()
    for chunk in torch.split(states, 65536):
        total += chunk.double().sum(0)
        squares += chunk.double().square().sum(0)
    mean = total / len(states)
    std = (squares / len(states) - mean.square()).clamp(min=0).sqrt()
    floor = 1e-3 * std.square().mean().sqrt() + 1e-12
    return mean.float(), std.clamp(min=floor).float()


def vocabulary_size(model: Any) -> int:
    """Rows of the policy's output embedding: every token it can propose."""
    return len(_output_embedding(model))


@torch.no_grad()
def starting_table(model: Any, rank: int, seed: int) -> Float[Tensor, "vocabulary rank"]:
    """The policy's output embedding along its ``rank`` principal directions, scaled to a deviation of 0.1.

    Tokens that are similar for the policy start with similar rows, so that a token that is rare in the pairs is scored
    like the tokens it resembles; with a random start, the held-out loss was higher. The directions come from a few
    steps of subspace iteration.
    """
    weight = _output_embedding(model)
    parts = torch.split(weight, 16384)  # so that a large table is never held in fp32 as a whole
    mean = torch.stack([rows.float().sum(0) for rows in parts]).sum(0) / len(weight)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(weight.shape[1], rank, generator=generator).to(weight.device)  # (H, rank)
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


class StatePairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Pairs of one layer's states; an item is (states, token ids) of the chosen and of the rejected completion.

    ``weights`` holds the weight of each pair at each prefix, if a reference scorer gives them.
    """

    def __init__(self, cache: StateCache, layer: int, weights: Sequence[Sequence[float]] | None = None) -> None:
        self.cache = cache
        self.layer = layer
        self.weights = weights

    def __len__(self) -> int:
        return self.cache.completions // 2

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        chosen, chosen_ids = self.cache.completion(self.layer, 2 * i)  # (T, H), (T,)
        rejected, rejected_ids = self.cache.completion(self.layer, 2 * i + 1)
        item = {"chosen": chosen, "chosen_ids": chosen_ids, "rejected": rejected, "rejected_ids": rejected_ids}
        return item if self.weights is None else item | {"pair_weights": torch.tensor(self.weights[i])}


class StateRollouts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Completions of one layer's states, with their rewards."""

    def __init__(self, cache: StateCache, layer: int, rewards: Sequence[float]) -> None:
        self.cache = cache
        self.layer = layer
        self.rewards = rewards

    def __len__(self) -> int:
        return self.cache.completions

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        states, ids = self.cache.completion(self.layer, i)  # (T, H), (T,)
        return {"states": states, "token_ids": ids, "reward": torch.tensor(self.rewards[i])}


def collate_pairs(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """States (P, H) and token ids (P,) of completions [chosen …; rejected …] end to end, and their lengths (2B,).

    With pair weights also these, (B, T).
    """
    states = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    ids = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    batch = _end_to_end(states, ids)
    if "pair_weights" in rows[0]:
        batch["pair_weights"] = pad_sequence([row["pair_weights"] for row in rows], batch_first=True)
    return batch


def collate_rollouts(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """States (P, H) and token ids (P,) of completions end to end, their lengths (B,) and rewards (B,)."""
    batch = _end_to_end([row["states"] for row in rows], [row["token_ids"] for row in rows])
    return batch | {"rewards": torch.stack([row["reward"] for row in rows])}


def _end_to_end(states: list[Tensor], ids: list[Tensor]) -> dict[str, Tensor]:
    """States (P, H), token ids (P,) and lengths (rows,) of completions: states (T, H) and ids (T,) each."""
    lengths = torch.tensor([len(completion) for completion in ids])
    return {"states": torch.cat(states), "token_ids": torch.cat(ids), "lengths": lengths}


class HeadTrainer(ResumableTrainer):
    """Minimises an objective of pairs over cached states (`StatePairs`).

    A step of a small head takes a few milliseconds, of which the Trainer's own work is one or two. It is used for its
    settings, schedules, optimizers and callbacks, which are the same as for other scorers.
    """

    control: Any
    figure_names: ClassVar[tuple[str, ...]] = ("loss", *PAIR_FIGURES, "prefix_accuracy")
    columns: ClassVar[tuple[str, ...]] = ("chosen", "chosen_ids", "rejected", "rejected_ids", "pair_weights")
    collate: ClassVar[Any] = staticmethod(collate_pairs)

    def __init__(
        self, head: Head, args: Any, *, objective: str, about: dict[str, Any], options: Any = None,
        vocabulary: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """As ``transformers.Trainer``.

        Args:
            head: what is trained.
            args: TrainingArguments.
            objective: a name of `rgtg.training.objectives.OBJECTIVES` that can train this head.
            about: written with every logged line, to tell the heads of a search apart.
            options: the objective's own settings; None for their defaults.
            vocabulary: number of tokens among which ``farma`` takes the maximum; None for all rows of the table.
            kwargs: the Trainer's other arguments.
        """
        super().__init__(head, args, data_collator=type(self).collate, **kwargs)
        self.objective, self.vocabulary = objective, vocabulary
        self.options: Any = options_of(objective, options)
        self.about = about
        self._figures: list[Tensor] = []  # (B, F) of each batch since the last logged line

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the pairs or completions of one batch.

        Raises:
            NonFiniteError: the loss is NaN or infinite; names the step.
        """
        losses, counted, scores = self.losses(model, inputs)
        loss = mean_of_counted(losses, counted)
        if not bool(loss.isfinite()):
            raise NonFiniteError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower train.learning_rate or set "
                "train.max_grad_norm"
            )
        with torch.no_grad():
            shown = losses.masked_fill(~counted, torch.nan)
            self._figures.append(torch.cat([shown[:, None], self.figures(scores)], dim=-1).cpu())
        return (loss, scores) if return_outputs else loss

    def losses(
        self, model: Any, inputs: dict[str, Tensor]
    ) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"], Any]:
        """Loss of each pair, which pairs count, and the scores they come from."""
        step = int(self.state.global_step) if self.model.training else None
        scores = head_pair_scores(model, inputs["states"], inputs["token_ids"], inputs["lengths"])
        scores.pair_weights = inputs.get("pair_weights")
        if needs_best_next(self.objective, step):
            scores.best_next = best_next(model, inputs["states"], scores.chosen_mask, self.vocabulary)
        return *pair_losses(self.objective, scores, self.options, step), scores

    def figures(self, scores: Any) -> Float[Tensor, "batch figures"]:
        """``figure_names`` of each pair except the loss; NaN where a figure has no meaning."""
        return torch.cat([pair_figures(scores), prefix_accuracy(scores)[:, None]], dim=-1)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Exact means over the held-out pairs or completions, for any batch size."""
        model = self.model.eval()
        training_figures, self._figures = self._figures, []
        for inputs in self.get_eval_dataloader(eval_dataset):
            with self.compute_loss_context_manager():
                self.compute_loss(model, self._prepare_inputs(inputs))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.means().items()}
        self._figures = training_figures
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def means(self) -> dict[str, float]:
        """Mean of each figure over the units that have it; a figure that none has is left out."""
        if not self._figures:
            return {}
        values = torch.cat(self._figures).nanmean(0).tolist()
        return {name: value for name, value in zip(self.figure_names, values, strict=True) if value == value}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean figures since the last line, and which head this is."""
        if "loss" in logs:
            logs = self.means() | logs  # the Trainer's own mean of the training loss stays
            self._figures.clear()
        super().log(self.about | logs, start_time)

    def pending_figures(self) -> list[list[float]]:
        """Rows of figures since the last logged line, one for each unit."""
        return torch.cat(self._figures).tolist() if self._figures else []

    def restore_figures(self, figures: list[list[float]]) -> None:
        """Continue with the figures of a checkpoint."""
        self._figures = [torch.tensor(figures)] if figures else []

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.columns)


class RolloutHeadTrainer(HeadTrainer):
    """Minimises ``value`` or ``cumulative-mse`` over cached states of completions with rewards (`StateRollouts`)."""

    figure_names = ("loss", *ROLLOUT_FIGURES)
    columns = ("states", "token_ids", "reward")
    collate = staticmethod(collate_rollouts)

    def losses(
        self, model: Any, inputs: dict[str, Tensor]
    ) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"], Any]:
        """Loss of each completion, all of which count, and the scores they come from."""
        values, _, mask = head_scores(model, inputs["states"], inputs["token_ids"], inputs["lengths"])
        cache = self.train_dataset.cache
        mean_length = len(cache.token_ids) / cache.completions
        scores = RolloutScores(values, mask, inputs["rewards"], mean_length)
        return *rollout_losses(scores, self.options), scores

    def figures(self, scores: Any) -> Float[Tensor, "batch figures"]:
        """Squared errors, and the reward."""
        return rollout_figures(scores)

    def means(self) -> dict[str, float]:
        """Mean figures, with errors also as shares of the rewards' variance."""
        return with_explained_variance(super().means())


def head_scores(
    model: Any,
    states: Float[Tensor, "positions hidden"],
    token_ids: Int[Tensor, " positions"],
    lengths: Int[Tensor, " rows"],
) -> tuple[Float[Tensor, "rows length"], Int[Tensor, "rows length"], Bool[Tensor, "rows length"]]:
    """Scores, token ids and mask of completions laid end to end, one row each; the head computes no padding."""
    reads_tokens = isinstance(model, VocabularyHead)
    flat = model(states, token_ids[:, None])[:, 0] if reads_tokens else model(states)  # (P,)
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    scores = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
    return scores, token_ids.new_zeros(mask.shape).masked_scatter(mask, token_ids), mask


def head_pair_scores(
    model: Any,
    states: Float[Tensor, "positions hidden"],
    token_ids: Int[Tensor, " positions"],
    lengths: Int[Tensor, " rows"],
) -> PairScores:
    """Scores of every prefix of a batch that `collate_pairs` made."""
    return pair_scores(*head_scores(model, states, token_ids, lengths))


def best_next(
    head: VocabularyHead, states: Float[Tensor, "positions hidden"], mask: Bool[Tensor, "batch length"],
    vocabulary: int | None,
) -> Float[Tensor, "batch length"]:  # fmt: skip
    """max_v Q(h_i)[v] of every prefix y_{1:i} of the first rows; h_i is cached with the token after it.

    The last prefix of a row has no state of its own here; its number is not used by `farma_consistency_losses`.
    """
    best = head.best(states[: int(mask.sum())], vocabulary)  # (positions of the first rows,)
    return best.new_zeros(mask.shape).masked_scatter(mask, best).roll(-1, -1)


@torch.no_grad()
def prefix_accuracy(scores: PairScores) -> Float[Tensor, " batch"]:
    """Share of each pair's differing prefixes at which the chosen completion leads; a tie counts as one half."""
    margins = prefix_margins(scores.chosen, scores.rejected, scores.chosen_mask, scores.rejected_mask)
    where = scores.compared
    return mean_over((margins.sign() + 1) / 2, where).masked_fill(~where.any(-1), torch.nan)
