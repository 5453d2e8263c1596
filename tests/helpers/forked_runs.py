"""Training runs as processes of their own that can be killed, without an interpreter's start for each.

As a script: one process has imported everything; for each line of settings on stdin it forks one that trains.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class ForkedRuns:
    """Starts runs one at a time, and ends them with SIGKILL or SIGTERM."""

    def __enter__(self):
        paths = [*sys.path, str(Path(__file__).parents[1])]
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait(timeout=60)

    def run(self, settings, *, after=None, number=signal.SIGKILL):
        """Train; ``after`` seconds send a signal. Returns the exit code (negative: of a signal) and the seconds."""
        self.server.stdin.write(settings.model_dump_json() + "\n")
        self.server.stdin.flush()
        process, start = int(self.server.stdout.readline()), time.perf_counter()
        if after is not None:
            time.sleep(after)
            os.kill(process, number)  # a process that has ended stays until it is waited for, on the next line
        self.server.stdin.write("wait\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline()), time.perf_counter() - start


def serve():
    import peft  # noqa: F401  # all that a run would import, before the first fork
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

    from rgtg.cli.common import hush_libraries
    from rgtg.config import TrainSettings
    from rgtg.errors import RgtgError
    from rgtg.training import train_head  # noqa: F401
    from rgtg.training.train import train_scorer

    torch.set_num_threads(1)
    hush_libraries()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        if not (process := os.fork()):
            try:
                train_scorer(TrainSettings.model_validate(json.loads(line)))
            except RgtgError as error:
                sys.stderr.write(f"{error}\n")
                os._exit(error.exit_code)
            os._exit(0)
        sys.stdout.write(f"{process}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
