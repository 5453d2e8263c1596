"""A head before training: its sizes, its moments, and where its token table starts."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rgtg.models.scorers.heads import Head, StateHead, VocabularyHead
from rgtg.training.data.state_cache import moments


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
