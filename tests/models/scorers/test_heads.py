"""Heads laid out for decoding give the scores of those that were trained."""

import pytest
import torch

from helpers.scorer_kinds import noisy
from rgtg.models.scorers.heads import FoldedVocabularyHead, VocabularyHead


@pytest.mark.parametrize("candidates", [3, 64], ids=["a few", "the whole vocabulary"])
def test_a_folded_head_gives_the_same_scores(candidates):
    head = noisy(VocabularyHead(32, 8, 5, 64)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    head.mlp.mean.normal_(generator=generator)
    head.mlp.std.uniform_(0.5, 2.0, generator=generator)
    states = torch.randn(4, 32, generator=generator)
    ids = torch.randint(64, (4, candidates), generator=generator)
    folded = FoldedVocabularyHead(head)
    torch.testing.assert_close(folded(states, ids), head(states, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded(states[:1], ids[:1]), head(states[:1], ids[:1]), atol=1e-5, rtol=1e-5)
