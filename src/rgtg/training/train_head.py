"""``rgtg train --trunk own``: heads on the frozen policy's hidden states; the best on held-out data is kept."""

import copy
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rgtg.config import TrainSettings
from rgtg.errors import StoppedError, UsageError
from rgtg.models.loading.gguf import CONVERTED, converted_folder
from rgtg.models.loading.known_models import converted_from
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.policy_files import describe_policy_files
from rgtg.models.loading.pretrained import find_gguf
from rgtg.models.loading.scorer_info import cast_fingerprints, fingerprint_weights
from rgtg.models.ops.hidden_states import require_hidden_states
from rgtg.models.scorers.heads import round_to_half
from rgtg.tokenization.encoding import embedding_rows
from rgtg.training.arguments import longest_sequence, reward_config
from rgtg.training.checkpoint.manager import CHECKPOINTS
from rgtg.training.checkpoint.resume import (
    TrainedHead,
    TrainedHeadRecord,
    find_checkpoint,
    load_trained_head,
    save_trained_head,
)
from rgtg.training.data.dataset import TrainData
from rgtg.training.data.state_cache import StateCache, cache_states
from rgtg.training.report import LOG_FILE, HeadChoice, TrainLog, progress, select_figures
from rgtg.training.trainers.head import (
    HeadTrainer,
    RolloutHeadTrainer,
    StatePairs,
    StateRollouts,
    new_head,
    starting_table,
    vocabulary_size,
)
from rgtg.training.trainers.resumable import TrainedModel, TrainingRun
from rgtg.types.scorer import PolicyFiles
from rgtg.utils.files import lock_folder

WIDTHS = (64, 256)  # that an automatic choice tries
RANK = 16  # of the token table; larger ranks memorise the training pairs (docs/training.md)
TABLE_ENTRIES = 2**21  # 4 MB in a checkpoint; a large vocabulary gets a lower rank


