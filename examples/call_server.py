"""Call `rgtg serve` with the openai client: each request chooses its own scorers and strengths.

rgtg serve --policy smollm2 --scorer friendly=demo-output/prefix-bt
python examples/call_server.py friendly --message "My sister lost her keys. What should I say?"
"""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("scorer", help="the name that the server gave it")
parser.add_argument("--url", default="http://localhost:8000/v1")
parser.add_argument("--message", required=True)
parser.add_argument("--tokens", type=int, default=48)
args = parser.parse_args()

client = OpenAI(base_url=args.url, api_key="none")
policy = client.models.list().data[0].id
for beta in (0.0, 2.0):
    answer = client.chat.completions.create(
        model=policy,
        messages=[{"role": "user", "content": args.message}],
        max_tokens=args.tokens,
        seed=0,
        extra_body={"guidance": {"scorers": {args.scorer: beta}}},
    )
    print(f"beta {beta:g}: {answer.choices[0].message.content}")
