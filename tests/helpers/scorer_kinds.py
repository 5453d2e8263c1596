"""A scorer of every kind on one tiny policy, and each one's score by definition."""

import torch

from helpers.naive import info, reward, tiny_scorer
from helpers.other_tokenizers import byte_level, encoder_with, reward_model_with
from helpers.tiny_models import VOCAB, tiny_policy, tiny_tokenizer
from rgtg.decoding.runners.factory import fit_scorer
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.heads import StateHead, VocabularyHead
from rgtg.models.scorers.hidden_state_head import OwnStateScorer
from rgtg.models.scorers.lora_adapter import SharedTrunkScorer
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.models.scorers.token_reward import VocabularyScorer


def noisy(module, seed=4):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return module


def final_states(model, ids, layer=-1):
    out = model.base_model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[layer][0]


def lora(model, rank=3, seed=6):
    """A LoRA on every linear layer of the trunk, as shared_trunk keeps it, and a scalar head."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.startswith(model.base_model_prefix) and type(module).__name__ in ("Linear", "Conv1D"):
            out, inside = weight.shape if type(module).__name__ == "Linear" else weight.shape[::-1]
            down = torch.randn(rank, inside, generator=generator) * 0.2
            adapter[name] = (down, torch.randn(out, rank, generator=generator) * 0.2)
    return adapter, torch.randn(1, 32, generator=generator)


def merged(family, adapter):
    """The policy with the adapter's products written into its weights."""
    model = tiny_policy(family)
    for name, (down, up) in adapter.items():
        layer = model.get_submodule(name)
        delta = up @ down
        layer.weight.data += delta if type(layer).__name__ == "Linear" else delta.t()
    return model


def own(family, kind, layer=1):
    policy = Policy(tiny_policy(family), tiny_tokenizer())
    head = noisy(StateHead(32, 8) if kind == "state" else VocabularyHead(32, 8, 5, VOCAB))
    about = info().model_copy(update={"trunk": "own", "head": kind, "layer": layer})
    return policy, OwnStateScorer(policy, head, about)


def kinds():
    """One policy, a scorer of every kind on it, and each one's score by definition."""
    policy, state = own("llama", "state")
    _, table = own("llama", "vocab", layer=2)
    table = OwnStateScorer(policy, table.head, table.info)
    adapter, head = lora(policy.model)
    stock, separate = merged("llama", adapter), tiny_scorer()
    model = tiny_policy(seed=9)
    return policy, {
        "separate": (separate, lambda ids: reward(separate.model, ids)),
        "state": (state, lambda ids: state.head(final_states(policy.model, ids, 1)[-1])),
        "vocab": (
            table,
            lambda ids: table.head(final_states(policy.model, ids[:-1], 2)[-1:], torch.tensor([ids[-1:]])),
        ),
        "adapter": (
            SharedTrunkScorer(policy, adapter, head, info=info()),
            lambda ids: head @ final_states(stock, ids)[-1],
        ),
        "vocabulary scorer": (
            VocabularyScorer(Policy(model, tiny_tokenizer()), info=info("farma")),
            lambda ids: model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1, ids[-1]],
        ),
    }  # fmt: skip


def every_scorer():
    """A policy, and a scorer of every kind by name."""
    policy, found = kinds()
    words = byte_level()
    text, encoder = (
        PrefixScorer(make(words), words, info=info(), name="text") for make in (reward_model_with, encoder_with)
    )
    more = {"other": tiny_scorer(seed=5), "text": text, "encoder": encoder}
    return policy, {
        name: fit_scorer(policy, one) for name, one in ({n: s for n, (s, _) in found.items()} | more).items()
    }
