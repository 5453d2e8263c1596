"""What every verb shares: its common options, settings, errors as exit codes, output as tables or JSON."""

import functools
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer
from pydantic import BaseModel

from rgtg.errors import RgtgError, StoppedError
from rgtg.utils.files import atomic_write as atomic_write
from rgtg.utils.files import make_folder as make_folder
from rgtg.utils.files import refuse_overwriting as refuse_overwriting
from rgtg.utils.files import write_text as write_text

P = ParamSpec("P")
R = TypeVar("R")

Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.", rich_help_panel="Common")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting, dotted.", rich_help_panel="Common")
]
AsJson = Annotated[bool, typer.Option("--json", help="Plain JSON on stdout.", rich_help_panel="Common")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.", rich_help_panel="Common")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.", rich_help_panel="Common")]


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors, and outputs that cannot be written, into one readable message and an exit code.

    Anything else keeps its traceback.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # A warning is one line to a person at a terminal, not a source location.
        warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)  # noqa: T201
        try:
            result = function(*args, **kwargs)
            sys.stdout.flush()  # now: when the interpreter ends, a failure would go unnoticed
        except RgtgError as error:
            fail(str(error), error.exit_code)
        except BrokenPipeError as error:  # the reader has seen enough (rgtg … | head)
            _forget_stdout()
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            fail("stopped", 75)
        except Exception as error:
            if (reason := _unwritable(error)) is None:
                raise
            _forget_stdout()
            fail(reason, 1)
        return result

    return run


@contextmanager
def resumable(what: str) -> Iterator[None]:
    """While the block runs, Ctrl-C and SIGTERM end it with exit code 75 and say how to go on.

    Raises:
        StoppedError: it was asked to stop.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt  # no library's "except Exception" catches it

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedError(f"stopped; {what}") from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _unwritable(error: Exception) -> str | None:
    """Why an output could not be written, if that is what the error says; libraries have names of their own for it."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{reason}: {error.filename}" if error.filename else f"cannot write: {reason}"
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "I/O error" in text:
        return f"cannot write the weights: {text.rpartition('I/O error: ')[2]}"
    if isinstance(error, RuntimeError) and ("unexpected pos" in text or "PytorchStreamWriter failed" in text):
        return "cannot write a checkpoint: is the disk full?"
    return None


def _forget_stdout() -> None:
    """Drop what stdout could not take, or the interpreter tries again as it ends and complains once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int) -> NoReturn:
    """Print one message on stderr and leave."""
    sys.stderr.write(f"error: {message}\n")
    raise typer.Exit(code)


def emit(result: Any, *, as_json: bool, quiet: bool, show: Callable[[], None]) -> None:
    """Print a result: JSON where asked for, else what ``show`` draws, else nothing."""
    if as_json:
        sys.stdout.write(_to_json(result) + "\n")
    elif not quiet:
        show()


def hush_libraries(*, forks: bool = True) -> None:
    """Keep the libraries' own progress bars and advice off the terminal; ours say what matters.

    Where nothing ``forks`` the process (to load data), tokenizers may use all cores.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if forks else "true")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def write_json(path: Path, content: "BaseModel | dict[str, Any]") -> None:
    """Write one JSON document, whole or not at all."""
    write_text(path, _to_json(content) + "\n")


def _to_json(content: Any) -> str:
    if isinstance(content, BaseModel):
        return content.model_dump_json(indent=2)
    return json.dumps(content, indent=2, default=str)


def save_settings(output: Path, settings: BaseModel) -> None:
    """Write the resolved settings beside an output: ``FILE.settings.json``, or settings.json in a folder."""
    path = output / "settings.json" if output.is_dir() else output.with_name(output.name + ".settings.json")
    write_json(path, settings)
