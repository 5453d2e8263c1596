"""Trains the demo's policy: a tokenizer and a small Llama, from scratch, on the desk's messages and replies."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rgtg.errors import NonFiniteError
from rgtg.tokenization.encoding import encode_completion, encode_prompt
from rgtg.tokenization.padding import pad_right

CONTEXT = 192
IGNORED = -100  # label that cross_entropy ignores
SPECIAL = ["<s>", "<pad>", "</s>"]


def train_tokenizer(texts: Sequence[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the corpus; <s> starts every text, </s> ends a finished reply."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_policy(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A Llama of 2 layers × 128 with random weights from ``seed``; torch's global generator is unchanged."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        tie_word_embeddings=True, attn_implementation="sdpa",
        initializer_range=0.08,  # 1/√128; the default 0.02 needs many more steps to learn to copy names
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_policy(
    folder: Path,
    texts: Sequence[tuple[str, str]],
    *,
    steps: int,
    seed: int,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train tokenizer and policy on (prompt, reply) texts and save both to ``folder``.

    The loss is −mean log π(reply token | prompt, previous tokens), including the final </s>. The optimiser is AdamW
    with a linear warm-up and a cosine schedule to zero.

    Args:
        folder: new folder for the model.
        texts: the corpus.
        steps: optimiser steps.
        seed: of the weights and the order of texts.
        batch_size: texts per step.
        learning_rate: peak learning rate.
        progress: called with (step, loss in nats) after each step.

    Returns:
        Mean loss of the last tenth of the steps, nats per token.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    tokenizer = train_tokenizer([prompt + reply for prompt, reply in texts])
    model = new_policy(len(tokenizer), seed)
    rows = [_encode(tokenizer, prompt, reply) for prompt, reply in texts]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    losses = []
    model.train()
    for step in range(steps):
        # 1. Draw a batch and compute its loss.
        chosen = torch.randint(len(rows), (batch_size,), generator=generator).tolist()
        loss = reply_loss(model, [rows[i] for i in chosen])
        if not bool(loss.isfinite()):
            raise NonFiniteError(f"the policy's loss is {float(loss)} at step {step + 1}; try another --seed")
        # 2. One step of the optimiser and the schedule.
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        progress(step + 1, losses[-1])
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def rate(step: int, steps: int) -> float:
    """Learning rate as a fraction of its peak: linear over the first tenth, then a cosine to zero.

    >>> [round(rate(step, 100), 2) for step in (0, 9, 55, 100)]
    [0.1, 1.0, 0.5, 0.0]
    """
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def reply_loss(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Mean negative log-probability of the replies' tokens in nats, a scalar; the prompts' tokens are not counted."""
    device = next(model.parameters()).device
    ids, mask = pad_right([prompt + reply for prompt, reply in rows], 1, device)
    labels = ids.masked_fill(mask == 0, IGNORED)  # (B, L)
    for i, (prompt, _) in enumerate(rows):
        labels[i, : len(prompt)] = IGNORED
    keep = labels[:, 1:] != IGNORED  # (B, L - 1): states that predict a token of a reply
    states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1][keep]
    return torch.nn.functional.cross_entropy(model.lm_head(states), labels[:, 1:][keep])


def _encode(tokenizer: Any, prompt: str, reply: str) -> tuple[list[int], list[int]]:
    prompt_ids = encode_prompt(tokenizer, prompt)
    return prompt_ids, encode_completion(tokenizer, prompt, reply, prompt_ids=prompt_ids)
