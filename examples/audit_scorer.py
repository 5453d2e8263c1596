"""Audit a reward model before you steer with it: does it order half-written texts as people ordered the finished ones?

python examples/audit_scorer.py my-reward-model held-out.jsonl
"""

import argparse

import rgtg

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("scorer", help="folder or hub id of a scorer, or of any reward model with one label")
parser.add_argument("pairs", help="preference pairs that it was not trained on")
args = parser.parse_args()

audit = rgtg.audit_prefixes(args.scorer, args.pairs)
print(audit.verdict)
for row in audit.by_fraction:
    print(f"{row.position:4.0%} read: {row.accuracy.mean:.1%} ({row.accuracy.low:.1%} to {row.accuracy.high:.1%})")
