"""The ``rgtg`` command, and ``python -m rgtg``."""

import signal
import sys


def main() -> None:
    """Run the command line. SIGTERM and Ctrl-C end it with exit code 75 and one line, even during imports.

    Commands that can be resumed say how (`rgtg.cli.common.resumable`).
    """
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
        from rgtg.cli.main import app
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped\n")
        sys.exit(75)
    app()


if __name__ == "__main__":
    main()
