"""How many files and functions of rgtg a run of ``rgtg train`` passes through.

    python benchmarks/trace_train.py [FILES ALLOWED]

Eight pairs, two steps of prefix-bt, a separate reward model, everything imported before. Training is traced, first with
its command line, then without; the last line has the counts without, and with a number the exit code is 1 where there
are more files.
"""

from pathlib import Path

from goldens.command import rgtg
from traced import Trace, arguments, tiny_models

STEPS = {"max_steps": 2, "use_cpu": True}


def by_command(output):
    steps = [part for name, value in STEPS.items() for part in ("--set", f"train.{name}={value}")]
    rgtg("train", "--pairs", "pairs.jsonl", "--base", "policy", "--output", output, *steps)


def training(output):
    """What trains without a command line, and its settings. The one place that names what is inside rgtg."""
    from rgtg.config import TrainSettings

    try:
        from rgtg.training.train import train_scorer
    except ModuleNotFoundError:  # its place before the modules moved
        from rgtg.training.run import train_scorer

    settings = TrainSettings(pairs="pairs.jsonl", base="policy", output=Path(output), train=STEPS)
    return lambda: train_scorer(settings)


def main():
    args = arguments(__doc__)
    with tiny_models():
        trace = Trace()
        by_command("warm")
        with trace:
            by_command("commanded")
        print(trace.counts("with the command line"))
        train = training("alone")
        with trace:
            train()
        trace.report("a run of rgtg train", args.allowed)


if __name__ == "__main__":
    main()
