"""Which files and functions of rgtg a piece of work passes through, in all threads."""

import argparse
import os
import sys
import tempfile
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import transformers

import rgtg
from goldens import models

_ROOT = str(Path(rgtg.__file__).parent) + os.sep


class Trace:
    """Counts calls while it is entered: of the thread that makes it, and of those that start later.

    Attributes:
        files: of rgtg, and how many calls each had.
        functions: (file, qualified name).
    """

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.functions: set[tuple[str, str]] = set()
        self._on = False
        threading.setprofile(self._watch)
        sys.setprofile(self._watch)

    def _watch(self, frame, event, _):
        name = frame.f_code.co_filename
        if self._on and event == "call" and name.startswith(_ROOT):
            place = name[len(_ROOT) :]
            self.files[place] = self.files.get(place, 0) + 1
            self.functions.add((place, frame.f_code.co_qualname))

    def __enter__(self):
        self.files.clear()
        self.functions.clear()
        self._on = True
        return self

    def __exit__(self, *_):
        self._on = False

    def counts(self, what):
        return f"{what}: {len(self.files)} files, {len(self.functions)} functions"

    def report(self, what, allowed):
        """Print every file with its calls, then the counts; exit code 1 beyond the files that are allowed."""
        print("\n".join(f"{calls:6} {place}" for place, calls in sorted(self.files.items())))
        print(self.counts(what), flush=True)
        sys.exit(allowed is not None and len(self.files) > allowed)


def arguments(description):
    """Of a script that traces."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("allowed", type=int, nargs="?", help="files; exit code 1 where there are more")
    return parser.parse_args()


@contextmanager
def tiny_models():
    """A folder with a policy, a reward model beside it, and pairs; it is the working directory meanwhile."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="rgtg-trace-") as made:
        os.chdir(made)
        for name, model in (("policy", models.policy()), ("scorer", models.reward_model())):
            model.save_pretrained(name)
            models.by_characters().save_pretrained(name)
        models.write_rows("pairs.jsonl", models.pairs()[:8])
        try:
            yield
        finally:
            os.chdir(before)
