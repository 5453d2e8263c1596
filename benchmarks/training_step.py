"""CPU seconds of a training step on human pairs: rows read whole, shared prompts read once, and both by length.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --base SMOLLM --pairs helpful-base.test.jsonl.gz
        [--batch 16] [--batches 2] [--objectives prefix-bt autoregressive] [--output FILE]

A step is the loss of a batch of pairs and its gradients, of a scorer as large as the base, in bf16 autocast where the
CPU multiplies bf16. "whole" is one call of the model with a row per completion; "packed" is one call in which each
prompt is read once; "by length" reads packed rows in calls of at most ``CPU_TOKENS`` tokens, as ``rgtg train`` does on
one CPU process. The three alternate on the same batches; their losses are compared. Times are CPU seconds of the
process, so that other work on the machine matters less.

The last line of stdout is one JSON object; ``--output`` writes it to a file.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from trl import RewardConfig

from rgtg.models.loading.device_map import multiplies
from rgtg.models.loading.pretrained import load_tokenizer
from rgtg.training.trainers import reward
from rgtg.training.trainers.language_model import AutoregressiveTrainer
from rgtg.training.trainers.reward import PrefixRewardTrainer
from states import read_chats, summarise

TRAINERS = {"prefix-bt": PrefixRewardTrainer, "autoregressive": AutoregressiveTrainer}
WAYS = {"whole": (False, None), "packed": (True, None), "by length": (True, reward.CPU_TOKENS)}  # packs, tokens


def step(trainer, batch, packs, tokens):
    """Loss of a batch and the CPU seconds of it and its gradients."""
    trainer.packs = packs
    type(trainer).tokens_of_a_pass = tokens
    trainer.model.zero_grad(set_to_none=True)
    start = time.process_time()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), time.process_time() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--objectives", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    pairs = read_chats(args.pairs, load_tokenizer(args.base, "base model"), 1024, args.batch * args.batches)
    rows = Dataset.from_list([
        {
            "chosen_ids": [*pair.prompt_ids, *pair.chosen_ids], "rejected_ids": [*pair.prompt_ids, *pair.rejected_ids],
            "prompt_length": len(pair.prompt_ids),
        }
        for pair in pairs
    ])  # fmt: skip
    bf16, result = multiplies(torch.bfloat16), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.objectives:
            config = RewardConfig(
                scratch, bf16=bf16, use_cpu=True, report_to="none", activation_checkpointing=False,
                gradient_checkpointing=None, dataloader_pin_memory=False, model_init_kwargs={"dtype": "float32"},
            )  # fmt: skip
            trainer = TRAINERS[name](args.base, config, train_dataset=rows)
            trainer.model.train()
            seconds, losses = {way: [] for way in WAYS}, {way: [] for way in WAYS}
            for i in range(args.batches):
                batch = trainer.data_collator(
                    [trainer.train_dataset[j] for j in range(i * args.batch, (i + 1) * args.batch)]
                )
                for way in list(WAYS)[:: 1 if i % 2 else -1]:
                    loss, took = step(trainer, batch, *WAYS[way])
                    seconds[way].append(took)
                    losses[way].append(loss)
                print(name, i, {way: round(found[-1], 1) for way, found in seconds.items()}, flush=True)
            result[name] = summarise(seconds, "by length") | {"losses": losses}
    result = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/training_step.py --base SMOLLM "
        f"--pairs {Path(args.pairs).name} --batch {args.batch} --batches {args.batches} "
        f"--objectives {' '.join(args.objectives)}",
        "objectives": result, "bf16": bf16, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
