"""Small networks that score a language model's hidden states, and the file that stores them.

A *state head* scores the candidate's own state: r(y_{1:i}) = Q(h_i). A *vocabulary head* scores every next token from
the state of the prefix: r(y_{1:i}) = Q(h_{i−1})[y_i]. h_i is the hidden state at token i in one of the policy's layers.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from rgtg.models.scorers.head_file import read_tensors
from rgtg.types.scorer import HEAD_FILE, ScorerInfo
from rgtg.utils.files import atomic_write


def gathers_rows(candidates: int, vocabulary: int) -> bool:
    """Whether gathering the rows of so few candidates is cheaper than a product with the whole vocabulary."""
    return candidates <= vocabulary // 16


class StateHead(nn.Module):
    """One score per state: Q(h) = w₂ · GELU(W₁ h̃ + b₁) + b₂ with h̃ = (h − mean) / std.

    ``mean`` and ``std`` are those of each dimension over the training states; they are stored with the weights.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.mlp = _MLP(hidden, width, 1)

    def forward(self, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows"]:
        """Scores in fp32, for states of any dtype."""
        scores: Tensor = self.mlp(states)[..., 0]
        return scores.float()


class VocabularyHead(nn.Module):
    """One score per next token v: Q(h)[v] = ⟨MLP(h), E[v]⟩ + b[v], with a learned token table E (V, rank)."""

    def __init__(self, hidden: int, width: int, rank: int, vocabulary: int) -> None:
        super().__init__()
        self.mlp = _MLP(hidden, width, rank)
        self.table = nn.Embedding(vocabulary, rank)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(
        self, states: Float[Tensor, "batch hidden"], candidate_ids: Int[Tensor, "batch candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        """Scores in fp32 of each prefix's candidates."""
        query = self.mlp(states)  # (B, R)
        if not gathers_rows(candidate_ids.shape[1], len(self.bias)):
            all_scores: Tensor = nn.functional.linear(query, self.table.weight, self.bias)  # (B, V)
            return all_scores.float().gather(1, candidate_ids)
        products: Tensor = self.table(candidate_ids) @ query[..., None]  # (B, K, 1)
        return products[..., 0].float() + self.bias[candidate_ids]

    @torch.no_grad()
    def best(self, states: Float[Tensor, "rows hidden"], vocabulary: int | None = None) -> Float[Tensor, " rows"]:
        """max_v Q(h)[v] over the first ``vocabulary`` tokens, without a gradient, a few rows at a time."""
        table, bias = self.table.weight[:vocabulary], self.bias[:vocabulary]
        rows = max(1, 2**24 // len(table))  # 64 MB of scores
        parts = [(part @ table.T + bias).amax(-1) for part in torch.split(self.mlp(states), rows)]
        return torch.cat(parts).float()

    def positions(
        self, states: Float[Tensor, "batch length hidden"], token_ids: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length"]:
        """Score of ``token_ids[b, t]``, given the state ``states[b, t]`` before it."""
        scores: Tensor = self(states.flatten(0, 1), token_ids.reshape(-1, 1))
        return scores.view(token_ids.shape)


class FoldedVocabularyHead(nn.Module):
    """A vocabulary head in six operations instead of twelve: its scores differ in the last digits only.

    After a pass of a few milliseconds, each operation counts. The standardization is folded into the first layer, and
    b[v] is one more column of the token table: Q(h)[v] = ⟨[W₂ GELU(W₁′ h + b₁′) + b₂, 1], [E[v], b[v]]⟩ with
    W₁′ = W₁ / std and b₁′ = b₁ − W₁′ mean.
    """

    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor
    table: Tensor

    def __init__(self, head: VocabularyHead) -> None:
        super().__init__()
        mlp = head.mlp
        with torch.no_grad():
            first = mlp.first.weight / mlp.std
            self.register_buffer("first_weight", first)
            self.register_buffer("first_bias", mlp.first.bias - first @ mlp.mean)
            self.register_buffer("second_weight", nn.functional.pad(mlp.second.weight, (0, 0, 0, 1)))
            self.register_buffer("second_bias", nn.functional.pad(mlp.second.bias, (0, 1), value=1.0))
            self.register_buffer("table", torch.cat([head.table.weight, head.bias[:, None]], 1))

    def forward(
        self, states: Float[Tensor, "batch hidden"], candidate_ids: Int[Tensor, "batch candidates"]
    ) -> Float[Tensor, "batch candidates"]:
        """Scores in fp32 of each prefix's candidates."""
        if len(states) == 1 and gathers_rows(candidate_ids.shape[1], len(self.table)):
            # products with a vector read less code than those of matrices: a pass has emptied the processor's caches
            inner = nn.functional.gelu(torch.addmv(self.first_bias, self.first_weight, states[0].float()))
            vector = torch.addmv(self.second_bias, self.second_weight, inner)  # (R + 1,)
            return torch.mv(self.table.index_select(0, candidate_ids[0]), vector)[None]
        inner = nn.functional.gelu(nn.functional.linear(states.float(), self.first_weight, self.first_bias))
        query = nn.functional.linear(inner, self.second_weight, self.second_bias)  # (B, R + 1)
        if not gathers_rows(candidate_ids.shape[1], len(self.table)):
            return (query @ self.table.T).gather(1, candidate_ids)
        rows = nn.functional.embedding(candidate_ids, self.table)  # (B, K, R + 1)
        return torch.bmm(rows, query[..., None])[..., 0]


class _MLP(nn.Module):
    """Standardize the input, then one hidden layer; everything in fp32."""

    mean: Tensor
    std: Tensor

    def __init__(self, hidden: int, width: int, out: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("std", torch.ones(hidden))
        self.first = nn.Linear(hidden, width)
        self.second = nn.Linear(width, out)

    def forward(self, states: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows out"]:
        hidden = nn.functional.gelu(self.first((states.float() - self.mean) / self.std))
        return self.second(hidden)  # type: ignore[no-any-return]


Head = StateHead | VocabularyHead


def score_positions(
    head: Head, states: Float[Tensor, "batch length hidden"], token_ids: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length"]:
    """Score of every prefix, given the states from `prefix_states` and the completions' tokens."""
    scores: Tensor = head.positions(states, token_ids) if isinstance(head, VocabularyHead) else head(states)
    return scores


def save_head(folder: Path, head: Head) -> None:
    """Write head.safetensors; call `round_to_half` first, so that the loaded head equals the evaluated one."""
    tensors = {
        name: value.half() if isinstance(value, nn.Parameter) else value
        for name, value in head.state_dict(keep_vars=True).items()
    }
    with atomic_write(folder / HEAD_FILE) as partial:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, str(partial))


@torch.no_grad()
def round_to_half(head: Head) -> None:
    """Round the weights to fp16 values, in place; they stay fp32 tensors."""
    for parameter in head.parameters():
        parameter.copy_(parameter.half())


def load_head(folder: Path, info: ScorerInfo) -> Head:
    """Read head.safetensors. The sizes come from its tensors.

    Raises:
        DataError: the file is missing, truncated, or not the head that rgtg.json describes.
    """
    tensors = {name: torch.from_numpy(array) for name, array in read_tensors(folder, info).items()}
    width, hidden = tensors["mlp.first.weight"].shape
    head: Head
    if info.head == "vocab":
        vocabulary, rank = tensors["table.weight"].shape
        head = VocabularyHead(hidden, width, rank, vocabulary)
    else:
        head = StateHead(hidden, width)
    head.load_state_dict(tensors)
    return head
