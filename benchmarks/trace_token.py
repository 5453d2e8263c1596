"""How many files and functions of rgtg one guided token passes through.

    python benchmarks/trace_token.py [FILES ALLOWED]

Tiny policy and reward model, pargs; trials and caches that are made once are made before. The last line has the counts;
with a number, the exit code is 1 where there are more files.
"""

from rgtg import GuidedPolicy
from traced import Trace, arguments, tiny_models


def main():
    args = arguments(__doc__)
    with tiny_models():
        trace = Trace()
        guided = GuidedPolicy.from_pretrained("policy", scorer="scorer", device="cpu")
        guided.generate(["Once upon a time"], max_new_tokens=1)
        with trace:
            guided.generate(["Once upon a time"], max_new_tokens=1)
        trace.report("one guided token", args.allowed)


if __name__ == "__main__":
    main()