class HeadTraining:
    """Trains one head for each layer and width on states that are computed once, and keeps the best.

    ``about`` holds the fields of rgtg.json that depend on the policy.
    """

    def __init__(self, settings: TrainSettings) -> None:
        """Load the policy and make the training arguments.

        Raises:
            UsageError, ModelNotFoundError: unusable settings, or a policy whose hidden states cannot be read.
        """
        self.began = time.perf_counter()
        self.settings = settings
        self.config = reward_config(settings, settings.max_length)
        self.config._n_gpu = min(self.config.n_gpu, 1)  # a batch of states is not spread over several GPUs
        dtype = (settings.train.get("model_init_kwargs") or {}).get("dtype")
        device = self.config.device if settings.engine == "torch" else None
        policy = load_policy(settings.base, dtype=dtype, device=device, engine=settings.engine)
        self.policy, self.tokenizer = policy.model, policy.tokenizer
        self.layers = candidate_layers(settings, self.policy)
        self.widths = [settings.width] if isinstance(settings.width, int) else list(WIDTHS)
        require_hidden_states(self.policy, self.layers)
        self.rank = table_rank(settings, self.policy) if settings.head == "vocab" else None
        self.max_length, self.embeddings = longest_sequence(settings, self.policy), embedding_rows(self.policy)
        base = Path(settings.base)
        self.about = {
            "base_model": str(base.resolve()) if base.exists() else settings.base,  # to be found from any folder
            "base_fingerprint": fingerprint_weights(self.policy),
            "base_casts": cast_fingerprints(self.policy),
            "trunk": "own",
            "head": settings.head,
            "rank": self.rank,
            "policy_layers": depth(self.policy),
            "hidden": int(self.policy.config.get_text_config().hidden_size),
            "vocabulary": vocabulary_size(self.policy) if settings.head == "vocab" else None,
            "normalisation": "standardize",
            "activation": "gelu",
            "policy_files": policy_files(settings.base),
        }

    def require_data(self, data: TrainData) -> None:
        """Check that there is held-out data, if it has to choose among several heads.

        Raises:
            UsageError: there is none.
        """
        if len(self.layers) * len(self.widths) > 1 and not data.held_out:
            raise UsageError(
                f"layer and width are chosen by held-out {data.kind}: give --eval-{data.kind}, or say --layer final "
                "(or --layer N) --set width=N"
            )

    def train(self, run: TrainingRun, checkpoint: Path | None) -> TrainedModel:
        """Train all heads and return the one with the lowest held-out loss.

        Args:
            run: of ``rgtg train``.
            checkpoint: None, because each head has checkpoints of its own.

        Raises:
            NonFiniteError, OutputError, StoppedError: as `rgtg.training.train.train_scorer`.
            UsageError: another process uses the folder of ``--states``.
        """
        shared = self.settings.states
        with nullcontext() if shared is None else lock_folder(shared):
            return self._train(run, checkpoint)

    def _train(self, run: TrainingRun, checkpoint: Path | None) -> TrainedModel:
        self.run = run
        self.resumed_from = str(checkpoint) if checkpoint else None
        # 1. the states and the token table; after that the policy is not needed
        self.states = self._compute_states(run.data.train, "states", "train")
        self.held_out = self._compute_states(run.data.held_out, "states of held-out completions", "held-out")
        self.table = starting_table(self.policy, self.rank, run.settings.seed) if self.rank is not None else None
        del self.policy
        states_seconds = time.perf_counter() - self.began
        # 2. one head for each layer and width
        trained = self._train_all()
        if self.settings.states is None:
            shutil.rmtree(self._states_folder, ignore_errors=True)
        # 3. the best
        best = min(trained, key=lambda one: one.record.choice.evaluation.get("loss", 0.0))
        record, choice = best.record, best.record.choice
        return TrainedModel(
            model=best.head, info=run.info.model_copy(update={"layer": choice.layer, "width": choice.width}),
            args=self.config, loss=record.loss, steps=record.steps, epochs=record.epochs, seconds=choice.seconds,
            evaluation=choice.evaluation, resumed_from=self.resumed_from,
            details={
                "seconds": time.perf_counter() - self.began, "states_seconds": states_seconds, "layer": choice.layer,
                "width": choice.width, "rank": self.rank, "choices": [one.record.choice for one in trained],
            },
        )  # fmt: skip

    @property
    def _states_folder(self) -> Path:
        """Where states stay for other heads (``--states``), or where ``--resume`` saves them until all are trained."""
        return self.settings.states or self.settings.output / CHECKPOINTS / "states"

    def _compute_states(self, units: Any, what: str, name: str) -> StateCache | None:
        """States of completions, or None if there are none; with ``--resume`` or ``--states``, saved by this name."""
        if not units:
            return None
        show_progress = progress(what, last=True) if self.run.show else None
        folder = self._states_folder / name if self.settings.resume or self.settings.states else None
        cache = cache_states(
            self.policy, units, self.layers, str(self.settings.head), folder=folder, progress=show_progress
        )
        if self.run.show and cache.on_disk:
            where = folder if folder is not None else "a temporary file"
            sys.stderr.write(f"{what}: {cache.bytes / 1e9:.1f} GB are kept in {where}\n")
        return cache

    def _train_all(self) -> list[TrainedHead]:
        """Train every head that an earlier start has not trained; if it must stop, save those that are done."""
        trained: list[TrainedHead] = []
        try:
            for layer in self.layers:
                for width in self.widths:
                    trained.append(self._restore(layer, width) or self._train_one(layer, width, trained[-1:]))
        except (StoppedError, KeyboardInterrupt):
            if not self.settings.resume:  # with --resume, each was saved when it was done
                for one in trained:
                    self._keep(one)
            raise
        return trained

    def _restore(self, layer: int, width: int) -> TrainedHead | None:
        """A head that an earlier start has trained, or None."""
        if not self.settings.resume:
            return None
        info = self.run.info.model_copy(update={"layer": layer, "width": width})
        folder = self._folder(layer, width)
        found = load_trained_head(folder, self.run.facts, info, force=self.settings.force)
        if found:
            self.resumed_from = str(folder)
            if self.run.show:
                sys.stderr.write(f"layer {layer}, width {width}: trained before\n")
        return found

    def _train_one(self, layer: int, width: int, before: list[TrainedHead]) -> TrainedHead:
        """Train one head from a start that depends on the seed alone, and evaluate what would be saved."""
        # 1. the head, its trainer and its checkpoint
        assert self.states is not None, "there is data to train on"
        head = new_head(self.states.states[layer], width, self.table, self.settings.seed)
        log_start = before[0].record.log_bytes if before else 0
        log = TrainLog(self.settings.output / LOG_FILE, show=self.run.show, start=log_start)
        trainer = self._trainer(head, layer, width, log)
        checkpoint = None
        if self.settings.resume:
            checkpoint = find_checkpoint(self._folder(layer, width), self.run.facts, force=self.settings.force)
            self.resumed_from = str(checkpoint) if checkpoint else self.resumed_from
        if self.run.show:
            resuming = f": resuming from {checkpoint}" if checkpoint else ""
            sys.stderr.write(f"layer {layer}, width {width}{resuming}\n")
        # 2. training
        start = time.perf_counter()
        done = trainer.train_run(self.run, checkpoint)
        seconds = time.perf_counter() - start
        # 3. evaluation of the rounded weights
        round_to_half(head)
        figures = select_figures(trainer.evaluate()) if self.held_out else {}
        choice = HeadChoice(layer=layer, width=width, seconds=seconds, evaluation=figures)
        steps, epochs = trainer.state.global_step, trainer.state.epoch or 0.0
        trained = TrainedHead(
            head,
            TrainedHeadRecord(choice=choice, loss=done.training_loss, steps=steps, epochs=epochs, log_bytes=log.size()),
        )
        if self.settings.resume:
            self._keep(trained)
        return trained

    def _trainer(self, head: Any, layer: int, width: int, log: TrainLog) -> HeadTrainer:
        kind = HeadTrainer if self.run.data.kind == "pairs" else RolloutHeadTrainer
        config = copy.copy(self.config)
        config.output_dir = str(self._folder(layer, width))
        return kind(
            head,
            config,
            objective=self.settings.objective,
            options=self.settings.options,
            about={"layer": layer, "width": width},
            vocabulary=len(self.tokenizer),
            train_dataset=self._dataset(layer, self.states, self.run.data.train, self.run.data.pair_weights),
            eval_dataset=self._dataset(layer, self.held_out, self.run.data.held_out),
            callbacks=[log],
        )

    def _dataset(self, layer: int, cache: StateCache | None, units: Any, weights: Any = None) -> Any:
        """The states of one layer as the trainer reads them; None if there are none."""
        if cache is None:
            return None
        if self.run.data.kind == "pairs":
            return StatePairs(cache, layer, weights)
        return StateRollouts(cache, layer, [unit.reward for unit in units])

    def _folder(self, layer: int, width: int) -> Path:
        """Folder of one head's checkpoints."""
        return self.settings.output / CHECKPOINTS / f"layer-{layer}-width-{width}"

    def _keep(self, trained: TrainedHead) -> None:
        """Save a trained head, so that a resumed run need not train it again."""
        choice = trained.record.choice
        with self.run.stop.defer():
            save_trained_head(self._folder(choice.layer, choice.width), trained, self.run.facts)


