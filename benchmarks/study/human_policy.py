"""Track B's policy: a small Llama with its own tokenizer, trained from scratch on the texts of human_data.

python -m benchmarks.study.human_policy --data DATA --output FOLDER [--minutes 25]

A run that was stopped continues from its last checkpoint, written every 100 steps.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .human_data import all_pairs, policy_texts


def train_tokenizer(texts, vocabulary):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet,
                                   show_progress=False),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def new_model(args):
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab, hidden_size=args.width, num_hidden_layers=args.layers,
            num_attention_heads=args.width // 32, num_key_value_heads=args.width // 32,
            intermediate_size=args.width * 8 // 3, max_position_embeddings=512, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.05,
        )
    )  # fmt: skip


def new_optimizers(model, args):
    """Muon for the layers' matrices, which need fewer tokens with it, and AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.matrix_rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["highest"] = group["lr"]
    return optimizers


def read_blocks(args):
    """The tokenizer, and the tokens of all texts as (blocks, context)."""
    parts = all_pairs(args.data)
    texts = policy_texts(args.data, parts)
    print({k: len(v) for k, v in parts.items()}, len(texts), "texts", flush=True)
    tokenizer = train_tokenizer(texts[:20_000], args.vocab)
    ids = [i for text in tokenizer(texts).input_ids for i in [*text, tokenizer.eos_token_id]]
    print(f"{len(ids)} tokens", flush=True)
    return tokenizer, torch.tensor(ids[: len(ids) // args.context * args.context]).view(-1, args.context)


def keep(path, model, optimizers, **more):
    """Write a checkpoint atomically."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], **more}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def go_on(path, model, optimizers):
    """Load the checkpoint at ``path`` into model and optimizers; return its steps, losses and seconds."""
    if not path.exists():
        return 0, [], 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return state["step"], state["losses"], state["seconds"]


def train(args):
    """Train for some minutes of processor time. The rate follows the time left, so that every run ends its schedule."""
    tokenizer, blocks = read_blocks(args)
    model, path = new_model(args), args.output / "unfinished.pt"
    optimizers = new_optimizers(model, args)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(args.seed))
    args.output.mkdir(parents=True, exist_ok=True)
    step, losses, before = go_on(path, model, optimizers)
    start = time.process_time() - before
    while (spent := (time.process_time() - start) / (60 * args.minutes)) < 1:
        share = min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * spent)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["highest"] * share
        batch = blocks[order[torch.arange(step * args.batch, (step + 1) * args.batch) % len(order)]]
        losses.append(train_step(model, optimizers, batch))
        if step % 50 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}  {time.process_time() - start:.0f} s", flush=True)
        step += 1
        if step % 100 == 0:
            keep(path, model, optimizers, step=step, losses=losses, seconds=time.process_time() - start)
    model.eval().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    facts = {
        "parameters": model.num_parameters(), "steps": step, "tokens": step * args.batch * args.context,
        "corpus_tokens": blocks.numel(), "final_loss_nats": sum(losses[-20:]) / len(losses[-20:]),
        "processor_minutes": args.minutes, "seed": args.seed, "vocab": args.vocab, "layers": args.layers,
        "width": args.width,
    }  # fmt: skip
    (args.output / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    path.unlink(missing_ok=True)
    print(facts, flush=True)


def train_step(model, optimizers, batch):
    """One step; returns the loss in nats per token before it."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch, labels=batch).loss
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25, help="of processor time, so that other work costs nothing")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    for name, value in {"seed": 0, "layers": 4, "width": 192, "vocab": 4096, "context": 256, "batch": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args)


if __name__ == "__main__":
    main()
