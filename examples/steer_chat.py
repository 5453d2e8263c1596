"""Steer a chat model: the reply of the policy, and the replies that a scorer steers, from one seed.

python examples/steer_chat.py demo-output/prefix-bt --policy smollm2 --message "I got a new job!"
"""

import argparse

import rgtg

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("scorer", help="what `rgtg train` made, or a reward model of Hugging Face with one label")
parser.add_argument("--policy", required=True)
parser.add_argument("--message", required=True)
parser.add_argument("--tokens", type=int, default=48)
args = parser.parse_args()

chat = [{"role": "user", "content": args.message}]
guided = rgtg.GuidedPolicy.from_pretrained(args.policy, args.scorer, method="pargs")
for beta in (0.0, 1.0, 2.0, 4.0):  # 0 is the policy alone
    (done,) = guided.generate([chat], beta=beta, temperature=0.7, max_new_tokens=args.tokens, seed=0)
    print(f"beta {beta:g}, {done.guided_log_prob - done.policy_log_prob:.1f} nats from the policy: {done.text}")
