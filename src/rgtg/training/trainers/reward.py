"""Reward models and their trainers on pairs; one forward pass scores every prefix of both completions."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from rgtg.config.training import options_of
from rgtg.errors import NonFiniteError, UsageError
from rgtg.losses import last_score, mean_of_counted
from rgtg.models.loading.pretrained import (
    is_adapter,
    load_pretrained,
    load_tokenizer,
    reads_ahead,
    require_dense,
    resolve_dtype,
)
from rgtg.models.ops.lm_head import scalar_head
from rgtg.models.ops.tree_attention import (
    PackedRow,
    groups_by_length,
    pack_row,
    packed_inputs,
    packing_pays,
    reads_packed_rows,
)
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.tokenization.encoding import ensure_pad_token
from rgtg.training.data.dataset import TOKENIZED_PAIR_COLUMNS, PrefixCollator, prepare_pairs
from rgtg.training.data.state_cache import CPU_TOKENS
from rgtg.training.objectives import (
    OBJECTIVES,
    PAIR_FIGURES,
    Losses,
    PairScores,
    align_pairs,
    pair_figures,
    pair_losses,
)
from rgtg.training.trainers.resumable import ResumableTrainer


def load_base(source: str, seed: int, **kwargs: Any) -> tuple[Any, Any]:
    """Load a sequence-classification model with one label, in fp32 unless ``dtype`` is given, and its tokenizer.

    A language model gets a new head, drawn from ``seed`` alone. A reward model keeps its head (a LoRA scorer is merged
    into its base). The tokenizer has a padding token that is not its EOS.

    Raises:
        ModelNotFoundError: ``source`` cannot be loaded.
        UsageError: a classifier with several labels, a model without a classification head in
            transformers, or quantised weights.
    """
    dtype = resolve_dtype(kwargs.pop("dtype", "float32"))
    if is_adapter(source):
        scorer = PrefixScorer.from_pretrained(source, dtype=dtype, device="cpu")
        return scorer.model.requires_grad_(True), scorer.tokenizer
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = load_tokenizer(source, "base model")
    config = load_pretrained(AutoConfig, source, "base model")
    classifier = any("ForSequenceClassification" in name for name in config.architectures or [])
    if classifier and config.num_labels != 1:
        raise UsageError(f"{source} is a classifier with {config.num_labels} labels; a scorer gives one number")
    model, report = load_pretrained(
        AutoModelForSequenceClassification, source, "base model",
        dtype=dtype, num_labels=1, use_safetensors=True, output_loading_info=True, **kwargs,
    )  # fmt: skip
    require_dense(model, source, "base model")
    ensure_pad_token(tokenizer, model)
    if any(key.startswith("score.") for key in report["missing_keys"]):
        init_scalar_head(model, seed)
    return model, tokenizer


def init_scalar_head(model: Any, seed: int) -> None:
    """Draw the scalar head from N(0, initializer_range²) with a generator of its own: same seed, same head."""
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in scalar_head(model).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@dataclass(frozen=True)
class Pass:
    """Some of a batch's texts, as one call of the model reads them.

    Attributes:
        inputs: keyword arguments of the model.
        texts: (text of the batch, row of the pass, columns (P + T,) of the text's tokens in that row).
    """

    inputs: dict[str, Any]
    texts: list[tuple[int, int, Int[Tensor, " tokens"]]]


class ScorerTrainer(ResumableTrainer, RewardTrainer):  # type: ignore[misc]
    """A ``trl.RewardTrainer`` whose loss sees the score of every prefix; subclasses define the data and the loss.

    ``objective`` names the loss, ``columns`` are those of its dataset, ``figure_names`` are logged beside the loss.
    """

    objective: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    figure_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, args: RewardConfig | None = None, *, options: Any = None, **kwargs: Any) -> None:
        """As ``trl.RewardTrainer``; datasets may hold texts or token ids.

        Args:
            model: a folder or hub id (a language model gets a new head, seeded by ``args.seed``), or a loaded model.
            args: trl's settings.
            options: the objective's own settings (`rgtg.config.training`); None for their defaults.
            kwargs: trl's other arguments; ``processing_class`` is the tokenizer.

        Raises:
            UsageError: a model that pools before its head or is not causal, or a setting without a meaning here.
        """
        args = copy.copy(args) or RewardConfig(f"{name_of(model)}-Reward")
        row = OBJECTIVES.get(self.objective)
        if row and not row.centred and args.center_rewards_coefficient is not None:
            raise UsageError(f"center_rewards_coefficient has no meaning for {self.objective}: leave it out")
        self.options: Any = options_of(self.objective, options)
        tokenizer = kwargs.get("processing_class")
        if isinstance(model, str):
            model, loaded = self.load(model, args.seed, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None  # they have been used
            tokenizer = tokenizer or loaded
        tokenizer = tokenizer or load_tokenizer(name_of(model), "base model")
        self.check_model(model, tokenizer)
        collator = kwargs.pop("data_collator", None) or self.make_collator(
            tokenizer.pad_token_id, args.pad_to_multiple_of
        )
        kwargs |= {"processing_class": tokenizer, "data_collator": collator}
        with self.passes_trl_checks(model), warnings.catch_warnings():
            # peft reads an attribute that transformers has renamed; users cannot do anything about it
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            super().__init__(model, args, **kwargs)

    def load(self, source: str, seed: int, **kwargs: Any) -> tuple[Any, Any]:
        """The model to train, and its tokenizer."""
        return load_base(source, seed, **kwargs)

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """Check that the model can score every position, and give the tokenizer a padding token.

        Raises:
            UsageError: the model pools before its head, or attends to later tokens.
        """
        # Without one, trl would pad with EOS, and a stock reward model then ignores a real EOS.
        ensure_pad_token(tokenizer, model)
        if scalar_head(model) is None:
            raise UsageError(
                f"{type(model).__name__} pools before its head, so it cannot score every prefix in one pass; start "
                "from a causal (decoder) model, such as the policy itself"
            )
        require_causal(model, lambda ids: score_every_position(model, model, ids, torch.ones_like(ids))[0])

    def passes_trl_checks(self, model: Any) -> AbstractContextManager[None]:
        """A context in which trl accepts the model."""
        return nullcontext()

    def make_collator(self, pad_token_id: int, pad_to_multiple_of: int | None) -> Any:
        """The collator that makes batches of rows."""
        raise NotImplementedError

    def losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any, Tensor, Any]:
        """Losses (B,), which of them count (B,), a term added to their mean, figures (B, F), and the model's output."""
        raise NotImplementedError

    @property
    def tokens_of_a_pass(self) -> int | None:
        """Padded tokens that are read in one call of the model; None where a batch is read in one.

        On a CPU, a batch is read in parts of similar length, whose activations its caches hold. The scores of the parts
        are joined before the loss, so that losses and gradients are those of one call.
        """
        alone = self.accelerator.num_processes == 1  # DDP expects one call per step
        return CPU_TOKENS if alone and self.args.device.type == "cpu" else None

    def passes(self, model: Any, inputs: dict[str, Any]) -> list[Pass]:
        """The calls of the model that read a batch."""
        return whole_passes(inputs["input_ids"], inputs["attention_mask"], self.tokens_of_a_pass)

    @property
    def step(self) -> int | None:
        """Optimizer steps done so far; None in an evaluation."""
        return int(self.state.global_step) if self.model.training else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of `losses` over the pairs or completions of one batch.

        Raises:
            NonFiniteError: the loss is NaN or infinite on any process; names the step.
        """
        losses, counted, extra, figures, outputs = self.losses(model, inputs)
        loss = mean_of_counted(losses, counted) + extra
        self._record(losses.detach().masked_fill(~counted, torch.nan), loss.detach(), figures.detach())
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record(self, losses: Tensor, loss: Tensor, figures: Tensor) -> None:
        """Keep losses (B,) and figures (B, F) by unit, so that logged means are exact for any batch size."""
        total = self.accelerator.gather(loss.reshape(1))
        if not torch.isfinite(total).all():
            raise NonFiniteError(
                f"the loss is {total[~torch.isfinite(total)][0].item()} at step {self.state.global_step + 1}; lower "
                "train.learning_rate, set train.max_grad_norm, or use a dtype with more range"
            )
        mode = "train" if self.model.training else "eval"
        rows = self.accelerator.gather_for_metrics(torch.cat([losses[:, None], figures.to(losses)], dim=-1)).tolist()
        for name, column in zip(("loss", *self.figure_names), zip(*rows, strict=True), strict=True):
            if (mode, name) != ("train", "loss"):  # the Trainer already averages the training loss
                self._metrics[mode][name].extend(value for value in column if value == value)

    def pending_figures(self) -> dict[str, list[float]]:
        """Figures of each unit since the last logged line, by name."""
        return dict(self._metrics["train"])

    def restore_figures(self, figures: dict[str, list[float]]) -> None:
        """Continue with the figures of a checkpoint."""
        self._metrics["train"].update(figures)

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, from the means of the figures."""
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means since the last call; a figure that no unit has (all prefixes identical) is left out."""
        mode = "train" if self.model.training else "eval"
        means = {name: sum(values) / len(values) for name, values in self._metrics[mode].items() if values}
        self._metrics[mode].clear()
        self._metrics[mode].update({name: [value] for name, value in self.summarize(means).items()})
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.columns)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere: trl's usage pings are switched off."""


def name_of(model: Any) -> str:
    """A model's folder or hub id, or ``model``."""
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "model")


