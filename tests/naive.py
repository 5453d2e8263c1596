"""What guided decoding must equal, written the slow way: stock models, one whole text at a time, float64 formulas."""

import math

import torch

from conftest import VOCAB, tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.decoding.guided import GuidedPolicy
from rgtg.models.checkpoint import ScorerInfo, fingerprint_weights, write_info
from rgtg.models.encoding import tokenizer_hash
from rgtg.models.heads import StateHead, VocabularyHead, save_head
from rgtg.models.prefix_scorer import PrefixScorer

EOS = 2
torch.set_num_threads(1)  # the models are tiny: threads only get in each other's way


def info(objective: str = "prefix-bt", append_eos: bool = True) -> ScorerInfo:
    return ScorerInfo(
        rgtg_version="0", objective=objective, base_model="tiny", base_fingerprint="", tokenizer_hash="",
        data_fingerprint="", append_eos=append_eos,
    )  # fmt: skip


def tiny_scorer(family: str = "llama", seed: int = 1, objective: str = "prefix-bt") -> PrefixScorer:
    return PrefixScorer(tiny_reward_model(family, seed), tiny_tokenizer(), info=info(objective), name="tiny")


def make_guided(method: str = "pargs", family: str = "llama", **settings) -> GuidedPolicy:
    """A guided tiny policy; the scorer is left out where the method needs none."""
    scorer = None
    if method != "policy":
        scorer = tiny_scorer(family, objective="prefix-bt")
    return GuidedPolicy.from_pretrained((tiny_policy(family), tiny_tokenizer()), scorer, method=method, **settings)


@torch.no_grad()
def next_log_probs(model, ids) -> torch.Tensor:
    """Stock causal LM on one text: log-probabilities (V,) of the next token, in float64."""
    return torch.log_softmax(model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double(), -1)


@torch.no_grad()
def reward(model, ids) -> float:
    """Stock reward model on one text; without a padding id, so that it reads the last token whatever it is."""
    pad = model.config.pad_token_id
    model.config.pad_token_id = None
    try:
        return float(model(input_ids=torch.tensor([list(ids)])).logits[0, 0])
    finally:
        model.config.pad_token_id = pad


def step_distribution(guided, ids, *, beta=0.0, top_k=None, top_p=1.0, temperature=1.0) -> dict[int, float]:
    """Log-probability of each candidate after ``ids``: the definition, term by term."""
    whole = next_log_probs(guided.policy.model, ids)
    tokens = whole.argsort(descending=True)[: top_k or len(whole)].tolist()
    mass = sum(math.exp(whole[t]) for t in tokens)
    kept, before = [], 0.0
    for token in tokens:
        if not kept or before < top_p:
            kept.append(token)
        before += math.exp(whole[token]) / mass
    energy = {t: float(whole[t]) for t in kept}
    if beta:
        energy = {t: e + beta * reward(guided.scorer.model, [*ids, t]) for t, e in energy.items()}
    if temperature == 0:
        return {max(energy, key=energy.__getitem__): 0.0}
    energy = {t: e / temperature for t, e in energy.items()}
    top = max(energy.values())
    total = top + math.log(sum(math.exp(e - top) for e in energy.values()))
    return {t: e - total for t, e in energy.items()}


def completion_distribution(guided, prompt, length, **settings) -> dict[tuple[int, ...], float]:
    """Probability of every completion of at most ``length`` tokens, EOS ending it early."""
    done, open_ = {}, {(): 0.0}
    for _ in range(length):
        grown = {}
        for tokens, log_prob in open_.items():
            for token, step in step_distribution(guided, [*prompt, *tokens], **settings).items():
                (done if token == EOS else grown)[(*tokens, token)] = log_prob + step
        open_ = grown
    return {tokens: math.exp(log_prob) for tokens, log_prob in (done | open_).items()}


def winner_distribution(guided, prompt, length, n, **settings) -> dict[tuple[int, ...], float]:
    """Distribution of the best of n independent completions, by order statistics of their rewards."""
    drawn = completion_distribution(guided, prompt, length, **settings)
    ranked = sorted(drawn, key=lambda tokens: reward(guided.scorer.model, [*prompt, *tokens]))
    winners, below = {}, 0.0
    for tokens in ranked:
        winners[tokens] = (below + drawn[tokens]) ** n - below**n
        below += drawn[tokens]
    return winners


def write_head(folder, policy_folder, kind: str = "state"):
    """A head with random weights on a saved tiny policy's states, as a folder."""
    folder.mkdir()
    torch.manual_seed(3)
    save_head(folder, StateHead(32, 8) if kind == "state" else VocabularyHead(32, 8, 4, VOCAB))
    tiny_tokenizer().save_pretrained(folder)
    about = {
        "trunk": "own", "head": kind, "layer": 2, "base_model": str(policy_folder),
        "base_fingerprint": fingerprint_weights(tiny_policy()), "tokenizer_hash": tokenizer_hash(tiny_tokenizer()),
    }  # fmt: skip
    write_info(folder, info().model_copy(update=about))
    return folder
