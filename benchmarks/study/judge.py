"""The judge of human preferences: a reward model of another trunk (MiniLM) and of other pairs than any method's.

TRL's RewardTrainer trains it on the judge's part of the conversations. How often it orders unseen human pairs as the
annotators did is in judge.json beside it, also among pairs whose sides are about equally long.
"""

import json
import shutil

import torch

from rgtg.utils.files import write_text

SEED = 1000
SETTINGS = {
    "num_train_epochs": 1, "learning_rate": 1e-4, "warmup_steps": 0.1, "max_length": 256,
    "per_device_train_batch_size": 16, "per_device_eval_batch_size": 32,
}  # fmt: skip
ABOUT_EQUAL = 1.2  # the longer side of a pair has at most so many times the characters of the other


class Judge:
    """Rewards of whole replies, from a folder that `train` wrote."""

    def __init__(self, folder):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()

    @torch.inference_mode()
    def score(self, texts, batch_size=32):
        """Rewards of conversations with their replies, as TRL's trainer has encoded them: closed with EOS."""
        found = []
        for start in range(0, len(texts), batch_size):
            part = [text + self.tokenizer.eos_token for text in texts[start : start + batch_size]]
            ids = self.tokenizer(
                part, padding=True, truncation=True, max_length=SETTINGS["max_length"], return_tensors="pt"
            )
            found += self.model(**ids).logits[:, 0].float().tolist()
        return found


def train(encoder, pairs, held_out, folder):
    """Train the judge once and write what it gets right.

    Args:
        encoder: folder of the encoder it starts from.
        pairs, held_out: rows of prompt, chosen and rejected as plain text.
        folder: of the judge.
    """
    if (folder / "judge.json").exists():
        return Judge(folder)
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    torch.manual_seed(SEED)
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1, local_files_only=True),
        args=RewardConfig(
            output_dir=str(folder / "trainer"), seed=SEED, use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **SETTINGS,
        ),
        train_dataset=Dataset.from_list(pairs), processing_class=tokenizer,
    )  # fmt: skip
    done = trainer.train()
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "encoder": "all-MiniLM-L6-v2", "pairs": len(trainer.train_dataset), "settings": SETTINGS, "seed": SEED,
        "loss": round(done.training_loss, 4), "held_out": agreement(Judge(folder), held_out),
    }  # fmt: skip
    write_text(folder / "judge.json", json.dumps(facts, indent=1) + "\n")
    return Judge(folder)


def agreement(judge, pairs):
    """Share of pairs that it orders as the annotators did: of all, and of those with sides of about equal length."""
    chosen, rejected = (judge.score([p["prompt"] + p[side] for p in pairs]) for side in ("chosen", "rejected"))
    right = [a > b for a, b in zip(chosen, rejected, strict=True)]
    lengths = [sorted((len(p["chosen"]), len(p["rejected"]))) for p in pairs]
    equal = [r for r, (low, high) in zip(right, lengths, strict=True) if high <= ABOUT_EQUAL * low]
    longer = [len(p["chosen"]) > len(p["rejected"]) for p in pairs]
    return {
        "pairs": len(right), "accuracy": round(sum(right) / len(right), 4),
        "about_equally_long": {"pairs": len(equal), "accuracy": round(sum(equal) / len(equal), 4) if equal else None},
        "longer_side_chosen": round(sum(longer) / len(longer), 4),
    }  # fmt: skip
