"""Is every output what it was? A fixed set of cases, written to a file, or compared with one to the byte.

    python benchmarks/golden.py --output FILE.json [--only PATTERN …]
    python benchmarks/golden.py --against FILE.json [--only PATTERN …]

Tiny models of random weights are made in a temporary folder; a pretrained one joins them where there is one (--real).
Cases go through what stays whatever moves inside: the public names of ``rgtg``, its command line, its HTTP API, and its
files. They are: every method with every kind of scorer, alone and in batches, with the settings, drafts and
architectures that change how tokens are read (method, setting, part, model); what else is public (public); ``rgtg
serve``, one request at a time and eight at once (served); files of prompts (job), also killed half way (killed); the
commands that read completions (command); and a few steps of every objective (train).

Token ids, texts, log-probabilities (to the last digit), counts and training weights are kept, traces as digests. What
changes by its nature is left out: ids drawn at random, times, ports. Another processor rounds otherwise: there only
--tolerance, which lets floats differ and passes over digests, says something. docs/results/golden.json was made so.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}

import torch
import transformers

import rgtg
from goldens import commands, decoding, models, serving, told

REAL = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
# Each is made as a whole, longest first; {first part of its cases' names: what yields (name, what makes its record)}.
GROUPS = {
    "train": commands.trained, "served": serving.records, "killed": commands.killed, "job": commands.jobs,
    "command": commands.commands,
}  # fmt: skip
CASES = decoding.cases()


def make(unit):
    """A group's records, or one case's; an error is a record too."""
    if unit in CASES:
        return {unit: attempted(CASES[unit])}
    found = {}
    failed = attempted(lambda: found.update((name, attempted(record)) for name, record in GROUPS[unit]()))
    return found | ({f"{unit}/": failed} if failed else {})


def attempted(work):
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def wanted(names, patterns):
    """Names that a pattern fits, or begins."""
    return [name for name in names if any(fnmatch.fnmatch(name, f"{pattern}*") for pattern in patterns)]


def units(patterns):
    """Groups and cases to run; a group runs as a whole, since what it keeps depends on what came before."""
    heads = [pattern.partition("/")[0] for pattern in patterns]
    groups = [group for group in GROUPS if any(fnmatch.fnmatch(group, f"{head}*") for head in heads)]
    return [*groups, *wanted(CASES, patterns)]


def run(patterns, processes, real):
    """{name: record} of all cases that a pattern fits."""
    chosen = [unit for unit in units(patterns) if real or "/stories/" not in unit]
    found, left, start = {}, {}, time.monotonic()
    for unit in chosen:
        left[unit.partition("/")[0]] = left.get(unit.partition("/")[0], 0) + 1
    with tempfile.TemporaryDirectory(prefix="rgtg-golden-") as made:
        before = Path.cwd()
        os.chdir(made)
        try:
            models.build(Path(), real)
            say(f"models made, {time.monotonic() - start:.0f} s")
            with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
                for done in as_completed([pool.submit(named, unit) for unit in chosen]):
                    unit, records = done.result()
                    found |= records
                    group = unit.partition("/")[0]
                    left[group] -= 1
                    if not left[group]:
                        say(f"{group} done, {len(found)} cases in all, {time.monotonic() - start:.0f} s")
        finally:
            os.chdir(before)
    kept = wanted(found, patterns)
    return {name: json.loads(json.dumps(found[name])) for name in sorted(kept)}


def named(unit):
    return unit, make(unit)


def say(text):
    print(text, file=sys.stderr, flush=True)


def about():
    """What the cases were made with."""
    where = Path(rgtg.__file__).parent
    asked = subprocess.run(["git", "-C", where, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "commit": asked.stdout.strip() or None, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(), "threads": 1,
    }  # fmt: skip


def write(path, cases):
    """One case a line, so that a change shows as one."""
    lines = [f"{json.dumps(name)}: {json.dumps(record, ensure_ascii=False)}" for name, record in cases.items()]
    head = json.dumps(about())
    path.write_text(f'{{"made_with": {head},\n"cases": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def compare(before, cases, patterns, tolerance, real):
    """Say of each case whether it is what it was; how many are not."""
    kept = before["cases"]
    expected = [name for name in wanted(kept, patterns) if real or "/stories/" not in name]
    for name, value in about().items():
        if name != "commit" and before["made_with"][name] != value:
            say(f"{name}: {before['made_with'][name]} then, {value} now")
    differ = 0
    for name in [*expected, *(name for name in cases if name not in kept)]:
        if name not in kept or name not in cases:
            print(f"{'NEW' if name in cases else 'GONE':<7}{name}")
            differ += name not in cases
            continue
        found = told.differences(kept[name], cases[name], tolerance)
        differ += bool(found)
        print(f"{'DIFFERS' if found else 'equal':<8}{name}")
        for field, then, now in found[:4]:
            print(f"        {field.lstrip('.')}: {short(then, now)} then, {short(now, then)} now")
        if len(found) > 4:
            print(f"        and {len(found) - 4} more fields")
    print(f"{len(expected) - differ} of {len(expected)} cases are what they were")
    return differ


def short(value, other):
    """A value, of a long one the place where it leaves the other."""
    text, against = (json.dumps(each, ensure_ascii=False) for each in (value, other))
    same = next((i for i, (a, b) in enumerate(zip(text, against, strict=False)) if a != b), len(text))
    begin = max(0, same - 30) if len(text) > 90 else 0
    return f"{'… ' if begin else ''}{text[begin : begin + 90]}{' …' if len(text) > begin + 90 else ''}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="write all records here")
    what.add_argument("--against", type=Path, help="compare with such a file; exit code 1 where anything differs")
    what.add_argument("--list", action="store_true", help="name the cases, and the groups that run as a whole")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PATTERN", help="beginnings of names; * is anything")
    parser.add_argument("--tolerance", type=float, help="let floats differ so much, and pass over digests")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--real", type=Path, default=REAL, help="folder of a pretrained story model")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.list:
        print("\n".join([f"{group}/…" for group in GROUPS] + list(CASES)))
        return
    before = json.loads(args.against.read_text(encoding="utf-8")) if args.against else None
    real = args.real.resolve() if args.real.is_dir() else None
    if real is None:
        say(f"cases of a pretrained model are left out: there is no {args.real}")
    start = time.monotonic()
    say(f"rgtg of {Path(rgtg.__file__).parent}")
    cases = run(args.only, args.processes, real)
    say(f"{len(cases)} cases, {time.monotonic() - start:.0f} s")
    if args.output:
        write(args.output, cases)
    else:
        sys.exit(compare(before, cases, args.only, args.tolerance, real) > 0)


if __name__ == "__main__":
    main()