class PairwiseRewardTrainer(ScorerTrainer):
    """A trainer whose loss sees the scores of every prefix of both completions of a pair.

    Subclasses name the objective or override `pair_losses`. The model is called as a whole, through its wrapper (DDP,
    FSDP, peft), and a hook on its scalar head records the scores of *all* positions.
    """

    columns = (*TOKENIZED_PAIR_COLUMNS, "pair_weights")
    figure_names = PAIR_FIGURES
    packs = False  # whether the model reads a prompt once for both of its completions

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """As `ScorerTrainer.check_model`; finds out too whether the model reads packed rows."""
        super().check_model(model, tokenizer)
        self.packs = reads_packed_rows(model)

    def make_collator(self, pad_token_id: int, pad_to_multiple_of: int | None) -> Any:
        """A collator of rows [chosen …; rejected …]."""
        return PrefixCollator(pad_token_id, pad_to_multiple_of)

    def passes(self, model: Any, inputs: dict[str, Any]) -> list[Pass]:
        """As `ScorerTrainer.passes`; a prompt is read once for both completions if the model can and it saves work."""
        if self.packs:
            unwrapped = self.accelerator.unwrap_model(model)
            rows = pack_pairs(unwrapped, inputs["input_ids"], inputs["attention_mask"], inputs["prompt_lengths"])
            if rows:
                return packed_passes(unwrapped, rows, self.tokens_of_a_pass)
        return super().passes(model, inputs)

    def pair_losses(self, scores: PairScores) -> Losses:
        """Loss of each pair, and which pairs count in the mean."""
        return pair_losses(self.objective, scores, self.options, self.step)

    def read(self, model: Any, inputs: dict[str, Any]) -> tuple[PairScores, Any]:
        """Scores of the batch, and the model's own output."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]  # (2B, L)
        passes = self.passes(model, inputs)
        every, outputs = score_every_position(model, self.accelerator.unwrap_model(model), ids, mask, passes)
        return align_pairs(every, ids, mask, inputs["prompt_lengths"]), outputs

    def losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any, Tensor, Any]:
        """Losses (B,), which of them count (B,), the centring term, figures (B, F), and the model's output."""
        scores, outputs = self.read(model, inputs)
        scores.pair_weights = inputs.get("pair_weights")
        losses, counted = self.pair_losses(scores)
        extra: Any = 0.0
        if self.args.center_rewards_coefficient is not None:
            extra = self.args.center_rewards_coefficient * self.centring_penalty(scores)
        return losses, counted, extra, pair_figures(scores), outputs

    def centring_penalty(self, scores: PairScores) -> Float[Tensor, ""]:
        """Mean of (r_w + r_l)² at the ends of the completions (RewardConfig's center_rewards_coefficient)."""
        ends = last_score(scores.chosen, scores.chosen_mask) + last_score(scores.rejected, scores.rejected_mask)
        return ends.square().mean()

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return prepare_pairs(dataset, processing_class, args.max_length, dataset_name)


