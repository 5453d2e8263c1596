"""Weights of the training pairs: how far a reference scorer of finished completions agrees with each judgement."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from rgtg.config import TrainSettings
from rgtg.data.pairs import TokenizedPair
from rgtg.errors import UsageError
from rgtg.losses import agreement, prefix_margins
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.base import load_named_scorer, weights_of
from rgtg.tokenization.encoding import same_tokenizer
from rgtg.training.data.dataset import TrainData


def add_pair_weights(data: TrainData, settings: TrainSettings, tokenizer: Any, device: Any) -> None:
    """Set the weight of every training pair (C of `rgtg.losses.prefix_bradley_terry_pair_losses`) in ``data``.

    Held-out pairs keep the weight 1: their labels are the truth against which the scorer is measured.

    Args:
        data: pairs.
        settings: of the run; ``reference_scorer`` gives the weights.
        tokenizer: of the base model.
        device: of the reference scorer.

    Raises:
        UsageError: the reference scorer has another tokenizer than the base model.
        DataError: a pair exceeds the reference scorer's context.
    """
    assert settings.reference_scorer is not None
    reference = load_named_scorer(settings.reference_scorer, device=str(device))
    if not same_tokenizer(reference.tokenizer, tokenizer):
        raise UsageError(
            f"the reference scorer {settings.reference_scorer} has another tokenizer than {settings.base}, so their "
            "prefixes cannot be aligned; train one from the same base (--objective full-bt)"
        )
    data.pair_weights = pair_weights(reference, data.train, settings.options.consistency or "pair")
    data.reference_fingerprint = fingerprint_weights(weights_of(reference))


def pair_weights(reference: Any, pairs: Sequence[TokenizedPair], consistency: str) -> list[list[float]]:
    """C = σ(R(x, y^w) − R(x, y^l)) of each pair at every prefix: of whole completions, or of the prefixes themselves.

    Args:
        reference: R, a scorer with ``score_prefixes``.
        pairs: token ids.
        consistency: ``pair`` compares whole completions, ``prefix`` compares the two prefixes at each position.

    Returns:
        For each pair, as many numbers as its longer completion has tokens.
    """
    rows = [row for pair in pairs for row in pair.rows]
    scores = reference.score_prefixes([prompt for prompt, _ in rows], [completion for _, completion in rows])
    weights = []
    for won, lost in zip(scores[::2], scores[1::2], strict=True):
        sides = pad_sequence([won, lost], batch_first=True)  # (2, T)
        mask = torch.arange(sides.shape[1]) < torch.tensor([[len(won)], [len(lost)]])  # (2, T)
        margins = prefix_margins(sides[:1], sides[1:], mask[:1], mask[1:])[0]  # (T,)
        compared = margins[-1:].expand_as(margins) if consistency == "pair" else margins
        weights.append(agreement(compared).tolist())
    return weights
