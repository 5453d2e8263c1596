"""Small networks on a language model's hidden states, and their file.

A *state head* is read at the candidate, r(y_{1:i}) = Q(h_i). A *vocabulary head* is read at the prefix and scores every
next token, r(y_{1:i}) = Q(h_{i-1})[y_i]. h_i is the policy's hidden state at token i, in one of its layers.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rgtg.errors import DataError
from rgtg.models.loading.scorer_info import HEAD_FILE, ScorerInfo
from rgtg.utils.files import atomic_write

# Beyond this share of the vocabulary, one product with all of it is cheaper than with rows that are gathered.
MANY = 16


class StateHead(nn.Module):
    """Q(h) = MLP(h), one score per state: w₂ · GELU(W₁ h̃ + b₁) + b₂ with h̃ = (h − mean) / std.

    ``mean`` and ``std``, of each dimension over the training states, make any model's scale fit; they are stored.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.mlp = _Perceptron(hidden, width, 1)

    def forward(self, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows"]:
        """Scores in fp32, whatever the states' dtype."""
        scores: Tensor = self.mlp(states)[..., 0]
        return scores.float()


class VocabularyHead(nn.Module):
    """Q(h)[v] = ⟨MLP(h), E[v]⟩ + b[v], one score per next token; E is a learned token table (V × rank)."""

    def __init__(self, hidden: int, width: int, rank: int, vocabulary: int) -> None:
        super().__init__()
        self.mlp = _Perceptron(hidden, width, rank)
        self.table = nn.Embedding(vocabulary, rank)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(
        self, states: Float[Tensor, "batch hidden"], candidate_ids: Int[Tensor, "batch candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        """Scores of each prefix's candidates in fp32; of a few, only their rows of the table are read."""
        query = self.mlp(states)  # (B, R)
        if candidate_ids.shape[1] > len(self.bias) // MANY:
            every: Tensor = nn.functional.linear(query, self.table.weight, self.bias)  # (B, V)
            return every.float().gather(1, candidate_ids)
        products: Tensor = self.table(candidate_ids) @ query[..., None]  # (B, K, 1)
        return products[..., 0].float() + self.bias[candidate_ids]

    @torch.no_grad()
    def best(self, states: Float[Tensor, "rows hidden"], vocabulary: int | None = None) -> Float[Tensor, " rows"]:
        """max_v Q(h)[v] over the first ``vocabulary`` tokens, without a gradient; few rows at a time."""
        table, bias = self.table.weight[:vocabulary], self.bias[:vocabulary]
        rows = max(1, 2**24 // len(table))  # 64 MB of scores
        parts = [(part @ table.T + bias).amax(-1) for part in torch.split(self.mlp(states), rows)]
        return torch.cat(parts).float()

    def positions(
        self, states: Float[Tensor, "batch length hidden"], token_ids: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length"]:
        """Score of ``token_ids[b, t]`` read at ``states[b, t]``, the state just before it."""
        scores: Tensor = self(states.flatten(0, 1), token_ids.reshape(-1, 1))
        return scores.view(token_ids.shape)


class _Perceptron(nn.Module):
    """Standardise, one hidden layer, fp32 throughout."""

    mean: Tensor
    std: Tensor

    def __init__(self, hidden: int, width: int, out: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("std", torch.ones(hidden))
        self.first = nn.Linear(hidden, width)
        self.second = nn.Linear(width, out)

    def forward(self, states: Tensor) -> Tensor:
        inside = nn.functional.gelu(self.first((states.float() - self.mean) / self.std))
        out: Tensor = self.second(inside)
        return out


Head = StateHead | VocabularyHead


def score_positions(
    head: Head, states: Float[Tensor, "batch length hidden"], token_ids: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    """Score of every prefix, given the states that `prefix_states` cuts out and the completions' tokens."""
    scores: Tensor = head.positions(states, token_ids) if isinstance(head, VocabularyHead) else head(states)
    return scores


def save_head(folder: Path, head: Head) -> None:
    """Write head.safetensors; `round_to_half` first, so that what is read back is what was evaluated."""
    tensors = {
        name: value.half() if isinstance(value, nn.Parameter) else value
        for name, value in head.state_dict(keep_vars=True).items()
    }
    with atomic_write(folder / HEAD_FILE) as partial:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, str(partial))


@torch.no_grad()
def round_to_half(head: Head) -> None:
    """Round the weights to what fp16 holds, in place; they stay fp32 tensors."""
    for parameter in head.parameters():
        parameter.copy_(parameter.half())


def load_head(folder: Path, info: ScorerInfo) -> Head:
    """Read head.safetensors; sizes come from its tensors.

    Raises:
        DataError: missing, cut off, or not what rgtg.json says.
    """
    try:
        tensors = load_file(str(folder / HEAD_FILE))
        width, hidden = tensors["mlp.first.weight"].shape
        head: Head
        if info.head == "vocab":
            vocabulary, rank = tensors["table.weight"].shape
            head = VocabularyHead(hidden, width, rank, vocabulary)
        else:
            head = StateHead(hidden, width)
        head.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise DataError(f"{folder / HEAD_FILE} is missing or damaged, or no {info.head} head: {error}") from error
    return head