class PrefixRewardTrainer(PairwiseRewardTrainer):
    """Minimises `rgtg.losses.prefix_bradley_terry_loss` (PARGS, arXiv 2406.07780), for token-wise guidance.

    −log σ( r(x, y^w_{1:i}) − r(x, y^l_{1:i}) ), mean over the positions i at which the prefixes differ, then over
    pairs; ``options`` (`rgtg.config.training.PrefixBtSettings`) weights positions and samples prefixes.

    Example (not run here)::

        trainer = PrefixRewardTrainer("policy-folder", RewardConfig("out"), train_dataset=pairs)
        trainer.train()
    """

    objective = "prefix-bt"
    _tag_names = ("rgtg", "prefix-bt")


class FullRewardTrainer(PairwiseRewardTrainer):
    """Minimises `rgtg.losses.bradley_terry_loss`: −log σ( r(x, y^w) − r(x, y^l) ) at the last tokens."""

    objective = "full-bt"
    _tag_names = ("rgtg", "full-bt")


class CoherentRewardTrainer(PairwiseRewardTrainer):
    """Minimises `rgtg.losses.tcrm_pair_losses`: full-bt, and the score of each prefix is tied to the final score."""

    objective = "tcrm"
    _tag_names = ("rgtg", "tcrm")


@contextmanager
def record_outputs(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """During the block, collect what a module returns."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def score_every_position(
    model: Any,
    unwrapped: Any,
    ids: Int[Tensor, "rows length"],
    mask: Int[Tensor, "rows length"],
    passes: Sequence[Pass] | None = None,
) -> tuple[Float[Tensor, "rows length"], Any]:
    """Score at every position, and the model's own output, whose logits are the scores at the last tokens.

    The *wrapped* model is called, because DDP and FSDP synchronise gradients only then.

    Args:
        model: with its wrapper.
        unwrapped: without it.
        ids: token ids, padded on either side.
        mask: 1 on tokens.
        passes: the calls that read the batch; default: one call of whole rows.

    Raises:
        UsageError: the hook on the scalar head records nothing.
    """
    texts: dict[int, Tensor] = {}
    for part in passes or whole_passes(ids, mask, None):
        with record_outputs(scalar_head(unwrapped)) as recorded:
            outputs = model(**part.inputs)
        if not recorded:
            raise UsageError("the model's scalar head cannot be observed (torch_compile?); train without it")
        texts |= {text: recorded[-1][row, columns, 0] for text, row, columns in part.texts}
    rows = [texts[i] for i in range(len(ids))]
    outputs.logits = torch.stack([scores[-1] for scores in rows])[:, None]
    found = torch.cat(rows)
    return found.new_zeros(ids.shape).masked_scatter(mask.bool(), found), outputs


def whole_passes(ids: Int[Tensor, "rows length"], mask: Int[Tensor, "rows length"], limit: int | None) -> list[Pass]:
    """Every text in a row of its own, padded on its side.

    Args:
        ids: token ids of the batch, padded on either side.
        mask: 1 on tokens.
        limit: padded tokens of one pass; None reads the batch in one.
    """
    starts, lengths = mask.long().argmax(-1).tolist(), mask.sum(-1).tolist()
    passes = []
    for group in groups_by_length(lengths, limit):
        first, end = min(starts[i] for i in group), max(starts[i] + lengths[i] for i in group)
        index = torch.tensor(group, device=ids.device)
        inside = mask[index, first:end]
        inputs = {"input_ids": ids[index, first:end], "attention_mask": inside, "use_cache": False}
        texts = [
            (i, row, torch.arange(starts[i] - first, starts[i] - first + lengths[i], device=ids.device))
            for row, i in enumerate(group)
        ]
        passes.append(Pass(inputs | position_ids(inside), texts))
    return passes


def packed_passes(model: Any, rows: Sequence[PackedRow], limit: int | None) -> list[Pass]:
    """Each pair in one row with one copy of its prompt; the texts are [chosen …; rejected …].

    Args:
        model: without its wrapper.
        rows: of `pack_pairs`.
        limit: padded tokens of one pass; None reads the batch in one.
    """
    passes = []
    for group in groups_by_length([len(row.ids) for row in rows], limit):
        texts = [
            (i + side * len(rows), at, rows[i].columns[side].to(model.device))
            for side in (0, 1)
            for at, i in enumerate(group)
        ]
        passes.append(Pass(packed_inputs(model, [rows[i] for i in group]), texts))
    return passes


def pack_pairs(
    unwrapped: Any,
    ids: Int[Tensor, "rows length"],
    mask: Int[Tensor, "rows length"],
    prompt_lengths: Int[Tensor, " batch"],
) -> list[PackedRow]:
    """Each pair of rows [chosen …; rejected …] as one row with one copy of the prompt; none if that costs more."""
    texts = [row[here.bool()].tolist() for row, here in zip(ids.cpu(), mask.cpu(), strict=True)]
    pairs = [
        (one[:prompt], [one[prompt:], other[prompt:]])
        for one, other, prompt in zip(texts, texts[len(texts) // 2 :], prompt_lengths.tolist(), strict=False)
    ]
    hidden = int(unwrapped.config.get_text_config().hidden_size)
    pays = sum(packing_pays(hidden, len(prompt), [len(one), len(other)]) for prompt, (one, other) in pairs)
    return [pack_row(prompt, sides) for prompt, sides in pairs] if 2 * pays > len(pairs) else []


def position_ids(mask: Int[Tensor, "rows length"]) -> dict[str, Tensor]:
    """``position_ids`` counted from the first real token, if rows are padded on the left; else no argument."""
    return {} if bool(mask[:, 0].all()) else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@torch.no_grad()
def require_causal(model: Any, read: Callable[[Int[Tensor, "rows length"]], Tensor]) -> None:
    """Check that what ``read`` gives at a position, (rows, L, …), does not depend on later tokens.

    Raises:
        UsageError: it does, so one forward pass cannot train the model on prefixes.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=device) % model.config.get_text_config().vocab_size
    outputs = read(ids)
    model.train(was_training)
    if reads_ahead(outputs):
        raise UsageError(
            f"{type(model).__name__} looks ahead: its score of a prefix changes with the tokens after it; start from a "
            "causal (decoder) model"
        )
