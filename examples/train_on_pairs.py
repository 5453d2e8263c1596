"""Train a head on your own preference pairs: kilobytes, minutes, and steering at nearly the policy's own speed.

A line of the file is {"prompt": ..., "chosen": ..., "rejected": ...}; texts, or lists of chat messages.

python examples/train_on_pairs.py pairs.jsonl --policy smollm2 --output my-head
"""

import argparse
from pathlib import Path

from rgtg.config import TrainSettings
from rgtg.training.train import train_scorer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pairs")
parser.add_argument("--policy", required=True)
parser.add_argument("--output", type=Path, required=True)
args = parser.parse_args()

settings = TrainSettings(
    pairs=args.pairs, base=args.policy, output=args.output,
    objective="prefix-bt",  # a loss on every prefix, because decoding only ever sees prefixes
    trunk="own", head="vocab",  # one small network on the policy's own hidden states scores every next token
    eval_fraction=0.1, on_bad="skip", resume=True,
)  # fmt: skip
report = train_scorer(settings, show=True)
print(f"layer {report.layer}, width {report.width}, of {report.eval_pairs} held-out pairs:")
print({name: round(value, 3) for name, value in report.evaluation.items()})
