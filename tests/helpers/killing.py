"""Run the command line in processes of their own that can be killed, without paying for the imports each time."""

import multiprocessing
import os
import signal
import sys
import time

_LIBRARIES = ("torch", "transformers", "rgtg.cli.main", "rgtg.batch.run", "rgtg.decoding.guided_policy",
              "transformers.models.llama.modeling_llama")  # fmt: skip


def in_process(*arguments):
    """A started process that runs ``rgtg ARGUMENTS…``; it is forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LIBRARIES))
    process = context.Process(target=_run, args=([str(argument) for argument in arguments],), daemon=True)
    process.start()
    return process


def _run(arguments):
    import torch

    from rgtg.cli.main import app

    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.argv = ["rgtg", *arguments]
    app(arguments)


def finish(process, seconds=120):
    """Exit code of a process that ends by itself."""
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def kill(process, after, sign=signal.SIGKILL):
    """Kill it after some seconds, unless it has ended; its exit code, negative for a signal."""
    process.join(after)
    if process.exitcode is None:
        os.kill(process.pid, sign)
    return finish(process)


def wait_until(condition, process, seconds=60):
    """Wait for something that a process does."""
    end = time.monotonic() + seconds
    while not condition() and process.exitcode is None:
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)
