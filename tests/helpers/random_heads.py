"""Random heads with complete descriptions of a saved policy, for the engines that read head folders."""

import torch

from helpers.naive import info
from rgtg.models.loading.policy import load_policy
from rgtg.models.loading.policy_files import describe_policy_files
from rgtg.models.loading.scorer_info import cast_fingerprints, fingerprint_weights, write_info
from rgtg.models.scorers.heads import StateHead, VocabularyHead, round_to_half, save_head
from rgtg.tokenization.encoding import tokenizer_hash


def write_random_head(folder, policy_folder, kind="vocab", *, seed=3, scale=1.0, policy=None, **changes):
    """Write a random head on the final states of a saved policy; ``changes`` replace fields of its description.

    Args:
        folder: of the head; it is made.
        policy_folder: of the policy.
        kind: ``vocab`` or ``state``.
        seed: of its weights.
        scale: of its scores.
        policy: the loaded policy, where the caller has it.
    """
    policy = policy or load_policy(str(policy_folder), dtype="float32", device="cpu")
    config = policy.model.config.get_text_config()
    hidden, vocabulary = config.hidden_size, len(policy.model.get_output_embeddings().weight)
    torch.manual_seed(seed)
    head = StateHead(hidden, 8) if kind == "state" else VocabularyHead(hidden, 8, 4, vocabulary)
    with torch.no_grad():
        head.mlp.mean.normal_()
        head.mlp.std.uniform_(0.5, 2.0)
        for part in (head.mlp.second, getattr(head, "table", None)):
            if part is not None:
                part.weight.normal_(0, scale)
    round_to_half(head)
    folder.mkdir(parents=True, exist_ok=True)
    save_head(folder, head)
    about = {
        "trunk": "own", "head": kind, "base_model": str(policy_folder), "normalisation": "standardize",
        "activation": "gelu", "policy_files": [describe_policy_files(str(policy_folder))],
        "tokenizer_hash": tokenizer_hash(policy.tokenizer), "base_fingerprint": fingerprint_weights(policy.model),
        "base_casts": cast_fingerprints(policy.model), "layer": config.num_hidden_layers,
        "policy_layers": config.num_hidden_layers, "hidden": hidden, "width": 8,
        "rank": 4 if kind == "vocab" else None, "vocabulary": vocabulary if kind == "vocab" else None,
    }  # fmt: skip
    write_info(folder, info().model_copy(update=about | changes))
    return head.requires_grad_(False)
