"""``python -m rgtg``, in this process: its imports are paid for once."""

import io
import runpy
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout


def rgtg(*arguments, code=0):
    """What the command prints.

    Raises:
        RuntimeError: it ends with another exit code.
    """
    out, err = io.StringIO(), io.StringIO()
    before, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["rgtg", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_module("rgtg", run_name="__main__")
        found = 0
    except SystemExit as ended:
        found = ended.code or 0
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
    if found != code:
        raise RuntimeError(f"rgtg {' '.join(map(str, arguments))} ended with {found}: {err.getvalue()[-500:]}")
    return out.getvalue()
