"""Workers of a Ray pool that record their batches, or fail.

Only one of them loads models, and this file does not import rgtg at the top, so that they start quickly.
"""

import json
import os
import signal
import time
from pathlib import Path


def note(settings, name, what):
    with Path(settings.output).with_suffix(f".{name}").open("a") as file:
        file.write(json.dumps(what) + "\n")


def notes(output, name):
    path = output.with_suffix(f".{name}")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Fake:
    """Record batches and complete nothing; ``settings.policy`` is its version of rgtg."""

    def __init__(self, settings):
        self.settings = settings

    def begin(self):
        return self.settings.policy, f"process {os.getpid()}"

    def load(self):
        return {"policy": "p", "scorers": []}

    def complete(self, batch):
        note(self.settings, "given", [task.row.id for task in batch.tasks])
        if any("?" in task.row.prompt for task in batch.tasks):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return [task.index for task in batch.tasks]


class DiesOnLoad(Fake):
    def load(self):
        os.kill(os.getpid(), signal.SIGKILL)


class OtherModels(Fake):
    def load(self):
        return super().load() | {"policy": f"of process {os.getpid()}"}


class Buggy(Fake):
    def complete(self, batch):
        raise KeyError("a fault of the program")


def slow_worker():
    """The real worker, slowed down; it records its process, and each batch when it begins and when it is done."""
    from rgtg.integrations.ray_pool import Worker

    class Slow(Worker):
        def begin(self):
            note(self.settings, "pids", os.getpid())
            return super().begin()

        def complete(self, batch):
            about = [os.getpid(), [task.row.id for task in batch.tasks]]
            note(self.settings, "given", about)
            time.sleep(0.25)
            answer = super().complete(batch)
            note(self.settings, "done", about)
            return answer

    return Slow
