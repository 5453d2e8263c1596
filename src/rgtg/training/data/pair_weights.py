"""How far each pair's judgement is trusted: what a reference scorer of finished texts says of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from rgtg.config import TrainSettings
from rgtg.data.pairs import TokenizedPair
from rgtg.errors import UsageError
from rgtg.losses import agreement, prefix_margins
from rgtg.models.loading.scorer_info import fingerprint_weights
from rgtg.models.scorers.base import load_named_scorer, weights_of
from rgtg.tokenization.encoding import same_tokenizer
from rgtg.training.data.read import TrainData


class Trust(NamedTuple):
    """What a reference scorer says: C of every training pair, and the fingerprint of its weights for rgtg.json."""

    pairs: list[list[float]] | None = None
    reference: str | None = None


def trust_of(settings: TrainSettings, data: TrainData, tokenizer: Any, device: Any) -> Trust:
    """C of `rgtg.losses.prefix_bradley_terry_pair_losses` for every training pair; nothing without a reference scorer.

    Held-out pairs are trusted as they are: their labels are the truth that the scorer is measured by.

    Raises:
        UsageError: a reference scorer with another tokenizer than the base model's.
        DataError: a pair over the reference scorer's context.
    """
    if settings.reference_scorer is None:
        return Trust()
    reference = load_named_scorer(settings.reference_scorer, device=str(device))
    if not same_tokenizer(reference.tokenizer, tokenizer):
        raise UsageError(
            f"the reference scorer {settings.reference_scorer} reads text with another tokenizer than "
            f"{settings.base}: prefixes could not be aligned; train one from the same base (--objective full-bt)"
        )
    trust = pair_trust(reference, data.train, settings.options.consistency or "pair")
    return Trust(trust, fingerprint_weights(weights_of(reference)))


def pair_trust(reference: Any, pairs: Sequence[TokenizedPair], consistency: str) -> list[list[float]]:
    """C = σ(R(x, y^w) − R(x, y^l)) of each pair, at every prefix: of whole completions, or of the prefixes themselves.

    Args:
        reference: R, a scorer with ``score_prefixes``.
        pairs: token ids.
        consistency: ``pair`` asks about whole completions, ``prefix`` about each pair of prefixes.

    Returns:
        As many numbers for each pair as its longer completion has tokens.
    """
    rows = [row for pair in pairs for row in pair.rows]
    scores = reference.score_prefixes([prompt for prompt, _ in rows], [completion for _, completion in rows])
    trust = []
    for won, lost in zip(scores[::2], scores[1::2], strict=True):
        sides = torch.nn.utils.rnn.pad_sequence([won, lost], batch_first=True)  # (2, T)
        mask = torch.arange(sides.shape[1]) < torch.tensor([[len(won)], [len(lost)]])
        margins = prefix_margins(sides[:1], sides[1:], mask[:1], mask[1:])[0]
        asked = margins[-1:].expand_as(margins) if consistency == "pair" else margins
        trust.append(agreement(asked).tolist())
    return trust