def policy_files(source: str) -> list[PolicyFiles]:
    """Fingerprints of the policy's files; of a GGUF file and of its conversion, where both are there."""
    other: Path | None = None
    if gguf := find_gguf(source):
        other = converted_folder(gguf)
    elif (folder := Path(source)).suffix == CONVERTED and converted_folder(file := folder.with_suffix("")) == folder:
        other = file
    else:
        other = converted_from(folder)
    return [describe_policy_files(str(one)) for one in (source, other) if one is not None]


def candidate_layers(settings: TrainSettings, model: Any) -> list[int]:
    """The layer that was set, or else the final state and the states at 3/4 and 1/2 of the depth."""
    final = depth(model)
    if isinstance(settings.layer, int):
        return [settings.layer]
    if settings.layer == "final" or settings.engine != "torch":  # other engines give no other states
        return [final]
    return list(dict.fromkeys([final, -(-3 * final // 4), -(-final // 2)]))


def depth(model: Any) -> int:
    """Number of decoder layers, which is also the index of the final state."""
    return int(model.config.get_text_config().num_hidden_layers)


def table_rank(settings: TrainSettings, model: Any) -> int:
    """Rank of the token table: what was set, or else as much as the table's size allows.

    Raises:
        UsageError: it exceeds the hidden size.
    """
    hidden = int(model.config.get_text_config().hidden_size)
    if settings.rank and settings.rank > hidden:
        raise UsageError(f"rank {settings.rank} exceeds the policy's hidden size, {hidden}: it would add nothing")
    return settings.rank or min(RANK, hidden, max(1, TABLE_ENTRIES // vocabulary_size(model)))
