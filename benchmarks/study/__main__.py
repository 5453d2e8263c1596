"""The study: all objectives, methods and fine-tuned baselines on the same prompts, pairs and held-out rewards.

    python -m benchmarks.study stories --policy STORIES260K --work WORK [--golds lexicon --seeds 0 1 2]
    python -m benchmarks.study human --policy SMOLLM2 --judge MINILM --data DATA --work WORK --seeds 0 1 2
    python -m benchmarks.study attributes --policy SMOLLM2 --data DATA --work WORK --seeds 0 1 2
    python -m benchmarks.study demo --work WORK [--only "pargs β=2"]
    python -m benchmarks.study tables --work WORK --track stories
    python -m benchmarks.study tables --json docs/results/study-stories.json
    python -m benchmarks.study restore --work WORK --track stories

``restore`` recreates the parts from the committed JSON, so that a study whose parts were lost can continue. Run one row
first, so that WORK has the prompts of this run.

A run is resumable: every trained folder and every measured row is a part in WORK, and a run that was killed continues
from them. ``--only ROW`` measures one row of the committed JSON again and compares the two to the digit.
"""

import argparse
import json
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.baselines import DEFAULTS

from rgtg.utils.files import write_text

from . import scorers, worlds
from .measure import Models, measured
from .rows import BY_NAME, CORE, REAL, REAL_CORE, ROWS, chosen
from .scorers import ADAPTERS, SCORERS, SEPARATE, TUNED_TRACK

# Of the committed studies: pairs, prompts to tune on, prompts to test on, tokens of a completion.
SIZES = {
    "stories": {"pairs": 1200, "tune": 64, "test": 500, "tokens": 64},
    "human": {"pairs": 1013, "tune": 24, "test": 80, "tokens": 48},
    "attributes": {"pairs": 500, "tune": 24, "test": 80, "tokens": 48},
    "demo": {"pairs": 2000, "tune": 32, "test": 100, "tokens": 96},
}


def best_value(world, row, models):
    """The value that ``chosen`` selects from the tries on the tuning prompts."""
    grid = row.grid_of(world.track)
    if len(grid) == 1 or (row.knob == "n" and row.group == "best-of-n"):
        return grid[-1]  # more samples are not tuned, because they cost more
    if world.track in REAL:  # a real model's tries are expensive: the first seed's choice holds for all
        world = replace(world, seed=0, folder=world.folder.with_name(f"{world.gold_name}-s0"))
    cut = measured(world, BY_NAME["policy"], None, "tune", models)
    return chosen(row, {value: measured(world, row, value, "tune", models) for value in grid}, cut)


def run_cell(world, names, passes, models):
    """Tune every row and measure it on the test prompts; a second pass measures the other values on some of them."""
    for stage in passes:
        for name in names:
            row = BY_NAME[name]
            try:
                start = time.perf_counter()
                if stage == "audit":
                    audit_row(world, row, models)
                    continue
                best = best_value(world, row, models)
                values = [best] if stage == "tuned" else [v for v in row.grid_of(world.track) if v != best]
                for value in values:
                    part = measured(world, row, value, "test" if stage == "tuned" else "frontier", models)
                    mean, kl = (sum(part[k]) / len(part[k]) for k in ("rewards", "kl"))
                    took = time.perf_counter() - start
                    print(f"{time.strftime('%H:%M:%S')} {world.gold_name} s{world.seed} {part['key']}: {mean:.3f} at "
                          f"{kl:.1f} nats  {took:.0f} s", flush=True)  # fmt: skip
            except Exception:  # a row that fails must not stop the others; the next run tries it again
                print(f"FAILED {world.gold_name} s{world.seed} {name}\n{traceback.format_exc(limit=-3)}", flush=True)


def audit_row(world, row, models):
    """Audit the scorers of a row on pairs that nothing was trained on."""
    for name in row.scorers:
        if world.held_out:
            found = scorers.audit(world, models.policy(world, None), name)
            print(f"{world.gold_name} s{world.seed} {name}: {found['verdict']}", flush=True)


def note(world, args):
    """Write the prompts and settings that all cells of a track share."""
    setup = {
        "policy": world.policy, "tune": world.tune, "test": world.test,
        "max_new_tokens": world.max_new_tokens, "batch_size": world.batch_size, "pairs": args.pairs,
        "scorers": SCORERS, "separate": SEPARATE[world.track], "adapters": ADAPTERS[world.track],
        "fine_tuned": DEFAULTS, "of_track": TUNED_TRACK[world.track],
    }  # fmt: skip
    write_text(args.work / world.track / "setup.json", json.dumps(setup, indent=1) + "\n")


def quiet():
    """Disable the progress bars of the libraries."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", choices=[*SIZES, "tables", "restore"])
    parser.add_argument("--policy")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--judge", help="folder of the encoder that the judge of human preferences starts from")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path, nargs="+", help="tables of these committed JSONs instead of WORK's")
    parser.add_argument("--track", dest="of", choices=list(SIZES), help="whose tables or parts")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--golds", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="default: the first pass")
    parser.add_argument("--passes", nargs="+", choices=["tuned", "frontier", "audit"], default=["tuned"])
    parser.add_argument("--only", help="a row of the committed JSON, measured again")
    for name in SIZES["stories"]:
        parser.add_argument(f"--{name}", type=int, help="default: the committed study's")
    parser.add_argument("--batch", type=int, help="default: 250, with a real model 80")
    args = parser.parse_args()
    if args.work is None and args.json is None:
        parser.error("--work is needed, but for tables of a committed --json")
    torch.set_num_threads(1)
    quiet()
    if args.track == "tables":
        from . import tables

        return tables.show(args.json, args.golds) if args.json else tables.write(args.work, args.of, args.output)
    if args.track == "restore":
        from . import record

        return record.restore(args.work, args.of, args.output)
    args.batch = args.batch or (80 if args.track in REAL else 250)
    args.rows = args.rows or (REAL_CORE if args.track in REAL else CORE)
    vars(args).update({name: size for name, size in SIZES[args.track].items() if getattr(args, name) is None})
    make = worlds.MAKERS[args.track]
    models = Models()
    for seed in args.seeds:
        for gold in args.golds or worlds.GOLD_NAMES[args.track]:
            world = make(args, gold, seed)
            note(world, args)
            if args.only:
                from . import reproduce

                return reproduce.compare(world, args.only, args.output)
            run_cell(world, args.rows, args.passes, models)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
