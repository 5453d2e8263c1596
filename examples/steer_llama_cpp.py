"""Steer a quantised model in a GGUF file, in llama.cpp where it is installed (pip install 'rgtg[llama-cpp]').

Train the head on the same file first, on the final layer, which every engine gives:
rgtg train --pairs pairs.jsonl --base model.gguf --trunk own --head vocab --layer final --output gguf-head

python examples/steer_llama_cpp.py model.gguf gguf-head --prompt "Once upon a time"
"""

import argparse

import rgtg

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("gguf")
parser.add_argument("scorer")
parser.add_argument("--prompt", required=True)
parser.add_argument("--beta", type=float, default=2.0)
parser.add_argument("--tokens", type=int, default=48)
args = parser.parse_args()

guided = rgtg.GuidedPolicy.from_pretrained(args.gguf, args.scorer, beta=args.beta, engine="auto")
(done,) = guided.generate([args.prompt], max_new_tokens=args.tokens, seed=0)
print(f"{done.text!r} ({len(done.token_ids)} tokens, {done.finish_reason})")
