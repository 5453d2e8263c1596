"""Audits full-sequence and prefix-trained scorers on held-out pairs of real human preferences.

    python benchmarks/human_pairs.py --text FILE [FILE ...] --pairs FILE [FILE ...] [--output docs/results]

Without --base, a small base model is trained first on the text files (JSONL, .gz or .xz, with "text", "post" or
"turns"), with its own byte-level BPE tokenizer. This is for machines without a model hub, and not a recommendation.
--base FOLDER uses a real base model. Both scorers see the same pairs, steps and settings. Writes human-pairs-audit.json
and human-pairs-audit.png.
"""

import argparse
import gzip
import json
import lzma
import tempfile
import time
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rgtg.config import TrainSettings
from rgtg.data.pairs import read_pairs, split_pairs
from rgtg.evaluation.audit.prefix_accuracy import audit_prefixes
from rgtg.evaluation.plots import plot_audit
from rgtg.training.train import train_scorer


def read_texts(paths, characters):
    """Texts of the files in turn, cut into pieces, until there are enough characters of each file."""
    for path in paths:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
        taken = 0
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                text = row.get("text") or row.get("post") or "\n\n".join(f"{who}: {said}" for who, said in row["turns"])
                text = text[:20_000]
                taken += len(text)
                yield text
                if taken > characters:
                    break


def train_tokenizer(texts, vocabulary):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def train_trunk(args, folder):
    """A small causal LM, trained for a fixed number of steps; returns its last mean loss in nats per token."""
    texts = list(read_texts(args.text, args.characters))
    tokenizer = train_tokenizer(texts, args.vocab)
    ids = [i for text in tokenizer(texts).input_ids for i in [*text, tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) // args.context * args.context]).view(-1, args.context)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab, hidden_size=args.width, num_hidden_layers=args.layers,
            num_attention_heads=args.width // 32, num_key_value_heads=args.width // 32,
            intermediate_size=args.width * 8 // 3, max_position_embeddings=1024, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.trunk_steps)
    order = torch.randint(
        len(blocks), (args.trunk_steps, args.trunk_batch), generator=torch.Generator().manual_seed(args.seed)
    )
    losses = []
    for step, rows in enumerate(order):
        batch = blocks[rows]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"trunk step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": model.num_parameters(), "steps": args.trunk_steps,
        "tokens": args.trunk_steps * args.trunk_batch * args.context,
        "final_loss_nats": sum(losses[-20:]) / len(losses[-20:]), "text": [Path(p).name for p in args.text],
    }  # fmt: skip


def gather(args, tokenizer, folder):
    """All pair files as one, split by prompt; returns row counts."""
    pairs, counts = [], {}
    for path in args.pairs:
        read = read_pairs(
            path, tokenizer=tokenizer, max_length=args.max_length, on_bad="skip", rejects=folder / "bad.jsonl"
        )
        pairs += read.pairs
        counts[Path(path).name] = read.summary.model_dump()
    train, held = split_pairs(pairs, args.eval_fraction, args.seed)
    for name, rows in (("train", train), ("held", held)):
        lines = (json.dumps({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}) + "\n" for p in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {"train": len(train), "held": len(held), "files": counts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[])
    parser.add_argument("--pairs", nargs="+", required=True)
    parser.add_argument("--base", help="a real trunk; none trains a small one")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--eval-fraction", type=float, default=0.25)
    for name, value in {
        "seed": 0, "layers": 4, "width": 192, "vocab": 4096, "context": 256, "trunk-steps": 500, "trunk-batch": 16,
        "characters": 6_000_000, "max-length": 256,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    start = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trunk = {"base": Path(args.base).name} if args.base else train_trunk(args, folder / "trunk")
        base = args.base or str(folder / "trunk")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        counts = gather(args, tokenizer, folder)
        print(trunk, {k: counts[k] for k in ("train", "held")}, f"{time.time() - start:.0f} s", flush=True)
        audits, reports = {}, {}
        for objective in ("full-bt", "prefix-bt"):
            settings = TrainSettings(
                pairs=str(folder / "train.jsonl"), eval_pairs=str(folder / "held.jsonl"), base=base,
                objective=objective,
                output=folder / objective, seed=args.seed, max_length=args.max_length,
                train={"num_train_epochs": args.epochs, "learning_rate": args.learning_rate,
                       "per_device_train_batch_size": 16},
            )  # fmt: skip
            reports[objective] = train_scorer(settings)
            audits[objective] = audit_prefixes(str(folder / objective), folder / "held.jsonl", seed=args.seed)
            print(objective, audits[objective].verdict, f"{time.time() - start:.0f} s", flush=True)
    save(args, trunk, counts, reports, audits)


def save(args, trunk, counts, reports, audits):
    args.output.mkdir(parents=True, exist_ok=True)
    record = {
        "what": __doc__.splitlines()[0], "command": "python benchmarks/human_pairs.py --text … --pairs …",
        "settings": vars(args) | {"text": [Path(p).name for p in args.text],
                                  "pairs": [Path(p).name for p in args.pairs],
                                  "output": args.output.name, "base": args.base and Path(args.base).name},
        "trunk": trunk, "pairs": counts,
        "training": {o: r.model_dump(exclude={"output", "base"}) for o, r in reports.items()},
        "audits": {o: a.model_dump() for o, a in audits.items()},
    }  # fmt: skip
    (args.output / "human-pairs-audit.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    plot_audit(audits, args.output / "human-pairs-audit.png", metadata={"Software": ""})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
