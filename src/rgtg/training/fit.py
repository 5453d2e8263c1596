"""What a run cannot carry out, found before anything is loaded: objectives, data, trunks and heads that do not fit."""

import os

from rgtg.config import TrainSettings
from rgtg.config.training import OPTIONS
from rgtg.errors import UsageError
from rgtg.models.loading.lora_merge import is_adapter
from rgtg.training.arguments import FIT_FOR_HEADS
from rgtg.training.objectives import OBJECTIVES


def require_fit(settings: TrainSettings) -> None:
    """Refuse what would have to be ignored or could not be trained.

    Raises:
        UsageError: naming the setting and what to do.
    """
    _require_fit_for_trunk(settings)
    for wrong, why in (*_unfit_data(settings), *_unfit_options(settings), *_unfit_trunk(settings)):
        if wrong:
            raise UsageError(why)
    adapts = settings.trunk == "shared" or settings.lora is not None
    if adapts and is_adapter(settings.base):  # last, since it may look on the hub
        raise UsageError(
            f"{settings.base} is an adapter itself, and an adapter of an adapter could not be loaded: train it further "
            "without lora, or start from its base"
        )


def _unfit_data(settings: TrainSettings) -> list[tuple[bool, str]]:
    row = OBJECTIVES[settings.objective]
    flags = " or ".join(f"--{kind} FILE" for kind in row.data)
    return [
        (
            "rollouts" not in row.data and bool(settings.rollouts or settings.eval_rollouts),
            f"{row.name} learns from pairs: give {flags}, not rollouts",
        ),
        (
            "pairs" not in row.data and bool(settings.pairs or settings.eval_pairs),
            f"{row.name} learns from completions with rewards, which pairs do not have: give {flags} (what rgtg "
            "generate and then rgtg score write)",
        ),
        (not settings.pairs and not settings.rollouts, f"{row.name} needs {flags}"),
        (bool(settings.pairs and settings.rollouts), "give --pairs or --rollouts, not both"),
        (
            bool((settings.pairs and settings.eval_rollouts) or (settings.rollouts and settings.eval_pairs)),
            "what is held out must be of the kind that is trained on: --eval-pairs with --pairs, --eval-rollouts with "
            "--rollouts",
        ),
    ]


def _unfit_options(settings: TrainSettings) -> list[tuple[bool, str]]:
    others = [name for name in OPTIONS if name != settings.objective]
    given = [name.replace("-", "_") for name in others if getattr(settings, name.replace("-", "_")) is not None]
    prefix, cumulative, farma = settings.prefix_bt, settings.cumulative_mse, settings.farma
    centred = settings.train.get("center_rewards_coefficient") is not None
    return [
        (bool(given), f"{', '.join(given)} belongs to another objective than {settings.objective}: leave it out"),
        (
            settings.reference_scorer is not None and settings.objective != "prefix-bt",
            f"--reference-scorer weighs the pairs of prefix-bt, not of {settings.objective}: leave it out",
        ),
        (
            prefix is not None and prefix.consistency is not None and settings.reference_scorer is None,
            "prefix_bt.consistency says what a reference scorer is asked: give --reference-scorer FOLDER",
        ),
        (
            cumulative is not None and cumulative.reward_range is not None and settings.rollouts is None,
            "cumulative_mse.reward_range scales the rewards of --rollouts; pairs have the labels 1 and 0",
        ),
        (
            centred and not OBJECTIVES[settings.objective].centred,
            f"train.center_rewards_coefficient has no meaning for {settings.objective}: leave it out",
        ),
        (
            farma is not None and "output_scale" in farma.model_fields_set and settings.trunk == "own",
            "farma.output_scale is of a language model's output layer; a head on the policy's states has a table "
            "of its own",
        ),
    ]


def _unfit_trunk(settings: TrainSettings) -> list[tuple[bool, str]]:
    row = OBJECTIVES[settings.objective]
    own, shared = settings.trunk == "own", settings.trunk == "shared"
    return [
        (
            own and row.name == "autoregressive",
            "autoregressive trains a language model, whose log-probabilities are the scores: leave --trunk out "
            "(--set lora.r=16 keeps it small)",
        ),
        (
            own and row.name == "farma" and settings.head == "state",
            "farma compares a prefix with its best next token, which only a vocabulary head can say: use --head vocab",
        ),
        (
            own and settings.head is not None and settings.head not in row.heads,
            f"{row.name} would train a vocabulary head on closing tokens only; use prefix-bt, or --head state",
        ),
        (
            shared and row.language_model,
            f"{row.name} trains a language model that scores next tokens, and an adapter is read in one pass with its "
            "policy by a scalar head: leave --trunk out and add --set lora.r=16"
            + (", or use --trunk own --head vocab" if row.name == "farma" else ""),
        ),
    ]


def _require_fit_for_trunk(settings: TrainSettings) -> None:
    """Refuse what a run cannot carry out: settings of heads without one, or of whole models for a head.

    Raises:
        UsageError: naming the setting and what to do.
    """
    if settings.trunk == "shared" and settings.head == "vocab":
        raise UsageError(
            "--trunk shared --head vocab is not trained: an adapter is read in one pass with its policy by a scalar "
            "head. Train a vocabulary head on the policy's own states (--trunk own --head vocab), or a language "
            "model that scores next tokens as a LoRA of its own (--objective farma or autoregressive --set lora.r=16)"
        )
    if settings.trunk != "own":
        given = [name for name in ("head", "layer", "width", "rank") if getattr(settings, name) is not None]
        if given:
            raise UsageError(
                f"{given[0]} belongs to a head on the policy's own states: add --trunk own, or leave it out"
            )
        return
    for wrong, why in _unfit_for_heads(settings):
        if wrong:
            raise UsageError(why)
    for name in settings.train:
        if name not in FIT_FOR_HEADS:
            raise UsageError(
                f"train.{name} does not apply to a head on the policy's states, which is small, is trained by one "
                "process on states that are computed once"
            )


def _unfit_for_heads(settings: TrainSettings) -> list[tuple[bool, str]]:
    vocab = settings.head == "vocab"
    sizes = [v for v in (settings.width, settings.rank) if isinstance(v, int)]
    loading = set(settings.train.get("model_init_kwargs") or {}) - {"dtype"}
    return [
        (settings.head is None, "--trunk own needs --head state (read at each candidate) or --head vocab (read once)"),
        (settings.lora is not None, "lora adapts a model; a head on the policy's own states leaves it as it is"),
        (settings.rank is not None and not vocab, "rank is of the token table of a vocabulary head (--head vocab)"),
        (any(v < 1 for v in sizes), "width and rank must be at least 1"),
        (bool(loading), f"train.model_init_kwargs: a policy takes dtype only, not {', '.join(sorted(loading))}"),
        (
            int(os.environ.get("WORLD_SIZE", "1")) > 1,
            "a head is trained by one process: run rgtg train without torchrun",
        ),
    ]
